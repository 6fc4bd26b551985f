"""The base model that a checkpoint is exported after: a local folder, or the small files of a Hub id.

The base says how the result looks (keys, shapes, dtypes, files: transforms.py), and gives the files that are not
weights: config, generation config, tokenizers, processors, chat templates, the model's own code, licence. From a Hub id
these files and the safetensors headers are fetched. The weights are fetched only if extra keys are to be kept, or an
adapter is merged. Without a network a whole copy in the Hub's cache will do.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from accel_moe.errors import HubFormatError
from accel_moe.names import MANIFEST_NAME
from accel_moe.weights.hub_config import first_line, meta_model, untied_config
from accel_moe.weights.quantised import refuse_quantised_config
from accel_moe.weights.safetensors import (
    INDEX_NAME,
    SINGLE_NAME,
    HubTensor,
    Reader,
    read_header,
    read_hub_tensors,
    refuse_unknown_dtypes,
)

# What a model folder has beside its weights. Named by suffix, so that a new tokenizer file is not forgotten.
COPIED_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".py", ".jsonl")
COPIED_SUFFIXES += (".spm", ".codes", ".tokenizer", ".bpe", ".vocab")
COPIED_NAMES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt")
# What transformers reads from a model's sub-folders; others with a tokenizer of their own come to it (is_tokenizer).
COPIED_FOLDERS = ("additional_chat_templates", "custom_generate")
# These would tell whoever loads the result that it is an adapter, or a checkpoint.
NOT_COPIED = ("adapter_config.json", "trainer_state.json", MANIFEST_NAME)
_WEIGHT_INDEX_SUFFIX = ".index.json"


@dataclass(frozen=True)
class BaseModel:
    """A base: `folder` has its small files (and its weights if it is local), `tensors` its Hub tensors by key."""

    name: str
    folder: Path
    tensors: dict[str, HubTensor]
    is_local: bool
    trust_remote_code: bool = False

    def meta_model(self, *, tied: bool = True) -> Any:
        """The architecture on meta, with word embeddings as its config has them or untied. Raises HubFormatError."""
        refuse_quantised_config(self.folder, self.name)
        return meta_model(self.folder, tied=tied, trust_remote_code=self.trust_remote_code)

    def untied_config(self) -> dict[str, Any]:
        """Its config.json, changed so that no word embeddings are tied."""
        return untied_config(self.folder, self.trust_remote_code)

    def copied_files(self) -> list[str]:
        """The files, within the base's folder, that go into the result as they are."""
        found = [path.name for path in self.folder.iterdir() if _is_copied(path)]
        for folder in filter(_is_copied_folder, self.folder.iterdir()):
            found += [str(path.relative_to(self.folder)) for path in folder.rglob("*") if _is_copied(path)]
        return sorted(found)

    def left_behind(self) -> list[str]:
        """The folder's files that do not go into the result, but for weights that it replaces and hidden files."""
        weights = {tensor.file for tensor in self.tensors.values()}
        taken = set(self.copied_files())
        left = []
        for path in self.folder.iterdir():
            if path.name.startswith(".") or path.name in weights or path.name == INDEX_NAME or path.name in taken:
                continue
            if path.is_dir():
                inside = {str(p.relative_to(self.folder)) for p in path.rglob("*") if p.is_file()}
                if _is_copied_folder(path):
                    left += inside - taken
                elif not inside <= weights:
                    left.append(f"{path.name}/")
            else:
                left.append(path.name)
        return sorted(left)

    def copy_small_files(self, out: Path) -> None:
        for name in self.copied_files():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.folder / name, out / name)

    def read_raw(self, keys: Iterable[str]) -> Iterator[tuple[str, memoryview]]:
        """(key, raw little-endian bytes) of base tensors, one at a time; a Hub base fetches the files they are in."""
        tensors = BaseTensors(self)
        for key in keys:
            yield key, memoryview(tensors.read(key).view(-1).view(torch.uint8).numpy())

    def stamps(self) -> list[str]:
        """File, size and time of each local file of weights, to notice that one of them was changed."""
        files = sorted({tensor.file for tensor in self.tensors.values()}) if self.is_local else []
        stats = {file: (self.folder / file).stat() for file in files}
        return [f"{file} {stat.st_size} {stat.st_mtime_ns}" for file, stat in stats.items()]


class BaseTensors:
    """The values of a base's tensors, read one at a time. A Hub base fetches the file of a tensor when it is read."""

    def __init__(self, base: BaseModel) -> None:
        self._base = base
        self._headers: dict[str, dict[str, HubTensor]] = {}

    def located(self, key: str) -> HubTensor:
        """A tensor's place in a local file. Raises HubFormatError when its file cannot be fetched."""
        base, file = self._base, self._base.tensors[key].file
        if file not in self._headers:
            self._headers[file] = read_header(base.folder / file if base.is_local else _download(base.name, file))
        return self._headers[file][key]

    def read(self, key: str) -> torch.Tensor:
        """A tensor as it is stored. Raises HubFormatError when its file cannot be fetched."""
        with Reader() as reader:
            return reader.tensor(self.located(key))


