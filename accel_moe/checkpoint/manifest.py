"""The manifest: what a checkpoint holds, written last, and the checks that it makes possible.

torch.distributed.checkpoint (DCP) does not notice a flipped byte, a chunk that its metadata forgot (the values stay
uninitialised), or new data under an old metadata file. The manifest lists every file with its size and checksum, and
every tensor with its shape, dtype and chunks, so that all three are seen before a model is touched.

A manifest is one JSON file, `accel_moe_manifest.json`, at the top of the checkpoint folder:

    {"digest": "<of the body>", "node": 0,
     "body": {"format_version": 1, "step": …, "files": […], "tensors": {…}, …}}

With a shared disk there is one folder, and node is 0. With node-local disks every node has a folder with the files that
its ranks wrote. The body is the same in all of them and lists the files of each; `node` says whose folder it is.

Everything here is plain files and arithmetic: no process group, no torch tensors.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accel_moe.checkpoint.checksums import DIGEST_BYTES, file_digest, hashing_pool
from accel_moe.checkpoint.durable import fsync, fsync_folder
from accel_moe.errors import CheckpointError
from accel_moe.names import MANIFEST_NAME

FORMAT_VERSION = 1


@dataclass(frozen=True)
class FileEntry:
    """One file of a checkpoint."""

    size_bytes: int
    digest: str


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor: where it starts, its extent, and the file that has it (within the DCP folder)."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str


@dataclass(frozen=True)
class TensorEntry:
    """A whole tensor as DCP stored it. `dtype` is torch's name without the prefix: "float32"."""

    shape: tuple[int, ...]
    dtype: str
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class Quantisation:
    """How frozen experts were quantised while a checkpoint was trained (`moe_quantize_experts`).

    Attributes:
        scheme: "nf4" or "int8".
        block_size: values that share a scale.
    """

    scheme: str
    block_size: int


