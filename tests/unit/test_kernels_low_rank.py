"""Low-rank changes of frozen experts in the kernels, against the same layer with the change added to its weights.
Output and every gradient, those of the factors too; fp32, in Triton's interpreter.

Tolerance: both sides sum the same fp32 products in another order; 1e-5 of the largest value is some 80 roundings.
"""

import pytest
import torch

from accel_moe.kernels import launch
from accel_moe.kernels.casts import Casts
from accel_moe.kernels.deferred_count import DeferredCount
from accel_moe.kernels.glu import Glu
from accel_moe.kernels.hints import LowRank
from tests.experts_layer import experts

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted: see tests/gpu")

T, K, H, I, E = 19, 2, 24, 20, 4
KINDS = {
    "gated": dict(glu=Glu("silu")),
    "clamped": dict(glu=Glu("silu", alpha=1.702, shift=1.0, limit=1.0)),
    "interleaved, biased, transposed": dict(glu=Glu("silu", interleaved=True), transposed=True, biased=True),
    "not gated": dict(glu=Glu("relu2", gated=False)),
}


def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) / shape[-1] ** 0.5


def make(glu, transposed=False, biased=False, rank=3, changed="both"):
    """-> weights and options of a layer, and its changes' factors."""
    wide = (2 if glu.gated else 1) * I
    up, down = random(E, wide, H, seed=1), random(E, H, I, seed=2)
    if transposed:
        up, down = up.mT.contiguous(), down.mT.contiguous()
    options = dict(glu=glu, transposed=transposed)
    if biased:
        options |= dict(b1=random(E, wide, seed=3), b2=random(E, H, seed=4))
    factors = [random(E, rank, width, seed=5 + i) for i, width in enumerate((H, wide, I, H))]
    if changed == "up":
        factors[2:] = None, None
    if changed == "down":
        factors[:2] = None, None
    return (up, down), options, factors


def inputs(seed=0):
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(T, H, generator=gen)
    index = torch.rand(T, E, generator=gen).topk(K, dim=-1).indices
    return x, index, torch.rand(T, K, generator=gen), torch.randn(T, H, generator=gen)


SCALES = (0.5, 2.0)


def run(weights, options, factors, fused, *, scales=SCALES, trained=(), index=None, **hints):
    """-> {name: output or gradient}. Not fused: the change is added to the weights."""
    x, own_index, routing, upstream = inputs()
    index = own_index if index is None else index
    leaves = {"x": x, "routing": routing, **dict(zip(("up in", "up out", "down in", "down out"), factors))}
    leaves |= {name: dict(zip(("up", "down"), weights))[name] for name in trained}
    leaves = {name: t.clone().requires_grad_() for name, t in leaves.items() if t is not None}
    up, down = (leaves.get(name, w) for name, w in zip(("up", "down"), weights))
    found = [
        LowRank(leaves[f"{side} in"], leaves[f"{side} out"], scale) if f"{side} in" in leaves else None
        for side, scale in zip(("up", "down"), scales)
    ]
    if fused:
        hints["changes"] = tuple(found)
    else:
        up, down = (added(w, change, options["transposed"]) for w, change in zip((up, down), found))
    out = experts(leaves["x"], up, down, index, leaves["routing"], **options, **hints)
    return {"out": out.detach(), **dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), upstream)))}


def added(weight, change, transposed):
    if change is None:
        return weight
    delta = change.scale * change.outer.mT @ change.inner
    return weight + (delta.mT if transposed else delta)


def assert_close(actual, expected):
    assert actual.keys() == expected.keys()
    for name, e in expected.items():
        assert actual[name].shape == e.shape, name
        assert (actual[name] - e).abs().max() <= 1e-5 * max(1.0, e.abs().max().item()), name


def rows():
    """Every kind with both projections changed; one alone on two kinds, and on the rest it is slow."""
    for kind in KINDS:
        for changed in ("both", "up", "down"):
            fast = changed == "both" or (kind, changed) in (
                ("gated", "up"),
                ("interleaved, biased, transposed", "down"),
            )
            yield pytest.param(kind, changed, marks=() if fast else pytest.mark.slow)


@pytest.mark.parametrize(("kind", "changed"), list(rows()))
def test_output_and_every_gradient_equal_those_of_the_changed_weights(kind, changed):
    layer = make(**KINDS[kind], changed=changed)
    assert_close(run(*layer, fused=True), run(*layer, fused=False))


# padded to 16, padded to 32, and two tiles of 64; the others are tiled alike
@pytest.mark.parametrize("rank", [20, *(pytest.param(rank, marks=pytest.mark.slow) for rank in (1, 16, 64, 80, 128))])
def test_every_rank(rank):
    layer = make(Glu("silu"), rank=rank)
    assert_close(run(*layer, fused=True), run(*layer, fused=False))


