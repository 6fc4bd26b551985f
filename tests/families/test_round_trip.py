"""Each family's way from the Hub and back: read into shards, trained, saved, consolidated, read by transformers.

Everything is compared at 0.0: bytes are moved and never computed with, but for the one training step.
"""

from __future__ import annotations

import json

import pytest
import torch

from accel_moe import catalogue, consolidate
from tests.families import round_trip, tiny_families
from tests.families.test_over_ranks import INSTALLED, ONE_RANK_ONLY
from tests.ranks import run_ranks

DEFAULT = [name for name in catalogue.ROUND_TRIP if name in INSTALLED]


def keys_of(folder) -> set[str]:
    return set(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"])


def check(family: str, folder) -> None:
    base, checkpoint, out = folder / "base", folder / "checkpoint", folder / "out"
    try:
        expected = round_trip.write_base(family, str(base))
    except ValueError as error:
        pytest.skip(f"{family}: {error}")
    trained = run_ranks(round_trip.train_on_rank, 2, family, str(base), str(checkpoint))[0]
    for name, tensor in trained.loaded.items():
        assert torch.equal(tensor, expected[name]), f"{name} was not loaded as transformers loads it"
    changed = [n for n, t in trained.stepped.items() if not torch.equal(t, expected[n])]
    assert any("experts" in n for n in changed)
    assert consolidate.main([str(checkpoint), str(out), str(base), "--verify"]) == 0
    assert keys_of(out) == keys_of(base)
    back = tiny_families.tiny(family).model_class.from_pretrained(out, dtype="float32").state_dict()
    assert back.keys() == expected.keys()
    for name, tensor in trained.stepped.items():
        assert torch.equal(back[name], tensor), f"{name} is not what training left"


@pytest.mark.parametrize("family", DEFAULT)
def test_a_family_goes_from_the_hub_through_training_and_back(family, tmp_path):
    check(family, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in INSTALLED if name not in {*DEFAULT, *ONE_RANK_ONLY}])
def test_every_other_family_goes_from_the_hub_through_training_and_back(family, tmp_path):
    check(family, tmp_path)


def test_the_default_families_have_every_style_of_hub_keys():
    def styles(names):
        return {catalogue.hub_key_style(name).split()[0] for name in names}

    assert styles(DEFAULT) == styles(name for name in INSTALLED if name not in ONE_RANK_ONLY)