@dataclass(frozen=True)
class AdapterEntry:
    """The adapter of a run whose checkpoint does not hold the base.

    Attributes:
        name: PEFT's name of the adapter ("default").
        config: its adapter_config.json.
        base_tensors: digest of each tensor of the base's files (weights/fingerprint.py), by key; empty where the base
            was not read from files.
    """

    name: str
    config: dict[str, Any]
    base_tensors: dict[str, str]


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds. `tensors` is keyed by DCP folder, then by DCP key ("model.<parameter name>").

    `nodes` are host names, one for each folder that took part in the save: one with a shared disk, one per node with
    node-local disks. `step` is the trainer's global step, or the optimizer's step count, or None.
    """

    step: int | None
    base_model: str | None
    model_type: str | None
    ep: int
    efsdp: int
    dp_replicate: int
    world_size: int
    versions: dict[str, str]
    digest_algorithm: str
    nodes: tuple[str, ...]
    files: tuple[dict[str, FileEntry], ...]
    tensors: dict[str, dict[str, TensorEntry]]
    format_version: int = FORMAT_VERSION
    node: int = field(default=0, compare=False)
    quantised_experts: Quantisation | None = None
    adapter: AdapterEntry | None = None

    @property
    def size_bytes(self) -> int:
        return sum(entry.size_bytes for files in self.files for entry in files.values())

    def own_files(self) -> dict[str, FileEntry]:
        """What must be in the folder that this manifest was read from."""
        return self.files[self.node]

    def identity(self) -> str:
        """A digest of the save: the same in the folders of all nodes, another for every other save."""
        return _body_digest(self._body(), 0)

    def to_json(self) -> str:
        body = self._body()
        document = {"digest": _body_digest(body, self.node), "node": self.node, "body": body}
        return json.dumps(document, separators=(",", ":"))

    def _body(self) -> dict[str, Any]:
        body = {} if self.adapter is None else {"adapter": vars(self.adapter)}
        return body | {
            "format_version": self.format_version,
            "step": self.step,
            "base_model": self.base_model,
            "model_type": self.model_type,
            "ep": self.ep,
            "efsdp": self.efsdp,
            "dp_replicate": self.dp_replicate,
            "world_size": self.world_size,
            "versions": self.versions,
            "digest_algorithm": self.digest_algorithm,
            "nodes": list(self.nodes),
            "files": [{p: [f.size_bytes, f.digest] for p, f in sorted(files.items())} for files in self.files],
            "tensors": {
                folder: {
                    name: [
                        list(t.shape),
                        t.dtype,
                        [[list(c.offsets), list(c.sizes), c.file] for c in t.chunks],
                    ]
                    for name, t in sorted(tensors.items())
                }
                for folder, tensors in sorted(self.tensors.items())
            },
            **({} if self.quantised_experts is None else {"quantised_experts": vars(self.quantised_experts)}),
        }

    @staticmethod
    def from_json(text: str, where: str | os.PathLike = "manifest") -> Manifest:
        """Raises CheckpointError for text that is not a manifest, was changed since, or is of another format."""
        try:
            document = json.loads(text)
            body, digest, node = document["body"], document["digest"], document["node"]
            version = body["format_version"]
            if type(version) is not int:
                raise TypeError(f"format_version is {_shown(version)}, expected a whole number")
            if version > FORMAT_VERSION:
                raise CheckpointError(
                    f"{where} has format_version {version}, this accel_moe reads up to {FORMAT_VERSION}. Upgrade "
                    "accel_moe."
                )
            found = _body_digest(body, node)
        except CheckpointError:
            raise
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise CheckpointError(
                f"{where} is not a readable manifest ({type(error).__name__}: {error}). The folder is damaged: use "
                "another checkpoint, or restore the file."
            ) from None
        if digest != found:
            raise CheckpointError(
                f"{where} does not match its own checksum: it was changed after it was written. Use another "
                "checkpoint, or restore the file."
            )
        try:
            return _parse(body, node)
        except (ValueError, TypeError, KeyError) as error:
            what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise CheckpointError(
                f"{where} is not a manifest of format_version {FORMAT_VERSION}: {what}. The file is damaged, or "
                "another version or program wrote it. Use another checkpoint, or restore the file."
            ) from None


# --- reading one, value by value ---------------------------------------------------------------------------------


def _parse(body: dict[str, Any], node: Any) -> Manifest:
    """The manifest of a body whose digest is right. Raises ValueError or KeyError for a value of another kind."""
    files = tuple(
        {_inside(path): _file(entry, path) for path, entry in _dict(files, f"files[{i}]").items()}
        for i, files in enumerate(_list(body["files"], "files"))
    )
    nodes = tuple(_text(name, "nodes") for name in _list(body["nodes"], "nodes"))
    if len(nodes) != len(files) or _number(node, "node") >= len(nodes):
        raise ValueError(f"node is {_shown(node)} with {len(nodes)} nodes and files of {len(files)}")
    tensors = {
        _inside(folder): {name: _tensor(entry, f"{folder}: {name}") for name, entry in _dict(of, folder).items()}
        for folder, of in _dict(body["tensors"], "tensors").items()
    }
    listed = set().union(*files)
    for folder, entries in tensors.items():
        needed = {chunk.file for entry in entries.values() for chunk in entry.chunks}
        if unlisted := sorted(file for file in needed if f"{folder}/{file}" not in listed):
            raise ValueError(f"tensors are in {folder}/{unlisted[0]}, which is not among its files")
    return Manifest(
        step=None if body["step"] is None else _number(body["step"], "step"),
        base_model=None if body["base_model"] is None else _text(body["base_model"], "base_model"),
        model_type=None if body["model_type"] is None else _text(body["model_type"], "model_type"),
        **{key: _number(body[key], key, least=1) for key in ("ep", "efsdp", "dp_replicate", "world_size")},
        versions={name: _text(v, "versions") for name, v in _dict(body["versions"], "versions").items()},
        digest_algorithm=_text(body["digest_algorithm"], "digest_algorithm"),
        nodes=nodes,
        files=files,
        tensors=tensors,
        format_version=_number(body["format_version"], "format_version", least=1),
        node=node,
        quantised_experts=_quantisation(body["quantised_experts"]) if "quantised_experts" in body else None,
        adapter=_adapter(body["adapter"]) if "adapter" in body else None,
    )


def _adapter(entry: Any) -> AdapterEntry:
    fields = _dict(entry, "adapter")
    digests = _dict(fields["base_tensors"], "adapter: base_tensors")
    return AdapterEntry(
        name=_text(fields["name"], "adapter: name"),
        config=_dict(fields["config"], "adapter: config"),
        base_tensors={key: _text(digest, f"adapter: base_tensors: {key}") for key, digest in digests.items()},
    )


def _quantisation(entry: Any) -> Quantisation:
    at = "quantised_experts"
    fields = _dict(entry, at)
    return Quantisation(_text(fields["scheme"], f"{at}: scheme"), _number(fields["block_size"], f"{at}: block_size", 1))


def _tensor(entry: Any, at: str) -> TensorEntry:
    shape, dtype, chunks = _list(entry, at, 3)
    boxes = []
    for chunk in _list(chunks, at):
        offsets, sizes, file = _list(chunk, at, 3)
        boxes.append(Chunk(_numbers(offsets, at), _numbers(sizes, at), _inside(_text(file, at))))
    return TensorEntry(_numbers(shape, at), _text(dtype, at), tuple(boxes))


def _file(entry: Any, at: str) -> FileEntry:
    size_bytes, digest = _list(entry, at, 2)
    return FileEntry(_number(size_bytes, at), _text(digest, at))


def _inside(path: str) -> str:
    """A path within the checkpoint folder, as a manifest writes them."""
    parts = path.split("/")
    if "\0" in path or any(part in ("", ".", "..") for part in parts):
        raise ValueError(f"{_shown(path)} is no path within the folder")
    os.fsencode(path)  # a UnicodeEncodeError is a ValueError
    return path


def _numbers(value: Any, at: str) -> tuple[int, ...]:
    return tuple(_number(inner, at) for inner in _list(value, at))


def _number(value: Any, at: str, least: int = 0) -> int:
    if type(value) is not int or value < least:
        raise ValueError(f"{at}: {_shown(value)}, expected a whole number from {least}")
    return value


def _text(value: Any, at: str) -> str:
    if type(value) is not str:
        raise ValueError(f"{at}: {_shown(value)}, expected text")
    return value


def _list(value: Any, at: str, length: int | None = None) -> list[Any]:
    if type(value) is not list or len(value) != (len(value) if length is None else length):
        raise ValueError(f"{at}: {_shown(value)}, expected a list{f' of {length}' if length is not None else ''}")
    return value


def _dict(value: Any, at: str) -> dict[str, Any]:
    if type(value) is not dict:
        raise ValueError(f"{at}: {_shown(value)}, expected an object with names")
    return value


def _shown(value: Any) -> str:
    return text if len(text := repr(value)) <= 60 else f"{text[:57]}..."


def _body_digest(body: dict[str, Any], node: int) -> str:
    canonical = json.dumps([node, body], sort_keys=True, separators=(",", ":")).encode()
    return hashlib.blake2b(canonical, digest_size=DIGEST_BYTES).hexdigest()


def read_manifest(folder: str | os.PathLike) -> Manifest | None:
    """The folder's manifest, or None when it has none (a stock accelerate checkpoint). Raises CheckpointError."""
    path = Path(folder) / MANIFEST_NAME
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}). Use another checkpoint, or restore the file."
        ) from None
    return Manifest.from_json(text, path)


