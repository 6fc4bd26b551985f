"""Frozen experts in 4 or 8 bits (`moe_quantize_experts`): packed once, and dense for one layer's forward or backward.

A weight [E, a, b] becomes one parameter of bytes, [E, bytes]. A row is one expert's matrix: its codes, and behind them
the scales of its blocks, as the bytes of fp32 numbers. So ep and FSDP split it like any weight, mixed precision leaves
it alone (it casts floating parameters only), and a checkpoint keeps its bits. The matrix is read in the order in which
it lies, in blocks of 64 values; zeros fill the last block.

    nf4     bitsandbytes' NF4, as QLoRA uses it: 4-bit normal floats times the block's largest magnitude. Its scales
            stay in fp32 (no double quantisation): 4.5 bits a value
    int8    round(w / s) for a step s of the block's largest magnitude / 127: w is at most s / 2 off; 8.5 bits a value.
            Plain torch. LLM.int8 has one step for a whole row, which one large value spoils, and a row is an output
            in some families and an input in others; bitsandbytes' blockwise int8 looks codes up in a table

NF4 is bitsandbytes', because its kernels run on the CPU, CUDA and ROCm, and PEFT's users know it. It gets rows of
values, never matrices: 0.50 dequantises a matrix wrongly on the CPU if its rows are no multiple of a block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from accel_moe.kernels.casts import Casts

BLOCK = 64
"""Values that share a scale."""
_SCALE_BYTES = 4


@dataclass(frozen=True)
class Packing:
    """How one weight is packed.

    Attributes:
        scheme: "nf4" or "int8".
        matrix: the shape of one expert's matrix, dense.
        dtype: the weight's dtype before it was packed.
    """

    scheme: str
    matrix: torch.Size
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Values of one expert."""
        return self.matrix.numel()

    @property
    def blocks(self) -> int:
        return math.ceil(self.numel / BLOCK)

    @property
    def code_bytes(self) -> int:
        return self.blocks * BLOCK // (2 if self.scheme == "nf4" else 1)

    @property
    def row_bytes(self) -> int:
        return self.code_bytes + self.blocks * _SCALE_BYTES

    def pack(self, matrix: torch.Tensor) -> torch.Tensor:
        """[row_bytes] uint8 of one expert's matrix, on its device."""
        values = torch.nn.functional.pad(matrix.reshape(-1), (0, self.blocks * BLOCK - self.numel))
        codes, scales = (_to_nf4 if self.scheme == "nf4" else _to_int8)(values)
        return torch.cat([codes.view(torch.uint8).view(-1), scales.view(torch.uint8).view(-1)])

    def dense(self, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """[e, *matrix] in `dtype`, from [e, row_bytes]. Computed in fp32 and rounded once.

        Raises:
            RuntimeError: something has cast the bytes, as numbers, to another dtype.
        """
        if weight.dtype != torch.uint8:
            raise RuntimeError(
                f"Weights packed by moe_quantize_experts={self.scheme} are torch.uint8, and these became "
                f"{weight.dtype}: a call of model.to(dtype), or a wrapper other than accelerate's, has cast them. "
                "Leave packed experts as they are."
            )
        experts = weight.shape[0]
        if not experts:
            return weight.new_empty((0, *self.matrix), dtype=dtype)
        codes, scales = (
            part.contiguous() for part in weight.split([self.code_bytes, self.row_bytes - self.code_bytes], 1)
        )
        scales = scales.view(torch.float32).view(-1)
        values = (_from_nf4 if self.scheme == "nf4" else _from_int8)(codes, scales, dtype).view(experts, -1)
        return values[:, : self.numel].reshape(experts, *self.matrix)

    def stand_in(self, weight: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A tensor without memory, of the dense weight's shape, device and dtype, to be asked for these."""
        one = torch.empty((), dtype=dtype or self.dtype, device=weight.device)
        return one.expand(weight.shape[0], *self.matrix)


def _to_nf4(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    from bitsandbytes.functional import quantize_4bit

    codes, state = quantize_4bit(values, blocksize=BLOCK, quant_type="nf4", compress_statistics=False)
    return codes, state.absmax


def _from_nf4(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    from bitsandbytes.functional import QuantState, dequantize_4bit

    shape = torch.Size([scales.numel() * BLOCK])
    state = QuantState(absmax=scales, shape=shape, dtype=dtype, blocksize=BLOCK, quant_type="nf4")
    return dequantize_4bit(codes.view(-1, 1), state)


def _to_int8(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    blocks = values.float().view(-1, BLOCK)
    steps = blocks.abs().amax(1) / 127
    codes = (blocks / torch.where(steps > 0, steps, 1.0)[:, None]).round().clamp(-127, 127)
    return codes.to(torch.int8), steps


def _from_int8(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    blocks = codes.view(torch.int8).view(-1, BLOCK)
    return torch.mul(blocks, scales[:, None], out=torch.empty(blocks.shape, dtype=dtype, device=codes.device))


class KeptPacked:
    """Within it, autograd keeps no dense copy of a packed weight for backward; there it is made again.

    For kernels that save the weights they were given; our own take `Unpacked`. A kernel may save a part of a weight, or
    another view of it: only the experts that it touches are made again.

    Args:
        dense: by name, the weights that the kernel is given, [e, ...]. They must live as long as this is in use: they
            are known again by their memory.
        weights: by name, what they were made of, [e, bytes].
    """

    def __init__(self, dense: dict[str, torch.Tensor], weights: dict[str, torch.Tensor], packed: dict[str, Packing]):
        memory = ((dense[name].untyped_storage().data_ptr(), name) for name in packed if dense[name].numel())
        self._made = {at: (weights[name].detach(), packed[name], dense[name].dtype) for at, name in memory}

    def __enter__(self) -> None:
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, self._make)
        self._hooks.__enter__()

    def __exit__(self, *raised: Any) -> None:
        self._hooks.__exit__(*raised)

    def _keep(self, saved: torch.Tensor) -> Any:
        made = self._made.get(saved.untyped_storage().data_ptr()) if saved.numel() else None
        if made is None or saved.dtype != made[2]:
            return saved
        return made, saved.shape, saved.stride(), saved.storage_offset()

    def _make(self, kept: Any) -> torch.Tensor:
        if isinstance(kept, torch.Tensor):
            return kept
        (weight, how, dtype), shape, strides, offset = kept
        last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides))
        first = offset // how.numel
        dense = how.dense(weight[first : last // how.numel + 1], dtype)
        return dense.as_strided(shape, strides, offset - first * how.numel)


class Unpacked(Casts):
    """`Casts` of weights of which some are packed: dense in forward, and made again in backward."""

    def __init__(self, weights: dict[str, torch.Tensor], packed: dict[str, Packing], dtype: torch.dtype):
        super().__init__(list(weights.values()), dtype, of_module=True)
        self._packings = [packed.get(name) for name in weights]

    def _make(self) -> list[torch.Tensor]:
        pairs = zip(self._parameters, self._packings, strict=True)
        return [p.detach().to(self._dtype) if how is None else how.dense(p, self._dtype) for p, how in pairs]
