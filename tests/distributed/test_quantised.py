"""4-bit and 8-bit experts: training adapters on them equals training on the same weights made dense again.

Tolerance, float32: 1e-4 of each tensor's largest value, as for LoRA on dense experts (tests/families/test_peft.py). The
packed weights give the oracle's numbers exactly; only sums over ranks are taken in another order.
"""

from __future__ import annotations

import functools

import pytest

from tests.distributed.quantised_runs import Case, on_one_process, on_rank, save_base
from tests.families.peft_runs import EXPERTS, differences
from tests.ranks import run_ranks

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

SCATTERMOE = dict(kernel="scattermoe", interpret=True)
BOTH = dict(modules=("q_proj",), parameters=EXPERTS)

TABLE = [
    Case(1, 1, **SCATTERMOE, fsdp=False),
    Case(1, 1, **BOTH, fsdp=False),
    Case(2, 1, **SCATTERMOE),
    Case(2, 1, **BOTH, scheme="int8"),
    Case(2, 2, **SCATTERMOE),
    Case(2, 2, **BOTH),
    Case(2, 2, **BOTH, scheme="int8", **SCATTERMOE),
    Case(4, 2, **BOTH, scheme="nf4", **SCATTERMOE),
    Case(2, 2, **SCATTERMOE, checkpointing=True),
    Case(2, 2, **BOTH, options=(("moe_dispatch_chunk_tokens", 5),)),
    Case(2, 2, **BOTH, ram_efficient=True),
    Case(2, 1, fsdp=False),
    Case(1, 1, **BOTH, fsdp=False, from_files=True),
    Case(2, 2, **BOTH, scheme="none", from_files=True),
    Case(2, 1, **BOTH, from_files=True),
    Case(2, 2, **BOTH, scheme="int8", from_files=True),
    Case(4, 2, **SCATTERMOE, from_files=True),
]


@functools.cache
def oracle(scheme: str, modules, parameters):
    return on_one_process(Case(1, 1, scheme=scheme, modules=modules, parameters=parameters))


def run(case: Case, folder):
    base = save_base(folder) if case.from_files else None
    return run_ranks(on_rank, case.world, case, base, interpret=case.interpret)[0]


@pytest.mark.parametrize("case", TABLE, ids=lambda case: case.name)
def test_training_on_quantised_experts_equals_training_on_the_dequantised(case, tmp_path):
    found = run(case, tmp_path)
    assert not (wrong := differences(found, oracle(case.scheme, case.modules, case.parameters))), "\n".join(wrong)
    if case.scheme != "none":
        assert found.facts["packed"] == [("torch.uint8", 2, False)]
        assert not any(found.facts["packed_changed"])
        assert f"weights={case.scheme}" in found.facts["repr"]


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_one_wrong_scale_is_seen(scheme, tmp_path):
    case = Case(2, 2, scheme=scheme, wrong_scale=True)
    wrong = differences(run(case, tmp_path), oracle(scheme, case.modules, case.parameters))
    assert any("losses" in line for line in wrong) and any("gradient" in line for line in wrong), wrong
