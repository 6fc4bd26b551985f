"""The sweep: one family's layer, and its whole tiny model, ours against its own loop; a row of the table each.

The oracle is the family's own `forward` (transformers' eager loop), float32, one process. Compared are the output
and every gradient: of hidden_states, of the routing weights, of each parameter.
"""

from __future__ import annotations

import contextlib
import copy
import csv
import inspect
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import nn

import accel_moe
from accel_moe import catalogue
from accel_moe.experts import recognise, view
from tests.families import tiny_families

T, K = 17, 2
RELATIVE, ABSOLUTE = 2e-5, 1e-7
"""Both sum the same float32 products in another order: a few hundred ulp (6e-8) of the tensor's largest value, over
at most 48 terms a dot product and two layers of a model. Measured: 4e-6 relative at most, 1e-7 in most families. The
absolute part is for gradients that are small beside the terms they are summed from (qwen4_exp: 2.9e-5 of 1e-5)."""


@dataclass
class Row:
    """One line of the table. `gap` is the largest difference of all tensors, relative to each one's largest value."""

    family: str
    level: str
    experts: str = ""
    model: str = ""
    maths: str = ""
    kernel: str = ""
    gap: float = float("nan")
    result: str = ""


class Holder(nn.Module):
    """The least model that holds an experts layer."""

    def __init__(self, layer: nn.Module, config: object):
        super().__init__()
        self.experts = layer
        self.config = config


def layer_rows(family: str, kernel: str, sabotage: object = None) -> list[Row]:
    """One row per experts class of the family: the module alone, random input and routing, one expert idle."""
    source = next(s for s in tiny_families.families() if s.name == family)
    return [_layer_row(source, module, name, kernel, sabotage) for module, name in tiny_families.classes_of(source)]


def _layer_row(source: catalogue.Source, module_name: str, class_name: str, kernel: str, sabotage: object) -> Row:
    row = Row(source.name, "layer", experts=class_name)
    try:
        oracle, config = build_layer(source, module_name, class_name)
    except Exception as error:
        row.result = f"not built: {type(error).__name__}: {error}"
        return row
    row.maths = catalogue.describe_maths(oracle)
    ours = Holder(copy.deepcopy(oracle), config)
    try:
        accel_moe.prepare(ours, moe_kernel=kernel)
    except ValueError as error:
        row.result = f"refused: {error}"
        return row
    row.kernel = ours._accel_moe.kernel
    if sabotage is not None:
        sabotage(ours.experts)
    expected = run_layer(lambda *a: inspect.unwrap(type(oracle).forward)(oracle, *a), oracle)
    found = run_layer(ours.experts, ours.experts)
    row.gap, row.result = compare(found, expected)
    return row


def layers_of(sources: Iterable[catalogue.Source]) -> Iterator[tuple[catalogue.Source, nn.Module]]:
    """Every experts layer of these families that can be built; what cannot be has a row of its own that says so."""
    for source in sources:
        for module, name in tiny_families.classes_of(source):
            with contextlib.suppress(Exception):
                yield source, build_layer(source, module, name)[0]


def build_layer(source: catalogue.Source, module_name: str, class_name: str, seed: int = 0) -> tuple[nn.Module, object]:
    configs = []
    for cls in catalogue.config_classes(source, module_name):
        try:
            configs.append(tiny_families.tiny_config(cls, source.name))
        except Exception:
            continue
    for config in configs:  # ernie4_5_vl gives its experts their width beside the config
        if isinstance(getattr(config, "moe_intermediate_size", None), list):
            vars(config)["moe_intermediate_size"] = config.moe_intermediate_size[0]
    layer = catalogue.build_experts(module_name, class_name, configs).float()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    config = next(c for c in configs if hasattr(c, "hidden_size"))
    config._experts_implementation = "eager"
    return layer, config


