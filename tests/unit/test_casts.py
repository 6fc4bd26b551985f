"""Weights in the compute dtype, made ahead."""

import torch

from accel_moe.kernels.casts import Casts


def test_casts_made_ahead_are_taken_once_and_then_made_anew():
    weight = torch.randn(3, 4, dtype=torch.double)
    casts = Casts([weight], torch.float32)
    casts.prepare()
    made = casts._made
    casts.prepare()
    assert casts._made is made  # not a second time
    assert made is not None and casts.take()[0] is made[0]
    weight.mul_(2)
    (again,) = casts.take()
    assert again is not made[0] and torch.equal(again, weight.float())
