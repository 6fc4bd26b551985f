"""A model's own positions are looked at once for each shape; positions from anywhere else, every time."""

import functools

import pytest
import torch

import accel_moe
from accel_moe import hooks, positions
from tests.tiny import tiny_model

IDS = torch.arange(12).reshape(2, 6)
PACKED = torch.tensor([[0, 1, 2, 0, 1, 2]]).expand(2, -1)


@pytest.fixture
def looks(monkeypatch):
    """The shapes that transformers looked at, through our patch."""
    import transformers.masking_utils as masking

    hooks.uninstall()
    seen, original = [], masking.find_packed_sequence_indices

    def look(position_ids):
        seen.append(tuple(position_ids.shape))
        return original(position_ids)

    monkeypatch.setattr(masking, "find_packed_sequence_indices", look)
    yield seen
    hooks.uninstall()


def trusted(family: str = "qwen3_moe"):
    model = accel_moe.prepare(tiny_model(family), moe_kernel="grouped_mm")
    positions.trust_own_positions(model)
    return model


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3"])
def test_own_positions_are_looked_at_once_for_each_shape(looks, family):
    plain = tiny_model(family)(IDS).logits
    model = trusted(family)
    before = len(looks)
    for ids in (IDS, IDS, IDS[:, :4], IDS):
        out = model(input_ids=ids).logits
    assert looks[before:] == [(2, 6), (2, 4)]
    torch.testing.assert_close(out, plain)


def given_by_the_caller(model):
    return model(IDS, position_ids=PACKED)


def given_by_a_hook(model):
    hook = model.model.register_forward_pre_hook(
        lambda _, args, kwargs: (args, {**kwargs, "position_ids": PACKED}), with_kwargs=True
    )
    try:
        return model(IDS)
    finally:
        hook.remove()


def given_by_a_forward_of_the_users(model):
    own = model.model.forward
    model.model.forward = lambda *args, **kwargs: own(*args, **{**kwargs, "position_ids": PACKED})
    try:
        return model(IDS)
    finally:
        del model.model.forward


def given_by_a_forward_in_the_class(model):
    cls = next(c for c in type(model.model).__mro__ if "forward" in vars(c))
    own = cls.forward

    @functools.wraps(own)
    def packing(self, *args, **kwargs):
        return own(self, *args, **{**kwargs, "position_ids": PACKED})

    cls.forward = packing
    try:
        return model(IDS)
    finally:
        cls.forward = own


@pytest.mark.parametrize(
    "packed",
    [given_by_the_caller, given_by_a_hook, given_by_a_forward_of_the_users, given_by_a_forward_in_the_class],
)
def test_packed_positions_keep_sequences_apart_after_others_of_that_shape(looks, packed):
    model = trusted()
    alone = torch.cat([model(half).logits for half in IDS.split(3, dim=1)], dim=1)
    together = model(IDS).logits
    assert not torch.allclose(together, alone)
    for _ in range(2):
        torch.testing.assert_close(packed(model).logits, alone)
    assert torch.equal(model(IDS).logits, together)


def test_a_forward_that_fails_leaves_nothing_behind(looks):
    model = trusted()
    model(IDS)
    with pytest.raises(IndexError):
        model(IDS + 1000)
    before = len(looks)
    tiny_model()(IDS)  # one of which nothing is trusted
    assert len(looks) == before + 1