def routing(layer: nn.Module, seed: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """[T, K] experts, each token's distinct, the last one idle; identity experts among them where there are any."""
    shim = view.shim_of(layer)
    count = view.as_interface(layer).num_experts
    identity = layer.zero_expert_num if shim is not None and shim.identity_experts else 0
    generator = torch.Generator().manual_seed(seed)
    choice = torch.stack([torch.randperm(count - 1 + identity, generator=generator)[:K] for _ in range(T)])
    choice = choice + (choice >= count - 1).long() if identity else choice
    return choice, torch.rand(T, K, generator=generator) + 0.1


def run_layer(call, layer: nn.Module) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    width = layer.down_proj.shape[-1 if view.as_interface(layer).is_transposed else 1]
    hidden = torch.randn(T, width, generator=generator).requires_grad_()
    index, weights = routing(layer)
    weights.requires_grad_()
    out = call(hidden, index, weights)
    (out * torch.randn(out.shape, generator=generator)).sum().backward()
    gradients = {f"gradient of {n}": p.grad for n, p in layer.named_parameters()}
    return {
        "output": out.detach(),
        "gradient of hidden_states": hidden.grad,
        "gradient of top_k_weights": weights.grad,
        **gradients,
    }


def model_row(family: str, kernel: str) -> Row:
    """The family's whole tiny model: logits and every parameter's gradient, ours against its own loop."""
    row = Row(family, "model")
    try:
        tiny = tiny_families.tiny(family)
        oracle, ours = tiny.build(), tiny.build()
    except Exception as error:
        row.result = f"not built: {type(error).__name__}: {error}"
        return row
    row.model = type(ours).__name__
    layers = recognise.find_experts(ours)
    row.experts = ", ".join(sorted({type(m).__name__ for m in layers.values()}))
    row.maths = "; ".join(sorted({catalogue.describe_maths(m) for m in layers.values()}))
    tiny_families.use_own_loop(oracle)
    try:
        accel_moe.prepare(ours, moe_kernel=kernel)
    except ValueError as error:
        row.result = f"refused: {error}"
        return row
    row.kernel = ours._accel_moe.kernel
    try:
        expected, found = run_model(oracle), run_model(ours)
    except Exception as error:
        row.result = f"does not run: {type(error).__name__}: {error}"
        return row
    row.gap, row.result = compare(found, expected)
    if row.result == "ok" and not any("down_proj" in name for name in expected):
        row.result = "no experts gradient was compared"
    return row


def run_model(model: nn.Module) -> dict[str, torch.Tensor]:
    torch.manual_seed(11)  # jitter and dropout draw the same numbers in both
    out = tiny_families.output_of(model)
    (out.float() * torch.randn(out.shape, generator=torch.Generator().manual_seed(5))).mean().backward()
    gradients = {f"gradient of {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"output": out.detach(), **gradients}


def compare(
    found: dict[str, torch.Tensor | None],
    expected: dict[str, torch.Tensor | None],
    absolute: float = ABSOLUTE,
    relative: float = RELATIVE,
) -> tuple[float, str]:
    """(largest relative difference, "ok" or the first thing that is wrong)."""
    if found.keys() != expected.keys():
        return float("inf"), f"wrong: only one side has {sorted(found.keys() ^ expected.keys())}"
    worst, wrong = 0.0, ""
    for name, right in expected.items():
        ours = found[name]
        if ours is None or right is None:
            if (ours is None) != (right is None):
                wrong = wrong or f"wrong: {name} is None on one side"
            continue
        if not torch.isfinite(right).all():
            return float("inf"), f"the oracle's {name} is not finite"
        largest = right.abs().max().item() if right.numel() else 0.0
        gap = (ours - right).abs().max().item() if right.numel() else 0.0
        if not gap <= relative * largest + absolute:
            wrong = wrong or f"wrong: {name} is off by {gap:.1e}, largest {largest:.1e}"
        if largest > absolute:
            worst = max(worst, gap / largest)
    return worst, wrong or "ok"


def write_table(rows: Iterable[Row], path: Path) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)], delimiter="\t")
        writer.writeheader()
        for row in rows:
            writer.writerow({**asdict(row), "gap": f"{row.gap:.1e}", "result": " ".join(row.result.split())})
