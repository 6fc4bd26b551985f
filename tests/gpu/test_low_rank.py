"""Low-rank changes in the compiled kernels, at real shapes in bf16, against fp32 with the change added to the weights.

Tolerance: 1% of a tensor's norm. The products are of bf16 numbers (8 bits of mantissa), each rounded a few times; fp32
sums of thousands of them average the roundings to some 3e-3. A change that is left out is off by more than 10%.
"""

import pytest
import torch

from accel_moe.kernels.glu import Glu
from accel_moe.kernels.hints import LowRank
from tests.experts_layer import experts

pytestmark = pytest.mark.gpu

SHAPES = {"qwen3": (4096, 8, 2048, 768, 128), "olmoe": (4096, 8, 2048, 1024, 64), "mixtral": (2048, 2, 4096, 14336, 8)}
GLUS = {
    "silu": Glu(),
    "gpt_oss": Glu("silu", interleaved=True, alpha=1.702, shift=1.0, limit=7.0),
    "relu2": Glu("relu2", gated=False),
}


def make(shape, glu, rank, transposed=False):
    T, K, H, I, E = shape
    gen = torch.Generator("cuda").manual_seed(0)
    normal = lambda *s: torch.randn(*s, generator=gen, device="cuda")  # noqa: E731
    wide = 2 * I if glu.gated else I
    up, down = normal(E, wide, H) / H**0.5, normal(E, H, I) / I**0.5
    factors = [normal(E, rank, width) / (width**0.5 * rank**0.5) for width in (H, wide, I, H)]
    factors = [f * scale for f, scale in zip(factors, (1.0, wide**0.5 / H**0.25, 1.0, H**0.5 / I**0.25))]
    s, index = (normal(T, E) + 0.5 * normal(E)).softmax(-1).topk(K, dim=-1)
    bf16 = [t.bfloat16() for t in (normal(T, H), s, up, down, *factors, normal(T, H))]
    if transposed:
        bf16[2:4] = [w.mT.contiguous() for w in bf16[2:4]]
    return index, bf16


def run(index, tensors, glu, transposed, fused):
    x, s, up, down, *factors, upstream = tensors
    leaves = [t.clone().requires_grad_() for t in (x, s, *factors)]
    x, s, up_in, up_out, down_in, down_out = leaves
    changes = LowRank(up_in, up_out, 2.0), LowRank(down_in, down_out, 0.5)
    if not fused:
        deltas = [c.scale * c.outer.mT @ c.inner for c in changes]
        up, down = (w + (d.mT if transposed else d) for w, d in zip((up, down), deltas))
        changes = None, None
    out = experts(x, up, down, index, s, glu=glu, transposed=transposed, changes=changes)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


@pytest.mark.parametrize("rank", [16, 128])
@pytest.mark.parametrize("name", SHAPES)
def test_output_and_gradients_in_bf16(name, rank):
    check(SHAPES[name], Glu(), rank)


@pytest.mark.parametrize("name", [name for name in GLUS if name != "silu"])
def test_other_gates_and_layouts(name):
    check((2048, 4, 1024, 512, 32), GLUS[name], 16, transposed=name == "gpt_oss")


def check(shape, glu, rank, transposed=False):
    index, tensors = make(shape, glu, rank, transposed)
    found = run(index, tensors, glu, transposed, fused=True)
    again = run(index, tensors, glu, transposed, fused=True)
    assert all(torch.equal(a, b) for a, b in zip(found, again))
    expected = run(index, [t.float() for t in tensors], glu, transposed, fused=False)
    for name, f, e in zip(("out", "x", "routing", "up in", "up out", "down in", "down out"), found, expected):
        assert (f.float() - e).norm() <= 1e-2 * e.norm(), name


def test_a_rank_that_is_no_multiple_of_16_and_few_tokens():
    check((64, 2, 256, 128, 8), Glu(), 20)