def _is_copied(path: Path) -> bool:
    named = path.name in COPIED_NAMES or path.name.endswith(COPIED_SUFFIXES)
    excluded = path.name in NOT_COPIED or path.name.endswith(_WEIGHT_INDEX_SUFFIX)
    return named and not excluded and path.is_file()


def _is_copied_folder(path: Path) -> bool:
    """Whether it is part of the model: templates, or a further tokenizer as a processor saves it; no other model."""
    if not path.is_dir():
        return False
    names = {entry.name for entry in path.iterdir()}
    return path.name in COPIED_FOLDERS or ("tokenizer_config.json" in names and "config.json" not in names)


def open_base(name: str, trust_remote_code: bool = False) -> BaseModel:
    """A base by folder or Hub id.

    `trust_remote_code` lets code of the base's own be run, where its architecture is not in transformers.

    Raises:
        HubFormatError: it is not a folder and not on the Hub, has no weights, or there is neither a network nor a copy
            in the cache.
    """
    folder = Path(os.path.expanduser(name))
    if folder.is_dir():
        folder = _snapshot_in(folder)
        return BaseModel(name, folder, read_hub_tensors(folder), True, trust_remote_code)
    looks_like_a_path = folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    if looks_like_a_path:
        raise HubFormatError(
            f"{name} is not a folder. Give the folder of the model that training started from, or its Hub id."
        )
    return _open_hub(name, trust_remote_code)


def local_base(name: str, revision: str | None = None) -> BaseModel | None:
    """The base whose files a model was read from, on this disk: a folder, or the Hub's cache. The Hub is not asked.

    None where there are no whole safetensors files of it.
    """
    folder = Path(os.path.expanduser(name))
    try:
        if not folder.is_dir():
            import huggingface_hub

            folder = Path(huggingface_hub.snapshot_download(name, revision=revision, local_files_only=True))
        folder = _snapshot_in(folder)
        return BaseModel(name, folder, read_hub_tensors(folder), True)
    except Exception:  # not in the cache, not a name that the client takes, other weights than safetensors
        return None


def _snapshot_in(folder: Path) -> Path:
    """The current snapshot, when the folder is a model's in the Hub's cache (models--org--name)."""
    revision = folder / "refs" / "main"
    if not revision.is_file():
        return folder
    snapshot = folder / "snapshots" / revision.read_text().strip()
    return snapshot if snapshot.is_dir() else folder


def _open_hub(repo: str, trust_remote_code: bool) -> BaseModel:
    import huggingface_hub

    try:
        patterns = [f"*{suffix}" for suffix in COPIED_SUFFIXES] + list(COPIED_NAMES)
        folder = huggingface_hub.snapshot_download(repo, allow_patterns=patterns)
        metadata = huggingface_hub.get_safetensors_metadata(repo)
    except Exception as error:  # the client raises its own, requests' and httpx' errors
        return _open_cached(repo, error, trust_remote_code)
    tensors = {
        key: HubTensor(key, info.dtype if isinstance(info.dtype, str) else str(info.dtype), tuple(info.shape), file)
        for file, header in metadata.files_metadata.items()
        for key, info in header.tensors.items()
    }
    refuse_unknown_dtypes(repo, tensors.values())
    if not tensors:
        raise HubFormatError(f"{repo} has no safetensors weights: expected {SINGLE_NAME} or {INDEX_NAME}.")
    return BaseModel(repo, Path(folder), tensors, False, trust_remote_code)


def _open_cached(repo: str, why: Exception, trust_remote_code: bool) -> BaseModel:
    """The copy in the Hub's cache, with its weights, for when the Hub could not be asked. Raises HubFormatError."""
    import huggingface_hub

    asked = f"{type(why).__name__}: {first_line(why)}"
    not_asked = f"{repo} is not a local folder, and the Hub could not be asked ({asked})"
    try:
        folder = Path(huggingface_hub.snapshot_download(repo, local_files_only=True))
    except Exception:
        raise HubFormatError(
            f"{not_asked}. Without a network, give the path of a local copy of the base model."
        ) from None
    try:
        return BaseModel(repo, folder, read_hub_tensors(folder), True, trust_remote_code)
    except HubFormatError as error:
        raise HubFormatError(
            f"{not_asked}; its copy in the cache is not whole ({error}). Download it where there is a network, by "
            f"hf download {repo}, or give the path of a local copy of the base model."
        ) from None


def _download(repo: str, file: str) -> Path:
    import huggingface_hub

    try:
        return Path(huggingface_hub.hf_hub_download(repo, file))
    except Exception as error:
        raise HubFormatError(
            f"{file} of {repo} could not be fetched ({type(error).__name__}), and its values are needed. Give a "
            "local copy of the base model."
        ) from None
