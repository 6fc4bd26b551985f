"""Digests of a base: each tensor's dtype, shape and bytes; of a long one four stretches."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from accel_moe.weights.base_model import local_base, open_base
from accel_moe.weights.fingerprint import WHOLE_BYTES, digests, first_difference


def digests_of(folder, tensors) -> dict[str, str]:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    base = open_base(str(folder))
    return digests(base, base.tensors)


def test_equal_tensors_have_equal_digests_whatever_file_they_are_in(tmp_path):
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(WHOLE_BYTES, dtype=torch.float32)}
    one = digests_of(tmp_path / "one", tensors)
    two = digests_of(tmp_path / "two", {"first": torch.ones(9), **tensors})
    assert first_difference(one, two) is None and set(one) == {"a", "b"}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: t["a"].view(-1)[5:].add_(1), "a has the hash"),
        (lambda t: t["long"][-1:].add_(1), "long has the hash"),
        (lambda t: t["long"][:1].add_(1), "long has the hash"),
        (lambda t: t.update(a=t["a"].reshape(3, 2)), "a has the hash"),
        (lambda t: t.update(a=t["a"].view(torch.int32)), "a has the hash"),
        (lambda t: t.pop("empty"), "empty is gone"),
    ],
    ids=["one value", "last of a long one", "first of a long one", "shape", "dtype", "gone"],
)
def test_the_first_tensor_that_is_another_one_is_named(tmp_path, change, told):
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "empty": torch.ones(0), "long": torch.randn(WHOLE_BYTES)}
    before = digests_of(tmp_path / "before", tensors)
    change(tensors)
    assert first_difference(before, digests_of(tmp_path / "after", tensors)).startswith(told)


def test_the_files_of_a_base_are_looked_for_without_asking_the_hub(tmp_path, monkeypatch):
    import huggingface_hub

    seen = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: seen.append(k) or str(tmp_path / "one"))
    digests_of(tmp_path / "one", {"a": torch.ones(2)})
    assert set(local_base("org/model", "abc").tensors) == {"a"}
    assert seen == [{"revision": "abc", "local_files_only": True}]
    assert local_base(str(tmp_path)) is None  # no weights in it
    assert load_file(tmp_path / "one" / "model.safetensors")["a"].sum() == 2
