"""The proof of an export: the result, loaded by transformers' own code, is what the checkpoint holds."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch

from accel_moe.checkpoint.export_plan import ExportPlan, stored_name
from accel_moe.weights.hub_config import meta_model
from accel_moe.weights.safetensors import Reader, read_hub_tensors
from accel_moe.weights.transforms import HubConverter


def verify_export(plan: ExportPlan, folder: Path, *, on_bytes: Callable[[int], None] | None = None) -> list[str]:
    """Loads the result with transformers' own loading code and compares every tensor of the checkpoint with it.

    Nothing of the writing is used again. The result's own config makes a fresh meta model, and headers are loaded into
    it: no key may be missing, unexpected or of another shape. Then group by group the tensors are read from the files,
    converted forward as from_pretrained does, and hashed against the checkpoint's tensor in the result's dtype. A
    tensor of the checkpoint that nothing in the result was compared with is a difference, too.

    Returns one line for each difference.
    """
    written = read_hub_tensors(folder)
    model = meta_model(folder, trust_remote_code=plan.base.trust_remote_code)
    converter = HubConverter(model, written)
    extras = set(plan.extras) if plan.keep_extra else set()
    problems = [f"{key} is in the plan and not in the result" for key in plan.outputs if key not in written]
    problems += [f"{name} would not be loaded" for name in converter.dry_load.missing]
    problems += list(converter.dry_load.mismatched)
    problems += [f"{key} would be an unexpected key" for key in converter.base_only if key not in extras]
    reader = plan.checkpoint.reader
    tied_in_result = converter.tied_aliases()
    compared: set[str] = set()
    with Reader(folder=folder) as files:
        for group in converter.groups:
            hub = {key: files.tensor(written[key]) for key in group.targets}
            loaded = converter.load(group, hub)
            stored_as = next(iter(hub.values())).dtype
            for name, tensor in loaded.items():
                names = [n for n in (name, *tied_in_result.get(name, ())) if n in reader.tensors]
                for stored in names or [stored_name(plan, name)]:
                    compared.add(stored)
                    if _hash(tensor) != _hash(reader.read(stored).to(stored_as).to(tensor.dtype)):
                        keys = ", ".join(group.targets)
                        problems.append(f"{name} loads with other values than the checkpoint has of {stored} ({keys})")
            if on_bytes is not None:
                on_bytes(sum(written[key].size_bytes for key in group.targets))
    left_out = [name for name in reader.tensors if name not in compared]
    return problems + [f"{name} is in the checkpoint and not in the result" for name in left_out]


def _hash(tensor: torch.Tensor) -> bytes:
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.blake2b(memoryview(data), digest_size=16).digest()
