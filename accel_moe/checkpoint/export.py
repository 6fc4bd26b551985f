"""From a DCP checkpoint to Hub-format safetensors, group by group: the engine of `accel_moe.consolidate`.

    open_checkpoint(folders)            what is there, and whether a manifest vouches for it
    check_checkpoint(checkpoint)        files, sizes, checksums, chunks: before any result counts
    plan_export(checkpoint, base, …)    which parameters become which tensors of which file, from shapes alone
    write_export(plan, out, …)          stream: read a group, convert it, write its tensors where their file
                                        has them
    verify_export(plan, out)            load the result back with transformers and compare with the checkpoint

No process group and no GPU. Memory is that of the largest group (one layer's experts, usually) and its copy,
whatever the model's size: output files are created at their final size with their header, and every tensor
is written at its offset, so groups may come in any order and from several processes. What is done is noted
in a journal in OUT.tmp, so an interrupted export goes on where it stopped. OUT appears by a rename at the
end.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from accel_moe.checkpoint.base_model import BaseModel
from accel_moe.checkpoint.dcp import (
    METADATA_NAME,
    MODEL_FOLDER,
    TensorReader,
    same_layout,
    tensors_of,
    was_written_with_manifest,
)
from accel_moe.checkpoint.folders import refuse_unfinished
from accel_moe.checkpoint.manifest import (
    CheckpointError,
    Manifest,
    check_files,
    fsync_folder,
    known_paths,
    read_manifest,
)
from accel_moe.hub_format import (
    DTYPE_NAMES,
    DTYPES,
    INDEX_NAME,
    SINGLE_NAME,
    ConversionGroup,
    HubConverter,
    HubTensor,
    header_bytes,
    read_header,
    read_hub_tensors,
    shard_names,
)

_JOURNAL = ".accel_moe_journal"
_SYNC_BYTES = 1 << 30  # what an interrupted export may have to write again


# --- the checkpoint
# ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk: one folder, or one per node. `dcp_folder` is the model's folder inside each."""

    roots: tuple[Path, ...]
    dcp_folder: str
    manifest: Manifest | None
    reader: TensorReader

    @property
    def name(self) -> str:
        return str(self.roots[0])


def open_checkpoint(folders: Sequence[str | os.PathLike]) -> Checkpoint:
    """Opens a checkpoint folder, or the folders that several nodes wrote of one checkpoint.

    The model's DCP folder itself is accepted too. Raises CheckpointError: missing, never committed, no model
    in it, folders of different checkpoints, a manifest that was lost.
    """
    roots = []
    dcp_folder = f"{MODEL_FOLDER}_0"
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is not a folder. Give the folder that save_state or Trainer wrote.")
        folder = folder.resolve()
        if folder.name.startswith(MODEL_FOLDER):
            dcp_folder, folder = folder.name, folder.parent
        elif not (folder / dcp_folder).is_dir() and (folder / METADATA_NAME).is_file():
            dcp_folder, folder = folder.name, folder.parent  # a DCP folder under another name
        refuse_unfinished(folder)
        roots.append(folder)
    holders = [root for root in roots if (root / dcp_folder).is_dir()]
    if not holders:
        found = ", ".join(sorted(p.name for p in roots[0].iterdir())[:6]) or "nothing"
        full = "pytorch_model_fsdp.bin" in found or "model.safetensors" in found
        hint = " It was saved with FULL_STATE_DICT: those weights need no consolidating." if full else ""
        raise CheckpointError(
            f"{roots[0]} is not a sharded checkpoint: expected {dcp_folder}/ in it, found {found}.{hint}"
        )
    manifests = [manifest for root in roots if (manifest := read_manifest(root)) is not None]
    if any(manifest != manifests[0] for manifest in manifests[1:]):
        raise CheckpointError(
            f"{', '.join(map(str, roots))} are of different checkpoints (their manifests differ). Give the "
            f"folders that "
            "the nodes wrote in one save."
        )
    manifest = manifests[0] if manifests else None
    reader = TensorReader([root / dcp_folder for root in holders], manifest)
    if manifest is None and was_written_with_manifest(reader.metadata):
        raise CheckpointError(
            f"{roots[0]} was written with a manifest, and it is gone: the copy is incomplete. Copy the "
            f"folder again, all "
            "of its files."
        )
    return Checkpoint(tuple(roots), dcp_folder, manifest, reader)


