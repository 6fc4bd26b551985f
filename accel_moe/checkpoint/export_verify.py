"""The proof of an export: the result, loaded by transformers' own code, is what the checkpoint holds."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from accel_moe.checkpoint.export_plan import ExportPlan, stored_name
from accel_moe.hub_format import DTYPES, HubConverter, HubTensor, read_header, read_hub_tensors


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
