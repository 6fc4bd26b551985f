"""The Gluon road without a GPU: its kernels compile for Hopper with this Triton, and it is chosen where it fits.

What they compute is compared on a GPU (tests/gpu/test_kernels.py, both roads).
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from accel_moe.kernels import launch, roads, tuning
from accel_moe.kernels.glu import Glu
from accel_moe.kernels.launch import Layer, Loads, Stores
from accel_moe.kernels.routing import sort_slots
from accel_moe.kernels.scattermoe import road_of
from accel_moe.kernels.tuning import Config, Problem
from tests.kernels import arguments_of, compiled_by

WIDE, TALL = Config(128, 256, 64, 8, 4, gluon=True), Config(256, 128, 64, 8, 4, gluon=True)
SHARED = Config(128, 256, 64, 4, 4, gluon=True)
UP, GRADIENT = Config(128, 128, 64, 8, 4, gluon=True), Config(32, 256, 128, 8, 8, gluon=True)
GPT_OSS = Glu(interleaved=True, alpha=1.702, shift=1.0, limit=7.0)


def loads(k_contiguous=True, bias=False, gather=False, pad=0):
    return Loads(True, True, k_contiguous, "ieee", bias, gather, pad)


SILU, BOTH = Glu(), Stores(True, True)


def up(x, w, h, gate=SILU, stores=BOTH, **options):
    types = {"x_src": x, "w_desc": w, "h_desc": h, "a_desc": [1, 1, 128, 64]}
    return "up_projection", types, {"LOADS": loads(**options), "GLU": gate, "STORES": stores, "TILE": UP}


def backward(h, dh, gate=SILU, k_contiguous=False, gather=False):
    """k_contiguous: W2 is stored transposed, [E, I, H]."""
    types = {"dout_src": "*bf16" if gather else [128, 64], "w_desc": [1, 256, 64] if k_contiguous else [1, 64, 256]}
    types |= {"h_desc": h, "dh_desc": dh, "sa_desc": [1, 1, 64, 64], "weight_ptr": "*bf16", "ds_ptr": "*fp32"}
    return "down_backward", types, {"GLU": gate, "LOADS": loads(k_contiguous, gather=gather, pad=64), "TILE": SHARED}


def gradient(left, gather, tile):
    """left: x is the left operand."""
    rows, widths = tile.block_p, (tile.block_k, tile.block_n)[:: 1 if left else -1]
    types = {"x_src": "*bf16" if gather else [rows, widths[0]], "other_desc": [rows, widths[1]], "scale": "fp32"}
    types |= {"dw_desc": [1, tile.block_k, 64]}
    return "weight_grad", types, {"GATHER": gather, "LEFT": left, "TOP_K": 8, "PAD": 64, "TILE": tile}


PAIRED, HALVES = [1, 2, 128, 64], [1, 1, 128, 1, 64]
KERNELS = {
    "rows": (
        "grouped_rows",
        {"a_desc": [128, 64], "w_desc": [1, 256, 64], "y_desc": [1, 1, 128, 64]},
        {"LOADS": loads(), "TILE": WIDE},
    ),
    "rows, tall, bias": (
        "grouped_rows",
        {"a_desc": [256, 64], "w_desc": [1, 64, 128], "y_desc": [1, 1, 256, 64]},
        {"LOADS": loads(False, bias=True), "TILE": TALL},
    ),
    "up": up([128, 64], PAIRED, HALVES, pad=64),
    "up, gathered": up("*bf16", PAIRED, HALVES, gather=True),
    "up, gathered, no h": up("*bf16", PAIRED, HALVES, stores=Stores(False, True), gather=True),
    "up of gpt-oss": up([128, 64], [1, 64, 256], [1, 1, 128, 64], GPT_OSS, k_contiguous=False, bias=True, pad=64),
    "up, not gated": up("*bf16", [1, 128, 64], [1, 1, 128, 64], Glu("relu2", gated=False), gather=True),
    "backward": backward([128, 1, 64], [1, 1, 64, 1, 64]),
    "backward of gpt-oss": backward([128, 64], [1, 1, 64, 64], GPT_OSS, k_contiguous=True),
    "backward, not gated": backward([128, 64], [1, 1, 64, 64], Glu("relu2", gated=False)),
    "backward, gathered": backward([128, 1, 64], [1, 1, 64, 1, 64], gather=True),
    "gradient": gradient(True, False, GRADIENT),
    "gradient, x on the right": gradient(False, False, GRADIENT),
    "gradient, gathered": gradient(True, True, replace(GRADIENT, block_p=64, num_stages=4)),
    "gradient, gathered on the right": gradient(
        False, True, replace(GRADIENT, block_p=64, block_n=128, block_k=256, num_stages=4)
    ),
}


def home_of(road, kernel):
    """The module of a kernel; road: launch_hopper."""
    return {"down_backward": road.hopper_backward, "weight_grad": road.hopper_gradients}.get(kernel, road.hopper)


def compile_for_hopper(name):
    """The kernel of KERNELS, compiled ahead of time."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource

    from accel_moe.kernels import launch_hopper

    kernel, types, constants = KERNELS[name]
    kernel = getattr(home_of(launch_hopper, kernel), kernel).fn

    def type_of(parameter):
        given = types.get(parameter, "*i32" if parameter.endswith("_ptr") else "i32")
        if isinstance(given, str):
            return "*bf16" if parameter == "bias_ptr" else given
        return f"tensordesc<bf16{given},{gl.NVMMASharedLayout.get_default_for(given, gl.bfloat16)!r}>"

    signature, values, places = arguments_of(kernel, constants, type_of)
    multiples = "depth", "hidden", "intermediate", "stride_x", "stride_dout", "left_width", "right_width"
    aligned = [n for n, t in signature.items() if t.startswith("*") or n in multiples]
    source = GluonASTSource(
        kernel,
        signature,
        values,
        {(places[n],): [["tt.divisibility", 16]] for n in aligned},
    )
    options = {"num_warps": constants["TILE"].num_warps, "maxnreg": 168}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def test_kernels_compile_for_hopper_and_fit():
    pytest.importorskip("triton.experimental.gluon")
    assert compiled_by("tests.unit.test_kernels_hopper") == list(KERNELS)


