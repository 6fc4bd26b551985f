"""Before anything is loaded: the ranks have the same checkpoint, its bytes are those of the save, and it fits.

    1. identify   the manifest is read; every rank must have been given a folder of the same save
    2. check      every file's size, and every checksum (`moe_verify`), shared out between ranks that see one folder
    3. fit        DCP's metadata is the one that was saved, its chunks tile every tensor, the tensors are the model's,
                  and an adapter's base is the one that it was trained on

An error of one rank is raised on all. A folder without a manifest (stock accelerate wrote it) is loaded, with a warning
that nothing vouches for its bytes.

A verification holds for these bytes: `Verified` notes size, times and inode of every file before it is read, and
`still_holds` compares them. Whatever changed since is verified anew.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accel_moe import ranks
from accel_moe.checkpoint import folders, node_local
from accel_moe.checkpoint.adapter_run import adapters_of, check_adapter, check_base
from accel_moe.checkpoint.dcp_metadata import (
    METADATA_NAME,
    MODEL_FOLDER,
    MODEL_PREFIX,
    OPTIMIZER_FOLDER,
    check_metadata,
    same_layout,
    tensors_of,
    was_written_with_manifest,
)
from accel_moe.checkpoint.dcp_read import FolderReader
from accel_moe.checkpoint.manifest import Manifest, Quantisation, check_files, known_paths, read_manifest
from accel_moe.checkpoint.saving import option, quantisation_of
from accel_moe.errors import CheckpointError, first_few
from accel_moe.names import MANIFEST_NAME, plain_name
from accel_moe.whereabouts import listed

_Stamp = tuple[int, int, int, int]


@dataclass(frozen=True)
class Verified:
    """A folder that was verified, and the proof that it is still the same.

    `gone` are the top-level names that a user thinned away (`moe_verify: present`). `stamps` are of this rank's share.
    """

    folder: Path
    manifest: Manifest | None
    gone: frozenset[str] = frozenset()
    stamps: dict[str, _Stamp | None] = field(default_factory=dict)

    def still_holds(self) -> bool:
        """Whether no file changed since, as far as the file system tells. A collective."""
        return all(ranks.gather(all(_stamp(self.folder / name) == stamp for name, stamp in self.stamps.items())))


def _stamp(path: Path) -> _Stamp | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


def verify(folder: Path, models: list[Any]) -> Verified:
    """Checks a checkpoint folder against its manifest and the models. A collective of all ranks.

    Warns for a stock checkpoint, whose `manifest` is None. Raises CheckpointError on every rank: missing, never
    committed, another one on another rank, damaged, or of another model.
    """
    manifest = ranks.run_or_raise_everywhere(f"reading {folder}", lambda: _read(folder))
    _compare_ranks(folder, manifest)
    share, shares = node_local.shares_of(folder, manifest)
    gone: frozenset[str] = frozenset()
    if manifest is None:
        paths = sorted(f"{path.parent.name}/{path.name}" for path in folder.glob(f"*/{METADATA_NAME}"))
        stamps = {path: _stamp(folder / path) for path in paths}
        if ranks.is_rank0():
            warnings.warn(
                f"{folder} has no manifest (stock accelerate wrote it): nothing vouches for its bytes. It is loaded "
                "as it is.",
                stacklevel=2,
            )
    else:
        mine = [path for i, path in enumerate(_by_size(manifest)) if i % shares == share]
        stamps = {path: _stamp(folder / path) for path in (MANIFEST_NAME, *mine)}
        gone = _check_bytes(folder, manifest, mine, str(option(models, "moe_verify")))
    ranks.run_or_raise_everywhere(f"checking {folder}", lambda: _check_dcp(folder, manifest, models))
    check_base(folder, manifest, models)
    return Verified(folder, manifest, gone, stamps)


# --- 1. identify -------------------------------------------------------------------------------------------------


def _read(folder: Path) -> Manifest | None:
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is not a folder. Give the folder that save_state or Trainer wrote.{_near(folder)}"
        )
    folders.refuse_unfinished(folder)
    return read_manifest(folder)


def _near(folder: Path) -> str:
    names = sorted(p.name for p in folder.parent.iterdir() if p.is_dir())[:5] if folder.parent.is_dir() else []
    return f" Beside it there are {', '.join(names)}." if names else ""


def _compare_ranks(folder: Path, manifest: Manifest | None) -> None:
    """Raises on every rank when the ranks' folders are not of one save: a mixture of steps would train on."""
    told = ranks.gather((_identity(folder, manifest), str(folder), None if manifest is None else manifest.step))
    saves = list(dict.fromkeys(identity for identity, _, _ in told))
    if len(saves) == 1:
        return
    groups = []
    for save in saves:
        members = [r for r, (identity, _, _) in enumerate(told) if identity == save]
        _, path, step = told[members[0]]
        groups.append(f"{listed(members)}: {path} ({f'step {step}' if step is not None else 'step unknown'})")
    raise CheckpointError(
        f"the ranks were given different checkpoints: {'; '.join(groups)}. Nothing was loaded. Give every rank the "
        "same one; with node-local disks, the newest that all nodes have."
    )


