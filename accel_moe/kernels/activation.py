"""Parts of Triton kernels: what stands between the two projections, on tiles in registers, and its derivative.

Which of them a module's gate is, glu.py finds out. Letters and terms are gemm.py's.
"""

import triton
import triton.language as tl


@triton.jit
def split_columns(tile, ROWS: tl.constexpr, COLS: tl.constexpr):
    """[ROWS, COLS] -> its left and its right half; moves no data, an accumulator's row lies in one warp's
    registers.
    """
    return tile.reshape(ROWS, 2, COLS // 2).permute(0, 2, 1).split()


@triton.jit
def split_pairs(tile, ROWS: tl.constexpr, COLS: tl.constexpr, INTERLEAVED: tl.constexpr):
    """[ROWS, COLS] -> gate and up, [ROWS, COLS / 2] each: every second column, or the left and the right half."""
    if INTERLEAVED:
        pair = tile.reshape(ROWS, COLS // 2, 2).split()
    else:
        pair = split_columns(tile, ROWS, COLS)
    return pair


@triton.jit
def load_pairs(ptr, offset, mask):
    """-> gate, up in fp32, at 2 * offset and the place after; 16-bit pairs come as one 32-bit word, in one layout."""
    if ptr.dtype.element_ty.primitive_bitwidth == 16:
        word = tl.load(ptr.to(tl.pointer_type(tl.uint32)) + offset, mask=mask, other=0)
        gate = (word & 0xFFFF).to(tl.uint16).to(ptr.dtype.element_ty, bitcast=True)
        up = (word >> 16).to(tl.uint16).to(ptr.dtype.element_ty, bitcast=True)
    else:
        gate = tl.load(ptr + 2 * offset, mask=mask, other=0.0)
        up = tl.load(ptr + 2 * offset + 1, mask=mask, other=0.0)
    return gate.to(tl.float32), up.to(tl.float32)


@triton.jit
def store_pairs(ptr, offset, gate, up, mask):
    """The other way."""
    gate, up = gate.to(ptr.dtype.element_ty), up.to(ptr.dtype.element_ty)
    if ptr.dtype.element_ty.primitive_bitwidth == 16:
        low = gate.to(tl.uint16, bitcast=True).to(tl.uint32)
        word = low | (up.to(tl.uint16, bitcast=True).to(tl.uint32) << 16)
        tl.store(ptr.to(tl.pointer_type(tl.uint32)) + offset, word, mask=mask)
    else:
        tl.store(ptr + 2 * offset, gate, mask=mask)
        tl.store(ptr + 2 * offset + 1, up, mask=mask)


@triton.jit
def tanh(x):
    # 2*sigmoid(2x) - 1: tl.math has no tanh that the interpreter and every backend share.
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


# ---- The formulas of activations.ACTIVATIONS: (x, alpha) -> act(x), act'(x), in fp32


@triton.jit
def silu(x, alpha):
    sig = tl.sigmoid(alpha * x)
    return x * sig, sig * (1.0 + alpha * x * (1.0 - sig))


@triton.jit
def gelu(x, alpha):
    cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    return x * cdf, cdf + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)


@triton.jit
def gelu_tanh(x, alpha):
    t = tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))
    slope = 0.7978845608028654 * (1.0 + 0.134145 * x * x)
    return 0.5 * x * (1.0 + t), 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * slope


@triton.jit
def relu(x, alpha):
    return tl.maximum(x, 0.0), tl.where(x > 0.0, 1.0, 0.0)


@triton.jit
def relu2(x, alpha):
    positive = tl.maximum(x, 0.0)
    return positive * positive, 2.0 * positive


# ---- On tiles


@triton.jit
def activation(x, GLU: tl.constexpr):
    """-> act(x), act'(x), in fp32."""
    return GLU.formula(x, GLU.alpha)


