"""Checkpoints on node-local disks: each node has a folder of its own, and all of them are one checkpoint.

A shared disk is the case of one folder. Otherwise each disk has a leader, the lowest rank that writes to it: it creates
the folder, seals it and commits it. A node can resume from its own disk, so a value that several nodes hold is written
once on each. All disks have sealed before one commits. Killed between two commits, some have the new checkpoint and
some the sealed folder; `recover_everywhere` commits the rest.

Every public function of this file is a collective of all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan

from accel_moe import ranks
from accel_moe.checkpoint import folders, transaction
from accel_moe.checkpoint.advice import run_advised
from accel_moe.checkpoint.dcp_metadata import METADATA_NAME
from accel_moe.checkpoint.manifest import MANIFEST_NAME, Manifest, read_manifest
from accel_moe.errors import CheckpointError


@dataclass(frozen=True)
class Disks:
    """`leaders[r]` is the rank that made the folder which rank r writes to."""

    leaders: tuple[int, ...]

    @property
    def leads(self) -> bool:
        """Whether this rank is the leader of its disk."""
        return self.leaders[ranks.rank()] == ranks.rank()

    @property
    def distinct(self) -> list[int]:
        """The leader of each disk, in order."""
        return sorted(set(self.leaders))

    @property
    def is_one(self) -> bool:
        return len(self.distinct) == 1


def create_on_every_disk(named: Path, final: Path) -> tuple[Disks, Path, int | None]:
    """Creates the folder once on each disk that some rank writes to.

    Returns the disks, the folder to fill, and the lock, which only leaders have. Rank 0 creates it; ranks that do not
    see it write elsewhere, and the lowest of them creates it there; and so on. With a shared disk that is one round. A
    folder that exists is not left: the new files are prepared inside it.
    """
    save_id = ranks.from_rank0(folders.new_save_id())
    leaders: list[int | None] = [None] * ranks.world_size()
    mine, held = final, None
    while None in leaders:
        leader = leaders.index(None)

        def create(leader: int = leader) -> tuple[bool, int | None]:
            if ranks.rank() != leader:
                return False, None
            inside = final.is_dir()
            staging = folders.staging_name(final, save_id, inside=inside)
            lock = folders.create_staging(staging)
            (staging / (named.name or "root")).mkdir()
            return inside, lock

        made = run_advised(final, f"saving {named}", create)
        held = made[1] if made[1] is not None else held
        staging = folders.staging_name(final, save_id, inside=ranks.gather(made[0])[leader])
        sees = ranks.gather(staging.is_dir())
        if sees[ranks.rank()] and leaders[ranks.rank()] is None:
            mine = staging / (named.name or "root")
        leaders = [leader if there and known is None else known for there, known in zip(sees, leaders, strict=True)]
    return Disks(tuple(leader for leader in ranks.from_rank0(leaders) if leader is not None)), mine, held


def metadata_of_other_nodes(disks: Disks, work: Path, node_metadata: dict[str, dict[int, bytes]]) -> Callable[[], None]:
    """The step that puts a `.metadata` into the folders of other nodes: reading needs one, and DCP wrote rank 0's.

    Args:
        work: the folder that is being filled on this rank's disk.
        node_metadata: by DCP folder and leader; rank 0's counts.
    """
    contents = ranks.from_rank0(node_metadata)

    def write() -> None:
        if disks.leads and ranks.rank() != 0:
            for folder, by_leader in contents.items():
                (work / folder).mkdir(exist_ok=True)
                (work / folder / METADATA_NAME).write_bytes(by_leader[ranks.rank()])

    return write


class NodePlanner(DefaultSavePlanner):
    """DCP's planner, for nodes with disks of their own: what several ranks hold is written once on each node.

    DCP writes a replicated value (the optimizer's step counts, HSDP's second copy) on one rank of the world, and a
    node without that rank could not resume from its own disk. Ranks of one node have one number in `leaders`.
    """

    def __init__(self, leaders: Sequence[int]) -> None:
        super().__init__()
        self._leaders = leaders

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        plans, metadata = super().create_global_plan(all_plans)
        self.global_plan = _with_node_copies(all_plans, plans, self._leaders)
        return self.global_plan, metadata


def _with_node_copies(wanted: Sequence[SavePlan], plans: Sequence[SavePlan], leaders: Sequence[int]) -> list[SavePlan]:
    """`plans` (deduplicated over the world) and, per node, what its ranks `wanted` and none of them kept."""
    items = [list(plan.items) for plan in plans]
    for leader in set(leaders):
        members = [r for r, other in enumerate(leaders) if other == leader]
        kept = {item.index for r in members for item in items[r]}
        for r in members:
            for item in wanted[r].items:
                if item.index not in kept:
                    items[r].append(item)
                    kept.add(item.index)
    return [replace(plan, items=own) for plan, own in zip(plans, items)]


def recover_everywhere(final: Path | None, parent: Path | None = None) -> None:
    """Finishes on every disk what a kill cut short, so that all nodes have one generation.

    It looks at one checkpoint, or at all those of `parent`, or at both; paths are this rank's own. A node whose
    folder was sealed, and not committed, is brought to what the others committed. Nothing is removed: call it before
    any cleaning. Raises CheckpointError on every rank.
    """
    where = str(final or parent)
    actors = _actors(where)

    def act() -> dict[str, dict[str, Path]]:
        if actors[ranks.rank()] != ranks.rank():
            return {}
        if parent is not None:
            transaction.recover_beside(parent)
        if final is not None:
            transaction.recover(final)
        return _sealed(final, parent)

    mine = ranks.run_or_raise_everywhere(f"recovering {where}", act)
    sealed = ranks.gather({name: sorted(by_generation) for name, by_generation in mine.items()})
    names = sorted({name for some in sealed for name in some})
    if not names:
        return

    def place(name: str) -> Path | None:
        return final if name == "" else parent / name if parent is not None else None

    def look() -> dict[str, str | None]:
        return {name: _generation(path) for name in names if (path := place(name)) is not None}

    committed = ranks.gather(ranks.run_or_raise_everywhere(f"recovering {where}", look))

    def finish() -> None:
        for name, roots in mine.items():
            states = [(committed[a].get(name), sealed[a].get(name, [])) for a in actors]
            chosen = {c for c, _ in states if c is not None and all(c == other or c in s for other, s in states)}
            for generation in chosen & set(roots):
                path = place(name)
                if path is not None and committed[ranks.rank()].get(name) != generation:
                    _commit_sealed(roots[generation], path)

    ranks.run_or_raise_everywhere(f"recovering {where}", finish)


def acts_for(folder: Path) -> bool:
    """Whether this rank works for those of its host that have the same folder."""
    return _actors(str(folder))[ranks.rank()] == ranks.rank()


def _actors(folder: str) -> list[int]:
    """By rank: the first rank of its host that has the same folder."""
    everyone = ranks.gather((ranks.host(), folder))
    return [everyone.index(key) for key in everyone]


def shares_of(folder: Path, manifest: Manifest | None) -> tuple[int, int]:
    """(this rank's share, number of shares) among the ranks that see the same folder."""
    stat = folder.stat()
    identity = (ranks.host(), stat.st_dev, stat.st_ino)
    if len({node for node in ranks.gather(None if manifest is None else manifest.node)}) == 1:
        identity = (str(folder), 0, 0)  # one folder on a shared disk, whose device number may differ between hosts
    everyone = ranks.gather(identity)
    sharing = [r for r, other in enumerate(everyone) if other == everyone[ranks.rank()]]
    return sharing.index(ranks.rank()), len(sharing)


def _sealed(final: Path | None, parent: Path | None) -> dict[str, dict[str, Path]]:
    """{name: {generation: folder}} of the folders that are sealed, not committed and nobody's. "" is `final`."""
    found: dict[str, dict[str, Path]] = {}
    seen = folders.leftovers(parent, final) if parent is not None else []
    if final is not None and parent is None:
        seen = [p for p in folders.unfinished(final.parent) if folders.unfinished_name(p) == final.name]
        seen += folders.unfinished(final)
    for staging in seen:
        if folders.kind_of(staging) != "tmp" or folders.is_journaled(staging):
            continue
        beside = staging.parent == (parent if parent is not None else final.parent if final is not None else None)
        path = staging.with_name(str(folders.unfinished_name(staging))) if beside else staging.parent
        for manifest in staging.glob(f"*/{MANIFEST_NAME}"):
            with folders.claimed(staging) as abandoned:
                generation = _generation(manifest.parent) if abandoned else None
            if generation is not None:
                found.setdefault("" if path == final else path.name, {})[generation] = manifest.parent
    return found


def _generation(folder: Path) -> str | None:
    """Which save wrote a folder, the same on every node; None where no manifest says so."""
    try:
        manifest = read_manifest(folder)
    except CheckpointError:
        return None
    return None if manifest is None else manifest.identity()


def _commit_sealed(work: Path, final: Path) -> None:
    staging = work.parent
    with folders.claimed(staging) as abandoned:
        if not abandoned:
            return
        work = transaction.commit(transaction.prepare(work, final), final)
    transaction.move_into_place(work, final, staging)
