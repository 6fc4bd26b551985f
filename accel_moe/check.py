"""Whether the installed versions fit this package: `python -m accel_moe.families --check`, on any machine, in seconds.

Three things can change with an update. The check looks at each:

1. the versions themselves;
2. the functions that are patched: their parameters are compared, as at `prepare()`;
3. transformers' experts interface: small layers of a few families run through our forward, with the kernels that every
   machine has. Output and every gradient are compared with the family's own loop.

Nothing is patched, and no GPU, network or process group is needed.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from accel_moe import catalogue, hooks, patching, supported
from accel_moe.config import MoEConfig, ResolvedConfig
from accel_moe.experts import recognise, view
from accel_moe.experts.state import PreparedState
from accel_moe.experts.swap import swap

PROBED = ("qwen3_moe", "gpt_oss", "nemotron_h", "deepseek_v4")
"""A plain gate; bias, transposed and interleaved; no gate; a gate of the family's own."""

KERNELS = ("eager", "grouped_mm")
"""The kernels that run without a GPU."""

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
}
T, K, RELATIVE, ABSOLUTE = 17, 2, 2e-5, 1e-7
"""As tests/families/sweep.py: float32 sums in another order."""


@dataclass(frozen=True)
class Finding:
    """One line: the subject, the value found, the value expected, and "ok" or the fault."""

    subject: str
    found: str
    expected: str
    verdict: str
    is_off: bool


def findings(families: Iterable[str] = PROBED) -> Iterator[Finding]:
    """Yields every line of the check as soon as it is known."""
    yield from _versions()
    yield from _patches()
    yield from _interface(families)


def report(families: Iterable[str] = PROBED, say: Callable[[str], None] = print) -> int:
    """Say each line, then a summary. Returns 0 if everything fits, else 1."""
    off = 0
    for finding in findings(families):
        off += finding.is_off
        say(f"{finding.subject:<58} {finding.found:<14} {finding.expected:<20} {finding.verdict}".rstrip())
    say("")
    say(
        f"{off} of these do not fit accel_moe. Install the versions above, or update accel_moe."
        if off
        else "The installed versions fit accel_moe."
    )
    return 1 if off else 0


def _versions() -> Iterator[Finding]:
    for row in supported.VERSIONS:
        found = supported.installed(row.name)
        verdict = row.verdict(found)
        words = {"untested": "ok so far: newer than the tested versions"}.get(verdict, verdict)
        yield Finding(row.name, found or "none", str(row), words, verdict in ("missing", "too old"))


def _patches() -> Iterator[Finding]:
    for patch in (*hooks.TABLE, *hooks.CPU_TABLE, *hooks.LOAD_TABLE):
        why = patching.off_leash(patch)
        yield Finding(patch.target, "moved" if why else "as expected", "", why or "ok", why is not None)


def _interface(families: Iterable[str]) -> Iterator[Finding]:
    sources = {source.name: source for source in catalogue.sources()}
    for family in families:
        try:
            layer = _small_layer(sources[family])
        except KeyError:
            yield _of_layer(family, "", "missing", "this transformers has no such family")
            continue
        except Exception as error:  # whatever a new version does
            yield _of_layer(family, "", "not built", f"{type(error).__name__}: {error}")
            continue
        for kernel in KERNELS:
            wrong = _difference(family, layer, kernel)
            yield _of_layer(family, kernel, "differs" if wrong else "as its own loop", wrong)


def _of_layer(family: str, kernel: str, found: str, wrong: str | None) -> Finding:
    return Finding(f"experts of {family} {kernel}".rstrip(), found, "", wrong or "ok", wrong is not None)


def _small_layer(source: catalogue.Source) -> nn.Module:
    """One experts layer with random float32 weights; it runs its family's own loop."""
    module, name = (source.decorated or source.lookalikes)[0]
    layer = catalogue.build_experts(module, name, map(_small, catalogue.config_classes(source, module))).float()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return layer


def _small(config_class: type) -> object:
    config = config_class()
    for name, value in SMALL.items():
        if hasattr(config, name):
            setattr(config, name, value)
    return config


def _difference(family: str, layer: nn.Module, kernel: str) -> str | None:
    """The difference between our forward with this kernel and the family's own loop, in words; None if they agree."""
    if why := recognise.refusal(layer, kernel=kernel, ep_degree=1):
        return why
    resolved = ResolvedConfig(MoEConfig(moe_kernel=kernel), {})
    ours, own = copy.deepcopy(layer), copy.deepcopy(layer)
    try:
        swap({"experts": ours}, PreparedState(resolved, kernel, None, family, 1))
        found = _run(ours, ours)
        expected = _run(own, lambda *args: inspect.unwrap(type(own).forward)(own, *args))
    except Exception as error:  # whatever a new version does
        return f"{type(error).__name__}: {error}"
    for name, right in expected.items():
        if (got := found[name]) is None or right is None:
            if got is not right:
                return f"only one of the two has {name}"
            continue
        gap, largest = (got - right).abs().max().item(), right.abs().max().item()
        if not gap <= RELATIVE * largest + ABSOLUTE:
            return f"{name} is off by {gap:.1e}, largest {largest:.1e}"
    return None


def _run(layer: nn.Module, call: Callable[..., torch.Tensor]) -> dict[str, torch.Tensor | None]:
    """Output and gradients. Layers of one shape get the same tokens and routing; one expert gets no token."""
    layout = view.as_interface(layer)
    generator = torch.Generator().manual_seed(1)
    width = layer.get_parameter("down_proj").shape[-1 if layout.is_transposed else 1]
    hidden = torch.randn(T, width, generator=generator).requires_grad_()
    index = torch.stack([torch.randperm(layout.num_experts - 1, generator=generator)[:K] for _ in range(T)])
    weights = (torch.rand(T, K, generator=generator) + 0.1).requires_grad_()
    out = call(hidden, index, weights)
    (out * torch.randn(out.shape, generator=generator)).sum().backward()
    gradients = {"hidden_states": hidden.grad, "top_k_weights": weights.grad}
    gradients |= {name: parameter.grad for name, parameter in layer.named_parameters()}
    return {"the output": out.detach(), **{f"the gradient of {name}": g for name, g in gradients.items()}}
