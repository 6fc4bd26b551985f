"""Checkpoints and bases for the tests of consolidate, made in one process."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
import torch.distributed.checkpoint as dist_cp
from safetensors.torch import load_file

from accel_moe import consolidate
from accel_moe.checkpoint import export_write
from accel_moe.checkpoint.checksums import ALGORITHM, file_digest
from accel_moe.checkpoint.manifest import FileEntry, Manifest, write_manifest
from accel_moe.checkpoint.tensor_reader import TensorReader
from accel_moe.weights.safetensors import read_header, safetensors_files
from tests.tiny import tiny_model


def write_checkpoint(model, folder):
    """A stock DCP checkpoint of a model, in accelerate's folders; returns the folder."""
    writer = dist_cp.FileSystemWriter(folder / "pytorch_model_fsdp_0")
    dist_cp.save({"model": model.state_dict()}, storage_writer=writer, no_dist=True)
    return folder


def write_manifest_of(folder: Path) -> None:
    """The manifest that accel_moe would have written beside a checkpoint's model."""
    dcp_folder = folder / "pytorch_model_fsdp_0"
    tensors = {f"model.{name}": entry for name, entry in TensorReader([dcp_folder]).tensors.items()}
    files = {
        f"{dcp_folder.name}/{path.name}": FileEntry(path.stat().st_size, file_digest(path, ALGORITHM))
        for path in dcp_folder.iterdir()
    }
    manifest = Manifest(
        step=3,
        base_model=None,
        model_type=None,
        ep=1,
        efsdp=1,
        dp_replicate=1,
        world_size=1,
        versions={},
        digest_algorithm=ALGORITHM,
        nodes=("here",),
        files=(files,),
        tensors={dcp_folder.name: tensors},
    )
    write_manifest(folder, manifest)


def read_weights(folder) -> dict[str, torch.Tensor]:
    weights = {}
    for file in safetensors_files(folder):
        weights |= load_file(folder / file)
    return weights


def interrupt_writes(monkeypatch, stop) -> list[int]:
    """From now on an export is interrupted before the group for which `stop(index, calls)` is true, as by Ctrl-C.

    Returns `calls`, the groups that were begun, in order.
    """
    calls: list[int] = []
    real = export_write._GroupWriter.write

    def write(self, index):
        if stop(index, calls):
            raise KeyboardInterrupt
        calls.append(index)
        return real(self, index)

    monkeypatch.setattr(export_write._GroupWriter, "write", write)
    return calls


def run(*args) -> int:
    return consolidate.main([str(arg) for arg in args])


def one_line_error(capsys, *args) -> str:
    assert run(*args) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ")
    return lines[-1]


def make_trained(tmp_path, family, **options):
    """(checkpoint, base, weights): the base differs from the trained model in every value."""
    tiny_model(family, seed=0, **options).save_pretrained(tmp_path / "base", max_shard_size="40KB")
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    model = tiny_model(family, seed=5, **options)
    model.save_pretrained(tmp_path / "expected")
    return (
        write_checkpoint(model, tmp_path / "checkpoint"),
        tmp_path / "base",
        read_weights(tmp_path / "expected"),
    )


def offer_on_hub(base: Path, cache: Path, monkeypatch) -> list[str]:
    """Let the Hub's client answer for `base`; returns the list of weight files that are fetched from now on."""
    import huggingface_hub
    from huggingface_hub import utils

    fetched: list[str] = []

    def snapshot(repo, allow_patterns):
        assert not any("safetensors" in pattern for pattern in allow_patterns)
        cache.mkdir()
        for name in ("config.json", "generation_config.json", "tokenizer.json"):
            shutil.copy(base / name, cache)
        return str(cache)

    def metadata(repo):
        files = {}
        for file in safetensors_files(base):
            tensors = {
                key: utils.TensorInfo(t.dtype, [*t.shape], (t.start, t.start + t.size_bytes))
                for key, t in read_header(base / file).items()
            }
            files[file] = utils.SafetensorsFileMetadata(metadata={}, tensors=tensors)
        return utils.SafetensorsRepoMetadata(metadata=None, sharded=True, weight_map={}, files_metadata=files)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", metadata)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, file: fetched.append(file) or str(base / file))
    return fetched


def assert_same_tensors(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert set(got) == set(want)
    for key, tensor in want.items():
        assert got[key].dtype == tensor.dtype and torch.equal(got[key], tensor), key
