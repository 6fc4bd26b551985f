"""FSDP units of one dtype: a router that stays fp32 in a bf16 model gets a unit of its own.

FSDP2 wants one dtype for all trained parameters of a unit, and accelerate makes one unit of a decoder layer. Without
mixed precision a model may hold two: transformers keeps the routers of some families fp32 in a bf16 model
(`_keep_in_fp32_modules_strict`), PEFT its adapters. Plain accelerate fails there, in the first forward. Here the
modules of the other dtype become units first, by the policy that accelerate asks of every module, from the innermost
out. Values, gradients and the optimizer's dtypes are those of one process.

With mixed precision accelerate makes every trained parameter fp32 before, and nothing is done here.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from accel_moe.experts.state import prepared_state
from accel_moe.names import plain_name
from accel_moe.patching import ACCELERATE, patch

Policy = Callable[[nn.Module], bool]


def units_of_one_dtype(model: nn.Module, policy: Policy | None, ignored: set[nn.Parameter]) -> Policy | None:
    """accelerate's `policy` (None: the model is one unit), which also wraps the modules of another dtype.

    Args:
        ignored: parameters that FSDP leaves alone.

    Raises:
        ValueError: a module has trained parameters of two dtypes in its own hands.
    """
    wrapped: set[nn.Module] = {m for m in model.modules() if isinstance(m, FSDPModule) or (policy and policy(m))}
    alone: set[nn.Module] = set()
    while odd := _odd_modules(model, wrapped | alone, ignored):
        alone |= odd
    if not alone:
        return policy
    return lambda module: module in alone or (policy is not None and policy(module))


def _odd_modules(model: nn.Module, roots: set[nn.Module], ignored: set[nn.Parameter]) -> set[nn.Module]:
    """Modules whose trained parameters are of another dtype than the rest of their unit."""
    found: set[nn.Module] = set()
    units: dict[nn.Module, dict[nn.Module, Counter[torch.dtype]]] = {}
    for root, name, module in _with_roots(model, model, "", roots):
        parent = model.get_submodule(name.rpartition(".")[0])
        if module is not model and name.rpartition(".")[2] in _reads(type(parent)):
            continue  # counted as its parent's
        counts = _trained(module, ignored)
        if len(counts) > 1:
            small = min(counts, key=lambda dtype: dtype.itemsize)
            raise ValueError(
                f"{plain_name(name)} ({type(module).__name__}) has trained parameters of {_names(counts)}, and FSDP2 "
                "needs one dtype for what it shards together. Use mixed_precision: bf16, which trains fp32 weights, or "
                f"cast the module to one: model.get_submodule('{plain_name(name)}').to({small})."
            )
        if counts:
            units.setdefault(root, {})[module] = counts
    for root, modules in units.items():
        main = _main_dtype(model, root, modules)
        found |= {module for module, counts in modules.items() if main not in counts and module is not root}
    return found


def _with_roots(
    module: nn.Module, root: nn.Module, name: str, roots: set[nn.Module]
) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """(root of its unit, name, module), each module once for each place that it has."""
    root = module if module in roots else root
    yield root, name, module
    for child_name, child in module.named_children():
        yield from _with_roots(child, root, f"{name}.{child_name}" if name else child_name, roots)


def _trained(module: nn.Module, ignored: set[nn.Parameter]) -> Counter[torch.dtype]:
    """Values by dtype, of the trained parameters that the module uses itself and FSDP is yet to shard.

    A unit's parameters are there while its own forward runs. Those of a child whose weight the module reads, instead
    of calling it (`self.conv1d.weight`), are to be in the module's unit.
    """
    counts: Counter[torch.dtype] = Counter()
    read = [child for name, child in module.named_children() if name in _reads(type(module))]
    for parameter in (p for m in (module, *read) for p in m._parameters.values()):
        if parameter is not None and parameter.requires_grad and parameter not in ignored:
            if not isinstance(parameter, DTensor):
                counts[parameter.dtype] += parameter.numel()
    return counts


@functools.cache
def _reads(cls: type[nn.Module]) -> frozenset[str]:
    """The names of children whose weights the code of `cls` reads, as far as it can be seen."""
    found: set[str] = set()
    for one in cls.__mro__:
        if one.__module__.startswith("torch.nn."):
            break
        try:
            found.update(
                re.findall(r"\bself\.(\w+)\.(?:weight|bias)\b(?!\.(?:dtype|device|shape))", inspect.getsource(one))
            )
        except (OSError, TypeError):  # a class that was made at run time
            continue
    return frozenset(found)


def _main_dtype(model: nn.Module, root: nn.Module, modules: dict[nn.Module, Counter[torch.dtype]]) -> torch.dtype:
    """The dtype that a unit keeps: its root's own, or that of tied embeddings, which accelerate shards with what is
    around them; else the one with most values."""
    if root in modules:
        return next(iter(modules[root]))
    tied = _tied_embeddings(model)
    if tied is not None and tied in modules:
        return next(iter(modules[tied]))
    total: Counter[torch.dtype] = Counter()
    for counts in modules.values():
        total += counts
    return total.most_common(1)[0][0]


def _tied_embeddings(model: nn.Module) -> nn.Module | None:
    input_embeddings, output_embeddings = (
        getattr(model, f"get_{side}_embeddings", lambda: None)() for side in ("input", "output")
    )
    weight = getattr(input_embeddings, "weight", None)
    return input_embeddings if weight is not None and weight is getattr(output_embeddings, "weight", None) else None


def _names(counts: Counter[torch.dtype]) -> str:
    return " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in counts))


@patch(
    "accelerate.utils.fsdp_utils.fsdp2_prepare_auto_wrap_policy",
    why="FSDP2 refuses trained parameters of two dtypes in one unit, such as fp32 routers in a bf16 model. The policy "
    "is where accelerate decides on units; a policy of the user's own would replace that of the decoder layers.",
    tested=ACCELERATE,
)
def fsdp2_prepare_auto_wrap_policy(original, fsdp2_plugin, model):
    policy = original(fsdp2_plugin, model)
    if prepared_state(model) is None:
        return policy
    return units_of_one_dtype(model, policy, _ignored_parameters(fsdp2_plugin, model))


def _ignored_parameters(plugin, model: nn.Module) -> set[nn.Parameter]:
    modules = plugin.ignored_modules or []
    if isinstance(modules, str):
        modules = [module for name, module in model.named_modules() if re.fullmatch(plugin.ignored_modules, name)]
    return {parameter for module in modules for parameter in module.parameters()}
