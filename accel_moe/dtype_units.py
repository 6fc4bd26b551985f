"""FSDP units of one dtype: a router that stays fp32 in a bf16 model gets a unit of its own.

FSDP2 wants one dtype for all trained parameters of a unit, and accelerate makes one unit of a decoder layer. Without
mixed precision a layer may hold two dtypes: transformers keeps the routers of some families fp32 in a bf16 model
(`_keep_in_fp32_modules_strict`), PEFT its adapters. Plain accelerate fails there, in the first forward. Here the
modules of the other dtype become units first: accelerate asks its policy about every module, from the innermost out,
and the policy also says yes to them. Values, gradients and the optimizer's dtypes equal a run's in one process.

With mixed precision accelerate makes every trained parameter fp32 first, and this file changes nothing.
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
    """accelerate's `policy` (None: the model is one unit), extended to the modules of another dtype.

    Args:
        ignored: parameters that FSDP leaves alone.

    Raises:
        ValueError: one module has trained parameters of two dtypes itself.
    """
    if len({parameter.dtype for parameter in model.parameters() if _counts(parameter, ignored)}) < 2:
        return policy  # the rest reads the modules' sources, which takes seconds
    wrapped: set[nn.Module] = {m for m in model.modules() if isinstance(m, FSDPModule) or (policy and policy(m))}
    own_units: set[nn.Module] = set()
    while odd := _odd_modules(model, wrapped | own_units, ignored):
        own_units |= odd
    if not own_units:
        return policy
    return lambda module: module in own_units or (policy is not None and policy(module))


def _odd_modules(model: nn.Module, roots: set[nn.Module], ignored: set[nn.Parameter]) -> set[nn.Module]:
    """Modules whose trained parameters have another dtype than the rest of their unit."""
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
    """(root of its unit, name, module), once for each place where a module stands."""
    root = module if module in roots else root
    yield root, name, module
    for child_name, child in module.named_children():
        yield from _with_roots(child, root, f"{name}.{child_name}" if name else child_name, roots)


def _trained(module: nn.Module, ignored: set[nn.Parameter]) -> Counter[torch.dtype]:
    """By dtype, the number of trained values that the module uses itself and that FSDP is yet to shard.

    A unit's parameters are whole while its own forward runs. A module may read a child's weight instead of calling the
    child (`self.conv1d.weight`): such a weight has to be in the module's unit, and is counted here.
    """
    counts: Counter[torch.dtype] = Counter()
    read = [child for name, child in module.named_children() if name in _reads(type(module))]
    for parameter in (p for m in (module, *read) for p in m._parameters.values()):
        if parameter is not None and _counts(parameter, ignored):
            counts[parameter.dtype] += parameter.numel()
    return counts


def _counts(parameter: nn.Parameter, ignored: set[nn.Parameter]) -> bool:
    """Whether FSDP is yet to shard it, and it is trained."""
    return parameter.requires_grad and parameter not in ignored and not isinstance(parameter, DTensor)


@functools.cache
def _reads(cls: type[nn.Module]) -> frozenset[str]:
    """The names of children whose weights the source of `cls` reads as `self.<name>.weight` or `.bias`."""
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
    """The dtype that a unit keeps: its root's own; else its tied embeddings'; else the one of most values.

    accelerate shards tied embeddings in the unit around them.
    """
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
