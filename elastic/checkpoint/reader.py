"""Reading a checkpoint's bytes, each chunk against its hash before anything of it is used."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from elastic.checkpoint.manifest import FileEntry, Manifest, Piece
from elastic.checkpoint.part import hash_of
from elastic.errors import BadCheckpoint, GroupBroken
from elastic.storage.store import Store, patiently

WINDOW = 16 * 1024 * 1024  # bytes that one rank reads before all exchange what they have
Put = Callable[[Piece, int, np.ndarray], None]  # values of a piece from one of its elements on


class Reader:
    """The checked bytes of one checkpoint. `bytes` counts what was read."""

    def __init__(self, store: Store, name: str, manifest: Manifest):
        self.store, self.name, self.manifest = store, name, manifest
        self.bytes = 0

    def chunks(self, entry: FileEntry, low: int, high: int) -> bytes:
        """The bytes of chunks low..high-1 of a file. BadCheckpoint where one does not have its hash, or cannot be read
        in several tries."""
        size = self.manifest.chunk_bytes
        begins, ends = low * size, min(high * size, entry.bytes)
        where = f"{self.name}/{entry.name}"
        content = read_range(self.store, where, begins, ends, entry.bytes)
        self.bytes += len(content)
        view = memoryview(content)
        for number in range(low, high):
            at = (number - low) * size
            if hash_of(view[at:at + size]) != entry.chunks[number]:
                raise BadCheckpoint(f"{where} does not have the hash that the manifest states, in bytes "
                                    f"{number * size} to {min((number + 1) * size, entry.bytes) - 1}.")
        return content

    def range(self, entry: FileEntry, low: int, high: int) -> memoryview:
        """Bytes low..high-1 of a file; only the chunks that hold them are read."""
        if low >= high:
            return memoryview(b"")
        size = self.manifest.chunk_bytes
        first = low // size
        content = memoryview(self.chunks(entry, first, -(-high // size)))
        return content[low - first * size:high - first * size]


def read_range(store: Store, where: str, low: int, high: int, size: int) -> bytes:
    """Bytes low..high-1 of a file of `size`. BadCheckpoint where it is shorter, or cannot be read in several tries."""
    try:
        content = patiently(lambda: store.read_range(where, low, high))
    except OSError as error:
        raise BadCheckpoint(f"{where} cannot be read ({' '.join(str(error).split())[:200]}).") from error
    if len(content) != high - low:
        raise BadCheckpoint(f"{where} ends before its {size} bytes.")
    return content


def read_arrays(reader: Reader, wanted: Iterable[str]) -> dict[str, np.ndarray]:
    """Arrays by name. Only the byte ranges that hold them are read.

    BadCheckpoint where the checkpoint has no such array, or its bytes are not good.
    """
    pieces: dict[str, list[tuple[FileEntry, Piece]]] = {}
    for entry in reader.manifest.files:
        for piece in entry.pieces:
            pieces.setdefault(piece.name, []).append((entry, piece))
    found = {}
    for name in wanted:
        if name not in pieces:
            raise BadCheckpoint(f"{reader.name} holds no array {name}.")
        first = pieces[name][0][1]
        found[name] = np.empty(first.shape, np.dtype(first.dtype))
        for entry, piece in pieces[name]:
            content = reader.range(entry, piece.offset, piece.offset + piece.bytes)
            found[name][piece.box.slices] = np.frombuffer(content,
                                                          np.dtype(piece.dtype).newbyteorder("<")).reshape(piece.count)
    return found


# The whole of a checkpoint, read by a group together.


@dataclass(frozen=True)
class Block:
    """One chunk of one file."""

    file: int
    number: int
    bytes: int


def windows(manifest: Manifest, world_size: int) -> Iterator[list[list[Block]]]:
    """All chunks in order, a window at a time: which of them each rank reads. Pure."""
    size = manifest.chunk_bytes
    blocks = [Block(f, n, min(size, entry.bytes - n * size)) for f, entry in enumerate(manifest.files)
              for n in range(len(entry.chunks))]
    per_window = world_size * max(1, WINDOW // size)
    for low in range(0, len(blocks), per_window):
        window = blocks[low:low + per_window]
        yield [window[len(window) * rank // world_size:len(window) * (rank + 1) // world_size]
               for rank in range(world_size)]


def read_together(reader: Reader, group: Any, put: Put, at: Callable[[int], Any]) -> None:
    """Every rank reads and checks its part of each window; all get all of it, in bounded memory. `at(window)` enters
    the exchange.

    Nobody passes a window of which a chunk is bad: its reader raises BadCheckpoint before the exchange, and breaks it.
    """
    if group.size > 1:
        with at(0):
            agree(reader.manifest, group)
    places = [sorted((p for p in entry.pieces if p.bytes), key=lambda piece: piece.offset)
              for entry in reader.manifest.files]
    for number, window in enumerate(windows(reader.manifest, group.size)):
        mine = read_blocks(reader, window[group.rank])
        if group.size == 1:
            with at(number):  # nobody to wait for, but a sign of life
                scatter(reader.manifest, window, [mine], places, put)
            continue
        unit = max(sum(block.bytes for block in blocks) for blocks in window)
        part, out = np.zeros(unit, np.uint8), np.empty(unit * group.size, np.uint8)
        part[:len(mine)] = np.frombuffer(mine, np.uint8)
        with at(number):
            group.all_gather(out, part)
        scatter(reader.manifest, window, [memoryview(row) for row in out.reshape(group.size, unit)], places, put)


def agree(manifest: Manifest, group: Any) -> None:
    """GroupBroken unless all have read the same manifest: by another one the others' bytes would mean other arrays."""
    mine = np.frombuffer(hashlib.sha256(manifest.dumps().encode()).digest(), np.uint8).copy()
    out = np.empty(len(mine) * group.size, np.uint8)
    group.all_gather(out, mine)
    if (out.reshape(group.size, -1) != mine).any():
        raise GroupBroken("The members have read different manifests of one checkpoint: it was written anew meanwhile.")


def read_blocks(reader: Reader, blocks: list[Block]) -> bytes:
    """The blocks' bytes one after the other; neighbours in a file are read in one go."""
    out = []
    low = 0
    for n, block in enumerate(blocks):
        if n + 1 == len(blocks) or blocks[n + 1].file != block.file:
            out.append(reader.chunks(reader.manifest.files[block.file], blocks[low].number, block.number + 1))
            low = n + 1
    return out[0] if len(out) == 1 else b"".join(out)


def within(pieces: list[Piece], low: int, high: int) -> Iterator[Piece]:
    """Of a file's pieces, in the order of their bytes, those of which some lie in low..high-1."""
    for piece in pieces[bisect_right(pieces, low, key=lambda piece: piece.offset + piece.bytes):]:
        if piece.offset >= high:
            return
        yield piece


def scatter(manifest: Manifest, window: list[list[Block]], rows: list[Any], places: list[list[Piece]],
            put: Put) -> None:
    """Hands the bytes of a window to the arrays they belong to."""
    for blocks, row in zip(window, rows, strict=True):
        at = 0
        for block in blocks:
            low = block.number * manifest.chunk_bytes
            for piece in within(places[block.file], low, low + block.bytes):
                first, last = max(low, piece.offset), min(low + block.bytes, piece.offset + piece.bytes)
                values = np.frombuffer(row[at + first - low:at + last - low], np.dtype(piece.dtype).newbyteorder("<"))
                put(piece, (first - piece.offset) // values.itemsize, values)
            at += block.bytes