@triton.jit
def glu(
    gate,
    up,
    GLU: tl.constexpr,
):
    """-> a = act(gate) * (up + shift), da/dgate, da/dup, in fp32.

    With a limit (not 0), up is clamped to +-limit, and gate, or act(gate) if late, to at most limit. As torch.clamp's,
    the gradient passes where the value is within, bounds included. `where`, not min and max: NaN stays NaN.
    """
    clamped_up = up
    if GLU.limit != 0.0:
        clamped_up = tl.where(up > GLU.limit, GLU.limit, tl.where(up < -GLU.limit, -GLU.limit, up))
    if GLU.limit != 0.0 and not GLU.late:
        act, slope = activation(tl.where(gate > GLU.limit, GLU.limit, gate), GLU)
        slope = tl.where(gate > GLU.limit, 0.0, slope)
    else:
        act, slope = activation(gate, GLU)
    if GLU.limit != 0.0 and GLU.late:
        slope = tl.where(act > GLU.limit, 0.0, slope)
        act = tl.where(act > GLU.limit, GLU.limit, act)
    from_up = act
    if GLU.limit != 0.0:
        from_up = tl.where(tl.abs(up) > GLU.limit, 0.0, act)
    clamped_up += GLU.shift
    return act * clamped_up, slope * clamped_up, from_up


@triton.jit
def activation_backward(
    da,
    scale,
    h_tile,
    dh_tile,
    sa_tile,
    rows_left,
    col0,
    intermediate,
    GLU: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """The epilogue of down_backward on columns col0 .. col0 + BLOCK_I: reads h, writes dh and sa, -> their share of
    ds.

    The pointers are those of the tile's first row, so that offsets within the tile fit 32 bits.
    """
    lane = tl.arange(0, BLOCK_P)[:, None]
    cols = col0 + tl.arange(0, BLOCK_I)[None, :]
    mask = (lane < rows_left) & (cols < intermediate)
    dtype = sa_tile.dtype.element_ty
    if GLU.gated and GLU.interleaved:
        h_offset = lane * intermediate + cols
        gate, up = load_pairs(h_tile, h_offset, mask)
        a, from_gate, from_up = glu(gate, up, GLU)
    elif GLU.gated:
        h_offset = lane * (2 * intermediate) + cols
        gate = tl.load(h_tile + h_offset, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(h_tile + h_offset + intermediate, mask=mask, other=0.0).to(tl.float32)
        a, from_gate, from_up = glu(gate, up, GLU)
    else:
        h_offset = lane * intermediate + cols
        a, slope = activation(tl.load(h_tile + h_offset, mask=mask, other=0.0).to(tl.float32), GLU)
    ds = tl.sum(da * a, axis=1)
    tl.store(sa_tile + lane * intermediate + cols, (a * scale[:, None]).to(dtype), mask=mask)
    da = da * scale[:, None]
    if GLU.gated and GLU.interleaved:
        store_pairs(dh_tile, h_offset, da * from_gate, da * from_up, mask)
    elif GLU.gated:
        tl.store(dh_tile + h_offset, (da * from_gate).to(dtype), mask=mask)
        tl.store(dh_tile + h_offset + intermediate, (da * from_up).to(dtype), mask=mask)
    else:
        tl.store(dh_tile + h_offset, (da * slope).to(dtype), mask=mask)
    return ds


@triton.jit
def activation_backward_halves(
    da,
    scale,
    h_tile,
    dh_tile,
    sa_tile,
    rows_left,
    col0,
    intermediate,
    GLU: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """As activation_backward, one half of the columns after the other: the accumulator, h and their products at once
    are more than the registers hold (1.4 kB of spills a thread at 128 x 128 on 8 warps).
    """
    HALF: tl.constexpr = BLOCK_I // 2
    left, right = split_columns(da, BLOCK_P, BLOCK_I)
    ds = activation_backward(
        left,
        scale,
        h_tile,
        dh_tile,
        sa_tile,
        rows_left,
        col0,
        intermediate,
        GLU,
        BLOCK_P,
        HALF,
    )
    return ds + activation_backward(
        right,
        scale,
        h_tile,
        dh_tile,
        sa_tile,
        rows_left,
        col0 + HALF,
        intermediate,
        GLU,
        BLOCK_P,
        HALF,
    )