def _identity(folder: Path, manifest: Manifest | None) -> tuple[Any, ...]:
    """What folders of one save have in common. For a stock one: the number in its name, and DCP's metadata."""
    if manifest is not None:
        return "manifest", manifest.identity()
    number = re.search(r"(\d+)$", folder.name)
    metadata = [
        (path.parent.name, hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest())
        for path in sorted(folder.glob(f"*/{METADATA_NAME}"))
        if path.is_file()
    ]
    return "stock", number[1] if number else None, tuple(metadata)


# --- 2. check ----------------------------------------------------------------------------------------------------


def _check_bytes(folder: Path, manifest: Manifest, mine: list[str], level: str) -> frozenset[str]:
    """Checks this rank's share; returns what was thinned away. A collective. Raises CheckpointError on every rank."""
    problems: list[str] = []
    absent: set[str] = set()
    if level == "present":
        absent = {path for path in manifest.own_files() if not (folder / path).exists()}

    def check() -> None:
        there = [path for path in mine if path not in absent]
        problems.extend(check_files(folder, manifest, paths=there, checksums=level != "sizes"))

    ranks.run_or_raise_everywhere(f"verifying {folder}", check)
    found = list(dict.fromkeys(line for lines in ranks.gather(problems) for line in lines))
    if found:
        raise CheckpointError(_damage(folder, found))
    everywhere = set().union(*ranks.gather(absent))
    if not everywhere:
        return frozenset()
    _refuse_half(folder, manifest, everywhere)
    gone = frozenset(path.partition("/")[0] for path in everywhere)
    if ranks.is_rank0():
        warnings.warn(
            f"{folder} was thinned (moe_verify: present): {', '.join(sorted(gone))} {_is(gone)} gone and not restored. "
            "Everything that is still there was verified.",
            stacklevel=3,
        )
    return gone


def _damage(folder: Path, found: list[str]) -> str:
    thinned = ""
    if all(" is missing (" in line for line in found):
        thinned = " If you deleted them on purpose, set moe_verify: present to load what is left."
    return (
        f"{folder} is damaged: {first_few(found)}. Nothing was loaded. Use another checkpoint, or restore the files."
        f"{thinned}"
    )


def _refuse_half(folder: Path, manifest: Manifest, absent: set[str]) -> None:
    """Raises for a DCP folder with a part of its files, and for a model that is gone: nothing could be loaded."""
    for name in manifest.tensors:
        own = {path for path in manifest.own_files() if path.startswith(f"{name}/")}
        if not own & absent:
            continue
        if not own <= absent:
            raise CheckpointError(
                f"{folder} is damaged: {min(own & absent)} is missing, and other files of {name} are there. Delete a "
                "DCP folder as a whole, or restore the file."
            )
        if name.startswith(MODEL_FOLDER):
            raise CheckpointError(f"{folder} has no {name} any more: no weights are left to load. Restore the folder.")


def _is(names: frozenset[str]) -> str:
    return "is" if len(names) == 1 else "are"


def _by_size(manifest: Manifest) -> list[str]:
    """Files largest first, so that dealing them out in turn gives each rank about the same number of bytes."""
    sizes = {path: entry.size_bytes for files in manifest.files for path, entry in files.items()}
    return sorted(known_paths(manifest), key=lambda path: (-sizes[path], path))


# --- 3. fit ------------------------------------------------------------------------------------------------------


def check_kind(folder: Path, plugin: Any, index: int, *, optimizer: bool = False, use_dcp: bool = True) -> None:
    """Raises CheckpointError when the folder was saved with the other fsdp_state_dict_type, or has no file that rank 0
    would resume from. Not a collective.

    accelerate would look for a file that is not there on rank 0, while the other ranks wait for its values.
    """
    whole = "optimizer" if optimizer else MODEL_FOLDER
    full = f"{whole}.bin" if index == 0 else f"{whole}_{index}.bin"
    sharded = f"{OPTIMIZER_FOLDER if optimizer else MODEL_FOLDER}_{index}"
    found = {"FULL_STATE_DICT": (folder / full).is_file(), "SHARDED_STATE_DICT": (folder / sharded).is_dir()}
    wanted = str(getattr(plugin.state_dict_type, "name", plugin.state_dict_type))
    if not use_dcp or wanted not in found or found[wanted]:
        return
    (other,) = set(found) - {wanted}
    if not found[other]:
        if wanted == "FULL_STATE_DICT" and ranks.is_rank0():  # the one rank that reads it, from its own disk perhaps
            raise CheckpointError(_no_whole_state(folder, full))
        return
    names = {"FULL_STATE_DICT": full, "SHARDED_STATE_DICT": f"{sharded}/"}
    raise CheckpointError(
        f"{folder} was saved with fsdp_state_dict_type: {other} (it has {names[other]}), and this run has {wanted} "
        f"(expected {names[wanted]}). Nothing was loaded. Set fsdp_state_dict_type: {other} in fsdp_config, or "
        "FSDP_STATE_DICT_TYPE in the environment; after loading, "
        f'accelerator.state.fsdp_plugin.set_state_dict_type("{wanted}") saves as before.'
    )


