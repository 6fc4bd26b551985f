"""The kernels compiled, on a GPU: real shapes in bf16 against an fp32 loop, edges, bit equality, CUDA graphs.

Each test runs on both roads: gemm.py's kernels alone, and with hopper.py's wherever they can compute.

bf16 error is judged by transformers' grouped_mm on the same inputs: ours may not be larger. What the two
round differs (ours rounds h, act(h) and y; grouped_mm also its intermediate products), so a margin of a tenth
covers chance.
"""

from types import SimpleNamespace

import pytest
import torch

from accel_moe.kernels import roads, tuning
from accel_moe.kernels.casts import Casts
from accel_moe.kernels.deferred_count import DeferredCount
from accel_moe.kernels.glu import Glu
from accel_moe.kernels.launch_passes import add_counts
from accel_moe.kernels.routing import list_tiles, sort_and_tile
from tests.experts_layer import experts

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True, params=["triton", "gluon"])
def road(request, monkeypatch):
    """gluon: the kernels of hopper*.py, even where experts have too few rows for them to be worth it."""
    gluon = request.param == "gluon"
    monkeypatch.setenv("SCATTERMOE_GLUON", "1" if gluon else "0")
    roads.gluon_road.cache_clear()
    if gluon and (torch.cuda.get_device_capability()[0] != 9 or roads.gluon_road() is None):
        pytest.skip("needs a Hopper GPU and a Triton with Gluon")
    choose = tuning.choose

    def choose_gluon(problem, launch):
        if not problem.gluon:
            return choose(problem, launch)
        return tuning._on_hopper(problem._replace(rows=4096 * problem.num_experts))[0]

    monkeypatch.setattr(tuning, "choose", choose_gluon)
    yield request.param
    roads.gluon_road.cache_clear()
    assert not roads._failed


def eager(x, w1, w2, index, weights):
    """The meaning of the layer: silu-gated experts, one at a time."""
    out = torch.zeros_like(x)
    for e in range(w1.shape[0]):
        token, k = torch.where(index == e)
        gate, up = (x[token] @ w1[e].T).chunk(2, -1)
        y = (torch.nn.functional.silu(gate) * up) @ w2[e].T
        out = out.index_add(0, token, (y * weights[token, k, None]).to(out.dtype))
    return out


def grouped_mm(x, w1, w2, index, weights):
    """The peer: the same layer through transformers."""
    forward = pytest.importorskip("transformers.integrations.moe").grouped_mm_experts_forward
    module = SimpleNamespace(
        num_experts=w1.shape[0],
        gate_up_proj=w1,
        down_proj=w2,
        has_gate=True,
        has_bias=False,
        is_transposed=False,
        has_post_expert_norm=False,
        _is_expert_parallel=True,
        _apply_gate=lambda h: torch.nn.functional.silu(h.chunk(2, -1)[0]) * h.chunk(2, -1)[1],
    )
    return forward(module, x, index, weights)


def make(T, K, H, I, E, dtype, seed=0):
    gen = torch.Generator("cuda").manual_seed(seed)
    options = {"generator": gen, "device": "cuda"}
    x = torch.randn(T, H, **options).to(dtype)
    w1 = (torch.randn(E, 2 * I, H, **options) / H**0.5).to(dtype)
    w2 = (torch.randn(E, H, I, **options) / I**0.5).to(dtype)
    logits = torch.randn(T, E, **options) + 0.5 * torch.randn(E, **options)
    weights, index = logits.softmax(-1).topk(K, dim=-1)
    return [x, w1, w2, index, weights]


def run(fn, args, dout, **kwargs):
    x, w1, w2, index, weights = args
    leaves = [t.detach().clone().requires_grad_() for t in (x, w1, w2, weights)]
    out = fn(*leaves[:3], index, leaves[3], **kwargs)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))]


def ours(*args, **kwargs):
    return experts(*args, act="silu", **kwargs)


def upcast(args):
    return [t.float() if t.is_floating_point() else t for t in args]


def error(actual, expected):
    """Relative Frobenius norm of the difference."""
    scale = expected.float().norm()
    return ((actual.float() - expected.float()).norm() / scale).item() if scale else actual.float().norm().item()


