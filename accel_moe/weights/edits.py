"""Edits of a model between accel_moe.from_pretrained and accelerator.prepare: kept, or refused by name.

    a tensor stands for a weight of the files, wherever it is now       its values are read (`origins`)
    it has its own values: a new head, load_state_dict(assign=True)     it keeps them
    it is on meta, and neither                                          refused: nobody knows its values

All ranks must have made the same edits; `check_ranks` compares them before anything is sharded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

from accel_moe import ranks
from accel_moe.weights.deferred_tensors import Origin, is_deferred, origin_of

MEND = (
    "Load with transformers' from_pretrained, change the model, and pass it to accel_moe.prepare(model); or give it "
    "values of its own, on the CPU: module.weight = torch.nn.Parameter(tensor), load_state_dict(..., assign=True)."
)


def origins(
    name: str, tensors: Mapping[str, torch.Tensor], planned: Mapping[str, tuple[int, ...]]
) -> dict[str, Origin]:
    """Name in the model → the weight of the files that a tensor on meta stands for. Pure.

    Args:
        name: the checkpoint's.
        tensors: the model's parameters and buffers.
        planned: the shape of each weight that the files have.

    Raises:
        ValueError: tensors are on meta, and their values are not in the files.
    """
    found: dict[str, Origin] = {}
    refused: dict[str, str] = {}
    for key, tensor in tensors.items():
        if not tensor.is_meta:
            continue
        if (origin := origin_of(tensor)) is not None:
            found[key] = origin
        else:
            refused[key] = _why(name, key, tensor, planned)
    if refused:
        first, *others = refused
        more = f" The same for {', '.join(others[:3])}{', ...' if others[3:] else ''}." if others else ""
        raise ValueError(f"{refused[first]}{more} {MEND}")
    return found


def _why(name: str, key: str, tensor: torch.Tensor, planned: Mapping[str, tuple[int, ...]]) -> str:
    since = "after accel_moe.from_pretrained()"
    known = tensor._origin.name if is_deferred(tensor) and tensor._origin is not None else key
    if known in planned and tuple(tensor.shape) != tuple(planned[known]):
        return f"{key} has shape {tuple(tensor.shape)}, and {name} has {tuple(planned[known])}: it was resized {since}."
    if is_deferred(tensor):
        return (
            f"{key} was changed in place {since}: it has no values before accelerator.prepare, and the change would be "
            "lost."
        )
    if key in planned:
        return f"{key} was replaced on meta {since}, and {name} has no values for the new one."
    return f"{key} was added on meta {since}, and {name} has no values for it."


def check_optimizers(optimizers: Sequence[torch.optim.Optimizer], own: set[int]) -> None:
    """Raises ValueError for an optimizer with a deferred parameter that is none of `own` (ids)."""
    for optimizer in optimizers:
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            if is_deferred(parameter) and id(parameter) not in own:
                known = "a parameter" if parameter._origin is None else parameter._origin.name
                raise ValueError(
                    f"The optimizer holds {known}, of shape {tuple(parameter.shape)}, which the model that came to "
                    "accelerator.prepare does not have any more. Make the optimizer after the model was changed."
                )


def check_ranks(tensors: Mapping[str, torch.Tensor]) -> None:
    """Compare the tensors of all ranks.

    A collective over the world, if there is one.

    Raises:
        ValueError: ranks edited their models differently.
    """
    lines = [_line(key, tensor) for key, tensor in sorted(tensors.items())]
    digest = hashlib.blake2b("\n".join(lines).encode()).hexdigest()
    if len(set(ranks.gather(digest, over=dist.group.WORLD))) > 1:
        _raise_difference(ranks.gather(lines, over=dist.group.WORLD))


def _raise_difference(everyone: list[list[str]]) -> None:
    for rank, lines in enumerate(everyone):
        if lines != everyone[0]:
            ours = next(iter(sorted({*everyone[0]} - {*lines})), "nothing")
            theirs = next(iter(sorted({*lines} - {*everyone[0]})), "nothing")
            raise ValueError(
                f"The model was edited differently on ranks 0 and {rank} after accel_moe.from_pretrained(): rank 0 has "
                f"{ours}, rank {rank} has {theirs}. Make the same edits on every rank."
            )


def _line(key: str, tensor: torch.Tensor) -> str:
    origin = origin_of(tensor)
    values = "real values" if origin is None else f"the values of {origin.name}"
    return f"{key} {tuple(tensor.shape)} {tensor.dtype} with {values}"