def check_checkpoint(
    checkpoint: Checkpoint, *, checksums: bool = True, on_bytes: Callable[[int], None] | None = None
) -> list[str]:
    """One line for everything that is wrong with the model's part of a checkpoint. Reads its files once.

    Without a manifest only the chunks and the presence of the files can be checked.
    """
    problems = checkpoint.reader.check() + checkpoint.reader.missing_files()
    manifest = checkpoint.manifest
    if manifest is None:
        return problems
    recorded = manifest.tensors.get(checkpoint.dcp_folder, {})
    stored = tensors_of(checkpoint.reader.metadata)
    for name in sorted(set(recorded) | set(stored)):
        if name not in stored or name not in recorded or not same_layout({name: stored[name]}, {name: recorded[name]}):
            problems.append(
                f"{name} is not what the manifest says: {METADATA_NAME} was changed or belongs to another save"
            )
            break
    for path in model_files(checkpoint):
        root = next((root for root in checkpoint.roots if (root / path).exists()), None)
        if root is None:
            line = checkpoint.reader.reader.missing(Path(path).name)
            if line not in problems:
                problems.append(line)
            continue
        problems += check_files(root, manifest, paths=[path], checksums=checksums, on_bytes=on_bytes)
    return problems


def model_files(checkpoint: Checkpoint) -> dict[str, int]:
    """Path → size of the model's files (not the optimizer's, which an export does not read)."""
    assert checkpoint.manifest is not None
    return {
        path: entry.size_bytes
        for files in checkpoint.manifest.files
        for path, entry in files.items()
        if path.startswith(f"{checkpoint.dcp_folder}/")
    }


# --- the plan
# ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExportPlan:
    """What goes where. `outputs` are the result's tensors by key, `extras` the base keys that no parameter
    becomes.

    `tied` maps a parameter that is left out to the one that it repeats.
    """

    checkpoint: Checkpoint
    base: BaseModel
    converter: HubConverter
    groups: tuple[ConversionGroup, ...]
    outputs: dict[str, HubTensor]
    extras: tuple[str, ...]
    keep_extra: bool
    tied: dict[str, str]
    total_parameters: int

    @property
    def size_bytes(self) -> int:
        return sum(tensor.size_bytes for tensor in self.outputs.values())

    def group_bytes(self, group: ConversionGroup) -> int:
        return sum(self.outputs[key].size_bytes for key in group.targets)

    def files(self) -> dict[str, list[HubTensor]]:
        files: dict[str, list[HubTensor]] = {}
        for tensor in self.outputs.values():
            files.setdefault(tensor.file, []).append(tensor)
        return dict(sorted(files.items()))

    def fingerprint(self) -> str:
        """Equal for two exports whose results would be equal: an interrupted one may only be resumed by such
        a one."""
        manifest = self.checkpoint.manifest
        source = manifest.to_json() if manifest is not None else _stat_of(self.checkpoint)
        target = sorted((t.key, t.dtype, t.shape, t.file) for t in self.outputs.values())
        return hashlib.blake2b(json.dumps([source, target, self.base.name]).encode(), digest_size=16).hexdigest()


def _stat_of(checkpoint: Checkpoint) -> list[Any]:
    """Names, sizes and times of a stock checkpoint's files: what is left to recognise it by."""
    return sorted(
        [str(path), path.stat().st_size, path.stat().st_mtime_ns]
        for root in checkpoint.roots
        for path in (root / checkpoint.dcp_folder).glob("*")
    )


def plan_export(
    checkpoint: Checkpoint,
    base: BaseModel,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int | None = None,
    keep_extra: bool = False,
) -> ExportPlan:
    """Plans the whole export from shapes alone. Raises CheckpointError when the checkpoint is of another
    model.

    `dtype` replaces the base's main floating dtype (the one of most of its bytes); tensors that the base
    keeps in another one, such as fp32 router biases in a bf16 model, stay as they are. `max_shard_bytes`
    replaces the base's file layout.
    """
    model = base.meta_model()
    converter = HubConverter(model, base.tensors)
    total_parameters = model.num_parameters()
    groups = _match_checkpoint(checkpoint, converter, base)
    outputs = {key: base.tensors[key] for group in groups for key in group.targets}
    if keep_extra:
        outputs |= {key: base.tensors[key] for key in converter.base_only}
    if dtype is not None:
        main = _main_dtype(base.tensors.values())
        name = DTYPE_NAMES[dtype]
        extras = set(converter.base_only)
        outputs = {k: replace(t, dtype=name) if t.dtype == main and k not in extras else t for k, t in outputs.items()}
    in_base_order = [key for key in base.tensors if key in outputs]
    if max_shard_bytes is not None:
        files = shard_names([(key, outputs[key].size_bytes) for key in in_base_order], max_shard_bytes)
        outputs = {key: replace(outputs[key], file=files[key]) for key in in_base_order}
    return ExportPlan(
        checkpoint=checkpoint,
        base=base,
        converter=converter,
        groups=tuple(groups),
        outputs={key: outputs[key] for key in in_base_order},
        extras=tuple(converter.base_only),
        keep_extra=keep_extra,
        tied=converter.tied,
        total_parameters=total_parameters,
    )


