"""A model's own positions are looked at once for each shape; positions that were given, every time."""

import pytest
import torch

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

    monkeypatch.setattr(masking, "find_packed_sequence_indices", positions.asking_once(look))
    return seen


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_own_positions_are_looked_at_once_for_each_shape(looks, family):
    model = tiny_model(family)
    plain = model(IDS).logits
    before = len(looks)
    positions.trust_own_positions(model)
    for ids in (IDS, IDS, IDS[:, :4], IDS):
        out = model(input_ids=ids).logits
    assert looks[before:] == [(2, 6), (2, 4)]
    assert torch.equal(out, plain)


def test_packed_positions_are_looked_at_every_time_and_keep_sequences_apart(looks):
    model = tiny_model()
    alone = torch.cat([model(half).logits for half in IDS.split(3, dim=1)], dim=1)
    positions.trust_own_positions(model)
    together = model(IDS).logits
    before = len(looks)
    for _ in range(2):
        packed = model(IDS, position_ids=PACKED).logits
        torch.testing.assert_close(packed, alone)
    assert len(looks) == before + 2
    assert not torch.allclose(packed, together)
    assert torch.equal(model(IDS).logits, together)


def test_a_forward_that_fails_leaves_nothing_behind(looks):
    model = tiny_model()
    positions.trust_own_positions(model)
    model(IDS)
    with pytest.raises(IndexError):
        model(IDS + 1000)
    before = len(looks)
    tiny_model()(IDS)  # one of which nothing is trusted
    assert len(looks) == before + 1
