"""The writing of an export: a stream of groups, each read, converted, and written where its file has it.

Memory is that of the largest group (one layer's experts, usually) and its copy, whatever the model's size.

Output files are created at their final size with their header, and every tensor is written at its offset, so groups may
come in any order and from several processes. A journal in OUT.tmp notes the finished groups, so an interrupted export
goes on where it stopped. export_out.py makes OUT appear at the end.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path

import torch

from accel_moe.checkpoint.durable import fsync, fsync_path, lock
from accel_moe.checkpoint.export_out import JOURNAL, Output, appear, place_of, put_back
from accel_moe.checkpoint.export_plan import ExportPlan, main_dtype, stored_name
from accel_moe.errors import CheckpointError
from accel_moe.weights.safetensors import DTYPES, INDEX_NAME, SINGLE_NAME, HubTensor, header_bytes

_SYNC_BYTES = 1 << 30  # what an interrupted export may have to write again


class _GroupWriter:
    """Converts groups and writes their tensors at their offsets. One per process. Opens a file at its first use."""

    def __init__(self, plan: ExportPlan, folder: Path) -> None:
        self.plan, self.folder = plan, folder
        self._offsets: dict[str, int] = {}
        for tensors in plan.files().values():
            self._offsets |= header_bytes(tensors)[1]
        self._descriptors: dict[str, int] = {}
        self._memory: dict[int, torch.Tensor] = {}

    def write(self, index: int) -> int:
        """Reads, converts and writes group `index`; returns the bytes written. Raises CheckpointError, OSError."""
        group = self.plan.groups[index]
        tensors = {name: self._read(slot, name) for slot, name in enumerate(group.sources)}
        converted = self.plan.converter.convert(group, tensors)
        del tensors
        written = 0
        for key in list(converted):
            output = self.plan.outputs[key]
            tensor = converted.pop(key).to(output.torch_dtype).contiguous()
            assert tuple(tensor.shape) == output.shape, (key, tensor.shape, output.shape)
            self._write_at(output, memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
            written += output.size_bytes
        return written

    def _read(self, slot: int, name: str) -> torch.Tensor:
        """A parameter in this slot's memory, which the next group's parameter in the slot will overwrite."""
        reader = self.plan.checkpoint.reader
        stored = stored_name(self.plan, name)
        size_bytes = reader.size_bytes(stored)
        if slot not in self._memory or len(self._memory[slot]) < size_bytes:
            self._memory[slot] = torch.empty(size_bytes, dtype=torch.uint8)
        return reader.read(stored, self._memory[slot])

    def write_raw(self, key: str, data: memoryview) -> int:
        self._write_at(self.plan.outputs[key], data)
        return len(data)

    def _write_at(self, output: HubTensor, data: memoryview) -> None:
        if output.file not in self._descriptors:
            self._descriptors[output.file] = os.open(self.folder / output.file, os.O_RDWR)
        position = self._offsets[output.key]
        while len(data):
            count = os.pwrite(self._descriptors[output.file], data[: 1 << 30], position)
            data, position = data[count:], position + count

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
    on_bytes: Callable[[int], None] = lambda _: None,
    on_resume: Callable[[int], None] = lambda _: None,
    before_commit: Callable[[Path], None] = lambda _: None,
    verified_by: str = "",
) -> None:
    """Writes the whole result to OUT.tmp, or a folder in an OUT that exists, and makes it OUT.

    Args:
        workers: processes that read, convert and write; each needs the memory of one group.
        on_bytes: hears how many bytes were written, group by group.
        on_resume: hears, once, how many bytes an interrupted export of the same plan had left.
        before_commit: called with OUT.tmp when it is complete; what it raises keeps OUT from appearing.
        verified_by: the kind of check that the checkpoint passed; a later run after another kind starts over.

    Raises CheckpointError when OUT exists, or another process writes OUT.tmp; OSError when the disk is full.
    """
    place = place_of(out)
    staging = place.staging
    staging.mkdir(parents=True, exist_ok=True)
    with journal(place, f"{plan.fingerprint()} {verified_by}") as (done, note):
        _create_files(plan, staging, keep=bool(done))
        if done:
            on_resume(sum(plan.group_bytes(plan.groups[i]) for i in done))
        writer = _GroupWriter(plan, staging)
        try:
            todo = [i for i in range(len(plan.groups)) if i not in done]
            _write_groups(writer, todo, workers, note, on_bytes)
            if plan.keep_extra:
                for key, data in plan.base.read_raw(plan.extras):
                    on_bytes(writer.write_raw(key, data))
            _sync_files(plan, staging)
        finally:
            writer.close()
        _write_small_files(plan, staging)
        before_commit(staging)
        appear(place)


def _write_groups(
    writer: _GroupWriter,
    todo: Sequence[int],
    workers: int,
    note: Callable[[Sequence[int]], None],
    on_bytes: Callable[[int], None],
) -> None:
    """Writes the groups; notes those that are durable, also when it is stopped."""
    unsynced: dict[int, int] = {}  # group -> bytes

    def sync() -> None:
        if unsynced:
            _sync_files(writer.plan, writer.folder)
            note(list(unsynced))
            unsynced.clear()

    try:
        for index, written in _written_groups(writer, todo, workers):
            unsynced[index] = written
            on_bytes(written)
            if sum(unsynced.values()) >= _SYNC_BYTES:
                sync()
    finally:
        sync()


def _written_groups(writer: _GroupWriter, todo: Sequence[int], workers: int) -> Iterator[tuple[int, int]]:
    """(group, bytes written), as soon as each is written."""
    if workers <= 1:
        yield from ((index, writer.write(index)) for index in todo)
        return
    # largest first: the last groups to finish are then small, and no worker is left alone with a big one
    order = sorted(todo, key=lambda i: -writer.plan.group_bytes(writer.plan.groups[i]))
    with _worker_pool(writer, workers) as pool:
        for done in as_completed([pool.submit(_work, index) for index in order]):
            yield done.result()


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
        fsync_path(folder / file)


@contextmanager
def journal(place: Output, fingerprint: str) -> Iterator[tuple[set[int], Callable[[Sequence[int]], None]]]:
    """The groups that an earlier export of the same plan finished, and a function that notes more of them.

    The journal is locked, so that two exports into one OUT do not mix. A journal of another plan is thrown away, with
    all that was written.
    """
    staging = place.staging
    descriptor = os.open(staging / JOURNAL, os.O_RDWR | os.O_CREAT, 0o644)
    with os.fdopen(descriptor, "r+", encoding="utf-8") as stream:
        if lock(stream.fileno()) is False:
            raise CheckpointError(f"{staging} is being written by another process. Wait for it, or give another OUT.")
        put_back(place)
        lines = stream.read().splitlines()
        if not lines or lines[0] != fingerprint:
            for stale in staging.iterdir():
                if stale.name != JOURNAL:
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
            fsync(stream.fileno())

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
    """Copies config, tokenizer and the like from the base; writes an index unless there is just model.safetensors."""
    plan.base.copy_small_files(folder)
    _write_config(plan, folder / "config.json")
    files = plan.files()
    if set(files) != {SINGLE_NAME}:
        index = {
            "metadata": {"total_parameters": plan.total_parameters, "total_size": plan.size_bytes},
            "weight_map": {key: tensor.file for key, tensor in sorted(plan.outputs.items())},
        }
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_config(plan: ExportPlan, path: Path) -> None:
    """Changes the base's config, which was copied, if the result has another dtype or unties tensors."""
    main = main_dtype(plan.outputs.values())
    if plan.config is None and main == main_dtype(plan.base.tensors.values()):
        return
    config = plan.config if plan.config is not None else json.loads(path.read_text(encoding="utf-8"))
    if main != main_dtype(plan.base.tensors.values()):
        for part in [config, *(value for value in config.values() if isinstance(value, dict))]:
            for key in ("dtype", "torch_dtype"):
                if key in part:
                    part[key] = str(DTYPES[main]).removeprefix("torch.")
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
