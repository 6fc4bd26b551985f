"""The kill loop's runs on ranks: saves whose every number is the step, killed before an event on the disk."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

from accel_moe.checkpoint import background, resume, transaction
from tests import kills
from tests.distributed import fault_runs
from tests.distributed.checkpoint_runs import install, set_up, train
from tests.distributed.parity import Case

ALONE = Case(1, 1)
OLD, NEW, NEXT = 1, 2, 3


class StateJob:
    """Accelerator.save_state and load_state: onto one name, or numbered with two kept."""

    def __init__(self, root: Path, case: Case, background: bool, one_name: bool, keep: int = 1):
        self.root, self.one_name, self.keep = root, one_name, keep
        self.accelerator, self.model, self.optimizer = set_up(case, moe_async_save=background)
        train(self.accelerator, self.model, self.optimizer, 0, 1)

    def use(self, folder: Path) -> None:
        self.folder = folder
        project = self.accelerator.project_configuration
        project.project_dir, project.total_limit = str(folder), self.keep
        project.automatic_checkpoint_naming = not self.one_name

    @property
    def target(self) -> str | None:
        return str(self.folder / "c") if self.one_name else None

    def save(self, step: int) -> None:
        fault_runs.set_step(self.model, self.optimizer, step)
        self.accelerator.project_configuration.iteration = step
        self.accelerator.save_state(self.target)
        background.wait_for_background()

    def load(self) -> int:
        fault_runs.set_step(self.model, self.optimizer, -1)
        self.accelerator.load_state(self.target)
        return fault_runs.step_of(self.model, self.optimizer)

    def expected_names(self, step: int) -> list[str]:
        return ["c"] if self.one_name else ["checkpoints", f"checkpoints/checkpoint_{step}"]


class TrainerJob:
    """Trainer's save and resume: every step has its checkpoint-<step>, or all runs write checkpoint-1."""

    def __init__(self, root: Path, case: Case, background: bool, one_name: bool, keep: int = 1):
        from tests.distributed.trainer_checkpoints import trainer_of

        self.one_name, self.keep = one_name, keep
        self.trainer = trainer_of(case, str(root / "unused"), {}, save_strategy="no", max_steps=1)
        self.trainer.train()
        if case.world == 1:
            self.trainer.store_flos = lambda: None  # an all_gather, for which a forked child has no gloo threads
        install()
        self.trainer.model._accel_moe.config.__dict__["moe_async_save"] = background
        self.model, self.optimizer = self.trainer.model_wrapped, self.trainer.optimizer

    def use(self, folder: Path) -> None:
        self.folder = folder
        self.trainer.args.output_dir, self.trainer.args.save_total_limit = str(folder), self.keep

    def save(self, step: int) -> None:
        fault_runs.set_step(self.model, self.optimizer, step)
        self.trainer.state.global_step = 1 if self.one_name else step
        self.trainer.state.epoch = float(step)
        self.trainer._save_checkpoint(self.model, None)
        background.wait_for_background()

    def load(self) -> int:
        import transformers.trainer

        fault_runs.set_step(self.model, self.optimizer, -1)
        assert resume.all_resume_newest(True, self.folder)
        folder = transformers.trainer.get_last_checkpoint(str(self.folder))
        self.trainer._load_from_checkpoint(folder, self.model)
        self.trainer._load_optimizer_and_scheduler(folder)
        step = fault_runs.step_of(self.model, self.optimizer)
        assert json.loads(Path(folder, "trainer_state.json").read_text())["epoch"] == step, "a mixture"
        return step

    def expected_names(self, step: int) -> list[str]:
        return ["checkpoint-1" if self.one_name else f"checkpoint-{step}"]


JOBS = {"state": StateJob, "trainer": TrainerJob}


def folders_in(root: Path) -> list[str]:
    """Folders that are no part of a checkpoint, and files of bookkeeping."""
    found = []
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        inside = any(path.parent.name.startswith(p) for p in ("pytorch_model", "optimizer"))
        if path.name.startswith((".accel_moe", "commit.json")) or (
            path.is_dir() and not path.name.startswith(("pytorch_model", "optimizer")) and not inside
        ):
            found.append(name)
    return found


def kill_before_each_event(root: str, kind: str, background: bool, one_name: bool, first: int, stride: int) -> dict:
    """One process: step 1 is saved; the save of step 2 is killed before an event; then step 1 or 2 must load at once,
    by value, and after the save of step 3 nothing else is left. How often each was loaded, and the events of a save."""
    job = JOBS[kind](Path(root), ALONE, background, one_name)
    start, folder = Path(root) / "start", Path(root) / "run"
    start.mkdir()
    job.use(start)
    job.save(OLD)
    (start / ("c" if one_name and kind == "state" else "")).joinpath("foreign.txt").write_text("mine")
    seen = {"events": 0, OLD: 0, NEW: 0}

    def fresh() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(start, folder)
        job.use(folder)

    fresh()
    for event in kills.every_event(lambda: job.save(NEW), first, stride):
        loaded = job.load()
        assert loaded in (OLD, NEW), f"killed before event {event}, {loaded} was loaded"
        seen[loaded] += 1
        job.save(NEXT)
        assert job.load() == NEXT
        left = folders_in(folder)
        assert left == job.expected_names(NEXT), f"killed before event {event}, left over: {left}"
        assert len(list(folder.rglob("foreign.txt"))) == 1
        fresh()
        seen["events"] = event
    return seen


