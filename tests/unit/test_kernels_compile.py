"""Every Triton kernel compiles for a GPU. The interpreter takes Python that the compiler refuses, such as a variable
that has another shape after a branch.
"""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

from accel_moe.dispatch.rows_triton import Parts
from accel_moe.kernels.glu import Glu
from accel_moe.kernels.launch import Loads, Stores
from accel_moe.kernels.tuning import Config
from tests.kernels import arguments_of, compiled_by

TILE, BINS = Config(64, 64, 64, 4, 2), {"BINS": 8}
TERM, PLAIN = Loads(False, True, True, "ieee", True, True, rank=16), Loads(False, False, False, "ieee")
GRADIENT = {"LEFT_PADDED": True, "USE_TMA": False, "EVEN": True, "PRECISION": "ieee", "PAD": 64}
NARROW = {"GATHER": True, "RANK": 16, "PRECISION": "ieee", "BLOCK_P": 64, "BLOCK_R": 16}
TOP = {"TOP_K": 6, "K_PAD": 8}
KERNELS = {
    "kernels.sort": {
        "count_slots": BINS,
        "add_counts": BINS | {"SLOTS": 64},
        "place_slots": BINS,
        "sort_few_slots": BINS | {"BLOCK_P": 64, "TILES": 64},
        "list_tiles": BINS | {"BLOCK_P": 64, "OTHER_P": 32, "TILES": 64},
    },
    "kernels.passes": {
        "place_rows": {"PAD": 64, "BLOCK": 64},
        "spread_rows": {"TOP_K": 2, "BLOCK": 64},
        "sum_slots": {"TOP_K": 2, "WEIGHTED": True, "BLOCK_H": 64},
        "sum_routing_grad": {"BLOCK": 64, "BLOCK_W": 64},
        "sum_expert_rows": {"WEIGHTED": True, "ROWS": 64, "BLOCK": 64},
        "dot_bias": {"BLOCK_P": 64, "BLOCK": 64},
    },
    "kernels.gemm": {
        "up_projection": {"GLU": Glu(), "STORES": Stores(True, True), "LOADS": TERM, "TILE": TILE},
        "grouped_rows": {"LOADS": PLAIN, "TILE": TILE},
        "down_backward": {"GLU": Glu(), "LOADS": TERM, "TILE": TILE},
        "weight_grad": GRADIENT | {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_P": 32},
    },
    "kernels.low_rank": {
        "narrow_rows": NARROW | {"BLOCK_K": 64},
        "factor_grad": NARROW | {"WEIGHTED": True, "BLOCK_N": 64},
    },
    "dispatch.rows_triton": {
        "count_copies": TOP | {"TOKENS": 64},
        "place_copies": TOP | {"TOKENS": 64, "BLOCKS": 8},
        "pack_rows": {"PARTS": Parts(True, True, True, 6, 8, 64)},
        "sum_copies": TOP | {"WEIGHTS": True, "BLOCK": 64},
        "fill_rows": TOP | {"BLOCK": 64},
        "keep_own_slots": TOP | {"ROWS": 64},
        "sum_parts": {"UNIT": 16, "RANKS": 2, "BLOCK": 64},
    },
}
INTEGERS = ("slot", "tile", "expert", "offset", "place", "largest", "index", "count", "total", "copy", "pairs")


def compile_for_a_gpu(module: str, name: str, constants: dict):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(import_module(f"accel_moe.{module}"), name).fn

    def type_of(parameter):
        if not parameter.endswith(("_ptr", "src")):
            return "fp32" if parameter == "scale" else "i32"
        integer = "weight" not in parameter and any(word in parameter for word in INTEGERS)
        return "*i32" if integer else "*fp32" if parameter == "ds_ptr" else "*bf16"

    signature, values, _ = arguments_of(kernel, constants, type_of)
    source = ASTSource(kernel, signature, values)
    return triton.compile(source, target=GPUTarget("cuda", 80, 32), options={"num_warps": 4, "num_stages": 2})


def test_kernels_compile_for_a_gpu():
    assert compiled_by("tests.unit.test_kernels_compile") == [n for kernels in KERNELS.values() for n in kernels]


def test_every_kernel_that_is_launched_is_in_the_list():
    for module, kernels in KERNELS.items():
        source = Path(import_module(f"accel_moe.{module}").__file__).read_text()
        assert re.findall(r"@cached_launch\n@triton.jit.*\ndef (\w+)", source) == list(kernels)


if __name__ == "__main__":
    for module, kernels in KERNELS.items():
        for name, constants in kernels.items():
            assert "ptx" in compile_for_a_gpu(module, name, constants).asm
            print(name)
