"""Weights in the compute dtype, made ahead."""

import contextlib

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from accel_moe.kernels import casts as module
from accel_moe.kernels.casts import Casts


@contextlib.contextmanager
def a_forward():
    module.begin_forward()
    try:
        yield
    finally:
        module.end_forward()


def test_casts_made_ahead_are_those_that_are_taken():
    weight = torch.randn(3, 4, dtype=torch.double)
    casts = Casts([weight], torch.float32)
    with a_forward():
        casts.prepare_aside()
        (ahead,) = casts._made
        (taken,) = casts.take()
        (again,) = casts.take()
    assert taken is ahead and torch.equal(taken, weight.float())
    assert again is not ahead and torch.equal(again, weight.float())


@pytest.fixture
def sharded():
    """A parameter as FSDP and we shard it: an optimizer changes its local tensor, whose version does not tell."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield torch.nn.Parameter(distribute_tensor(torch.ones(4, 4), init_device_mesh("cpu", (1,)), [Shard(0)]))
    dist.destroy_process_group()


@pytest.mark.parametrize("ends", ["forward", "backward"])
def test_a_weight_that_an_optimizer_changed_since_is_cast_again(sharded, ends):
    optimizer = torch.optim.AdamW([sharded], lr=0.5, foreach=True)
    casts = Casts([sharded.detach().to_local()], torch.bfloat16)
    if ends == "forward":
        with a_forward():
            casts.prepare_aside()
    else:
        x = torch.ones(1, requires_grad=True)
        x.register_hook(lambda _: casts.prepare_aside())
        (x * 2).backward()
    assert casts._made is not None
    sharded.grad = sharded.detach().clone()
    optimizer.step()
    with a_forward():
        (taken,) = casts.take()
    assert sharded.to_local()[0, 0] < 1 and torch.equal(taken, sharded.detach().to_local().bfloat16())


def test_outside_of_forwards_and_backwards_nothing_is_made_ahead():
    casts = Casts([torch.randn(3, dtype=torch.double)], torch.float32)
    casts.prepare_aside()
    assert casts._made is None


def test_prepared_casts_are_not_made_a_second_time():
    casts = Casts([torch.randn(3, dtype=torch.double)], torch.float32)
    casts.prepare()
    made = casts._made
    with a_forward():
        casts.prepare_aside()
    assert casts._made is made
