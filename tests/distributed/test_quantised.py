"""4-bit and 8-bit experts: training adapters on them equals training on the same weights made dense again.

Tolerance, float32: 1e-4 of each tensor's largest value, as for LoRA on dense experts (tests/families/test_peft.py). The
packed weights give the oracle's numbers exactly; only sums over ranks are taken in another order.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch

from accel_moe.checkpoint import opened
from accel_moe.checkpoint.export_plan import plan_export
from accel_moe.checkpoint.manifest import Quantisation, read_manifest
from accel_moe.errors import CheckpointError
from accel_moe.weights.base_model import open_base
from tests.distributed.quantised_runs import Case, on_one_process, on_rank, refused, resumed, save_base, saved
from tests.families.peft_runs import EXPERTS, differences
from tests.ranks import run_ranks

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

SCATTERMOE = dict(kernel="scattermoe", interpret=True)
BOTH = dict(modules=("q_proj",), parameters=EXPERTS)

FAST = [
    Case(1, 1, **BOTH, fsdp=False),
    Case(2, 1, **BOTH, scheme="int8"),
    Case(2, 2, **BOTH),
    Case(2, 2, **BOTH, scheme="int8", **SCATTERMOE, checkpointing=True),
    Case(4, 2, **BOTH, dp_replicate=2),
    Case(2, 2, **BOTH, options=(("moe_dispatch_chunk_tokens", 5),)),
    Case(2, 2, **BOTH, ram_efficient=True),
    Case(2, 1, fsdp=False),
    Case(2, 1, **BOTH, from_files=True),
    Case(2, 2, **BOTH, scheme="int8", from_files=True),
]
# Each repeats with another kernel, or another source of the base, what a row above shows.
SLOW = [
    Case(1, 1, **SCATTERMOE, fsdp=False),
    Case(2, 1, **SCATTERMOE),
    Case(2, 2, **SCATTERMOE),
    Case(2, 2, **BOTH, scheme="int8", **SCATTERMOE),
    Case(4, 2, **BOTH, **SCATTERMOE),
    Case(2, 2, **SCATTERMOE, checkpointing=True),
    Case(2, 2, **SCATTERMOE, options=(("moe_recompute_up_projection", True),)),
    Case(1, 1, **BOTH, fsdp=False, from_files=True),
    Case(2, 2, **BOTH, scheme="none", from_files=True),
    Case(4, 2, **SCATTERMOE, from_files=True),
]
TABLE = [*FAST, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)]


@functools.cache
def oracle(scheme: str, modules, parameters):
    return on_one_process(Case(1, 1, scheme=scheme, modules=modules, parameters=parameters))


@pytest.fixture(scope="module")
def checkpoint_of(tmp_path_factory):
    """-> a case's checkpoint, saved once: (folder, rank 0's losses after it, the names of its packed tensors)."""

    @functools.cache
    def made(case: Case):
        folder = str(tmp_path_factory.mktemp("runs") / "checkpoint")
        return folder, *run_ranks(saved, case.world, case, folder)[0]

    return made


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


@pytest.mark.parametrize(
    "scheme, world, ep",
    [
        ("nf4", 2, 2),
        pytest.param("nf4", 2, 1, marks=pytest.mark.slow),
        pytest.param("nf4", 4, 2, marks=pytest.mark.slow),
        pytest.param("int8", 2, 2, marks=pytest.mark.slow),
    ],
)
def test_under_bf16_mixed_precision_the_bits_are_those_of_the_dequantised_base(scheme, world, ep, tmp_path):
    # the same layout, kernel and dtypes on both sides: a scale that FSDP had cast to bf16 would show
    case = Case(world, ep, **BOTH, scheme=scheme, mixed_precision="bf16")
    packed, dense = run(case, tmp_path), run(replace(case, scheme="none", base=scheme), tmp_path)
    assert packed.losses == dense.losses and packed.norms == dense.norms
    for what in ("gradients", "weights"):
        ours, theirs = getattr(packed, what), getattr(dense, what)
        assert ours.keys() == theirs.keys() and ours
        assert not [name for name, value in theirs.items() if not torch.equal(ours[name], value)], what


@pytest.mark.parametrize("ep", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_trained_experts_are_refused_on_every_rank(ep):
    for told in run_ranks(refused, 2, Case(2, ep)):
        assert "moe_quantize_experts=nf4" in told and "down_proj is trained" in told and "freeze the experts" in told


@pytest.mark.parametrize("scheme", ["nf4", pytest.param("int8", marks=pytest.mark.slow)])
def test_one_wrong_scale_is_seen(scheme, tmp_path):
    case = Case(2, 2, scheme=scheme, wrong_scale=True)
    wrong = differences(run(case, tmp_path), oracle(scheme, case.modules, case.parameters))
    assert any("losses" in line for line in wrong) and any("gradient" in line for line in wrong), wrong


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(Case(2, 2, **BOTH), marks=pytest.mark.core),
        Case(2, 1, scheme="int8", adapters=False),
        pytest.param(Case(2, 2, adapters=False), marks=pytest.mark.slow),
    ],
    ids=lambda case: case.name,
)
def test_a_run_on_quantised_experts_resumes_where_it_was(case, checkpoint_of):
    folder, losses, packed = checkpoint_of(case)
    assert len(packed) == 4
    assert read_manifest(folder).quantised_experts == Quantisation(case.scheme, 64)
    assert run_ranks(resumed, case.world, case, folder)[0] == losses
    # another layout: sums in another order, after one step
    other = replace(case, ep=3 - case.ep)
    assert run_ranks(resumed, other.world, other, folder)[0] == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize(
    ("there", "here", "adapters"), [("nf4", "int8", True), ("nf4", "none", False), ("none", "nf4", True)]
)
def test_a_resume_with_another_quantisation_is_refused_on_every_rank(there, here, adapters, checkpoint_of):
    case = Case(2, 2, **(BOTH if adapters else {}), scheme=there, adapters=adapters)
    folder, *_ = checkpoint_of(case)
    words = {"nf4": "nf4 (blocks of 64)", "int8": "int8 (blocks of 64)", "none": "none"}
    for told in run_ranks(resumed, 2, replace(case, scheme=here), folder):
        assert f"trained with moe_quantize_experts={words[there]}, and this run has {words[here]}" in told
        assert f"Set moe_quantize_experts: {there}," in told


def test_a_checkpoint_of_quantised_experts_is_not_consolidated(checkpoint_of, tmp_path):
    folder, *_ = checkpoint_of(Case(2, 2, adapters=False))
    base = save_base(tmp_path)
    assert "experts      nf4, blocks of 64" in opened.describe(opened.open_checkpoint([folder]))
    with pytest.raises(CheckpointError, match=r"holds experts in nf4 \(4 tensors such as .*Train adapters"):
        plan_export(opened.open_checkpoint([folder]), open_base(base))
