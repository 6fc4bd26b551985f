"""The exchange around its happy path: in chunks, under activation checkpointing, without memory, with a dead rank."""

import time
from dataclasses import replace

import pytest
import torch

from tests.distributed import exchange_runs as runs
from tests.distributed.parity import Case, differences
from tests.distributed.test_parity import oracle
from tests.ranks import run_ranks

RECOMPUTE = ("moe_keep_exchanged", False)
TO_ALL = (("moe_dispatcher", "all_to_all"),)
TO_EVERY_RANK, SHARED = (("moe_dispatcher", "all_gather"),), (("moe_dispatcher", "symmetric"),)
EXCHANGES = {"all_to_all": 8, "all_gather": 10, "symmetric": 10, "auto": 10}
"""Of a step of two layers: two forward and two backward each, and the routing weights' gradients beside the rows' under
all_gather and symmetric. Exchanging again costs the way out once more for each layer; bringing the sums back is left
out, because checkpointing stops once it has what backward needs."""


def assert_same(found: dict, wanted: dict) -> None:
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert torch.equal(found[name], gradient), (
            name
        )  # the same sums in the same order: nothing is computed otherwise


@pytest.mark.parametrize(
    "nothing_received", [pytest.param(False, marks=pytest.mark.slow), True], ids=["", "nothing received"]
)
@pytest.mark.parametrize(
    "dispatcher", [pytest.param(d, marks=[pytest.mark.slow] if d in ("auto", "symmetric") else []) for d in EXCHANGES]
)
def test_activation_checkpointing_does_not_exchange_twice(dispatcher, nothing_received):
    options = (("moe_dispatcher", dispatcher),)
    case = Case(2, 2, nothing_received=nothing_received, options=options)
    plain, calls = run_ranks(runs.gradients_and_exchanges, 2, case)[0]
    assert calls == EXCHANGES[dispatcher]
    case = replace(case, checkpointing=True)
    kept, calls = run_ranks(runs.gradients_and_exchanges, 2, case)[0]
    assert calls == EXCHANGES[dispatcher]
    assert_same(kept, plain)
    case = replace(case, options=(*options, RECOMPUTE))
    again, calls = run_ranks(runs.gradients_and_exchanges, 2, case)[0]
    assert calls == EXCHANGES[dispatcher] + 2
    assert_same(again, plain)


@pytest.mark.parametrize(
    ("family", "when"),
    [
        ("qwen3_moe", "before"),
        pytest.param("qwen3_moe", "after", marks=pytest.mark.slow),
        pytest.param("deepseek_v3", "before", marks=pytest.mark.slow),
        ("deepseek_v3", "after"),
    ],
)
def test_gradient_checkpointing_of_transformers_does_not_exchange_twice(family, when):
    case = Case(2, 2, family=family)
    plain, expected = run_ranks(runs.gradients_and_exchanges, 2, case)[0]
    kept, calls = run_ranks(runs.gradients_and_exchanges, 2, case, when)[0]
    assert calls == expected
    assert_same(kept, plain)


def test_what_is_kept_survives_a_model_that_changes_its_experts_output_in_place():
    from torch.utils.checkpoint import checkpoint

    from accel_moe.dispatch.replay import kept_exchanges, replayed

    class Exchange(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return replayed(lambda: 2 * x, handed_out=True)

        @staticmethod
        def backward(ctx, gradient):
            return 2 * gradient

    def block(x):
        y = Exchange.apply(x)
        y *= 3
        return (y * y).sum()  # saves y

    x = torch.ones(2, requires_grad=True)
    loss = checkpoint(block, x, use_reentrant=False, context_fn=kept_exchanges)
    for _ in range(2):
        (gradient,) = torch.autograd.grad(loss, x, retain_graph=True)
        assert gradient.tolist() == [72.0, 72.0]


def test_a_kept_forward_can_be_run_again_more_than_once():
    for first, second in run_ranks(runs.backward_twice, 2, Case(2, 2, checkpointing=True)):
        assert_same(second, first)


@pytest.mark.core
@pytest.mark.parametrize("where", [0, 1])
def test_what_cannot_fit_is_refused_on_every_rank_before_it_is_allocated(where):
    free = [2**30, 2**30]
    free[where] = 4096
    for text, went_on in run_ranks(runs.crowded, 2, Case(2, 2, nothing_received=True, options=TO_ALL), free):
        if where == 1:  # sends all its rows away, and needs nothing
            assert text == ""
        else:
            assert "ep rank 0 were sent" in text and "moe_dispatch_chunk_tokens" in text
        assert went_on


def test_chunks_need_less_than_the_whole():
    """The same memory, too little for all tokens at once, is enough for three at a time."""
    case = Case(2, 2, nothing_received=True, options=TO_ALL)
    free = [6 * 32 * 4 + 12 * (2 * 24 + 24) * 4 + 1, 2**30]  # 3 rows from each of 2 ranks, 2 experts for each
    assert all("moe_dispatch_chunk_tokens" in text for text, _ in run_ranks(runs.crowded, 2, case, free))
    in_chunks = replace(case, options=(*TO_ALL, ("moe_dispatch_chunk_tokens", 3)))
    assert all(text == "" for text, _ in run_ranks(runs.crowded, 2, in_chunks, free))


@pytest.mark.parametrize(
    "dispatcher", ["all_gather", *(pytest.param(name, marks=pytest.mark.slow) for name in ("all_to_all", "symmetric"))]
)
def test_a_rank_that_counts_its_operations_in_backward_exchanges_with_those_that_do_not(dispatcher):
    """Under a dispatch mode our kernels run as operators, which start no gradient early: the order must not change."""
    case = Case(2, 2, kernel="scattermoe", interpret=True, options=(("moe_dispatcher", dispatcher),))
    plain, counted = (run_ranks(runs.counted_backward, 2, case, on, interpret=True)[0] for on in (False, True))
    assert_same(counted, plain)


@pytest.mark.parametrize("options", [(), (*TO_ALL, RECOMPUTE), (*TO_ALL, ("moe_dispatch_chunk_tokens", 5))], ids=str)
def test_dropout_drops_the_same_when_activation_checkpointing_runs_a_layer_again(options):
    """accelerate asks for other random numbers then: another routing, and gradients of another forward."""
    plain = run_ranks(runs.gradients_with_dropout, 2, Case(2, 2))[0]
    again = run_ranks(runs.gradients_with_dropout, 2, Case(2, 2, checkpointing=True, options=options))[0]
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-4, atol=1e-6, msg=name)  # as the parity table's