def _main_dtype(tensors: Iterable[HubTensor]) -> str:
    sizes: dict[str, int] = {}
    for tensor in tensors:
        if DTYPES[tensor.dtype].is_floating_point:
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.size_bytes
    return max(sizes, key=lambda dtype: sizes[dtype]) if sizes else "F32"


def _refuse_adapters(checkpoint: Checkpoint, base: BaseModel) -> None:
    """Raises CheckpointError, with the way to a merged model, for the checkpoint of a PEFT run."""
    adapters = [name for name in checkpoint.reader.tensors if "lora_" in name or name.startswith("base_model.model.")]
    if adapters:
        raise CheckpointError(
            f"{checkpoint.name} is of a PEFT run ({len(adapters)} tensors such as {adapters[0]}), and consolidate does "
            "not merge adapters. After load_state in the training script, gather the adapter on every rank, "
            "{n: t.full_tensor() for n, t in model.state_dict().items() if 'lora_' in n}, and save it on the main "
            "process with accelerator.unwrap_model(model).save_pretrained(ADAPTER, state_dict=...); then merge it "
            f"offline: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base.name!r}), ADAPTER)"
            ".merge_and_unload().save_pretrained(OUT)."
        )


def _match_checkpoint(checkpoint: Checkpoint, converter: HubConverter, base: BaseModel) -> list[ConversionGroup]:
    """The converter's groups with sources that the checkpoint has, tied weights resolved. Raises
    CheckpointError."""
    stored = checkpoint.reader.tensors
    _refuse_adapters(checkpoint, base)
    shapes = {name: tuple(tensor.shape) for name, tensor in converter.model.state_dict().items()}
    aliases = converter.tied_aliases()
    problems = []
    for name in shapes:
        entry = stored.get(name) or stored.get(aliases.get(name, ""))
        if entry is None:
            problems.append(f"{name} is in the base and not in the checkpoint")
        elif entry.shape != shapes[name]:
            problems.append(f"{name} has shape {entry.shape} in the checkpoint, {shapes[name]} in the base")
    problems += [f"{name} is in the checkpoint and not in the base" for name in stored if name not in shapes]
    if problems:
        raise CheckpointError(
            f"{checkpoint.name} is not a checkpoint of {base.name}: {'; '.join(problems[:3])}"
            f"{f' (and {len(problems) - 3} more)' if len(problems) > 3 else ''}. Give the base that "
            f"training started from."
        )
    return converter.groups


def stored_name(reader: TensorReader, name: str, aliases: Mapping[str, str]) -> str:
    """The name that a parameter is stored under; a tied one may have been stored once, under its other name."""
    return name if name in reader.tensors else aliases[name]


# --- writing
# -----------------------------------------------------------------------------------------------------


