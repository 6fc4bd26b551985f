"""Weights in the compute dtype, made ahead."""

import torch

from accel_moe.kernels.casts import Casts


def test_casts_made_ahead_are_those_that_are_taken():
    weight = torch.randn(3, 4, dtype=torch.double)
    casts = Casts([weight], torch.float32)
    casts.prepare_aside()
    (ahead,) = casts._made
    (taken,) = casts.take()
    assert taken is ahead and torch.equal(taken, weight.float())
    (again,) = casts.take()
    assert again is not ahead and torch.equal(again, weight.float())


def test_a_weight_that_changed_since_is_cast_again():
    weight = torch.nn.Parameter(torch.randn(3, 4, dtype=torch.double))
    casts = Casts([weight.detach()], torch.float32)
    casts.prepare_aside()
    with torch.no_grad():
        weight.mul_(2)
    assert torch.equal(casts.take()[0], weight.detach().float())


def test_prepared_casts_are_not_made_a_second_time():
    casts = Casts([torch.randn(3, dtype=torch.double)], torch.float32)
    casts.prepare()
    made = casts._made
    casts.prepare_aside()
    assert casts._made is made
