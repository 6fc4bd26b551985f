"""Checksums of files and of byte streams.

A checksum is a two-level tree, so that several threads can hash one file while it is written or verified: leaves are
the hashes of 4 MiB blocks, the root is the hash of the leaves and of the file's length. The leaf hash of a new
checkpoint is blake2b, which every Python has. Older checkpoints may have xxh3_128 leaves, which need `xxhash` to be
read; the manifest names the algorithm.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from accel_moe.errors import CheckpointError

ALGORITHM = "blake2b"  # of new checkpoints
BLOCK_BYTES = 4 * 1024 * 1024
DIGEST_BYTES = 16


def _block_hash(algorithm: str) -> Callable[[Any], bytes]:
    if algorithm == ALGORITHM:
        return lambda data: hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()
    if algorithm == "xxh3_128":
        try:
            import xxhash  # ty: ignore
        except ImportError:
            raise CheckpointError(
                "the checkpoint's checksums are xxh3_128, and xxhash is not installed here. Install xxhash, or set "
                "moe_verify: sizes to check sizes only."
            ) from None
        return lambda data: xxhash.xxh3_128(data).digest()
    raise CheckpointError(
        f"the checkpoint's checksums are {algorithm!r}, expected blake2b or xxh3_128. Upgrade accel_moe, or set "
        "moe_verify: sizes to check sizes only."
    )


def _root(leaves: Iterable[bytes], size_bytes: int) -> str:
    tree = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for leaf in leaves:
        tree.update(leaf)
    tree.update(size_bytes.to_bytes(8, "little"))
    return tree.hexdigest()


class StreamDigest:
    """The checksum of a byte stream, computed beside the writing.

    `pool`'s threads hash whole blocks in place, without a copy, while the caller's thread writes the same bytes, since
    hashlib lets other threads run. Only the ends of a piece, less than a block each, are copied.
    """

    def __init__(self, algorithm: str, pool: ThreadPoolExecutor | None = None) -> None:
        self._hash = _block_hash(algorithm)
        self._pool = pool
        self._block = bytearray()
        self._leaves: list[bytes] = []
        self.size_bytes = 0

    def update(self, data: Any, meanwhile: Callable[[], Any] | None = None) -> Any:
        """Takes the next bytes. Runs `meanwhile` while they are hashed, and returns its result.

        `data` may be reused once this returns.
        """
        view = memoryview(data).cast("B")
        self.size_bytes += len(view)
        blocks: list[Any] = []
        if self._block or len(view) < BLOCK_BYTES:
            head, view = view[: BLOCK_BYTES - len(self._block)], view[BLOCK_BYTES - len(self._block) :]
            self._block += head
            if len(self._block) == BLOCK_BYTES:
                blocks.append(self._block)
                self._block = bytearray()
        whole = len(view) - len(view) % BLOCK_BYTES
        blocks += [view[start : start + BLOCK_BYTES] for start in range(0, whole, BLOCK_BYTES)]
        self._block += view[whole:]
        if self._pool is None or len(blocks) + (meanwhile is not None) < 2:
            result = meanwhile() if meanwhile is not None else None
            self._leaves += map(self._hash, blocks)
            return result
        hashing = [self._pool.submit(self._hash, block) for block in blocks]
        try:
            return meanwhile() if meanwhile is not None else None
        finally:
            self._leaves += [future.result() for future in hashing]  # wait here: `data` is the caller's again

    def hexdigest(self) -> str:
        """The root; call it once, at the end of the stream."""
        if self._block:
            self._leaves.append(self._hash(self._block))
        return _root(self._leaves, self.size_bytes)


_thread = threading.local()


def file_digest(path: str | os.PathLike, algorithm: str, pool: ThreadPoolExecutor | None = None) -> str:
    """The checksum of a file on disk; equal to what StreamDigest gave for the bytes written to it.

    `pool`'s threads read and hash a block each, so this also reads ahead.
    """
    block_hash = _block_hash(algorithm)
    with open(path, "rb", buffering=0) as stream:
        size_bytes = os.fstat(stream.fileno()).st_size

        def leaf(start: int) -> bytes:
            if not hasattr(_thread, "block"):
                _thread.block = bytearray(BLOCK_BYTES)  # fresh memory for every block would cost as much as the read
            block = memoryview(_thread.block)[: min(BLOCK_BYTES, size_bytes - start)]
            filled = 0
            while filled < len(block):
                count = os.preadv(stream.fileno(), [block[filled:]], start + filled)
                if count == 0:
                    break  # the file shrank: the checksum will differ
                filled += count
            return block_hash(block[:filled])

        starts = range(0, size_bytes, BLOCK_BYTES)
        leaves = pool.map(leaf, starts) if pool is not None else map(leaf, starts)
        return _root(leaves, size_bytes)


def hashing_pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1), thread_name_prefix="accel_moe-checksum")
