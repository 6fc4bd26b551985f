"""A manifest of odd types, with the right checksum: always a CheckpointError, never another error, never accepted."""

from __future__ import annotations

import copy
import json
import random

import pytest

from accel_moe.checkpoint import manifest as m
from accel_moe.checkpoint.manifest import Manifest
from accel_moe.errors import CheckpointError
from tests.unit.test_manifest import write

ODD = [
    None,
    True,
    -1,
    0.5,
    "text",
    "",
    [],
    {},
    [[]],
    {"a": 1},
    10**30,
    "../up",
    "/etc/passwd",
    "a\0b",
    "\ud800",
    [None],
]


def text_of(body, node=0) -> str:
    """As somebody writes it who also writes the right checksum."""
    return json.dumps({"digest": m._body_digest(body, node), "node": node, "body": body})


@pytest.fixture
def body(tmp_path) -> dict:
    write(tmp_path)
    return json.loads((tmp_path / m.MANIFEST_NAME).read_text())["body"]


def paths_of(value, path=()):
    """Every place in a tree of JSON."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from paths_of(inner, (*path, key))


def changed(body, path, change):
    """A copy with one place changed, or taken away, or renamed."""
    if not path:
        return change(body)
    tree = copy.deepcopy(body)
    owner = tree
    for key in path[:-1]:
        owner = owner[key]
    owner[path[-1]] = change(owner[path[-1]])
    return tree


def without(body, path):
    tree = copy.deepcopy(body)
    owner = tree
    for key in path[:-1]:
        owner = owner[key]
    del owner[path[-1]]
    return tree


def read(text: str) -> Manifest | None:
    """What a manifest reads as; None when it is refused. Any other error is the fault that is looked for."""
    try:
        return Manifest.from_json(text)
    except CheckpointError as error:
        assert "Use another checkpoint" in str(error) or "use another" in str(error) or "Upgrade" in str(error)
        return None


def test_every_value_of_another_kind_is_refused_or_reads_as_what_it_says(body):
    for path in paths_of(body):
        for odd in ODD:
            made = read(text_of(changed(body, path, lambda _, odd=odd: odd)))
            if made is None:
                continue
            assert m._body_digest(json.loads(made.to_json())["body"], 0) == m._body_digest(
                changed(body, path, lambda _, odd=odd: odd), 0
            ), (path, odd)


@pytest.mark.parametrize("key", ["format_version", "step", "files", "nodes", "tensors", "versions", "world_size", "ep"])
def test_a_missing_field_is_refused(body, key):
    assert read(text_of(without(body, (key,)))) is None


def test_an_adapter_is_described_in_whole_or_not_at_all(body):
    assert read(text_of(without(body, ("adapter",)))).adapter is None
    for key in ("name", "config", "base_tensors"):
        assert read(text_of(without(body, ("adapter", key)))) is None


@pytest.mark.parametrize("version", ["1", None, 1.0, True, [1], {}])
def test_a_format_version_that_is_no_number_is_refused(body, version):
    with pytest.raises(CheckpointError, match="format_version"):
        Manifest.from_json(text_of({**body, "format_version": version}))


@pytest.mark.parametrize("node", [-1, 1, "0", None, True, 0.0])
def test_a_node_that_is_none_of_its_nodes_is_refused(body, node):
    assert read(text_of(body, node)) is None


def test_numbers_where_text_is_expected_are_refused_by_name(body):
    for key in ("base_model", "model_type", "digest_algorithm"):
        with pytest.raises(CheckpointError, match=f"{key}: 7, expected text"):
            Manifest.from_json(text_of({**body, key: 7}))


def test_a_file_outside_the_folder_is_refused(body):
    (files,) = body["files"]
    for path in ("../secret", "/etc/passwd", "a//b", "a/../../b"):
        with pytest.raises(CheckpointError, match="no path within the folder"):
            Manifest.from_json(text_of({**body, "files": [{**files, path: [1, "00"]}]}))


def test_a_tensor_in_a_file_that_is_not_listed_is_refused(body):
    (files,) = body["files"]
    left = {path: entry for path, entry in files.items() if not path.endswith("data.distcp")}
    with pytest.raises(CheckpointError, match=r"tensors are in model/data\.distcp, which is not among its files"):
        Manifest.from_json(text_of({**body, "files": [left]}))


@pytest.mark.parametrize("text", ["[" * 100_000, '{"body":' * 50_000, "null", "7", '"text"', '{"digest": 1}', "NaN"])
def test_text_of_another_shape_and_deep_nesting_are_refused(text):
    with pytest.raises(CheckpointError, match="not a readable manifest"):
        Manifest.from_json(text)


def test_thousands_of_random_changes_give_a_checkpoint_error_or_a_manifest(body):
    chance = random.Random(0)
    for _ in range(2000):
        tree = body
        for _ in range(chance.randint(1, 3)):
            path = chance.choice([p for p in paths_of(tree) if p])
            tree = without(tree, path) if chance.random() < 0.3 else changed(tree, path, lambda _: chance.choice(ODD))
        if isinstance(tree, dict):
            read(text_of(tree))


def test_the_quantisation_of_experts_is_read_back_and_is_no_other_kind(body):
    assert "quantised_experts" not in body  # a manifest of dense experts is what it was
    good = {**body, "quantised_experts": {"scheme": "nf4", "block_size": 64}}
    read = Manifest.from_json(text_of(good))
    assert read.quantised_experts == m.Quantisation("nf4", 64)
    assert Manifest.from_json(read.to_json()) == read
    for wrong in (*ODD, {"scheme": "nf4"}, {"scheme": 4, "block_size": 64}, {"scheme": "nf4", "block_size": 0}):
        with pytest.raises(CheckpointError):
            Manifest.from_json(text_of({**body, "quantised_experts": wrong}))
