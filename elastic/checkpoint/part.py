"""A part file of a checkpoint: put together in memory as the bytes it will have, which are hashed chunk by chunk and written from there."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import numpy as np
import xxhash

from elastic.checkpoint.manifest import CHUNK, FileEntry, Piece
from elastic.checkpoint.safetensors import lay_out
from elastic.storage.sink import aligned
from elastic.storage.store import Store

PIECE = 4  # chunks that are written in one go
RUN = 1 << 20  # elements that are copied in one go
MUCH = 1 << 25  # bytes from which on a second thread is worth its start
Take = Callable[[str, int, int], np.ndarray]  # elements low..high-1 of an array, in C order


class Image:
    """A part file's bytes in memory, kept from save to save: two saves of the same boxes allocate nothing."""

    def __init__(self, boxes: tuple[Piece, ...], memory: np.ndarray | None = None, sources: tuple[Piece, ...]
                 | None = None):
        """`memory`: bytes that may be used again. `sources`: the same boxes where they are taken from, if that is a
        part of each array.

        ValueError for an array that a checkpoint cannot hold.
        """
        self.boxes, self.sources = boxes, sources or boxes
        self._runs = {(piece.name, piece.start): source.box.run
                      for piece, source in zip(boxes, self.sources, strict=True)}
        header, self.pieces = lay_out(boxes)
        size = len(header) + sum(piece.bytes for piece in boxes)
        if memory is None or not size <= len(memory) <= 2 * size + CHUNK:
            memory = aligned(size)
        self.memory = memory
        self.bytes = memory[:size]
        self.bytes[:len(header)] = np.frombuffer(header, np.uint8)

    def fill(self, take: Take) -> None:
        """Copies the boxes' values in, with a second thread where there is much to copy: one alone does not fill the
        memory's lanes."""
        left = deque(self.runs())

        def copy() -> None:
            while True:
                try:
                    piece, low, high = left.popleft()
                except IndexError:
                    return
                self.copy(piece, low, high, take)

        if len(self.bytes) < MUCH:
            copy()
            return
        with ThreadPoolExecutor(1, "copy") as pool:
            beside = pool.submit(copy)
            copy()
            beside.result()

    def runs(self) -> Iterator[tuple[Piece, int, int]]:
        """The boxes in ranges of elements, short enough to share the work evenly."""
        for piece in self.pieces:
            size = math.prod(piece.count)
            for low in range(0, size, RUN):
                yield piece, low, min(size, low + RUN)

    def copy(self, piece: Piece, low: int, high: int, take: Take) -> None:
        """Elements low..high-1 of a box."""
        run = self._runs[piece.name, piece.start]
        assert run is not None
        kind = np.dtype(piece.dtype).newbyteorder("<")
        at = piece.offset + low * kind.itemsize
        self.bytes[at:at + (high - low) * kind.itemsize].view(kind)[...] = take(piece.name, run[0] + low, run[0] + high)

    def are_finite(self, prefix: str) -> bool:
        """Whether all floats of the arrays under `prefix` are numbers. A minimum and a maximum show NaN and infinity.
        """
        for piece in self.pieces:
            if piece.name.startswith(prefix) and piece.dtype.startswith("float") and piece.bytes:
                values = self.bytes[piece.offset:piece.offset
                                    + piece.bytes].view(np.dtype(piece.dtype).newbyteorder("<"))
                if not (np.isfinite(values.min()) and np.isfinite(values.max())):
                    return False
        return True

    def write(self, store: Store, folder: str, name: str, chunk_bytes: int = CHUNK,
              progress: Callable[[int], None] = lambda done: None,
              check: Callable[[], None] = lambda: None) -> FileEntry:
        """Writes the file, and hashes it meanwhile; durable on return. `progress(bytes)`: how far it is. Nothing is
        left where `check` raises."""
        with ThreadPoolExecutor(1, "hash") as beside:
            checked, hashed = beside.submit(check), beside.submit(self.hashes, chunk_bytes)

            def pieces() -> Iterator[memoryview]:
                view = self.bytes.data
                for low in range(0, len(view), PIECE * chunk_bytes):
                    if checked.done():
                        checked.result()
                    yield view[low:low + PIECE * chunk_bytes]
                    progress(min(len(view), low + PIECE * chunk_bytes))

            store.write(f"{folder}/{name}", pieces())
            try:
                checked.result()
            except Exception:
                with suppress(OSError):  # no manifest will name it
                    store.remove(f"{folder}/{name}")
                raise
            return FileEntry(name, len(self.bytes), *hashed.result(), self.pieces)

    def hashes(self, chunk_bytes: int) -> tuple[str, tuple[str, ...]]:
        """Of the whole and of every chunk, in one pass over memory: a chunk's second hash finds it in the cache."""
        whole, chunks, view = xxhash.xxh3_128(), [], self.bytes.data
        for low in range(0, len(view), chunk_bytes):
            chunks.append(hash_of(view[low:low + chunk_bytes]))
            whole.update(view[low:low + chunk_bytes])
        return whole.hexdigest(), tuple(chunks)


def hash_of(content: Any) -> str:
    """Of a buffer's bytes, in hex."""
    return xxhash.xxh3_128_hexdigest(content)


def part_name(rank: int, world_size: int, generation: int, kind: str = "state") -> str:
    return f"{kind}-{rank:04d}-of-{world_size:04d}-g{generation:06d}.safetensors"