# ---- Rows that end at any row


def test_clipped_rows_are_those_of_the_tensor_and_end_where_they_are_told(monkeypatch):
    """By the copy engine's own arithmetic: coordinates times strides modulo 2**64, written while within the shape."""
    road = pytest.importorskip("accel_moe.kernels.launch_hopper", exc_type=ImportError)
    for t in (torch.empty(1000, 64, dtype=torch.bfloat16), torch.empty(1000, 2, 64, dtype=torch.bfloat16)):
        many, place = 2**30, (7,) if t.ndim == 2 else (1, 7)
        described = road._clipped(t, 128, *(1 for _ in t.shape[2:]), 64)
        assert road.hopper_parts.MANY.value == many and described.block_shape[:3] == [1, 1, 128]
        assert all(stride * t.element_size() < 2**40 for stride in described.strides)  # the copy engine's limit
        for row0, end in ((0, 128), (300, 333), (872, 1000), (500, 500), (500, 490)):
            for lane in range(128):
                coordinates = (many, end, many - (end - row0) + lane, *place)  # those of hopper_parts.clipped_rows
                written = all(c < size for c, size in zip(coordinates, described.shape, strict=True))
                assert written == (row0 + lane < end)
                if written:
                    offset = sum(c * s for c, s in zip(coordinates, described.strides, strict=True))
                    assert offset * 2 % 2**64 == t[(row0 + lane, *place)].storage_offset() * 2


# ---- The choice between the roads