def _no_whole_state(folder: Path, expected: str) -> str:
    text = f"{folder} has no {expected}, which fsdp_state_dict_type: FULL_STATE_DICT resumes from. Nothing was loaded."
    if not any(folder.glob("*.safetensors")):
        return f"{text} Use another checkpoint, or restore the file."
    return (
        f"{text} It holds a model to use, as save_only_model writes it: load it with from_pretrained({str(folder)!r}), "
        "and train without resume_from_checkpoint."
    )


def read_checked(folder: Path, name: str, manifest: Manifest | None) -> Any:
    """DCP's metadata of one folder of the checkpoint. Raises CheckpointError for one that cannot be whole.

    With a manifest nothing is read, by DCP or by its metadata, that the manifest does not list.
    """
    listed_files = None if manifest is None else set(known_paths(manifest))
    if listed_files is not None and f"{name}/{METADATA_NAME}" not in listed_files and (folder / name).is_dir():
        raise CheckpointError(_unlisted(folder, f"{name}/{METADATA_NAME}"))
    metadata = FolderReader([folder / name], manifest).read_metadata()
    if manifest is None and was_written_with_manifest(metadata):
        raise CheckpointError(
            f"{folder} was written with a manifest, and it is gone: the copy is incomplete. Copy the folder again, all "
            "of its files."
        )
    if listed_files is not None:
        needed = {f"{name}/{info.relative_path}" for info in (metadata.storage_data or {}).values()}
        if unlisted := sorted(needed - listed_files):
            raise CheckpointError(_unlisted(folder, unlisted[0]))
    if problems := check_metadata(metadata):
        raise CheckpointError(f"{folder / name} is incomplete: {problems[0]}. Use another checkpoint.")
    return metadata


def _unlisted(folder: Path, path: str) -> str:
    return (
        f"{folder} is damaged: DCP needs {path}, which the manifest does not list, so nothing vouches for it. Use "
        "another checkpoint, or restore the folder."
    )


def _check_dcp(folder: Path, manifest: Manifest | None, models: list[Any]) -> None:
    _check_quantisation(folder, manifest, models)
    for index, model in enumerate(models):
        dcp_folder = folder / f"{MODEL_FOLDER}_{index}"
        if not dcp_folder.is_dir():
            _explain_missing(folder, dcp_folder)
            continue
        stored = tensors_of(read_checked(folder, dcp_folder.name, manifest))
        if manifest is not None and not same_layout(stored, manifest.tensors.get(dcp_folder.name, {})):
            raise CheckpointError(
                f"{dcp_folder}/.metadata is not the one that the manifest describes: files of two saves are mixed. Use "
                "another checkpoint, or restore the folder."
            )
        if adapters_of(model):
            check_adapter(folder, stored, model)
        else:
            _check_model(folder, stored, model, manifest)


def _check_quantisation(folder: Path, manifest: Manifest | None, models: list[Any]) -> None:
    """Raises CheckpointError when the experts were packed otherwise, or not at all: they were other weights then."""
    if manifest is None:
        return
    there, here = manifest.quantised_experts, quantisation_of(models)
    if there != here:
        raise CheckpointError(
            f"{folder} was trained with moe_quantize_experts={_spelt(there)}, and this run has {_spelt(here)}: the "
            "experts would be other weights than those it was trained on. Nothing was loaded. Set "
            f"moe_quantize_experts: {'none' if there is None else there.scheme}, or give another folder."
        )


def _spelt(how: Quantisation | None) -> str:
    return "none" if how is None else f"{how.scheme} (blocks of {how.block_size})"


def _explain_missing(folder: Path, dcp_folder: Path) -> None:
    """A folder with no DCP model is fine when it was saved whole; else raises CheckpointError."""
    whole = ("pytorch_model_fsdp", "model.safetensors", "pytorch_model")
    found = sorted(path.name for path in folder.iterdir())
    if any(name.startswith(whole) for name in found):
        return
    raise CheckpointError(
        f"{folder} holds no model: expected {dcp_folder.name}/, found {', '.join(found[:6]) or 'nothing'}. Give the "
        "folder that save_state or Trainer wrote."
    )


def _check_model(folder: Path, stored: dict[str, Any], model: Any, manifest: Manifest | None) -> None:
    """Raises CheckpointError when names or shapes are not the model's."""
    theirs = {plain_name(n.removeprefix(MODEL_PREFIX)): e.shape for n, e in stored.items()}
    ours = {plain_name(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    wrong = [
        f"{name} has shape {theirs[name]} there, {shape} here"
        for name, shape in ours.items()
        if name in theirs and theirs[name] != shape
    ]
    wrong += [f"{name} is not in it" for name in ours if name not in theirs and name not in tied]
    wrong += [f"{name} is only there" for name in theirs if name not in ours and name not in tied]
    if not wrong:
        return
    whose = ""
    if manifest is not None and manifest.model_type:
        whose = f" ({manifest.model_type}, base {manifest.base_model or 'unknown'})"
    raise CheckpointError(
        f"{folder} is a checkpoint of another model{whose}: {first_few(wrong)}. Build the model that was trained "
        "there, or give another folder."
    )
