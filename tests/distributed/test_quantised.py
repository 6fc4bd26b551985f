"""4-bit and 8-bit experts: training adapters on them equals training on the same weights made dense again.

Tolerance, float32: 1e-4 of each tensor's largest value, as for LoRA on dense experts (tests/families/test_peft.py). The
packed weights give the oracle's numbers exactly; only sums over ranks are taken in another order.
"""

from __future__ import annotations

import functools

import pytest

from tests.distributed.quantised_runs import Case, on_one_process, on_rank
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
]


@functools.cache
def oracle(scheme: str, modules, parameters):
    return on_one_process(Case(1, 1, scheme=scheme, modules=modules, parameters=parameters))


def run(case: Case, *args):
    return run_ranks(on_rank, case.world, case, *args, interpret=case.interpret)[0]


@pytest.mark.parametrize("case", TABLE, ids=lambda case: case.name)
def test_training_on_quantised_experts_equals_training_on_the_dequantised(case):
    found = run(case)
    assert not (wrong := differences(found, oracle(case.scheme, case.modules, case.parameters))), "\n".join(wrong)
    assert found.facts["packed"] == [("torch.uint8", 2, False)]
    assert not any(found.facts["packed_changed"])
    assert f"weights={case.scheme}" in found.facts["repr"]
