"""Decoder layers compiled as one graph each, with experts over ranks: what the parity table does not show."""

import gc
import random

import pytest
import torch
import torch.distributed as dist

from tests.distributed.exchange_runs import allocated, own_batch
from tests.distributed.parity import Case, clean, prepared, whole
from tests.ranks import run_ranks

FULLGRAPH = Case(2, 2, compiled="fullgraph")


def many_lengths(case: Case, steps: int) -> list[tuple[int, int, int]]:
    """After a third of the steps and after all, each with lengths of its own: graphs, live bytes, kept forwards."""
    from accel_moe.experts import in_graph

    accelerator, model, optimizer = prepared(case)
    generator, same = torch.Generator().manual_seed(accelerator.process_index), random.Random(0)
    found = []
    for step in range(1, steps + 1):
        own = torch.randint(0, 64, (2, same.randint(4, 40)), generator=generator).to(accelerator.device)
        accelerator.backward(model(input_ids=own, labels=own).loss)
        optimizer.step()
        optimizer.zero_grad()
        del own
        if step in (steps // 3, steps):
            gc.collect()
            graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            found.append((graphs, allocated(), len(in_graph._forwards)))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_changing_lengths_stop_recompiling_and_leave_no_memory_behind(checkpointing):
    case = Case(2, 2, compiled="fullgraph", checkpointing=checkpointing)
    for (graphs, early, kept), (graphs_at_the_end, late, kept_at_the_end) in run_ranks(many_lengths, 2, case, 200):
        assert graphs_at_the_end == graphs
        assert kept == kept_at_the_end == 0
        assert late == early


def odd_uses() -> dict[str, bool]:
    """Two backwards of one forward, forwards that nobody goes back from, and evaluation between two steps."""
    from accel_moe.experts import in_graph

    accelerator, model, _ = prepared(FULLGRAPH)
    own = own_batch(accelerator)

    def gradients():
        found = {clean(n): whole(p.grad) for n, p in model.named_parameters()}
        model.zero_grad()
        return found

    loss = model(input_ids=own, labels=own).loss
    loss.backward()
    once, facts = gradients(), {}
    with torch.no_grad():
        evaluated = model(input_ids=own, labels=own).loss
    facts["no forward is kept without a gradient"] = not in_graph._forwards
    facts["evaluation gives the same"] = torch.equal(evaluated, loss)
    loss = model(input_ids=own, labels=own).loss
    facts["a forward is kept"] = len(in_graph._forwards) == 2
    del loss
    gc.collect()
    facts["until nobody can go back"] = not in_graph._forwards
    model(input_ids=own, labels=own).loss.backward()
    again = gradients()
    facts["the same gradients"] = all(torch.equal(again[name], once[name]) for name in once)
    return facts


@pytest.mark.core
def test_forwards_without_a_backward_are_let_go_and_change_nothing():
    for facts in run_ranks(odd_uses, 2):
        assert all(facts.values()), facts


def counted(case: Case) -> dict[str, list[int]]:
    import accel_moe

    accelerator, model, _ = prepared(case)
    own = own_batch(accelerator)
    model(input_ids=own, labels=own).loss.backward()
    return {name: counts.tolist() for name, counts in accel_moe.tokens_per_expert(model).items()}


def test_tokens_are_counted_as_they_are_uncompiled():
    assert run_ranks(counted, 2, FULLGRAPH) == run_ranks(counted, 2, Case(2, 2))
    assert sum(map(sum, run_ranks(counted, 2, FULLGRAPH)[0].values())) > 0


def second_backward() -> str:
    accelerator, model, _ = prepared(FULLGRAPH)
    own = own_batch(accelerator)
    rows = torch.randn(6, 32, device=accelerator.device)
    layer = next(m for m in model.modules() if hasattr(m, "_accel_moe_layer"))
    index, weights = torch.zeros(6, 2, dtype=torch.long, device=rows.device), rows.new_ones(6, 2, requires_grad=True)
    step = torch.compile(lambda *tokens: layer(*tokens), backend="aot_eager", fullgraph=True)
    out = step(rows, index, weights).sum()
    first = torch.autograd.grad(out, weights, retain_graph=True)
    second = torch.autograd.grad(out, weights)
    assert torch.equal(first[0], second[0])
    dist.barrier()
    del own
    try:
        torch.autograd.grad(out, weights)
    except RuntimeError as error:
        return str(error)
    return ""


def test_a_graph_that_is_retained_can_go_back_twice():
    assert all(run_ranks(second_backward, 2))