@pytest.fixture
def chosen(monkeypatch):
    """The problems that launch.tuned asks about, on a Hopper GPU whose Gluon is there."""
    asked = []
    monkeypatch.setattr(launch, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(roads, "gluon_road", lambda: object())
    monkeypatch.setattr(tuning, "choose", lambda problem, launch: asked.append(problem))
    return asked


@pytest.mark.parametrize(
    "kernel, dtype, hidden, term, expected",
    [
        ("up", torch.bfloat16, 64, None, True),
        ("down", torch.float16, 64, None, True),
        ("down", torch.float32, 64, None, False),
        ("down_backward", torch.bfloat16, 64, None, True),
        ("down_backward", torch.bfloat16, 64, "a low-rank term", False),
        ("up", torch.bfloat16, 65, None, False),
        ("up", torch.bfloat16, 64, "a low-rank term", False),
    ],
)
def test_the_road_is_open_to_what_it_computes(chosen, kernel, dtype, hidden, term, expected):
    layer = Layer(4, hidden, 32, True, False)
    launch.tuned(kernel, layer, 4096, torch.empty(1, dtype=dtype), lambda config: None, term)
    assert chosen[0].gluon is expected


def test_another_chip_keeps_to_triton(chosen, monkeypatch):
    monkeypatch.setattr(launch, "_capability", lambda device: (10, 0))
    launch.tuned("up", Layer(4, 64, 32, True, False), 4096, torch.empty(1, dtype=torch.bfloat16), lambda config: None)
    assert not chosen[0].gluon


def test_shapes_measured_on_one_road_say_nothing_about_the_other():
    problem = Problem("up", 4096, 8, 512, 256, torch.bfloat16, (9, 0))
    with_gluon = Problem("up", 4096, 8, 512, 256, torch.bfloat16, (9, 0), gluon=True)
    assert problem.key != with_gluon.key
    assert not any(c.gluon for c in tuning.candidates(problem))
    assert any(c.gluon for c in tuning.candidates(with_gluon))


def test_experts_with_few_rows_do_not_take_tall_tiles():
    assert not any(
        c.gluon for c in tuning.candidates(Problem("up", 512, 8, 512, 256, torch.bfloat16, (9, 0), gluon=True))
    )


def test_a_kernel_that_does_not_run_is_tried_once_and_told_once(monkeypatch, caplog):
    calls = []

    class Road:
        def grouped_rows(self, *arguments):
            calls.append(arguments)
            raise RuntimeError("async_store has been renamed")

    monkeypatch.setattr(roads, "gluon_road", lambda: Road())
    monkeypatch.setattr(roads, "_failed", set())
    for _ in range(2):
        assert not roads.on_hopper("grouped_rows", WIDE, True, "operands")
    assert len(calls) == 1 and len(caplog.records) == 1
    assert not roads.on_hopper("grouped_rows", TALL, True, "operands")  # may be another fault
    assert len(calls) == 2


def test_a_kernel_that_does_not_run_is_no_candidate(monkeypatch):
    """Triton's would be timed in its place, and kept as Gluon's."""

    class Road:
        def grouped_rows(self, *arguments):
            raise RuntimeError("async_store has been renamed")

    monkeypatch.setattr(roads, "gluon_road", lambda: Road())
    monkeypatch.setattr(tuning, "_time_ms", lambda run: run())
    problem = Problem("down", 4096, 8, 512, 256, torch.bfloat16, (9, 0), gluon=True)
    times = {True: 1.0, False: 2.0}
    launch = lambda config: times[roads.on_hopper("grouped_rows", config, True)]  # noqa: E731
    assert not tuning._fastest(problem, launch).gluon and not tuning.measuring()
    assert not roads._failed


@pytest.mark.parametrize(
    "version, asked, taken",
    [("3.6.0", None, True), ("3.6.0", "0", False), ("3.60.1", None, False), ("3.9.0", "1", True)],
)
def test_the_road_is_taken_as_it_was_run_and_where_asked(monkeypatch, version, asked, taken):
    pytest.importorskip("accel_moe.kernels.launch_hopper", exc_type=ImportError)
    monkeypatch.setattr(roads, "INTERPRETED", False)
    monkeypatch.setattr(roads.triton, "__version__", version)
    roads.gluon_road.cache_clear()
    monkeypatch.setenv("SCATTERMOE_GLUON", asked) if asked else monkeypatch.delenv("SCATTERMOE_GLUON", False)
    assert (roads.gluon_road() is not None) == taken
    roads.gluon_road.cache_clear()


def test_an_answer_that_is_neither_0_nor_1_is_refused(monkeypatch):
    monkeypatch.setenv("SCATTERMOE_GLUON", "on")
    roads.gluon_road.cache_clear()
    with pytest.raises(ValueError, match="'on': expected 0 or 1"):
        roads.gluon_road()
    roads.gluon_road.cache_clear()


def test_beside_collectives_a_kernel_has_more_programs(monkeypatch):
    road = pytest.importorskip("accel_moe.kernels.launch_hopper", exc_type=ImportError)
    monkeypatch.setattr(road, "_multiprocessors", lambda device: 132)
    found = []
    for several in (False, True):
        monkeypatch.setattr(road, "beside_collectives", lambda several=several: several)
        found.append([road._programs(torch.device("cpu"), tiles) for tiles in (100, 300, 5000)])
    assert found == [[100, 132, 132], [100, 300, 528]]


@pytest.mark.parametrize(
    "capability, road, text",
    [((9, 0), object(), "scattermoe (Gluon)"), ((9, 0), None, "scattermoe"), ((8, 0), object(), "scattermoe")],
)
def test_a_model_says_which_road_runs(monkeypatch, capability, road, text):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(roads, "gluon_road", lambda: road)
    assert road_of(torch.device("cuda")) == text
    assert road_of(torch.device("cpu")) == "scattermoe"


def test_a_configuration_of_one_road_has_its_like_on_the_other():
    assert not WIDE.plain.gluon and (WIDE.plain.block_n, WIDE.plain.group) == (256, 8)
    assert Config(64, 64, 64, 4, 3).plain == Config(64, 64, 64, 4, 3)
    backward = Problem("down_backward", 2**17, 128, 2048, 768, torch.bfloat16, (9, 0), gluon=True)
    for config in tuning._on_hopper(backward):  # 4 warps, or a tile's columns at once, would spill
        like = replace(config.plain, group=8)
        assert config.gluon and like in tuning.candidates(backward._replace(gluon=False))


# ---- From tensors to grids


@pytest.fixture
def launched(monkeypatch):
    """What Gluon's kernels are launched with, on a Hopper GPU that is not there."""
    road = pytest.importorskip("accel_moe.kernels.launch_hopper", exc_type=ImportError)
    calls = {}

    class Kernel:
        def __init__(self, name):
            self.name, self.parameters = name, getattr(home_of(road, name), name).arg_names

        def __getitem__(self, grid):
            def launch(*arguments, num_warps, maxnreg, **constants):
                assert 0 < grid[0] <= 132  # one rank
                calls[self.name] = arguments
                assert len(arguments) + len(constants) == len(self.parameters)
                assert list(constants) == self.parameters[len(arguments) :]

            return launch

    for name in ("up_projection", "grouped_rows", "down_backward", "weight_grad"):
        monkeypatch.setattr(home_of(road, name), name, Kernel(name))
    monkeypatch.setattr(road, "_multiprocessors", lambda device: 132)
    monkeypatch.setattr(roads, "gluon_road", lambda: road)
    monkeypatch.setattr(roads, "_failed", set())
    monkeypatch.setattr(launch, "_capability", lambda device: (9, 0))
    return calls


@pytest.mark.parametrize("glu, transposed", [(SILU, False), (GPT_OSS, True), (Glu("relu2", gated=False), False)])
def test_every_kernel_is_launched_with_as_many_arguments_as_it_has(launched, glu, transposed):
    """With real tensors of each layout, so that what launch.py hands over is what launch_hopper.py reads."""
    hidden, intermediate, wide = 64, 32, 64 if glu.gated else 32
    x, index = torch.randn(200, hidden, dtype=torch.float16), torch.randint(0, 4, (200, 2))
    w1, w2 = (torch.randn(4, *shape, dtype=torch.float16) for shape in ((wide, hidden), (hidden, intermediate)))
    if transposed:
        w1, w2 = w1.mT.contiguous(), w2.mT.contiguous()
    up, down = launch.Weight(w1, not transposed), launch.Weight(w2, not transposed)
    routing = sort_slots(index, 4, 400)
    tiles = launch.TileLists(routing)
    for gather in (True, False):
        h, a = launch.up_projection(x, up, None, routing, tiles, replace(UP, gather=gather), glu, 400)
        source = launched["up_projection"][0]
        assert source is x if gather else source.base.shape[1] == hidden
    y = launch.grouped_rows(a, down, None, routing, tiles, WIDE)
    back = launch.Weight(w2, transposed)
    for gather in (True, False):
        rows = launch.Gathered(x, routing, tiles)
        tile, weights = replace(SHARED, gather=gather), torch.rand(200, 2)
        dh, sa, ds = launch.down_backward(rows, back, h, weights, routing, tiles, tile, glu, extra_parts=1)
        assert dh.shape == h.shape and sa.shape == a.shape and ds.shape == (2, 400)
        for operands in ((rows, y), (y, rows)):
            dw = launch.weight_grad(*operands, routing, replace(GRADIENT, gather=gather), 1.0, torch.float32)
        for kernel in ("down_backward", "weight_grad"):
            assert launched[kernel][0] is x if gather else launched[kernel][0].base is rows.padded.data
        assert ("padded" in vars(rows)) != gather  # nothing was copied that is gathered
    assert h.shape == (400, wide) and a.shape == (400, intermediate) and dw.shape == (4, hidden, hidden)
    assert len(launched) == 4 and not roads._failed


if __name__ == "__main__":
    for name in KERNELS:
        compiled = compile_for_hopper(name)
        assert compiled.metadata.shared <= 227 * 1024, name  # what a multiprocessor has
        assert all(word in compiled.asm["ptx"] for word in ("wgmma", "cp.async.bulk.tensor")), name
        print(name)
