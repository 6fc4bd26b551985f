"""The router is the model's own: its losses, logits, biases, noise and precision are the same under expert parallelism.

Tolerances, float32: losses and logits 1e-5 relative, gradients 1e-4 of each one's largest (sums over ranks and experts
in another order), as in the parity table.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch

from tests.families.router_runs import Case, build, on_one_process, on_rank
from tests.ranks import run_ranks

slow = functools.partial(pytest.param, marks=pytest.mark.slow)
TABLE = [
    slow(Case("qwen3_moe", aux=0.5)),
    Case("mixtral", aux=0.5, z=0.1),
    slow(Case("olmoe", z=0.1)),
    Case("mixtral", options=(("router_jitter_noise", 0.3),), aux=0.5),
    Case("deepseek_v3", bias=True),
    slow(Case("glm4_moe", bias=True)),
]


@pytest.mark.parametrize("case", TABLE, ids=lambda case: getattr(case, "name", None))
def test_what_the_router_computes_over_two_ranks_is_what_it_computes_on_one(case):
    run, expected = run_ranks(on_rank, 2, case)[0], on_one_process(case)
    torch.testing.assert_close(torch.tensor(run.losses), torch.tensor(expected.losses), rtol=1e-5, atol=0)
    for ours, right in zip(run.router_logits, expected.router_logits):
        assert (ours is None) == (right is None)
        if right is not None:
            torch.testing.assert_close(ours, right, rtol=0, atol=1e-5 * right.abs().max().item())
    assert run.gradients.keys() == expected.gradients.keys()
    for name, right in expected.gradients.items():
        atol = 1e-4 * right.abs().max().item() + 1e-9
        torch.testing.assert_close(run.gradients[name], right, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")
    assert run.biases.keys() == expected.biases.keys()
    for name, right in expected.biases.items():
        assert torch.equal(run.biases[name], right)


@pytest.mark.parametrize(
    ("with_it", "without"),
    [
        (Case("qwen3_moe", aux=0.5), Case("qwen3_moe")),
        (Case("olmoe", z=0.1), Case("olmoe")),
        (Case("mixtral", options=(("router_jitter_noise", 0.3),)), Case("mixtral")),
        (Case("deepseek_v3", bias=True), Case("deepseek_v3")),
    ],
    ids=lambda case: case.name,
)
def test_the_cases_above_do_exercise_the_feature(with_it, without):
    """The router's gradient changes by more than the tolerance when the feature is on."""
    on, off = on_one_process(with_it).gradients, on_one_process(without).gradients
    routers = [n for n in on if n.endswith("gate.weight")]
    assert routers
    assert any((on[n] - off[n]).abs().max() > 1e-3 * off[n].abs().max() for n in routers)


def test_routing_weights_that_a_router_computes_in_float32_stay_so_under_bf16():
    """DeepSeek's router is float32. Its weights cross the exchange so, and the loss is that of FSDP2 without us."""
    case = Case("deepseek_v3", bias=True, mixed_precision="bf16")
    ours, plain = run_ranks(on_rank, 2, case)[0], run_ranks(on_rank, 2, replace(case, ours=False))[0]
    assert ours.weight_dtypes == ["torch.float32"]
    # bf16 sums over experts round once more or less (8 bits): two roundings of 0.4 %, averaged over the tokens
    torch.testing.assert_close(torch.tensor(ours.losses), torch.tensor(plain.losses), rtol=4e-3, atol=0)


def test_jitter_draws_the_same_numbers_with_the_experts_sharded_or_not():
    """Nothing of ours touches the random number generator: a second draw after a forward is the same."""
    import accel_moe

    case = Case("mixtral", options=(("router_jitter_noise", 0.3),))
    draws = []
    for prepared in (False, True):
        model = build(case)
        model.set_experts_implementation("eager")
        if prepared:
            accel_moe.prepare(model, moe_kernel="grouped_mm")
        torch.manual_seed(1)
        model(input_ids=torch.arange(12).view(2, 6)).logits.sum().backward()
        draws.append(torch.rand(4))
    assert torch.equal(*draws)