class _GroupWriter:
    """Converts groups and writes their tensors at their offsets. One per process; files are opened when
    first used."""

    def __init__(self, plan: ExportPlan, folder: Path) -> None:
        self.plan, self.folder = plan, folder
        self._offsets: dict[str, int] = {}
        for tensors in plan.files().values():
            self._offsets |= header_bytes(tensors)[1]
        self._descriptors: dict[str, int] = {}
        self._aliases = plan.converter.tied_aliases()
        self._memory: dict[int, torch.Tensor] = {}

    def write(self, index: int) -> int:
        """Reads, converts and writes group `index`; returns the bytes written. Raises CheckpointError,
        OSError."""
        group = self.plan.groups[index]
        tensors = {name: self._read(slot, name) for slot, name in enumerate(group.sources)}
        converted = self.plan.converter.convert(group, tensors)
        del tensors
        written = 0
        for key in list(converted):
            output = self.plan.outputs[key]
            tensor = converted.pop(key).to(DTYPES[output.dtype]).contiguous()
            assert tuple(tensor.shape) == output.shape, (key, tensor.shape, output.shape)
            self._write_at(output, memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
            written += output.size_bytes
        return written

    def _read(self, slot: int, name: str) -> torch.Tensor:
        """A parameter in this slot's memory, which the next group's parameter in the slot will overwrite."""
        reader = self.plan.checkpoint.reader
        stored = stored_name(reader, name, self._aliases)
        size_bytes = reader.size_bytes(stored)
        if slot not in self._memory or len(self._memory[slot]) < size_bytes:
            self._memory[slot] = torch.empty(size_bytes, dtype=torch.uint8)
        return reader.read(stored, self._memory[slot])

    def write_raw(self, key: str, data: bytes) -> int:
        self._write_at(self.plan.outputs[key], memoryview(data))
        return len(data)

    def _write_at(self, output: HubTensor, data: memoryview) -> None:
        if output.file not in self._descriptors:
            self._descriptors[output.file] = os.open(self.folder / output.file, os.O_RDWR)
        position = self._offsets[output.key]
        while len(data):
            count = os.pwrite(self._descriptors[output.file], data[: 1 << 30], position)
            data, position = data[count:], position + count

    def sync(self) -> None:
        for descriptor in self._descriptors.values():
            os.fsync(descriptor)

    def close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()


_WORKER: _GroupWriter | None = None  # one per worker process, inherited through fork


def _work(index: int) -> tuple[int, int]:
    assert _WORKER is not None
    written = _WORKER.write(index)
    return index, written


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    torch.set_num_threads(1)  # the processes are the parallelism; torch's own threads do not survive a fork


def write_export(
    plan: ExportPlan,
    out: Path,
    *,
    workers: int = 1,
    on_bytes: Callable[[int], None] | None = None,
    on_resume: Callable[[int], None] | None = None,
    before_commit: Callable[[Path], None] | None = None,
    vouched: Future[None] | None = None,
    vouched_by: str = "",
) -> None:
    """Writes the whole result to OUT.tmp and renames it to OUT.

    Args:
        workers: processes that read, convert and write; each needs the memory of one group.
        on_bytes: hears how many bytes were written, group by group.
        on_resume: hears, once, how many bytes an interrupted export of the same plan had left.
        before_commit: called with OUT.tmp when it is complete; what it raises keeps OUT from appearing.
        vouched: a check of the checkpoint that may still be going on. Until it has passed, nothing that is written
            counts as done for a later run, and OUT does not appear. What it raises is raised at the end; if that is a
            CheckpointError, OUT.tmp goes.
        vouched_by: what that check looked at; a later run that looks at something else starts over.

    Raises CheckpointError when OUT exists, or another process writes OUT.tmp; OSError when the disk is full.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} exists and is not empty. Remove it, or give another OUT.")
    staging = out.with_name(out.name + ".tmp")
    staging.mkdir(parents=True, exist_ok=True)
    with _journal(staging, f"{plan.fingerprint()} {vouched_by}") as (done, note):
        _create_files(plan, staging, keep=bool(done))
        if done and on_resume is not None:
            on_resume(sum(plan.group_bytes(plan.groups[i]) for i in done))
        writer = _GroupWriter(plan, staging)
        try:
            todo = [i for i in range(len(plan.groups)) if i not in done]
            _write_groups(plan, writer, todo, workers, note, on_bytes, vouched)
            if plan.keep_extra:
                for key, data in plan.base.read_raw(plan.extras):
                    count = writer.write_raw(key, data)
                    if on_bytes is not None:
                        on_bytes(count)
            for file in plan.files():
                with open(staging / file, "rb") as stream:
                    os.fsync(stream.fileno())
        finally:
            writer.close()
            if vouched is not None and vouched.done() and isinstance(vouched.exception(), CheckpointError):
                shutil.rmtree(staging, ignore_errors=True)
        _write_small_files(plan, staging)
        if before_commit is not None:
            before_commit(staging)
        (staging / _JOURNAL).unlink()
        fsync_folder(staging)
        if out.exists():
            out.rmdir()
        staging.rename(out)
        fsync_folder(out.parent)


def _write_groups(
    plan: ExportPlan,
    writer: _GroupWriter,
    todo: Sequence[int],
    workers: int,
    note: Callable[[Sequence[int]], None],
    on_bytes: Callable[[int], None] | None,
    vouched: Future[None] | None,
) -> None:
    unsynced: list[int] = []
    unsynced_bytes = 0

    def finished(index: int, written: int) -> None:
        nonlocal unsynced_bytes
        unsynced.append(index)
        unsynced_bytes += written
        if on_bytes is not None:
            on_bytes(written)
        if unsynced_bytes >= _SYNC_BYTES:
            flush()

    def flush() -> None:
        nonlocal unsynced_bytes
        if vouched is not None and (not vouched.done() or vouched.exception() is not None):
            return  # what it raises comes at the end
        if unsynced:
            _sync_files(plan, writer.folder)
            note(unsynced)
            unsynced.clear()
            unsynced_bytes = 0

    try:
        if workers <= 1:
            for index in todo:
                finished(index, writer.write(index))
        else:
            # largest first: the last groups to finish are then small, and no worker is left alone with a big one
            order = sorted(todo, key=lambda i: -plan.group_bytes(plan.groups[i]))
            with _worker_pool(writer, workers) as pool:
                for done in as_completed([pool.submit(_work, index) for index in order]):
                    finished(*done.result())
        if vouched is not None:
            vouched.result()
    finally:
        flush()


@contextmanager
def _worker_pool(writer: _GroupWriter, workers: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that inherit the plan by fork: nothing is imported or planned twice. Raises CheckpointError."""
    global _WORKER
    if "fork" not in multiprocessing.get_all_start_methods():
        raise CheckpointError(
            f"--workers {workers} needs a system that can fork, and this one cannot. Use --workers 1."
        )
    _WORKER = writer
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    try:
        yield pool
    except BrokenProcessPool:
        raise CheckpointError(
            "a worker process was killed, most likely for memory: each needs that of the largest group of tensors. Run "
            "the same command with fewer --workers; it goes on where it stopped."
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)
        _WORKER = None


def _sync_files(plan: ExportPlan, folder: Path) -> None:
    for file in plan.files():
        descriptor = os.open(folder / file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def _journal(staging: Path, fingerprint: str) -> Iterator[tuple[set[int], Callable[[Sequence[int]], None]]]:
    """The groups that an earlier export of the same plan finished, and a function that notes more of them.

    The journal is locked, so that two exports into one OUT do not mix. One of another plan is thrown away,
    with all that was written.
    """
    path = staging / _JOURNAL
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    with os.fdopen(descriptor, "r+", encoding="utf-8") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(
                f"{staging} is being written by another process. Wait for it, or give another OUT."
            ) from None
        lines = stream.read().splitlines()
        if not lines or lines[0] != fingerprint:
            for stale in staging.iterdir():
                if stale.name != _JOURNAL:
                    shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
            stream.seek(0)
            stream.truncate()
            stream.write(fingerprint + "\n")
            stream.flush()
            lines = [fingerprint]
        done = {int(word) for line in lines[1:] if line.endswith(".") for word in line[:-1].split()}

        def note(groups: Sequence[int]) -> None:
            stream.seek(0, os.SEEK_END)
            stream.write(" ".join(map(str, groups)) + ".\n")  # the dot says that the line is whole
            stream.flush()
            os.fsync(stream.fileno())

        yield done, note


def _create_files(plan: ExportPlan, folder: Path, keep: bool) -> None:
    """Every safetensors file at its final size, with its header; the data is still a hole."""
    for file, tensors in plan.files().items():
        path = folder / file
        header, _ = header_bytes(tensors)
        size_bytes = len(header) + sum(tensor.size_bytes for tensor in tensors)
        if keep and path.is_file() and path.stat().st_size == size_bytes:
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as stream:
            stream.write(header)
            stream.truncate(size_bytes)


def _write_small_files(plan: ExportPlan, folder: Path) -> None:
    """Config, tokenizer and the like from the base, and an index unless there is just model.safetensors."""
    plan.base.copy_small_files(folder)
    main = _main_dtype(plan.outputs.values())
    if main != _main_dtype(plan.base.tensors.values()):
        _set_config_dtype(folder / "config.json", str(DTYPES[main]).removeprefix("torch."))
    files = plan.files()
    if set(files) != {SINGLE_NAME}:
        index = {
            "metadata": {"total_parameters": plan.total_parameters, "total_size": plan.size_bytes},
            "weight_map": {key: tensor.file for key, tensor in sorted(plan.outputs.items())},
        }
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _set_config_dtype(path: Path, dtype: str) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    for part in [config, *(value for value in config.values() if isinstance(value, dict))]:
        for key in ("dtype", "torch_dtype"):
            if key in part:
                part[key] = dtype
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


# --- verifying
# ---------------------------------------------------------------------------------------------------


def verify_export(plan: ExportPlan, folder: Path, *, on_bytes: Callable[[int], None] | None = None) -> list[str]:
    """Loads the result with transformers' own loading code and compares every parameter with the checkpoint.

    The road is not the one that wrote: headers are loaded into a fresh meta model (no key may be missing,
    unexpected or of another shape), then group by group the tensors are read from the files, converted
    forward as from_pretrained does, and hashed against the checkpoint's tensor in the result's dtype.
    Returns one line for each difference.
    """
    written = read_hub_tensors(folder)
    converter = HubConverter(plan.base.meta_model(), {k: t for k, t in written.items()})
    extras = set(plan.extras) if plan.keep_extra else set()
    problems = [f"{key} is in the plan and not in the result" for key in plan.outputs if key not in written]
    problems += [f"{name} would not be loaded" for name in converter.dry_load.missing]
    problems += list(converter.dry_load.mismatched)
    problems += [f"{key} would be an unexpected key" for key in converter.base_only if key not in extras]
    headers = {file: read_header(folder / file) for file in {tensor.file for tensor in written.values()}}
    aliases = plan.converter.tied_aliases()
    for group in converter.groups:
        hub = {key: _read_tensor(folder, written[key], headers) for key in group.targets}
        loaded = converter.load(group, hub)
        stored_as = next(iter(hub.values())).dtype
        for name, tensor in loaded.items():
            source = plan.checkpoint.reader.read(stored_name(plan.checkpoint.reader, name, aliases))
            expected = source.to(stored_as).to(tensor.dtype)
            if _hash(tensor) != _hash(expected):
                problems.append(f"{name} loads with other values than the checkpoint has ({', '.join(group.targets)})")
        if on_bytes is not None:
            on_bytes(sum(written[key].size_bytes for key in group.targets))
    return problems


def _read_tensor(folder: Path, tensor: HubTensor, headers: Mapping[str, dict]) -> torch.Tensor:
    header = headers[tensor.file]
    begin, end = header[tensor.key]["data_offsets"]
    with open(folder / tensor.file, "rb") as stream:
        stream.seek(header["__data_start__"] + begin)
        data = bytearray(end - begin)
        stream.readinto(data)
    if not data:
        return torch.empty(tensor.shape, dtype=DTYPES[tensor.dtype])
    return torch.frombuffer(data, dtype=DTYPES[tensor.dtype]).reshape(tensor.shape)


def _hash(tensor: torch.Tensor) -> bytes:
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.blake2b(memoryview(data), digest_size=16).digest()


def describe(checkpoint: Checkpoint) -> list[str]:
    """What a checkpoint holds, as lines for a terminal. Reads the manifest and DCP's metadata, no tensor."""
    tensors = checkpoint.reader.tensors
    sizes = {name: _entry_bytes(entry.shape, entry.dtype) for name, entry in tensors.items()}
    dtypes = sorted({entry.dtype for entry in tensors.values()})
    lines = [f"checkpoint   {', '.join(map(str, checkpoint.roots))}"]
    manifest = checkpoint.manifest
    if manifest is None:
        lines.append("manifest     none (stock accelerate wrote it)")
    else:
        versions = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
        lines += [
            f"step         {manifest.step if manifest.step is not None else 'unknown'}",
            f"model        {manifest.model_type or 'unknown'}, base {manifest.base_model or 'unknown'}",
            f"layout       world size {manifest.world_size}: dp_replicate {manifest.dp_replicate}, efsdp "
            f"{manifest.efsdp}, "
            f"ep {manifest.ep}; written by {', '.join(manifest.nodes)}",
            f"versions     {versions}",
            f"files        {len(known_paths(manifest))}, {manifest.size_bytes / 1e9:.3f} GB, checksums "
            f"{manifest.digest_algorithm}",
        ]
    lines.append(
        f"weights      {len(tensors)} tensors, {sum(sizes.values()) / 1e9:.3f} GB, {', '.join(dtypes)}, in "
        f"{len({c.file for e in tensors.values() for c in e.chunks})} file(s)"
    )
    for name in sorted(sizes, key=lambda n: -sizes[n])[:5]:
        entry = tensors[name]
        lines.append(f"  {sizes[name] / 1e6:10.2f} MB  {name} {list(entry.shape)} in {len(entry.chunks)} chunk(s)")
    return lines


def _entry_bytes(shape: Sequence[int], dtype: str) -> int:
    count = 1
    for length in shape:
        count *= length
    return count * getattr(torch, dtype).itemsize
