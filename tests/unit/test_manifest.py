"""The manifest: what it records is what it reads back, and every kind of damage is seen and named."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from accel_moe.checkpoint import manifest as m
from accel_moe.checkpoint.checksums import BLOCK_BYTES, StreamDigest, file_digest
from accel_moe.checkpoint.manifest import (
    AdapterEntry,
    Chunk,
    FileEntry,
    Manifest,
    TensorEntry,
    check_chunks,
    check_files,
)

FILES = {"model/data.distcp": b"x" * 1000, "model/.metadata": b"meta", "rng_0.pkl": b"state"}


def write(folder, algorithm="blake2b", node=0, nodes=("host-a",)) -> Manifest:
    for path, content in FILES.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    entries = {p: FileEntry(len(c), file_digest(folder / p, algorithm)) for p, c in FILES.items()}
    files = tuple(entries if i == node else {f"other{i}.pkl": FileEntry(1, "00")} for i in range(len(nodes)))
    tensor = TensorEntry((4, 2), "float32", (Chunk((0, 0), (4, 2), "data.distcp"),))
    made = Manifest(
        step=7,
        base_model="some/base",
        model_type="qwen3_moe",
        ep=2,
        efsdp=1,
        dp_replicate=1,
        world_size=2,
        versions={"torch": "2"},
        digest_algorithm=algorithm,
        nodes=tuple(nodes),
        files=files,
        tensors={"model": {"model.weight": tensor}},
        node=node,
        adapter=AdapterEntry("default", {"r": 8}, {"lm_head.weight": "00"}),
    )
    m.write_manifest(folder, made)
    return made


def problems(folder, manifest, **options) -> list[str]:
    return list(check_files(folder, manifest, **options))


def test_a_manifest_reads_back_as_it_was_written(tmp_path):
    made = write(tmp_path)
    assert m.read_manifest(tmp_path) == made
    assert problems(tmp_path, made) == []
    assert m.read_manifest(tmp_path / "model") is None


@pytest.mark.parametrize(
    "damage, told",
    [
        (lambda p: p.write_bytes(b""), "0 bytes, the manifest says 1000"),
        (lambda p: p.write_bytes(b"x" * 999), "999 bytes"),
        (lambda p: p.write_bytes(b"x" * 999 + b"y"), "its bytes changed"),
        (lambda p: p.unlink(), "is missing (written by node 0, host-a)"),
        (lambda p: (p.unlink(), p.mkdir()), "model/data.distcp"),
    ],
)
def test_damage_names_the_file_and_a_tensor_that_it_holds(tmp_path, damage, told):
    made = write(tmp_path)
    damage(tmp_path / "model" / "data.distcp")
    (line,) = problems(tmp_path, made)
    assert told in line and "model/data.distcp" in line
    if "cannot be read" not in line:
        assert "model.weight" in line


def test_sizes_only_does_not_read_the_files(tmp_path):
    made = write(tmp_path)
    (tmp_path / "model" / "data.distcp").write_bytes(b"y" * 1000)
    assert problems(tmp_path, made, checksums=False) == []


def test_files_of_another_node_need_not_be_there_but_are_checked_where_they_are(tmp_path):
    made = write(tmp_path, node=1, nodes=("host-a", "host-b"))
    assert problems(tmp_path, made) == []
    (tmp_path / "other0.pkl").write_bytes(b"?")
    assert "other0.pkl does not match" in problems(tmp_path, made)[0]
    assert m.writer_of(made, "rng_0.pkl") == "node 1, host-b"


@pytest.mark.parametrize(
    "change, told",
    [
        (lambda text: text[: len(text) // 2], "not a readable manifest"),
        (lambda text: "", "not a readable manifest"),
        (lambda text: "[]", "not a readable manifest"),
        (lambda text: text.replace('"step":7', '"step":8'), "changed after it was written"),
        (lambda text: text.replace('"format_version":1', '"format_version":9'), "Upgrade accel_moe"),
    ],
)
def test_a_manifest_that_was_changed_is_refused(tmp_path, change, told):
    write(tmp_path)
    path = tmp_path / m.MANIFEST_NAME
    path.write_text(change(path.read_text()))
    with pytest.raises(m.CheckpointError, match=told):
        m.read_manifest(tmp_path)


def test_every_flipped_bit_of_a_manifest_is_seen(tmp_path):
    made = write(tmp_path)
    raw = (tmp_path / m.MANIFEST_NAME).read_bytes()
    for position in range(0, len(raw), 7):
        flipped = bytearray(raw)
        flipped[position] ^= 1 << (position % 7)
        (tmp_path / m.MANIFEST_NAME).write_bytes(flipped)
        try:
            again = m.read_manifest(tmp_path)
        except m.CheckpointError:
            continue
        assert again == made  # a blank between two tokens, say


@pytest.mark.parametrize("size", [0, 1, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 3 * BLOCK_BYTES + 5])
def test_a_checksum_does_not_depend_on_how_the_bytes_came_nor_on_threads(tmp_path, size):
    content = bytes(range(256)) * (size // 256 + 1)
    content = content[:size]
    (tmp_path / "file").write_bytes(content)
    with ThreadPoolExecutor(3) as pool:
        pieces = StreamDigest("blake2b", pool)
        for start in range(0, size, 999_983):
            pieces.update(content[start : start + 999_983])
        expected = pieces.hexdigest()
        assert file_digest(tmp_path / "file", "blake2b", pool) == expected
    assert file_digest(tmp_path / "file", "blake2b") == expected
    if size:
        (tmp_path / "file").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert file_digest(tmp_path / "file", "blake2b") != expected


def test_a_checkpoint_with_the_other_checksum_is_still_verified(tmp_path):
    pytest.importorskip("xxhash")
    made = write(tmp_path, algorithm="xxh3_128")
    assert not problems(tmp_path, made)
    (tmp_path / "model/data.distcp").write_bytes(b"y" * 1000)
    assert any("data.distcp does not match its checksum" in line for line in problems(tmp_path, made))


def test_the_other_checksum_without_its_package_says_how_to_go_on(tmp_path, monkeypatch):
    made = replace(write(tmp_path), digest_algorithm="xxh3_128")
    monkeypatch.setitem(sys.modules, "xxhash", None)
    with pytest.raises(m.CheckpointError, match="Install xxhash, or set moe_verify: sizes"):
        problems(tmp_path, made)


def test_an_unknown_checksum_says_how_to_go_on(tmp_path):
    made = replace(write(tmp_path), digest_algorithm="sha3")
    with pytest.raises(m.CheckpointError, match="moe_verify: sizes"):
        problems(tmp_path, made)


def entry(shape, *boxes) -> TensorEntry:
    return TensorEntry(shape, "float32", tuple(Chunk(o, s, "f") for o, s in boxes))


@pytest.mark.parametrize(
    "whole",
    [
        entry((4, 2), ((0, 0), (2, 2)), ((2, 0), (2, 2))),
        entry((4, 2), ((0, 0), (4, 1)), ((0, 1), (4, 1))),
        entry((3,), ((0,), (2,)), ((2,), (1,)), ((3,), (0,))),  # a rank with nothing
        entry((), ((), ())),
        entry((0, 4), ((0, 0), (0, 4))),
    ],
)
def test_chunks_that_tile_a_tensor_are_whole(whole):
    assert check_chunks("w", whole) is None


@pytest.mark.parametrize(
    "broken, told",
    [
        (entry((4, 2), ((0, 0), (2, 2))), "4 of 8 values, 4 would be uninitialised"),
        (entry((4, 2)), "0 of 8"),
        (entry((4, 2), ((0, 0), (3, 2)), ((2, 0), (2, 2))), "overlap"),
        (entry((4, 2), ((0, 0), (2, 2)), ((0, 0), (2, 2))), "overlap"),
        (entry((4, 2), ((0, 0), (2, 2)), ((3, 0), (2, 2))), "outside"),
        (entry((4, 2), ((0,), (4,))), "outside"),
        (entry((), ((), ()), ((), ())), "overlap"),
    ],
)
def test_holes_overlaps_and_strays_are_named(broken, told):
    assert told in check_chunks("w", broken)