def test_a_second_model_makes_no_process_groups():
    (first, *others), *_ = run_ranks(runs.groups_after_each_model, 2, Case(2, 2), 3)
    assert others == [first, first]


@pytest.mark.parametrize("dispatcher", ["all_to_all", "all_gather", "symmetric"])
def test_a_second_derivative_is_refused(dispatcher):
    assert all("once_differentiable" in said for said in run_ranks(runs.differentiate_twice, 2, dispatcher))


def test_a_dispatcher_from_outside_the_package_trains_alike():
    case = Case(2, 2, kernel="grouped_mm")
    assert not (wrong := differences(run_ranks(runs.train_with_toy, 2, case)[0], oracle(case))), "\n".join(wrong)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(Case(2, 2), marks=pytest.mark.slow),
        Case(2, 2, checkpointing=True),
        pytest.param(Case(2, 2, options=(("moe_dispatch_chunk_tokens", 200),)), marks=pytest.mark.slow),
        pytest.param(Case(2, 2, options=SHARED), marks=pytest.mark.slow),
    ],
    ids=lambda case: getattr(case, "name", None),
)
def test_two_hundred_steps_with_changing_routings_leave_no_memory_behind(case):
    for early, late, growth in run_ranks(runs.live_bytes, 2, case, 200, 100):
        assert late == early
        # one [T, H] a layer and step would be 13 MB; the allocator's own growth levels off (1 to 2 MB by then)
        assert growth <= 8 * 2**20, growth


@pytest.mark.parametrize(
    "how, before, case",
    [
        ("killed", "_send_out", Case(2, 2, options=TO_ALL)),
        pytest.param("stuck", "_send_out", Case(4, 2, options=TO_ALL), marks=pytest.mark.slow),
        ("killed", "gather_rows", Case(2, 2, options=TO_EVERY_RANK)),
        pytest.param("stuck", "gather_rows", Case(2, 2, options=TO_EVERY_RANK), marks=pytest.mark.slow),
        pytest.param("stuck", "agree", Case(2, 2), marks=pytest.mark.slow),
        ("stuck", "gather", Case(2, 2, options=SHARED)),
        pytest.param("stuck", "sum", Case(2, 2, options=SHARED), marks=pytest.mark.slow),
    ],
    ids=lambda value: value.name if isinstance(value, Case) else value,
)
def test_a_rank_that_is_lost_in_a_step_ends_the_job_within_the_timeout(how, before, case, tmp_path):
    with pytest.raises(AssertionError, match="rank"):
        run_ranks(runs.die_in_step, case.world, case, how, before, 10.0, str(tmp_path), timeout_s=180)
    lost = float((tmp_path / "lost").read_text())
    if torch.cuda.is_available():
        # NCCL's watchdog ends the process itself: nobody is left to write. It sees the timeout after 10 s, and then
        # takes another minute to wait for the others' dumps and to abort.
        assert time.time() - lost < 120
        return
    seen, error = (tmp_path / "seen-0").read_text().split(" ", 1)
    assert float(seen) - lost < 30 and "Error" in error, (float(seen) - lost, error)
    assert "where every rank was last seen: rank" in error and "a forward of the model (training)" in error, error


def test_the_next_layers_weights_are_asked_for_before_the_host_waits_for_counts_and_the_heads_too():
    assert run_ranks(runs.layers_prefetched, 2, Case(2, 2)) == [[["model.layers.1"], ["lm_head"]]] * 2


def test_no_forward_but_the_first_asks_the_gpu_whether_sequences_are_packed():
    assert run_ranks(runs.looks_at_positions, 2, Case(2, 2), 3) == [1, 1]
