"""The kernels' experts layer with its records spelt out, for tests on the CPU and on a GPU."""

from __future__ import annotations

from accel_moe.kernels import autograd
from accel_moe.kernels.autograd import ExpertWeights
from accel_moe.kernels.glu import Glu
from accel_moe.kernels.hints import Hints


def experts(
    x, w1, w2, index, weights, act="silu", *, b1=None, b2=None, glu=None, gated=True, transposed=False, **hints
):
    """autograd.experts. `hints` are the fields of Hints."""
    own = ExpertWeights(w1, w2, b1, b2, transposed)
    return autograd.experts(x, own, index, weights, glu or Glu(act, gated), Hints(**hints))