NAMES = ("out", "dx", "dw1", "dw2", "dweights")
REAL = {
    "qwen3": (4096, 8, 2048, 768, 128),
    "mixtral": (2048, 2, 4096, 14336, 8),
    "granite": (4096, 8, 1536, 512, 40),
    "olmoe": (4096, 8, 2048, 1024, 64),
}


@pytest.mark.parametrize("name", REAL)
def test_bf16_error_is_no_larger_than_grouped_mm(name):
    args = make(*REAL[name], torch.bfloat16)
    dout = torch.randn(args[0].shape, device="cuda").bfloat16()
    expected = run(eager, upcast(args), dout)
    peer = [error(a, e) for a, e in zip(run(grouped_mm, args, dout), expected, strict=True)]
    mine = [error(a, e) for a, e in zip(run(ours, args, dout), expected, strict=True)]
    for n, m, p in zip(NAMES, mine, peer, strict=True):
        assert m <= 1.1 * p and m < 2e-2, (n, mine, peer)


def test_gpt_oss_like_experts_at_real_width():
    """In bf16: transposed, biased, interleaved and clamped. 2e-2 as for the edges below."""
    T, K, H, I, E = 1024, 4, 2880, 2880, 8
    x, w1, w2, index, weights = make(T, K, H, I, E, torch.bfloat16)
    w1, w2 = w1.transpose(1, 2).contiguous(), w2.transpose(1, 2).contiguous()
    b1, b2 = (torch.randn(E, n, device="cuda").bfloat16() for n in (2 * I, H))
    dout = torch.randn(x.shape, device="cuda").bfloat16()

    gate = Glu(interleaved=True, alpha=1.702, shift=1.0, limit=7.0)

    def loop(x, w1, w2, b1, b2, index, weights):
        out = torch.zeros_like(x)
        for e in range(E):
            token, k = torch.where(index == e)
            y = gate(x[token] @ w1[e] + b1[e]) @ w2[e] + b2[e]
            out = out.index_add(0, token, y * weights[token, k, None])
        return out

    def fused(x, w1, w2, b1, b2, index, weights):
        return experts(x, w1, w2, index, weights, b1=b1, b2=b2, glu=gate, transposed=True)

    results = []
    for function, dtype in ((fused, torch.bfloat16), (loop, torch.float32)):
        leaves = [t.to(dtype).requires_grad_() for t in (x, w1, w2, b1, b2)] + [weights.clone().requires_grad_()]
        out = function(*leaves[:5], index, leaves[5])
        results.append([out, *torch.autograd.grad(out, leaves, dout.to(dtype))])
    for name, a, e in zip(("out", "dx", "dw1", "dw2", "db1", "db2", "dweights"), *results, strict=True):
        assert error(a, e) < 2e-2, name


