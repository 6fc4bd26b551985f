"""Families under context parallelism: two gloo ranks share each sequence, against the family's loop on one process.

The default run has those whose positions have three planes, for their axes of images; `--slow` has every family that
ring_limits.py lets pass.
"""

from __future__ import annotations

import pytest

from accel_moe import ring_limits
from tests.families import split_sequences, tiny_families
from tests.families.sweep import compare
from tests.families.test_over_ranks import INSTALLED, ONE_RANK_ONLY
from tests.ranks import run_ranks

WITH_PLANES = [name for name in ("qwen3_vl_moe", "glm4v_moe", "qwen3_omni_moe") if name in INSTALLED]


def check(found, expected) -> None:
    found = {n: found[n] if n in found else 0 * g for n, g in expected.items()}  # experts that no token reached
    # fp32, sums in another order: over_ranks.py's tolerance; the families measure 5e-7 to 2e-6
    assert compare(found, expected, 1e-6, 1e-4)[1] == "ok"


def check_family(family: str) -> None:
    if why := ring_limits.why_no_ring(tiny_families.tiny(family).build()):
        pytest.skip(why)
    check(run_ranks(split_sequences.on_rank, 2, family)[0], split_sequences.on_one_process(family))


@pytest.mark.parametrize("family", WITH_PLANES)
def test_text_of_a_family_with_images_is_split_like_any_other(family):
    check_family(family)


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in INSTALLED if name not in {*WITH_PLANES, *ONE_RANK_ONLY}])
def test_every_family_with_a_ring_has_the_gradients_of_whole_sequences(family):
    check_family(family)


def test_a_model_with_images_trains_on_text_whatever_the_planes_of_its_positions():
    expected = split_sequences.text_on_one_process()
    for found in run_ranks(split_sequences.text_on_rank, 2)[0]:
        check(found, expected)


def test_images_are_refused_by_name_on_every_rank():
    first, second = run_ranks(split_sequences.refused_on_rank, 2, timeout_s=60)
    assert first == second
    said = ["a batch with image_grid_thw, pixel_values. Images", "position_ids [3, 2, 8] differ from plane to plane"]
    said += ["Qwen3VLMoeForConditionalGeneration got, within a split over cp_size=2, image_grid_thw, pixel_values."]
    said += ["A model got no position_ids under cp_size=2"] * 2
    for message, words in zip(first, said, strict=True):
        assert words in message, message
