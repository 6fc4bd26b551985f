"""Families under expert parallelism: two gloo ranks, FSDP2, against the family's own loop on one process.

The default run has those that `accel_moe.families` claims (`catalogue.OVER_RANKS`: every kind of maths, and experts in
every place); `--slow` has every family. The ones that need moe_ep_degree 1 are in test_refusals.py.
"""

from __future__ import annotations

import pytest

from accel_moe import catalogue
from accel_moe.experts import recognise
from accel_moe.experts.view import as_interface
from accel_moe.kernels.glu import has_default_glu
from tests.families import over_ranks, sweep, tiny_families
from tests.families.sweep import Row
from tests.ranks import run_ranks

INSTALLED = [source.name for source in tiny_families.families()]
DEFAULT = [name for name in catalogue.OVER_RANKS if name in INSTALLED]
ONE_RANK_ONLY = {"ernie4_5_vl_moe", "longcat_flash", "muse_spark"}


def check(family: str, families_table: list[Row], kernel: str = "grouped_mm") -> None:
    run = run_ranks(over_ranks.on_rank, 2, family, kernel, 2, interpret=kernel == "scattermoe")[0]
    gap, result = over_ranks.differences(run, over_ranks.on_one_process(family, 2))
    families_table.append(Row(family, "ep 2", kernel=kernel, gap=gap, result=result))
    assert result == "ok"


@pytest.mark.parametrize("family", DEFAULT)
def test_a_family_over_two_ranks_equals_its_own_loop_on_one_process(family, families_table):
    check(family, families_table)


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in INSTALLED if name not in {*DEFAULT, *ONE_RANK_ONLY}])
def test_every_other_family_over_two_ranks_equals_its_own_loop_on_one_process(family, families_table):
    check(family, families_table)


@pytest.mark.slow
@pytest.mark.parametrize("family", DEFAULT)
def test_our_kernels_over_two_ranks_equal_the_loop_of_one_process(family, families_table):
    layers = recognise.find_experts(tiny_families.tiny(family).build()).values()
    if why := next(filter(None, map(recognise.not_scattermoe, layers)), None):
        pytest.skip(f"scattermoe does not take it: {why}")
    check(family, families_table, "scattermoe")


def kind_of_maths(module) -> str:
    """A short name for the group of families that one kernel variant serves."""
    layout = as_interface(module)
    if not layout.has_gate:
        return "no gate"
    parts = ["gate" if has_default_glu(layout) else "own gate"]
    parts += [word for flag, word in (("has_bias", "bias"), ("is_transposed", "transposed")) if getattr(layout, flag)]
    parts += [] if layout.is_concatenated else ["interleaved"]
    parts += ["norm"] if getattr(layout, "has_post_expert_norm", False) else []
    return " ".join(parts)


def test_the_default_families_have_every_kind_of_maths():
    def kinds(names):
        sources = [source for source in tiny_families.families() if source.name in names]
        return {kind_of_maths(layer) for _, layer in sweep.layers_of(sources)}

    assert len(DEFAULT) >= 10
    assert kinds(DEFAULT) | kinds(ONE_RANK_ONLY) == kinds(INSTALLED)