EDGES = {
    "one token": dict(T=1, K=2, H=64, I=48, E=8),
    "K = 1": dict(T=77, K=1, H=64, I=64, E=4),
    "one expert": dict(T=300, K=1, H=256, I=1088, E=1),
    "256 experts": dict(T=300, K=8, H=128, I=64, E=256),
    "no multiples": dict(T=333, K=3, H=200, I=88, E=7),
    "unaligned rows": dict(T=130, K=2, H=67, I=33, E=4),
    "many rows": dict(T=5000, K=4, H=256, I=128, E=8),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("edge", EDGES)
def test_edges_in_every_dtype(edge, dtype):
    args = make(**EDGES[edge], dtype=dtype)
    dout = torch.randn(args[0].shape, device="cuda").to(dtype)
    # fp32 without tf32 sums exact products; bf16 has 8 bits and fp16 11, and three tensors are rounded on the
    # way
    bound = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    for name, a, e in zip(NAMES, run(ours, args, dout), run(eager, upcast(args), dout), strict=True):
        assert error(a, e) < bound, name


@pytest.mark.parametrize("intermediate", [192, 1088])  # of narrow experts Gluon gathers rows, of wide ones it copies
@pytest.mark.parametrize("counted", [False, True])
def test_sentinels_and_an_idle_expert(counted, intermediate):
    args = make(900, 4, 256, intermediate, 8, torch.bfloat16)
    args[3] = torch.where(args[3] == 5, 8, args[3])
    args[3] = args[3].masked_fill(torch.rand(args[3].shape, device="cuda") < 0.6, 8)
    pairs = int((args[3] < 8).sum()) if counted else None
    dout = torch.randn(args[0].shape, device="cuda").bfloat16()
    poison = torch.full((2**28,), float("nan"), device="cuda")  # what empty() hands out next is not zero
    del poison
    actual, expected = run(ours, args, dout, num_pairs=pairs), run(eager, upcast(args), dout)
    for name, a, e in zip(NAMES, actual, expected, strict=True):
        assert error(a, e) < 2e-2, name
    assert not actual[4][args[3] == 8].any()
    assert not actual[2][5].any() and not actual[3][5].any()


@pytest.mark.parametrize("stray", [-1, -(2**40), 9, 2**40, 2**63 - 1])
def test_a_number_that_is_no_experts_is_a_slot_without_one(stray):
    args = make(900, 4, 256, 192, 8, torch.bfloat16)
    away = torch.rand(args[3].shape, device="cuda") < 0.3
    wanted = [*args[:3], args[3].masked_fill(away, 8), args[4]]
    args[3] = args[3].masked_fill(away, stray)
    dout = torch.randn(args[0].shape, device="cuda").bfloat16()
    for name, a, e in zip(NAMES, run(ours, args, dout), run(ours, wanted, dout), strict=True):
        assert torch.equal(a, e), name


def test_all_tokens_on_one_expert():
    args = make(3000, 1, 256, 192, 8, torch.bfloat16)
    args[3] = torch.full_like(args[3], 6)
    dout = torch.randn(args[0].shape, device="cuda").bfloat16()
    for name, a, e in zip(NAMES, run(ours, args, dout), run(eager, upcast(args), dout), strict=True):
        assert error(a, e) < 2e-2, name


def test_no_tokens():
    args = make(4, 2, 64, 64, 4, torch.bfloat16)
    args = [args[0][:0], args[1], args[2], args[3][:0], args[4][:0]]
    out, _, dw1, dw2, _ = run(ours, args, args[0])
    assert out.shape == (0, 64) and not dw1.any() and not dw2.any()


@pytest.mark.parametrize("tokens", [1, 512, 2048, 2049, 9000])  # with 8 slots each, 2048 are the most of one launch
@pytest.mark.parametrize("block_p", [16, 64, 128])
def test_slots_are_sorted_tiled_and_counted_alike_in_one_launch_and_in_several(tokens, block_p):
    index = torch.randint(0, 129, (tokens, 8), device="cuda")
    routing, made = sort_and_tile(index, 128, index.numel(), block_p)
    assert (made is None) == (tokens > 2048)
    counts = torch.bincount(index.flatten(), minlength=129)[:128]
    used = int(counts.sum())
    assert torch.equal(routing.row_slot[:used], torch.sort(index.flatten(), stable=True).indices[:used].int())
    assert torch.equal(routing.expert_offsets.diff(), counts.int())
    total = torch.zeros(128, dtype=torch.long, device="cuda")
    add_counts(index, total)
    add_counts(index, total)
    assert torch.equal(total, 2 * counts)
    for tiles in filter(None, (made, *list_tiles(routing, block_p, 32))):
        per_expert = (counts + tiles.block_p - 1) // tiles.block_p
        expected = torch.repeat_interleave(torch.arange(128, device="cuda"), per_expert).int()
        assert torch.equal(tiles.tile_expert[: len(expected)], expected)
        assert (tiles.tile_expert[len(expected) :] == -1).all()
        assert torch.equal(tiles.tile_offsets.diff(), per_expert.int())


def test_two_runs_give_the_same_bits():
    args = make(*REAL["granite"], torch.bfloat16)
    dout = torch.randn(args[0].shape, device="cuda").bfloat16()
    for a, b in zip(run(ours, args, dout), run(ours, args, dout), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "shape", [(512, 4, 2880, 1440, 4), (1024, 8, 512, 256, 40), (700, 3, 264, 136, 7)], ids=["wide", "many", "ragged"]
)
def test_fifty_runs_give_the_same_bits(shape):
    """A wait too few between the warps that load, multiply and store shows only now and then."""
    args = make(*shape, torch.bfloat16)
    dout = torch.randn(args[0].shape, device="cuda").bfloat16()
    first = run(ours, args, dout)
    for name, a, e in zip(NAMES, first, run(eager, upcast(args), dout), strict=True):
        assert error(a, e) < 2e-2, name
    for _ in range(50):
        poison = torch.full((2**24,), float("nan"), device="cuda")  # what empty() hands out next
        del poison
        for a, b in zip(run(ours, args, dout), first, strict=True):
            assert torch.equal(a, b)


def test_fp32_gradients_of_fp32_weights():
    """Of master weights: written once, from the fp32 sums, with no rounding to bf16 between (4e-3 if there were)."""
    args = make(1024, 4, 512, 256, 8, torch.bfloat16)
    dout = torch.randn(args[0].shape, device="cuda").bfloat16()
    masters = [args[0], *(w.float() for w in args[1:3]), *args[3:]]
    casts = Casts(masters[1:3], torch.bfloat16)
    for plain, exact in zip(run(ours, args, dout)[2:4], run(ours, masters, dout, casts=casts)[2:4], strict=True):
        assert exact.dtype == torch.float32 and torch.equal(exact.bfloat16(), plain)


@pytest.mark.parametrize("pairs", ["unknown", "counted", "later"])
def test_an_up_projection_that_is_computed_again_gives_the_same_bits(pairs):
    args = make(2048, 8, 2048, 768, 128, torch.bfloat16)
    args[3] = args[3].masked_fill(args[3] >= 64, 128)  # half the experts are elsewhere
    count = int((args[3] < 128).sum())
    options = {"num_pairs": {"unknown": None, "counted": count, "later": DeferredCount(lambda: count, 0.5)}[pairs]}
    dout = torch.randn_like(args[0])
    for again, once in zip(run(ours, args, dout, recompute_up=True, **options), run(ours, args, dout, **options)):
        assert torch.equal(again, once)


def test_weight_grad_scale():
    args = make(512, 4, 256, 128, 8, torch.bfloat16)
    dout = torch.randn(args[0].shape, device="cuda").bfloat16()
    plain, scaled = run(ours, args, dout), run(ours, args, dout, weight_grad_scale=0.5)
    for i, (a, b) in enumerate(zip(plain, scaled, strict=True)):
        assert torch.equal(a * 0.5 if i in (2, 3) else a, b)  # a power of two scales without rounding


def test_a_step_is_captured_in_a_cuda_graph_and_replayed_with_other_routing():
    args = make(600, 4, 256, 128, 8, torch.bfloat16)
    other = make(600, 4, 256, 128, 8, torch.bfloat16, seed=1)
    dout = torch.randn(args[0].shape, device="cuda").bfloat16()
    expected = run(ours, [other[0], args[1], args[2], other[3], other[4]], dout)
    leaves = [
        args[0].requires_grad_(),
        args[1].requires_grad_(),
        args[2].requires_grad_(),
        args[4].requires_grad_(),
    ]

    def step():
        out = ours(*leaves[:3], args[3], leaves[3])
        return [out, *torch.autograd.grad(out, leaves, dout)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        args[0].copy_(other[0]), args[3].copy_(other[3]), args[4].copy_(other[4])
    graph.replay()
    for a, e in zip(captured, expected, strict=True):
        assert torch.equal(a, e)


def test_no_host_sync():
    args = make(600, 4, 256, 128, 8, torch.bfloat16)
    dout = torch.ones_like(args[0])
    run(ours, args, dout)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(ours, args, dout)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_compiles_without_a_graph_break():
    args = make(600, 4, 256, 128, 8, torch.bfloat16)
    dout = torch.ones_like(args[0])
    compiled = torch.compile(lambda x, w1, w2, i, w: ours(x, w1, w2, i, w), fullgraph=True)
    for a, e in zip(run(compiled, args, dout), run(ours, args, dout), strict=True):
        assert torch.equal(a, e)


def test_offsets_past_32_bits():
    # T*K*H = 2.4e9 elements; 2I small keeps it affordable
    T, K, H, I, E = 150_000, 8, 2048, 64, 8
    if torch.cuda.mem_get_info()[0] < 30 * 2**30:
        pytest.skip("needs 30 GiB")
    x, w1, w2, index, weights = make(T, K, H, I, E, torch.bfloat16)
    out = experts(x, w1, w2, index, weights, "silu")
    tail = slice(T - 500, T)
    expected = eager(*upcast([x[tail], w1, w2, index[tail], weights[tail]]))
    assert error(out[tail], expected) < 2e-2
