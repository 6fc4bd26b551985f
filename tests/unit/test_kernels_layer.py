"""The experts layer's kernels against a loop in plain torch: output and every gradient, fp32, in Triton's
interpreter.

Tolerance: both sides sum the same fp32 products in another order; 1e-5 of the largest value is some 80
roundings. Tiles are 16 wide here (tuning.pick), so tensors of a few dozen reach every edge. bf16 and real
shapes are in tests/gpu.
"""

import pytest
import torch

from accel_moe.kernels import activations, launch, ops, sort, tuning
from accel_moe.kernels.casts import Casts
from accel_moe.kernels.deferred_count import DeferredCount
from accel_moe.kernels.glu import Glu
from accel_moe.kernels.routing import sort_slots
from accel_moe.kernels.tuning import Config
from tests.experts_layer import experts
from tests.kernels import count_launches

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted: see tests/gpu")

ACTIVATIONS = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "relu": torch.relu,
    "relu2": lambda x: torch.relu(x) ** 2,
}


def crossed(firsts, seconds):
    """All pairs. Ordinary are those with the first of either: the two do not meet in the code."""
    for first in firsts:
        for second in seconds:
            ordinary = first == firsts[0] or second == seconds[0]
            yield pytest.param(first, second, marks=[] if ordinary else pytest.mark.slow)


def eager(x, w1, w2, index, weights, act="silu", gate=None):
    """The meaning of the layer."""
    out = torch.zeros_like(x)
    for e in range(w1.shape[0]):
        token, k = torch.where(index == e)
        h = x[token] @ w1[e].T
        a = gate(h) if gate else ACTIVATIONS[act](h.chunk(2, -1)[0]) * h.chunk(2, -1)[1]
        y = a @ w2[e].T
        out = out.index_add(0, token, y * weights[token, k, None])
    return out


def make(T=19, K=2, H=24, I=20, E=4, seed=0):
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(T, H, generator=gen)
    w1 = torch.randn(E, 2 * I, H, generator=gen) / H**0.5
    w2 = torch.randn(E, H, I, generator=gen) / I**0.5
    index = torch.rand(T, E, generator=gen).topk(K, dim=-1).indices
    weights = torch.rand(T, K, generator=gen)
    return [x, w1, w2, index, weights]


def make_with_sentinels():
    """-> arguments of 40 x 3 slots, of which some six in ten are sentinels; and which."""
    args = make(T=40, K=3)
    sentinel = torch.rand(40, 3, generator=torch.Generator().manual_seed(2)) < 0.6
    args[3] = args[3].masked_fill(sentinel, 4)
    return args, sentinel


def options_of(kind, args):
    """The options of a kind of layer; args become those of one."""
    if kind == "interleaved":
        return dict(glu=Glu("silu", interleaved=True))
    if kind == "biased":
        return dict(act="silu", b1=torch.randn(4, 40), b2=torch.randn(4, 24))
    if kind == "not gated":
        args[1] = args[1][:, :20].contiguous()
        return dict(act="relu2", gated=False)
    return dict(act="silu")


def run(fn, args, dout, **kwargs):
    """-> [out, dx, dw1, dw2, dweights]."""
    x, w1, w2, index, weights = args
    leaves = [t.detach().clone().requires_grad_() for t in (x, w1, w2, weights)]
    out = fn(*leaves[:3], index, leaves[3], **kwargs)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