def save_and_die(root: str, kind: str, background: bool, one_name: bool, who: list[int], event: int) -> None:
    """Two ranks: step 2 is saved over step 1, and the ranks `who` are killed before their event."""
    job = JOBS[kind](Path(root), Case(2, 2), background, one_name)
    folder = Path(root) / "run"
    job.use(folder)
    if not folder.exists():
        job.save(OLD)
    loaded = job.load()
    (Path(root) / f"loaded-{loaded}-{os.environ['RANK']}").touch()
    if int(os.environ["RANK"]) in who:
        kills.die_before(event)
    job.save(NEW)
    kills.stop_counting()


def load_and_go_on(root: str, kind: str, one_name: bool) -> tuple[int, list[str], list[str]]:
    job = JOBS[kind](Path(root), Case(2, 2), False, one_name)
    folder = Path(root) / "run"
    job.use(folder)
    loaded = job.load()
    job.save(NEXT)
    assert job.load() == NEXT
    return loaded, folders_in(folder), job.expected_names(NEXT)


# --- nodes -------------------------------------------------------------------------------------------------------


def node_job(root: str, one_name: bool) -> StateJob:
    """Each rank is a node with a disk of its own."""
    from accelerate import PartialState

    job = StateJob(Path(root), Case(2, 2), False, one_name)
    job.accelerator.project_configuration.save_on_each_node = True
    os.environ["LOCAL_RANK"] = "0"
    PartialState._shared_state["local_process_index"] = 0
    folder = Path(root) / f"node{os.environ['RANK']}"
    folder.mkdir(exist_ok=True)
    job.use(folder)
    return job


def kill_between_two_nodes_commits(root: str, one_name: bool) -> None:
    """Step 1 is saved by both; of step 2 node 0 commits, and node 1 dies as it is about to."""
    job = node_job(root, one_name)
    job.save(OLD)
    if os.environ["RANK"] == "1":

        def die(work, final):
            while not Path(root, "node0", "committed.mark").exists():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)

        transaction.commit = die
    else:
        commit = transaction.commit

        def mark(work, final):
            work = commit(work, final)
            Path(root, "node0", "committed.mark").touch()
            return work

        transaction.commit = mark
    job.save(NEW)


def load_on_nodes(root: str, one_name: bool) -> tuple[int, list[str]]:
    job = node_job(root, one_name)
    loaded = job.load()
    job.save(NEXT)
    assert job.load() == NEXT
    return loaded, folders_in(job.folder)


# --- where a save may go -----------------------------------------------------------------------------------------


def save_load(case: Case, targets: list[str], options: dict, cwd: str | None = None) -> list[tuple[str, int]]:
    """Saves step 1, 2, ... to each target in turn and loads it again: (error, step)."""
    if cwd is not None:
        os.chdir(cwd)
    accelerator, model, optimizer = fault_runs.ready(options)
    results = []
    for step, target in enumerate(targets, 1):
        fault_runs.set_step(model, optimizer, step)
        try:
            accelerator.save_state(target)
            background.wait_for_background()
            fault_runs.set_step(model, optimizer, -1)
            accelerator.load_state(target)
            results.append(("", fault_runs.step_of(model, optimizer)))
        except Exception as error:
            results.append((f"{type(error).__name__}: {error}", -1))
    return results


def save_on_an_odd_file_system(target: str) -> list[str]:
    """fsync of folders and flock refused, as some NFS, CIFS and FUSE do; what was told."""
    import errno
    import fcntl
    import stat
    import warnings

    real = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(descriptor)

    def flock(*args):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    os.fsync, fcntl.flock = fsync, flock
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        results = save_load(Case(2, 2), [target, target], {})
    assert results == [("", 1), ("", 2)], results
    return [str(w.message) for w in caught if "file system refuses" in str(w.message)]


def advised_number(folder: str) -> tuple[str, list[str]]:
    """A second run in a folder of numbered checkpoints: what save_state says, and what its advice does."""
    import re

    accelerator, _, _ = fault_runs.ready({}, folder)
    for _ in range(2):
        accelerator.save_state()
    project = accelerator.project_configuration
    project.iteration = 0  # a fresh run
    try:
        accelerator.save_state()
        said = "nothing"
    except ValueError as error:
        said = str(error)
        exec(re.search(r"(accelerator\.project_configuration\.iteration = \d+)", said)[1], {"accelerator": accelerator})
        accelerator.save_state()
    return said, sorted(os.listdir(Path(folder) / "checkpoints"))
