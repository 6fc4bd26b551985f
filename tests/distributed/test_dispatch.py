"""Dispatch and combine against the same sum computed without leaving the rank, for the nastiest routings.

fp32; sums over ranks are taken in another order, hence 1e-5 on values of order 1 to 10.
"""

import pytest
import torch

from accel_moe.dispatch.base import RoutedTokens
from tests.ranks import run_ranks

H, E, K = 16, 8, 3
NAMES = ["all_to_all", "all_gather", "symmetric"]


def tokens_of(kind: str, rank: int, world: int, step: int):
    """This rank's (hidden_states, top_k_index, top_k_weights) for one routing."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    count = {"ragged": 5 * rank + 3, "rank without tokens": 0 if rank == 0 else 7, "one token in all": int(rank == 1)}
    tokens = count.get(kind, 6)
    hidden = torch.randn(tokens, H, generator=generator)
    index = torch.rand(tokens, E, generator=generator).argsort(1)[:, :K]
    if kind == "all on one rank":
        index = index % (E // world)
    if kind == "all on one expert":
        index = torch.full_like(index, 5)  # a router may not do this; the exchange must not care
    if kind == "slots without an expert":
        index[:, 1] = E
        index[::2] = E + 3
    weights = torch.rand(tokens, K, generator=generator)
    return hidden, index, weights


KINDS = [
    "even",
    "ragged",
    "rank without tokens",
    "one token in all",
    "all on one rank",
    "all on one expert",
    "slots without an expert",
]


def slow_experts(hidden, index, weights, matrices):
    """sum_k w[t, k] * hidden[t] @ matrices[index[t, k]]; slots past the last matrix count nothing."""
    padded = torch.cat([matrices, matrices.new_zeros(1, H, H)])
    chosen = padded[index.clamp(max=len(matrices))]
    return torch.einsum("th,tkhj,tk->tj", hidden, chosen, weights)


def check_routings(dtype, name: str) -> None:
    import torch.distributed as dist

    from accel_moe.dispatch import make_dispatcher

    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    dispatcher = make_dispatcher(name, dist.group.WORLD, E)
    matrices = torch.randn(E, H, H, generator=torch.Generator().manual_seed(0)).to(device)
    e = E // world
    for step, kind in enumerate(KINDS):
        hidden, index, weights = (t.to(device) for t in tokens_of(kind, rank, world, step))
        weights = weights.to(dtype)
        hidden.requires_grad_()
        weights.requires_grad_()
        expected = slow_experts(hidden, index, weights.float(), matrices)
        upstream = torch.randn_like(expected)
        expected_gradients = torch.autograd.grad(expected, (hidden, weights), upstream)

        sent = dispatcher.dispatch(RoutedTokens(hidden, index, weights))
        assert sent.local_weights.dtype == dtype and sent.rows.shape[0] >= 1
        ours = sent.local_index < e
        num_pairs = sent.num_pairs if isinstance(sent.num_pairs, int) else sent.num_pairs.wait()
        assert int(ours.sum()) == num_pairs, kind
        assert not sent.local_weights[~ours].any(), kind
        rows = slow_experts(
            sent.rows, sent.local_index, sent.local_weights.float(), matrices[rank * e : (rank + 1) * e]
        )
        # What an experts function leaves in its sentinel slots' gradients must not come home.
        sent.local_weights.register_hook(lambda g, ours=ours: torch.where(ours, g, float("nan")))
        out = dispatcher.combine(rows, sent).mul_(1.0)  # in place: a model may
        gradients = torch.autograd.grad(out, (hidden, weights), upstream)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5, msg=lambda m, kind=kind: f"{kind}: {m}")
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        for gradient, wanted in zip(gradients, expected_gradients):
            torch.testing.assert_close(
                gradient, wanted, rtol=tolerance, atol=tolerance, msg=lambda m, kind=kind: f"{kind}: {m}"
            )


def check_chunks(limit: int, name: str) -> None:
    """Every routing in chunks: the same numbers, forward and backward, whatever the ranks' numbers of tokens."""
    import torch.distributed as dist

    from accel_moe.dispatch import make_dispatcher
    from accel_moe.dispatch.chunks import in_chunks

    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    dispatcher = make_dispatcher(name, dist.group.WORLD, E)
    matrices = torch.randn(E, H, H, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
    e = E // world
    most = []

    def layer(tokens):
        sent = dispatcher.dispatch(tokens)
        most.append(sent.rows.shape[0])
        own = matrices[rank * e : (rank + 1) * e]
        return dispatcher.combine(slow_experts(sent.rows, sent.local_index, sent.local_weights, own), sent)

    for step, kind in enumerate(KINDS):
        tokens = RoutedTokens(*(t.to(device) for t in tokens_of(kind, rank, world, step)))
        tokens[0].requires_grad_()
        tokens[2].requires_grad_()
        wanted = (tokens[0], tokens[2], matrices)
        whole = layer(tokens)
        upstream = torch.randn_like(whole)
        expected = torch.autograd.grad(whole, wanted, upstream)
        most.clear()
        chunked = in_chunks(layer, tokens, limit, dist.group.WORLD)
        assert max(most) <= max(1, world * limit), kind
        # cuBLAS may add in another order for fewer rows: fp32 noise; a CPU does not.
        noise = 1e-5 if device.type == "cuda" else 0.0
        torch.testing.assert_close(chunked, whole, rtol=noise, atol=noise, msg=lambda m, kind=kind: f"{kind}: {m}")
        for gradient, want in zip(torch.autograd.grad(chunked, wanted, upstream), expected):
            torch.testing.assert_close(gradient, want, rtol=1e-5, atol=1e-5, msg=lambda m, kind=kind: f"{kind}: {m}")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("limit", [1, 4, 100])
@pytest.mark.parametrize("world", [2, 4])
def test_a_dispatch_in_chunks_gives_the_same_numbers_for_every_routing(world, limit, name):
    run_ranks(check_chunks, world, limit, name)


@pytest.mark.core
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_dispatch_and_combine_equal_the_sum_on_one_rank_for_every_routing(world, name, dtype):
    run_ranks(check_routings, world, dtype, name)


def check_rows_sent_once() -> None:
    import torch.distributed as dist

    from accel_moe.dispatch.all_to_all import AllToAllDispatcher

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    dispatcher = AllToAllDispatcher(dist.group.WORLD, E)
    index = torch.tensor([[0, 1, 2], [0, 4, 5], [6, 7, 5]])  # ranks {0}, {0, 1}, {1}
    hidden = torch.arange(3.0)[:, None].expand(3, H) + 10 * rank
    sent = dispatcher.dispatch(RoutedTokens(hidden, index, torch.ones(3, 3)))
    expected = [10.0, 11.0, 0.0, 1.0] if rank == 0 else [1.0, 2.0, 11.0, 12.0]  # the other rank's, then our own
    assert sent.rows[:, 0].tolist() == expected
    assert (sent.handle.num_sent, sent.handle.num_own) == (2, 2)  # our own do not travel
    assert sent.num_pairs == (8 if rank == 0 else 10)
    assert sent.local_index[0].tolist() == ([0, 1, 2] if rank == 0 else [4, 0, 1])


def test_a_row_travels_once_to_each_rank_that_needs_it_with_its_local_experts():
    run_ranks(check_rows_sent_once, 2)
