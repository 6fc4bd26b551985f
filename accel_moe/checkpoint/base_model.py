"""The base model that a checkpoint is exported after: a local folder, or a Hub id of which only small files
are fetched.

The base says how the result looks (keys, shapes, dtypes, files: hub_format.py), and gives the files that are
not weights: config, generation config, tokenizer, chat template, remote code, licence. From a Hub id those
files and the safetensors headers are fetched, never the weights, unless extra keys are to be kept.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accel_moe.checkpoint.quantised import refuse_quantised_config
from accel_moe.hub_format import (
    DTYPES,
    INDEX_NAME,
    SINGLE_NAME,
    HubFormatError,
    HubTensor,
    meta_model,
    read_header,
    read_hub_tensors,
    unknown_dtypes,
    untied_config,
)

# What a model folder has beside its weights. Named by suffix, so that a new tokenizer file is not forgotten.
COPIED_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".py", ".jsonl")
COPIED_NAMES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt")
_WEIGHT_INDEX_SUFFIX = ".index.json"


@dataclass(frozen=True)
class BaseModel:
    """A base: `folder` has its small files (and its weights when it is local), `tensors` its Hub tensors by
    key."""

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
        """Names of the files that go into the result as they are."""
        return sorted(
            path.name
            for path in self.folder.iterdir()
            if path.is_file()
            and (path.name in COPIED_NAMES or path.name.endswith(COPIED_SUFFIXES))
            and not path.name.endswith(_WEIGHT_INDEX_SUFFIX)
        )

    def copy_small_files(self, out: Path) -> None:
        for name in self.copied_files():
            shutil.copyfile(self.folder / name, out / name)

    def read_raw(self, keys: Iterable[str]) -> Iterable[tuple[str, bytes]]:
        """(key, raw little-endian bytes) of base tensors, one at a time; a Hub base fetches the files they
        are in."""
        headers: dict[str, tuple[Path, dict]] = {}
        for key in keys:
            file = self.tensors[key].file
            if file not in headers:
                path = self.folder / file if self.is_local else _download(self.name, file)
                headers[file] = path, read_header(path)
            path, header = headers[file]
            begin, end = header[key]["data_offsets"]
            with open(path, "rb") as stream:
                stream.seek(header["__data_start__"] + begin)
                yield key, stream.read(end - begin)


def open_base(name: str) -> BaseModel:
    """A base by folder or Hub id. Raises HubFormatError: not a folder and not on the Hub, no weights, no
    network."""
    folder = Path(os.path.expanduser(name))
    if folder.is_dir():
        return BaseModel(name, folder, read_hub_tensors(folder), is_local=True)
    looks_like_a_path = folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    if looks_like_a_path:
        raise HubFormatError(
            f"{name} is not a folder. Give the folder of the model that training started from, or its Hub id."
        )
    return _open_hub(name)


def _open_hub(repo: str) -> BaseModel:
    import huggingface_hub

    try:
        patterns = [f"*{suffix}" for suffix in COPIED_SUFFIXES] + list(COPIED_NAMES)
        folder = huggingface_hub.snapshot_download(repo, allow_patterns=patterns)
        metadata = huggingface_hub.get_safetensors_metadata(repo)
    except Exception as error:  # the client raises its own, requests' and httpx' errors
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise HubFormatError(
            f"{repo} is not a local folder, and the Hub could not be asked ({type(error).__name__}: "
            f"{reason}). Without "
            "a network, give the path of a local copy of the base model."
        ) from None
    tensors = {
        key: HubTensor(key, info.dtype if isinstance(info.dtype, str) else str(info.dtype), tuple(info.shape), file)
        for file, header in metadata.files_metadata.items()
        for key, info in header.tensors.items()
    }
    if unknown := sorted({t.dtype for t in tensors.values()} - set(DTYPES)):
        raise HubFormatError(unknown_dtypes(repo, unknown))
    if not tensors:
        raise HubFormatError(f"{repo} has no safetensors weights: expected {SINGLE_NAME} or {INDEX_NAME}.")
    return BaseModel(repo, Path(folder), tensors, is_local=False)


def _download(repo: str, file: str) -> Path:
    import huggingface_hub

    try:
        return Path(huggingface_hub.hf_hub_download(repo, file))
    except Exception as error:
        raise HubFormatError(
            f"{file} of {repo} could not be fetched ({type(error).__name__}), and --keep-extra needs it. "
            f"Give a local "
            "copy of the base model."
        ) from None