def test_a_weight_may_be_trained_beside_its_change():
    layer = make(Glu("silu"))
    trained = ("up", "down")
    found = run(*layer, fused=True, trained=trained, weight_grad_scale=0.25)
    expected = run(*layer, fused=False, trained=trained)
    # the scale is of the weights alone, and no other gradient knows it
    expected |= {name: 0.25 * expected[name] for name in trained}
    assert_close(found, expected)


@pytest.mark.parametrize("hints", [dict(recompute_up=True), dict(num_pairs=DeferredCount(lambda: T * K, 0.5))], ids=str)
def test_a_pre_activation_that_is_computed_again_knows_the_change(hints):
    layer = make(Glu("silu"))
    assert_close(run(*layer, fused=True, **hints), run(*layer, fused=False))


@pytest.mark.parametrize("counted", [False, True])
def test_sentinels_and_idle_experts_change_nothing(counted):
    _, index, *_ = inputs()
    index = index.masked_fill(index == 1, E)
    pairs = int((index < E).sum()) if counted else None
    layer = make(Glu("silu"))
    found, expected = run(*layer, True, index=index, num_pairs=pairs), run(*layer, False, index=index)
    assert_close(found, expected)
    assert not any(found[name][1].any() for name in ("up in", "up out", "down in", "down out"))


def test_weights_in_another_dtype_are_cast_beside_their_change():
    (up, down), options, factors = make(Glu("silu"))
    stored = up.double(), down.double()
    casts = Casts(list(stored), torch.float32, of_module=True)
    assert_close(run(stored, options, factors, True, casts=casts), run((up, down), options, factors, False))


def test_no_gradient_is_computed_that_nobody_asks_for(monkeypatch):
    from accel_moe.kernels import low_rank

    asked, grad = [], low_rank.grad
    monkeypatch.setattr(low_rank, "grad", lambda *a, **k: (asked.append(1), grad(*a, **k))[1])
    (up, down), options, factors = make(Glu("silu"))
    x, index, routing, upstream = inputs()
    changes = LowRank(factors[0], factors[1].requires_grad_(), 0.5), LowRank(*factors[2:], 2.0)
    experts(x.requires_grad_(), up, down, index, routing, **options, changes=changes).backward(upstream)
    assert len(asked) == 1 and factors[1].grad is not None and factors[0].grad is None


def test_evaluation_saves_nothing_and_gives_the_same_output():
    weights, options, factors = make(Glu("silu"))
    x, index, routing, _ = inputs()
    changes = LowRank(*factors[:2], SCALES[0]), LowRank(*factors[2:], SCALES[1])
    with torch.no_grad():
        out = experts(x, *weights, index, routing, **options, changes=changes)
    expected = run(weights, options, factors, fused=False)["out"]
    assert (out - expected).abs().max() <= 1e-5 * max(1.0, expected.abs().max().item())


def test_compiles_into_one_graph():
    weights, options, factors = make(Glu("silu"))
    x, index, routing, upstream = inputs()
    leaves = [t.requires_grad_() for t in (x, routing, *factors)]

    def layer():
        changes = LowRank(*factors[:2], SCALES[0]), LowRank(*factors[2:], SCALES[1])
        return experts(x, *weights, index, routing, **options, changes=changes)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = [[out, *torch.autograd.grad(out, leaves, upstream)] for out in (compiled(), layer())]
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fault", [pytest.param("scale", marks=pytest.mark.slow), "expert"])
def test_a_wrong_change_would_be_seen(fault):
    weights, options, factors = make(Glu("silu"))
    expected = run(weights, options, factors, fused=False)
    if fault == "expert":  # one expert's factor taken for another's
        factors[0] = factors[0][[1, 0, 2, 3]]
    found = run(weights, options, factors, True, scales=SCALES if fault == "expert" else (1.0, 2.0))
    with pytest.raises(AssertionError):
        assert_close(found, expected)


def test_every_gemm_with_a_change_says_so_when_its_configuration_is_chosen(monkeypatch):
    """Only gemm.py's kernels add a change. One of Gluon's, chosen by its speed, could not run."""
    told, tuned = {}, launch.tuned

    def record(kernel, layer, rows, x, run, term=None):
        told[kernel] = term is not None
        return tuned(kernel, layer, rows, x, run, term)

    monkeypatch.setattr(launch, "tuned", record)
    weights, options, factors = make(Glu("silu"))
    run(weights, options, factors, fused=True)
    assert told == {"up": True, "down": True, "down_backward": True, "up_backward": True}
