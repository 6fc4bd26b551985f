"""Every MoE family of the installed transformers, from its config alone: ours against the family's own loop.

The default run does each family's layer and model with grouped_mm, and one family of each kind of maths with our
kernels in Triton's interpreter. `--slow` does every family with both. See sweep.py for the tolerances.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from accel_moe import catalogue
from accel_moe.experts import recognise
from tests.families import sweep, tiny_families

SOURCES = tiny_families.families()
NAMES = [source.name for source in SOURCES]
CANNOT_BE_BUILT: dict[str, str] = {}
"""Families whose tiny model cannot be made from their config alone, and why. Listed in the table, not dropped."""


@pytest.mark.parametrize("family", NAMES)
def test_a_layer_of_every_family_equals_its_own_loop(family, families_table):
    rows = sweep.layer_rows(family, "grouped_mm")
    families_table += rows
    assert [row.result for row in rows] == ["ok"] * len(rows)


@pytest.mark.parametrize("family", NAMES)
def test_a_whole_tiny_model_of_every_family_equals_its_own_loop(family, families_table):
    row = sweep.model_row(family, "grouped_mm")
    families_table.append(row)
    if family in CANNOT_BE_BUILT:
        assert row.result.startswith("not built"), "it can be built now: take it off the list"
    else:
        assert row.result == "ok"


def one_of_each_kind() -> dict[str, str]:
    """Kind of maths to the first family of it that our kernels take."""
    kinds: dict[str, str] = {}
    for source, layer in sweep.layers_of(SOURCES):
        if recognise.not_scattermoe(layer) is None:
            kinds.setdefault(catalogue.describe_maths(layer), source.name)
    return kinds


@pytest.mark.parametrize("kind", list(one_of_each_kind()))
def test_our_kernels_equal_the_loop_of_one_family_of_each_kind(kind, families_table):
    rows = sweep.layer_rows(one_of_each_kind()[kind], "scattermoe")
    families_table += rows
    assert [(row.kernel, row.result) for row in rows] == [("scattermoe", "ok")] * len(rows)


@pytest.mark.slow
@pytest.mark.parametrize("family", NAMES)
def test_our_kernels_equal_the_loop_of_every_family_they_take(family, families_table):
    rows = [row for row in sweep.layer_rows(family, "auto")]
    families_table += rows
    assert [row.result for row in rows] == ["ok"] * len(rows)


def test_a_family_that_cannot_be_built_is_a_row_with_its_name_and_stops_no_other(monkeypatch):
    """What the collection builds must not fail: on a new transformers no test at all would run."""
    build = sweep.build_layer

    def without_mixtral(source, *names):
        if source.name == "mixtral":
            raise RuntimeError("a field that nobody knew")
        return build(source, *names)

    monkeypatch.setattr(sweep, "build_layer", without_mixtral)
    monkeypatch.setitem(globals(), "SOURCES", [s for s in SOURCES if s.name in ("gpt_oss", "mixtral")])
    assert list(one_of_each_kind().values()) == ["gpt_oss"]
    (row,) = sweep.layer_rows("mixtral", "grouped_mm")
    assert (row.family, row.result) == ("mixtral", "not built: RuntimeError: a field that nobody knew")


def test_the_tiny_model_of_a_family_whose_layers_loop_runs_their_experts_in_each_pass():
    if "inkling2_loop" not in NAMES:
        pytest.skip("this transformers has no family whose layers loop")
    model = tiny_families.tiny("inkling2_loop").build()
    calls = Counter()
    for name, layer in recognise.find_experts(model).items():
        layer.register_forward_hook(lambda *_, name=name: calls.update([name]))
    gradients = sweep.run_model(model)
    assert list(calls.values()) == [1, 2, 2, 1]
    assert all(gradients[f"gradient of {name}"].any() for name, _ in model.named_parameters() if "message" in name)


def other_gate(layer: torch.nn.Module) -> None:
    """Gate and up exchanged: the mistake that a wrong layout makes."""
    layer.__dict__["_apply_gate"] = lambda h: torch.nn.functional.silu(h.chunk(2, -1)[1]) * h.chunk(2, -1)[0]


def no_clamp(layer: torch.nn.Module) -> None:
    layer.__dict__["_apply_gate"] = lambda h: torch.nn.functional.silu(h.chunk(2, -1)[0]) * h.chunk(2, -1)[1]


def gelu_for_relu2(layer: torch.nn.Module) -> None:
    layer.act_fn = torch.nn.GELU()


@pytest.mark.parametrize(
    ("family", "sabotage"),
    [("qwen3_moe", other_gate), ("deepseek_v4", no_clamp), ("gpt_oss", other_gate), ("nemotron_h", gelu_for_relu2)],
)
def test_a_wrong_gate_formula_fails_the_sweep(family, sabotage):
    (row,) = sweep.layer_rows(family, "grouped_mm", sabotage)
    assert row.result.startswith("wrong: output")


def test_the_sweep_covers_every_decorated_class_of_the_installed_transformers():
    decorated = sum(len(source.decorated) for source in catalogue.sources())
    assert decorated == sum(len(source.decorated) for source in SOURCES) >= 55