def write_manifest(folder: str | os.PathLike, manifest: Manifest) -> None:
    """Writes the manifest and makes it durable (the file and its folder entry) before it returns."""
    path = Path(folder) / MANIFEST_NAME
    with open(path, "w", encoding="utf-8") as stream:
        stream.write(manifest.to_json())
        stream.flush()
        fsync(stream.fileno())
    fsync_folder(path.parent)


# --- checks ------------------------------------------------------------------------------------------------------


def check_files(
    folder: str | os.PathLike,
    manifest: Manifest,
    *,
    paths: Iterable[str] | None = None,
    checksums: bool = True,
    on_bytes: Callable[[int], None] | None = None,
) -> Iterator[str]:
    """Yields one line for each file that is missing, of another size, or (with `checksums`) has other bytes.

    The folder's own files must be there. Files of other nodes need not be there, and are checked if they are. `paths`
    restricts the check. `on_bytes` hears how many bytes were verified.
    """
    root = Path(folder)
    with hashing_pool() as pool:
        for path in known_paths(manifest) if paths is None else paths:
            own = manifest.own_files().get(path)
            accepted = [own] if own is not None else [files[path] for files in manifest.files if path in files]
            size_bytes = accepted[0].size_bytes
            try:
                found = os.stat(root / path).st_size
                digests = {entry.digest for entry in accepted if entry.size_bytes == found}
                if not digests:
                    yield f"{path} has {found} bytes, the manifest says {size_bytes}{_holds(manifest, path)}"
                elif checksums and file_digest(root / path, manifest.digest_algorithm, pool) not in digests:
                    yield f"{path} does not match its checksum: its bytes changed{_holds(manifest, path)}"
            except FileNotFoundError:
                if own is not None:
                    yield f"{path} is missing (written by {writer_of(manifest, path)}){_holds(manifest, path)}"
            except OSError as error:
                yield f"{path} cannot be read ({error})"
            finally:
                if on_bytes is not None:
                    on_bytes(size_bytes)


