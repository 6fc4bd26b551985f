"""`accelerator.prepare` first compares the ranks: all must bring the same model with the same settings.

A rank with another degree, another number of layers or experts, or another width would hang the others, end them by
SIGABRT in a collective whose sizes differ, or train on without a word. So ranks exchange first what they are about to
prepare:

    1. arrive     each rank says so in the job's key-value store, and waits until all have. A rank that never called
                  accel_moe.prepare() has no patches and does not come. A warning names it, and an error does at the
                  process group's timeout; without this step one collective would pair with another
    2. compare    the options, and a digest of the model; only where digests differ, the models in words   collective

Every decision is a pure function of the gathered values, so all ranks decide alike.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch.distributed as dist
from torch import nn

from accel_moe import ranks, whereabouts
from accel_moe.config import config_mismatch, spell_ranks
from accel_moe.experts.state import PreparedState, swapped_layers
from accel_moe.mesh import host_timeout
from accel_moe.names import plain_name
from accel_moe.weights.deferred_tensors import DeferredTensor

logger = logging.getLogger("accel_moe")

_WARN_S = 20.0
"""Seconds until the first warning names the missing ranks; each further warning comes after twice the time."""
_NUMBERS = re.compile(r"top_?k|per_tok|expert|group|scal|norm|limit|alpha|hidden|intermediate|ffn")
"""Names of the numbers of routers and experts that no weight shows."""
_SHOWN = 4

_comparisons = 0


def compare_ranks(model: nn.Module, state: PreparedState) -> None:
    """Raise on every rank if the ranks differ. A collective over the world, the first of all; nothing in one process.

    Raises:
        ValueError: options or models differ; the same words on every rank.
        RuntimeError: some ranks did not come before the process group's timeout; raised on the others.
    """
    global _comparisons
    if not ranks.distributed():
        return
    _comparisons += 1
    _arrive(f"accel_moe/prepare/{_comparisons}")
    ours = describe(model, state)
    digest = hashlib.sha256(repr(ours).encode()).hexdigest()
    everyone = ranks.gather((state.resolved.for_comparison(), digest), over=dist.group.WORLD)
    if (message := config_mismatch([options for options, _ in everyone])) is not None:
        raise ValueError(message)
    if len({digest for _, digest in everyone}) == 1:
        return
    raise ValueError(model_mismatch(ranks.gather(ours, over=dist.group.WORLD)))


def describe(model: nn.Module, state: PreparedState) -> dict[str, str]:
    """By name, in words: every parameter, and each experts layer's numbers. All must be the same on every rank."""
    found = {"the kernel of the experts": state.kernel}
    for name, parameter in model.named_parameters():
        words = "trained" if parameter.requires_grad else "frozen"
        # packed weights may be packed on the rank alone that loads them
        own_kind = type(parameter) is nn.Parameter or isinstance(parameter, DeferredTensor)
        if own_kind and parameter.is_floating_point():
            words = f"{list(parameter.shape)} {parameter.dtype}, {words}"
        found[plain_name(name)] = words
    modules = {plain_name(name): module for name, module in model.named_modules()}
    for name, layer in swapped_layers(model):
        experts = layer._accel_moe_layer
        gate = experts.glu.describe() if experts.glu is not None else "its own gate"
        found[name] = f"{experts.num_experts} experts, {gate}"
        block = name.rpartition(".")[0]
        for near in [block, name, *(f"{block}.{child}" for child, _ in modules[block].named_children())]:
            found.update((f"{near}.{key}", str(value)) for key, value in _numbers_of(modules[near]))
    return found


def _numbers_of(module: nn.Module) -> Iterator[tuple[str, int | float | bool]]:
    for key, value in vars(module).items():
        if isinstance(value, bool | int | float) and not key.startswith("_") and _NUMBERS.search(key):
            yield key, value


def model_mismatch(per_rank: Sequence[Mapping[str, str]]) -> str:
    """The message for models that differ: the first differences, and the ranks that have each value."""
    names = dict.fromkeys(name for found in per_rank for name in found)
    differences = []
    for name in names:
        members: dict[str, list[int]] = {}
        for rank, found in enumerate(per_rank):
            members.setdefault(found.get(name, "absent"), []).append(rank)
        if len(members) > 1:
            values = ", ".join(f"{value} on {spell_ranks(at)}" for value, at in members.items())
            differences.append(f"{name} is {values}")
    more = f"; and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
    return (
        f"The model differs between ranks: {'; '.join(differences[:_SHOWN])}{more}. Expected the same tensors and "
        "numbers everywhere: give every rank the same model config, checkpoint, dtype and adapters."
    )


def _arrive(place: str) -> None:
    """Say in the job's store that this rank is there, and wait for the others. Raises RuntimeError."""
    store = dist.distributed_c10d._get_default_store()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    timeout = host_timeout()

    def all_there() -> bool:
        return store.add(place, 0) >= world_size

    def missing() -> list[int]:
        return [other for other in range(world_size) if not store.check([f"{place}/{other}"])]

    try:
        store.set(f"{place}/{rank}", "there")
        store.add(place, 1)
        wait_for_all(all_there, missing, rank, world_size, timeout.total_seconds())
    except dist.DistError as error:
        raise RuntimeError(
            "The job's key-value store is gone, which rank 0 or the launcher holds: it has died. See its log."
        ) from error


def wait_for_all(
    all_there: Callable[[], bool], missing: Callable[[], list[int]], rank: int, world_size: int, timeout_s: float
) -> None:
    """Return when all_there(). Until then the first rank that is there warns of the `missing`.

    Raises:
        RuntimeError: they did not come within timeout_s.
    """
    warn_after = min(_WARN_S, timeout_s / 2)
    for waited in whereabouts.waiting(all_there):
        if waited < min(warn_after, timeout_s) or not (late := missing()):
            continue
        words = f"{spell_ranks(late)} of {world_size} did not come to accelerator.prepare() with a prepared model"
        if waited >= timeout_s:
            raise RuntimeError(
                f"{words} within {timeout_s:.0f} s (the process group's timeout). Either a rank does not call "
                "accel_moe.prepare(model), or not for as many models; or it has died, see its log; or it still loads. "
                "Expected the same calls on every rank. For slow loading, give Accelerator an "
                "InitProcessGroupKwargs(timeout=...) that is longer."
            )
        if rank == min(set(range(world_size)) - set(late)):
            logger.warning(
                "%s after %.0f s. They may still load their model; or they do not call accel_moe.prepare(model), which "
                "every rank must. This ends in an error after %.0f s.",
                words,
                waited,
                timeout_s,
            )
        warn_after *= 2
