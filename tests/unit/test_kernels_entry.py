"""A compiled kernel is launched again only where Triton would have chosen it again."""

import types

import pytest
import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from accel_moe.kernels import cached_launch
from accel_moe.kernels.cached_launch import CachedLaunch


def parameter(name, constexpr=False, any_value=False):
    return types.SimpleNamespace(name=name, is_constexpr=constexpr, do_not_specialize=any_value)


class Jit:
    """Stands for triton.jit's function: says what it was asked to choose, and what was launched."""

    def __init__(self):
        self.chosen, self.launched = 0, []
        given = parameter("x"), parameter("n", any_value=True), parameter("stride")
        self.params = [*given, parameter("BLOCK", constexpr=True), parameter("FLAG", constexpr=True)]

    def __getitem__(self, grid):
        def run(*arguments, **options):
            self.chosen += 1
            return Compiled(self, self.chosen)

        return run


class Compiled:
    function, packed_metadata = "function", "metadata"

    def __init__(self, jit, number):
        self.jit, self.number = jit, number

    def __getitem__(self, grid):
        return lambda *arguments: self.jit.launched.append((self.number, grid, ("watched", *arguments)))

    def run(self, x, y, z, stream, function, metadata, launch_metadata, enter, leave, *arguments):
        assert (stream, function, metadata) == ("stream of 0", self.function, self.packed_metadata)
        assert launch_metadata is enter is leave is None
        self.jit.launched.append((self.number, (x, y, z), arguments))


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    active = types.SimpleNamespace(get_current_stream=lambda device: f"stream of {device}")
    monkeypatch.setattr(cached_launch, "driver", types.SimpleNamespace(active=active))
    return CachedLaunch(Jit())


def launch(kernel, x=None, n=5, stride=16, flag=True, block=64, **options):
    x = torch.zeros(64) if x is None else x
    kernel[(3,)](x, n, stride, BLOCK=block, FLAG=flag, **options)


def test_the_same_kind_of_arguments_launch_what_was_chosen_before_with_the_constants_in_their_places(kernel):
    launch(kernel)
    other = torch.ones(128)
    launch(kernel, other, n=77)  # another tensor, another size that nobody specialises on
    assert kernel.fn.chosen == 1
    ((number, grid, arguments),) = kernel.fn.launched
    assert (number, grid) == (1, (3, 1, 1))
    assert arguments == (other.data_ptr(), 77, 16, 64, True)


@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
def test_who_looks_on_sees_every_launch(kernel, name):
    launch(kernel)
    chain, seen = getattr(triton.knobs.runtime, name), lambda metadata: None
    chain.add(seen)
    try:
        launch(kernel)
    finally:
        chain.remove(seen)
    launch(kernel)
    assert [arguments[0] == "watched" for *_, arguments in kernel.fn.launched] == [True, False]


def test_a_descriptor_goes_as_it_is_and_a_scalar_of_any_value_decides_nothing(kernel):
    descriptor = TensorDescriptor(torch.zeros(16, 16), [16, 16], [16, 1], [8, 8])
    launch(kernel, descriptor)
    launch(kernel, descriptor, n=6)
    assert kernel.fn.chosen == 1 and kernel.fn.launched[0][2][:2] == (descriptor, 6)


@pytest.mark.parametrize(
    "change",
    [
        {"x": torch.zeros(64, dtype=torch.bfloat16)},
        {"x": torch.zeros(64)[1:]},  # 4 bytes off: no vector loads
        {"x": TensorDescriptor(torch.zeros(16, 16), [16, 16], [16, 1], [8, 8])},
        {"n": 2**31},  # another type
        {"stride": 17},
        {"stride": 1},
        {"block": 128},
        {"flag": False},
        {"num_warps": 8},
    ],
    ids=lambda change: str(next(iter(change))),
)
def test_whatever_can_decide_is_asked_again(kernel, change):
    launch(kernel)
    launch(kernel, **change)
    assert kernel.fn.chosen == 2 and not kernel.fn.launched
    launch(kernel)
    launch(kernel, **change)
    assert [number for number, *_ in kernel.fn.launched] == [1, 2]


def test_another_device_is_asked_again(kernel, monkeypatch):
    launch(kernel)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    launch(kernel)
    assert kernel.fn.chosen == 2


def test_descriptors_of_other_blocks_or_dtypes_are_asked_again(kernel):
    base = torch.zeros(16, 16)
    for block, dtype in (([8, 8], torch.float32), ([8, 16], torch.float32), ([8, 8], torch.bfloat16)):
        launch(kernel, TensorDescriptor(base.to(dtype), [16, 16], [16, 1], block))
    assert kernel.fn.chosen == 3


def test_nothing_is_kept_of_a_launch_that_chose_nothing(kernel, monkeypatch):
    monkeypatch.setattr(Jit, "__getitem__", lambda self, grid: lambda *a, **o: None)
    launch(kernel)
    assert not kernel._compiled
