"""A slot whose number is no expert's, below zero or too large: it adds nothing and its gradient is zero, on every road.

The reference is the same layer with such a slot sent to expert 0 with weight 0.
"""

import pytest
import torch

import accel_moe
from accel_moe import expert_load
from accel_moe.kernels.routing import sort_slots
from tests.distributed.parity import Case, prepared, whole
from tests.ranks import run_ranks
from tests.tiny import tiny_model

STRAYS = (-1, -7, 8, 9, 2**31, 2**40, -(2**40), -(2**63), 2**63 - 1)  # of 8 experts


def slots(rank: int, device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """index [T, 2] with each stray beside an expert, a token of strays alone and some without any; weights; rows."""
    generator = torch.Generator().manual_seed(rank)
    index = torch.rand(len(STRAYS) + 12, 8, generator=generator).argsort(1)[:, :2].contiguous()
    index[: len(STRAYS), 1] = torch.tensor(STRAYS)
    index[len(STRAYS)] = torch.tensor([-1, 2**40])
    weights, rows = torch.rand(index.shape, generator=generator), torch.randn(len(index), 32, generator=generator)
    return tuple(t.to(device) for t in (index, weights, rows))


def results(layer, index, weights, rows) -> list[torch.Tensor]:
    """Output, and the gradients of rows, weights and parameters."""
    rows, weights = rows.clone().requires_grad_(), weights.clone().requires_grad_()
    layer.zero_grad()
    out = layer(rows, index, weights)
    out.square().sum().backward()
    return [out.detach(), rows.grad, weights.grad, *(whole(p.grad) for p in layer.parameters())]


def assert_strays_do_nothing(layer, rank: int = 0) -> torch.Tensor:
    """Returns the slots of each expert, without the strays."""
    index, weights, rows = slots(rank, layer.down_proj.device)
    stray = (index < 0) | (index >= 8)
    there = index.masked_fill(stray, 0)
    found = results(layer, index, weights.masked_fill(stray, float("nan")), rows)
    wanted = results(layer, there, weights.masked_fill(stray, 0.0), rows)
    wanted[2].masked_fill_(stray, 0.0)
    for a, b in zip(found, wanted, strict=True):  # the rows of an expert may come in other numbers: another summation
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * b.abs().max().item())
    assert found[2][stray].eq(0).all()
    return torch.bincount(index[~stray].cpu(), minlength=8)


def first_layer(model):
    return model.model.layers[0].mlp.experts


@pytest.mark.parametrize("kernel", ["scattermoe", "grouped_mm", "batched_mm", "eager"])
def test_a_stray_slot_adds_nothing_and_has_no_gradient_on_one_rank(kernel):
    if kernel == "scattermoe" and torch.cuda.is_available():
        pytest.skip("interpreted: see tests/gpu")
    model = accel_moe.prepare(tiny_model(), moe_kernel=kernel)
    layer = first_layer(model)
    counted = assert_strays_do_nothing(layer)
    expert_load(model)
    index, weights, rows = slots(0)
    layer(rows, index, weights)
    assert torch.equal(expert_load(model)["model.layers.0.mlp.experts"], counted)


def over_ranks(dispatcher: str, kernel: str) -> bool:
    accelerator, model, _ = prepared(Case(2, 2, kernel=kernel, options=(("moe_dispatcher", dispatcher),)))
    layer, rank = first_layer(model), accelerator.process_index
    counted = assert_strays_do_nothing(layer, rank)
    counted = accelerator.reduce(counted.to(accelerator.device)).cpu()
    expert_load(model)
    index, weights, rows = slots(rank, accelerator.device)
    layer(rows, index, weights)
    return torch.equal(expert_load(model)["model.layers.0.mlp.experts"], counted)


@pytest.mark.parametrize(
    "dispatcher, kernel",
    [
        ("all_to_all", "scattermoe"),
        ("all_gather", "grouped_mm"),
        pytest.param("all_to_all", "grouped_mm", marks=pytest.mark.slow),
        pytest.param("all_gather", "scattermoe", marks=pytest.mark.slow),
        pytest.param("auto", "scattermoe", marks=pytest.mark.slow),
        pytest.param("auto", "grouped_mm", marks=pytest.mark.slow),
    ],
)
def test_a_stray_slot_adds_nothing_and_has_no_gradient_over_ranks(dispatcher, kernel):
    assert run_ranks(over_ranks, 2, dispatcher, kernel, interpret=True) == [True, True]


@pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted: see tests/gpu")
@pytest.mark.parametrize("stray", STRAYS)
def test_the_sort_gives_a_stray_slot_no_row(stray):
    index = torch.tensor([[0, stray], [3, 1], [stray, stray], [7, 0]])
    routing, wanted = (sort_slots(i, 8, 8) for i in (index, index.masked_fill(index == stray, 8)))
    assert torch.equal(routing.slot_row, wanted.slot_row)
    assert torch.equal(routing.expert_offsets, wanted.expert_offsets)
    used = int(wanted.expert_offsets[-1])
    assert torch.equal(routing.row_slot[:used], wanted.row_slot[:used])