@pytest.fixture
def poisoned():
    """torch.empty gives NaN: what is read before it was written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def assert_close(actual, expected):
    for name, a, e in zip(("out", "dx", "dw1", "dw2", "dweights"), actual, expected, strict=True):
        assert a.dtype == e.dtype and a.shape == e.shape, name
        if e.numel():
            assert (a - e).abs().max() <= 1e-5 * max(1.0, e.abs().max().item()), name


def check(args, act="silu", **kwargs):
    dout = torch.randn(args[0].shape, generator=torch.Generator().manual_seed(1))
    actual = run(experts, args, dout, act=act, **kwargs)
    assert_close(actual, run(eager, args, dout, act=act))
    return actual


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"T": 1},
        {"T": 1, "K": 1, "E": 1},
        {"T": 33, "K": 1},
        {"T": 32, "H": 32, "I": 32},
        {"T": 40, "K": 4, "E": 4},
        {"H": 7, "I": 5},
        {"T": 5, "E": 33, "K": 3},
        {"T": 300, "K": 2, "H": 16, "I": 16, "E": 3},
    ],
    ids=str,
)
def test_output_and_gradients_equal_the_loop(shape):
    check(make(**shape))


@pytest.mark.parametrize("act", activations.ACTIVATIONS)
def test_every_activation_and_its_derivative(act):
    check(make(), act=act)


def test_expert_with_no_token_gets_exactly_zero_weight_gradient():
    args = make()
    args[3] = torch.where(args[3] == 1, 3, args[3])
    _, _, dw1, dw2, _ = check(args)
    assert not dw1[1].any() and not dw2[1].any()


def test_all_tokens_on_one_expert():
    args = make(T=50, K=1)
    args[3] = torch.full_like(args[3], 2)
    check(args)


@pytest.mark.parametrize("counted", [False, True])
def test_sentinels_add_nothing_and_get_zero_routing_gradient(counted, poisoned):
    args, sentinel = make_with_sentinels()
    *_, dweights = check(args, num_pairs=int((~sentinel).sum()) if counted else None)
    assert not dweights[sentinel].any()


def test_a_sentinel_ignores_its_index_above_num_experts_and_its_weight():
    args = make(T=9)
    args[3][::2, 0] = 4
    expected = run(eager, args, torch.ones(9, 24))
    args[3][::2, 0] = 1000
    args[4][::2, 0] = float("nan")
    assert_close(run(experts, args, torch.ones(9, 24), act="silu"), expected)


@pytest.mark.parametrize("kind, share", crossed(["gated", "interleaved", "not gated"], [0.3, 0.01, 1.0]))
def test_pairs_that_are_counted_later_give_the_same_bits_whatever_was_kept(kind, share, poisoned):
    args, sentinel = make_with_sentinels()
    options = options_of(kind, args)
    pairs = int((~sentinel).sum())
    later = DeferredCount(lambda: pairs, share)
    assert (later.likely(120) < pairs) == (share < 0.4)  # then backward computes the pre-activation again
    dout = torch.randn(40, 24, generator=torch.Generator().manual_seed(1))
    found = run(experts, args, dout, num_pairs=later, **options)
    for ours, counted in zip(found, run(experts, args, dout, num_pairs=pairs, **options), strict=True):
        assert torch.equal(ours, counted)
    with torch.no_grad():
        assert torch.equal(experts(*args[:3], *args[3:], num_pairs=later, **options), found[0])


@pytest.mark.parametrize("kind, pairs", crossed(["gated", "biased", "not gated"], ["counted", "unknown", "later"]))
def test_an_up_projection_that_is_computed_again_gives_the_same_bits_and_is_not_kept(pairs, kind, poisoned):
    args, sentinel = make_with_sentinels()
    options = options_of(kind, args)
    count = int((~sentinel).sum())
    options["num_pairs"] = {"unknown": None, "counted": count, "later": DeferredCount(lambda: count, 0.9)}[pairs]
    dout = torch.randn(40, 24, generator=torch.Generator().manual_seed(1))
    kept, found = {}, {}
    for keep_h in (True, False):

        def pack(tensor):
            kept[keep_h] = kept.get(keep_h, 0) + tensor.numel()  # noqa: B023
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            found[keep_h] = run(experts, args, dout, recompute_up=not keep_h, **options)
    for again, once in zip(found[False], found[True], strict=True):
        assert torch.equal(again, once)
    rows = {"unknown": 120, "counted": count, "later": options["num_pairs"] and DeferredCount(int, 0.9).likely(120)}[
        pairs
    ]
    assert kept[True] - kept[False] == rows * args[1].shape[1]


@pytest.mark.parametrize("biased", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_up_projection_that_is_computed_again_compiles_into_one_graph(biased):
    x, w1, w2, index, weights = make()
    biases = dict(b1=torch.randn(4, 40, requires_grad=True), b2=torch.randn(4, 24)) if biased else {}
    leaves = [t.requires_grad_() for t in (x, w1, w2, weights)] + [b for b in biases.values() if b.requires_grad]
    layer = lambda: experts(x, w1, w2, index, weights, "silu", recompute_up=True, **biases)  # noqa: E731
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = [[out, *torch.autograd.grad(out.sum(), leaves)] for out in (compiled(), layer())]
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("keep_h", [pytest.param(True, marks=pytest.mark.slow), False])
def test_forward_its_repetition_and_evaluation_are_tuned_for_the_same_number_of_rows(keep_h, monkeypatch):
    tuned, tuned_for = launch.tuned, []

    def noted(kernel, layer, rows, x, run, term=None):
        if kernel == "up":
            tuned_for.append(rows)
        return tuned(kernel, layer, rows, x, run, term)

    monkeypatch.setattr(launch, "tuned", noted)
    args = make(T=40, K=3)
    later = DeferredCount(lambda: 120, 0.5)  # more than is likely: computed again, whatever is kept
    run(experts, args, torch.ones(40, 24), act="silu", num_pairs=later, recompute_up=not keep_h)
    with torch.no_grad():
        experts(*args, "silu", num_pairs=later)
    assert tuned_for == [later.likely(120)] * 3 and later.likely(120) < 120


def test_later_pairs_that_turn_out_to_be_none():
    args = make()
    args[3] = torch.full_like(args[3], 4)
    out, *grads = check(args, num_pairs=DeferredCount(lambda: 0, 0.5))
    assert not out.any() and not any(g.any() for g in grads)


@pytest.mark.parametrize("frozen", ["", "x", "weights", "experts"])
def test_rows_ready_is_told_the_very_gradients_before_those_of_the_experts(frozen, monkeypatch):
    x, w1, w2, index, weights = make()
    leaves = {"x": [x], "weights": [weights], "experts": [w1, w2]}
    for name, tensors in leaves.items():
        for tensor in tensors:
            tensor.requires_grad_(name != frozen)
    order, told = [], []
    weight_grad = launch.weight_grad
    monkeypatch.setattr(launch, "weight_grad", lambda *a: (order.append("weight_grad"), weight_grad(*a))[1])

    def ready(grad_x, grad_weights):
        order.append("ready")
        told.extend(grad.detach().clone() for grad in (grad_x, grad_weights))

    experts(x, w1, w2, index, weights, "silu", on_input_grads=ready).sum().backward()
    assert order == ["ready"] + ["weight_grad"] * (0 if frozen == "experts" else 2)
    for grad, leaf in zip(told, (x, weights)):
        assert torch.equal(grad, leaf.grad) if leaf.requires_grad else not grad.numel()


@pytest.mark.parametrize("num_pairs", [None, 0])
def test_nothing_but_sentinels(num_pairs):
    args = make()
    args[3] = torch.full_like(args[3], 4)
    out, *grads = check(args, num_pairs=num_pairs)
    assert not out.any() and not any(g.any() for g in grads)


def test_no_tokens_at_all():
    args = make()
    args = [args[0][:0], args[1], args[2], args[3][:0], args[4][:0]]
    _, _, dw1, dw2, _ = check(args)
    assert not dw1.any() and not dw2.any()


def test_non_contiguous_input_weights_and_gradient():
    args = make()
    expected = run(eager, args, torch.ones(19, 24))
    args[0] = args[0].repeat(1, 2)[:, :24]  # rows twice as far apart
    args[4] = args[4].T.contiguous().T
    args[3] = args[3].T.contiguous().T
    assert_close(run(experts, args, torch.ones(1, 1).expand(19, 24), act="silu"), expected)
    args[0] = args[0].T.contiguous().T
    args[1], args[2] = (w.transpose(1, 2).contiguous().transpose(1, 2) for w in args[1:3])
    assert_close(run(experts, args, torch.ones(1, 1).expand(19, 24), act="silu"), expected)


def test_gathered_rows_are_padded_with_zeros_to_whole_blocks():
    x, *_, index, _ = make(T=40, K=3)
    routing = sort_slots(index, 4, 120)
    padded = launch.Gathered(x, routing, launch.TileLists(routing)).padded
    offsets, tiles = routing.expert_offsets.tolist(), padded.tiles.tile_offsets.tolist()
    for e in range(4):
        block = padded.data[tiles[e] * launch.PAD : tiles[e + 1] * launch.PAD]
        token = routing.row_slot[offsets[e] : offsets[e + 1]] // 3
        assert torch.equal(block[: len(token)], x[token])
        assert not block[len(token) :].any()


@pytest.mark.parametrize("gate", [None, Glu(interleaved=True, alpha=1.7, shift=1.0, limit=0.5)], ids=str)
@pytest.mark.parametrize("shape", [{}, {"T": 70, "K": 3, "H": 40, "I": 36, "E": 5}], ids=str)
def test_operands_read_by_descriptor_give_the_same(shape, gate, monkeypatch, poisoned):
    """The interpreter knows descriptors too: here every operand that the copy engine of a newer chip would bring."""
    descriptors = []
    real = launch._descriptor
    monkeypatch.setattr(launch, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(
        launch, "_descriptor", lambda t, block, *layout: descriptors.append(block) or real(t, block, *layout)
    )
    args = make(**shape)
    args[3][::3, 0] = args[1].shape[0]  # sentinels: rows at the end of the buffers that nobody wrote
    dout = torch.randn(args[0].shape, generator=torch.Generator().manual_seed(1))
    assert_close(run(experts, args, dout, glu=gate), run(eager, args, dout, gate=gate))
    assert len(descriptors) == 11  # by launch: W1; a, W2; dout, W2; dout, sa; dh, x; dh, W1


def test_interleaved_pairs_of_16_bits_are_read_and_written_as_words():
    """fp16: half a unit in the last place is 5e-4 of a value, and every result is rounded a few times on the way."""
    gate = Glu(interleaved=True, alpha=1.7, shift=1.0, limit=0.5)
    args, dout = make(), torch.randn(19, 24, generator=torch.Generator().manual_seed(1))
    half = [t.half() if t.is_floating_point() else t for t in args]
    actual = run(experts, half, dout.half(), glu=gate)
    rounded = [t.float() if t.is_floating_point() else t for t in half]
    for a, e in zip(actual, run(eager, rounded, dout.half().float(), gate=gate), strict=True):
        assert (a.float() - e).abs().max() <= 4e-3 * e.abs().max()


def test_two_runs_give_the_same_bits():
    args, dout = make(T=60, K=3), torch.randn(60, 24)
    for a, b in zip(run(experts, args, dout, act="silu"), run(experts, args, dout, act="silu"), strict=True):
        assert torch.equal(a, b)


def test_weight_grad_scale_multiplies_weight_gradients_and_nothing_else():
    args, dout = make(), torch.ones(19, 24)
    out, dx, dw1, dw2, dweights = run(eager, args, dout)
    scaled = run(experts, args, dout, act="silu", weight_grad_scale=0.25)
    assert_close(scaled, [out, dx, dw1 * 0.25, dw2 * 0.25, dweights])


@pytest.mark.parametrize("frozen", range(4))
def test_a_frozen_tensor_gets_no_gradient_and_the_others_theirs(frozen):
    x, w1, w2, index, weights = args = make()
    expected = run(eager, args, torch.ones(19, 24))[1:]
    leaves = [t.clone().requires_grad_(i != frozen) for i, t in enumerate((x, w1, w2, weights))]
    experts(*leaves[:3], index, leaves[3], "silu").backward(torch.ones(19, 24))
    for i, (leaf, e) in enumerate(zip(leaves, expected, strict=True)):
        if i == frozen:
            assert leaf.grad is None
        else:
            torch.testing.assert_close(leaf.grad, e, rtol=1e-5, atol=1e-5)


def test_backward_launches_no_gemm_for_frozen_weights(monkeypatch):
    def refuse(*_):
        raise AssertionError("weight gradient computed")

    monkeypatch.setattr(launch, "weight_grad", refuse)
    x, w1, w2, index, weights = make()
    experts(x.requires_grad_(), w1, w2, index, weights, "silu").sum().backward()
    with pytest.raises(AssertionError, match="weight gradient computed"):
        experts(x, w1.requires_grad_(), w2, index, weights, "silu").sum().backward()


def test_a_backward_lists_its_tiles_in_one_launch(monkeypatch):
    """Those of the GEMMs, here 32 rows high, and those of the copy of rows."""
    tall, flat = (Config(rows, 16, 16, num_warps=1, num_stages=1, group=2) for rows in (32, 16))
    monkeypatch.setattr(tuning, "_known", lambda problem: flat if problem.kernel.endswith("grad") else tall)
    x, w1, w2, index, weights = make()
    out = experts(x.requires_grad_(), w1.requires_grad_(), w2.requires_grad_(), index, weights, "silu")
    launches = count_launches(monkeypatch, sort, "list_tiles")
    out.sum().backward()
    assert len(launches) == 1


def test_weights_of_another_dtype_are_cast_twice_and_get_their_gradients_in_their_own():
    x, w1, w2, index, weights = make()
    dout = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    expected = run(experts, [x, w1, w2, index, weights], dout, act="silu")
    masters = [w.double().requires_grad_() for w in (w1, w2)]
    casts = Casts(masters, torch.float32)
    casts.prepare()
    leaves = [x.clone().requires_grad_(), *masters, weights.clone().requires_grad_()]
    out = experts(leaves[0], *masters, index, leaves[3], "silu", casts=casts)
    assert casts._made is None  # handed out, and nobody keeps them until backward
    saved = {t.data_ptr() for t in out.grad_fn.saved_tensors if t is not None}
    assert {w.data_ptr() for w in masters} <= saved
    found = [out.detach(), *torch.autograd.grad(out, leaves, dout)]
    assert [g.dtype for g in found[2:4]] == [torch.float64] * 2
    for gradient, wanted in zip(found, expected):
        assert torch.equal(gradient.float(), wanted)  # the same products; float64 only holds the fp32 sums


def test_saved_for_backward_is_h_and_integers_besides_the_inputs():
    x, w1, w2, index, weights = make()
    saved = []
    inputs = {t.data_ptr() for t in (x, w1, w2, weights)}
    leaves = [t.requires_grad_() for t in (x, w1, w2, weights)]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        experts(*leaves[:3], index, leaves[3], "silu")
    new = [t for t in saved if t.data_ptr() not in inputs]
    assert [tuple(t.shape) for t in new if t.is_floating_point() and t.numel()] == [(38, 40)]
    assert {t.dtype for t in new if not t.is_floating_point()} == {torch.int32}


def test_inference_mode_saves_nothing_and_gives_the_same_output():
    args = make()
    with torch.inference_mode():
        out = experts(*args, "silu")
    torch.testing.assert_close(out, eager(*args), rtol=1e-5, atol=1e-5)
    x, w1, w2, *routing = args
    inputs = (x, w1, w2, None, None, [], [], *routing, "silu", [], True, False, -1, 38, 0)
    assert ops.experts_forward(*inputs)[1].numel() == 0


def test_bf16_routing_weights_keep_their_dtype_in_the_gradient():
    args = make()
    args[4] = args[4].bfloat16()
    actual = run(experts, args, torch.ones(19, 24), act="silu")
    args[4] = args[4].float()
    expected = run(eager, args, torch.ones(19, 24))
    assert actual[4].dtype == torch.bfloat16
    actual[4], expected[4] = actual[4].float(), expected[4].bfloat16().float()
    torch.testing.assert_close(actual[4], expected[4], rtol=1e-2, atol=1e-2)  # one bf16 rounding
    assert_close(actual[:4] + expected[4:], expected)


def test_compiles_without_a_graph_break_and_the_fake_kernels_agree():
    args = make()
    leaves = [t.clone().requires_grad_() for t in (*args[:3], args[4])]
    layer = torch.compile(
        lambda x, w1, w2, w: experts(x, w1, w2, args[3], w, "silu") * 2, fullgraph=True, backend="aot_eager"
    )
    out = layer(*leaves)
    grads = torch.autograd.grad(out, leaves, torch.full((19, 24), 0.5))
    assert_close([out / 2, *grads], run(eager, args, torch.ones(19, 24)))
    no_grad = [t.detach() for t in args]
    x, w1, w2, *routing = no_grad
    inputs = (x, w1, w2, None, None, [], [], *routing, "silu", [], True, False, -1, 38, 38)
    torch.library.opcheck(ops.experts_forward, inputs, test_utils="test_faketensor")
    _, h, narrow, _, *sorted_slots = ops.experts_forward(*inputs)
    inputs = (x, w1, w2, None, None, narrow, *sorted_slots, "silu", [], True, False, 38)
    torch.library.opcheck(ops.pre_activation, inputs, test_utils="test_faketensor")
    assert torch.equal(ops.pre_activation(*inputs), h)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.__setitem__(1, a[1].half()), "one dtype"),
        (lambda a: a.__setitem__(0, a[0][:, :5]), "hidden_states"),
        (lambda a: a.__setitem__(2, a[2][:, :, 1:]), "down_proj"),
        (lambda a: a.__setitem__(4, a[4][:, :1]), "top_k_weights"),
        (lambda a: a.__setitem__(3, a[3].float()), "int32 or int64"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_was_found(change, message):
    args = make()
    change(args)
    with pytest.raises(ValueError, match=message):
        experts(*args, "silu")


def test_bf16_is_refused_in_the_interpreter_whose_products_of_it_are_wrong():
    x, w1, w2 = (torch.ones(shape, dtype=torch.bfloat16) for shape in ((2, 16), (4, 32, 16), (4, 16, 16)))
    index, weights = torch.tensor([[0], [1]]), torch.ones(2, 1)
    with pytest.raises(ValueError, match=r"bfloat16 under TRITON_INTERPRET=1.*Use float32 or float16.*grouped_mm"):
        experts(x, w1, w2, index, weights)


def test_fp16_is_right_in_the_interpreter():
    index, weights = torch.tensor([[0, 1], [3, 2], [1, 3]]), torch.rand(3, 2)
    x, w1, w2 = (0.3 * torch.randn(shape) for shape in ((3, 16), (4, 32, 16), (4, 16, 16)))
    found = experts(x.half(), w1.half(), w2.half(), index, weights, "silu")
    wanted = experts(x, w1, w2, index, weights, "silu")
    torch.testing.assert_close(found.float(), wanted, rtol=0, atol=5e-3)