def known_paths(manifest: Manifest) -> list[str]:
    """Every file of the checkpoint, on whichever node, once."""
    return sorted({path for files in manifest.files for path in files})


def writer_of(manifest: Manifest, path: str) -> str:
    """Which node wrote a file, for messages: "node 1, host-b"."""
    nodes = [i for i, files in enumerate(manifest.files) if path in files]
    return " or ".join(f"node {i}, {manifest.nodes[i]}" for i in nodes) or "no node"


def _holds(manifest: Manifest, path: str) -> str:
    """Names a tensor or two that the file has, so that a report of damage says what was lost."""
    folder, _, file = path.partition("/")
    names = [n for n, t in manifest.tensors.get(folder, {}).items() if any(c.file == file for c in t.chunks)]
    if not names:
        return ""
    return f"; it holds {', '.join(names[:2])}" + (f" and {len(names) - 2} more tensors" if len(names) > 2 else "")


def check_chunks(name: str, entry: TensorEntry) -> str | None:
    """None when the chunks tile the tensor exactly; else one line that says what is wrong.

    DCP leaves values that no chunk covers uninitialised, and lets the last of two overlapping chunks win: neither is an
    error there. Boxes that fit inside, do not overlap and add up to the tensor's volume cover it.
    """
    rank = len(entry.shape)
    for chunk in entry.chunks:
        inside = len(chunk.offsets) == len(chunk.sizes) == rank and all(
            0 <= o and o + s <= d for o, s, d in zip(chunk.offsets, chunk.sizes, entry.shape, strict=True)
        )
        if not inside:
            return f"{name}: chunk at {chunk.offsets} of size {chunk.sizes} lies outside shape {entry.shape}"
    boxes = [c for c in entry.chunks if math.prod(c.sizes) > 0]
    if pair := _overlap(boxes):
        return f"{name}: chunks at {pair[0].offsets} and {pair[1].offsets} overlap"
    covered, whole = sum(math.prod(c.sizes) for c in boxes), math.prod(entry.shape)
    if covered != whole:
        return f"{name}: its chunks cover {covered} of {whole} values, {whole - covered} would be uninitialised"
    return None


def _overlap(boxes: Sequence[Chunk]) -> tuple[Chunk, Chunk] | None:
    """Two boxes that share a point, or None. Sweeps dim 0, and compares only boxes that are open at the same time."""
    open_boxes: list[Chunk] = []
    for box in sorted(boxes, key=lambda c: c.offsets):
        start = box.offsets[0] if box.offsets else 0
        open_boxes = [b for b in open_boxes if b.offsets and b.offsets[0] + b.sizes[0] > start]
        for other in open_boxes:
            if all(
                o < p + t and p < o + s
                for o, s, p, t in zip(box.offsets, box.sizes, other.offsets, other.sizes, strict=True)
            ):
                return other, box
        if not box.offsets and len(boxes) > 1:
            return boxes[0], boxes[1]
        open_boxes.append(box)
    return None
