"""A state of plain arrays, and a group of savers: checkpoints without a model, a loop or a controller's process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np

from elastic.boxes import Box
from elastic.checkpoint import manager, safetensors
from elastic.checkpoint.manager import folder_of
from elastic.checkpoint.manifest import CHUNK as MANIFEST_CHUNK
from elastic.checkpoint.manifest import FileEntry, Manifest, Piece
from elastic.checkpoint.part import Image
from elastic.checkpoint.plan import shares
from elastic.checkpoint.state_hash import hashes_of, in_order
from elastic.collective.solo import SoloGroup
from elastic.controller.checkpoints import Checkpoints, Outcome
from elastic.errors import GroupBroken
from elastic.messages import Part, Save
from elastic.storage.store import Store
from elastic.worker.saver import Saver
from tests.support.threads import together

CHUNK = 1024  # bytes: small, so that small states have many


def values(step: int, size: int = 1) -> dict[str, np.ndarray]:
    """Arrays of many shapes and dtypes, other bits for every step. About 14 kB times `size`."""
    draw = np.random.default_rng(step)
    return {"parameter/w": draw.standard_normal((40 * size, 30)).astype(np.float32),
            "parameter/b": draw.standard_normal(7).astype(np.float32),
            "optimizer/exp_avg/w": draw.standard_normal((40 * size, 30)).astype(np.float32),
            "parameter/deep": draw.standard_normal((1, 3, 5, 7)).astype(np.float64),
            "buffer/count": np.array(step, np.int64),
            "buffer/mask": draw.random(5) > 0.5, "buffer/none": np.zeros((0, 3), np.float32),
            "buffer/tall": draw.integers(0, 9, (1, 501), np.int16)}


class Arrays:
    """What a saver needs of `elastic.state.state.State`, on NumPy arrays."""

    def __init__(self, arrays: Mapping[str, np.ndarray], committed: int = -1):
        self.arrays, self.committed = {name: np.array(array) for name, array in arrays.items()}, committed

    def specs(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {name: (array.dtype.name, array.shape) for name, array in self.arrays.items()}

    replica_size, is_all = 1, True
    whole_specs = specs

    def shares(self, rank: int, size: int) -> tuple[Piece, ...]:
        return shares(self.specs(), size)[rank]

    def in_whole(self, piece: Piece) -> Piece:
        return piece

    def take(self, name: str, low: int, high: int) -> np.ndarray:
        return self.arrays[name].reshape(-1)[low:high]

    def put(self, name: str, box: Box, low: int, found: np.ndarray) -> None:
        self.arrays[name][box.slices].flat[low:low + len(found)] = found


def blank(arrays: Mapping[str, np.ndarray]) -> Arrays:
    """The same shapes, and bits that are surely others."""
    return Arrays({name: np.ones_like(array) if array.dtype == bool else array + array.dtype.type(1)
                   for name, array in arrays.items()})


def saver(location: str, worker: str = "w0", post: Callable[[Any], None] = lambda part: None, chunk_bytes: int = CHUNK,
          mb_s: float = 0.0) -> Saver:
    head = Manifest(0, 0, 0, 7, "recipe", chunk_bytes=chunk_bytes, extra={"info": {"key": "data"}, "run": "a-run"})
    return Saver(worker, location, head, 12, post, mb_s=mb_s)


def write_parts(location: str, step: int, world_size: int, generation: int = 1, size: int = 1,
                **eval_: float) -> list[Part]:
    """Every rank's part, durable."""
    parts: list[Part] = []
    for rank in range(world_size):
        saver(location, f"w{rank}", parts.append).save(Arrays(values(step, size), step),
                                                       Save(generation, step, rank, world_size, True), eval_)
    return parts


def save(location: str, step: int, world_size: int = 3, generation: int = 1, checkpoints: Checkpoints | None = None,
         **eval_: float) -> Outcome | None:
    """A whole checkpoint, committed: what the controller says of it."""
    checkpoints = checkpoints or Checkpoints(location, 100, "")
    found = None
    for part in write_parts(location, step, world_size, generation, **eval_):
        found = checkpoints.take(part, written=step) or found
    return found


def restore(path: str, world_size: int, size: int = 1) -> list[tuple[Arrays, Any]]:
    """Every rank's state after a group has loaded a checkpoint together, with (manifest, bytes read) or what was
    raised."""
    states = [blank(values(0, size)) for _ in range(world_size)]

    def body(rank: int, group: Any) -> Any:
        try:
            return saver("/nowhere").restore(path, states[rank], SoloGroup() if world_size == 1 else group,
                                             lambda window: nullcontext())
        except Exception as error:
            group.abort()
            return error

    return list(zip(states, together(world_size, body), strict=True))


def assert_same(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> None:
    """The same names, dtypes, shapes and bits."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape), name
        assert found[name].tobytes() == value.tobytes(), name


def assert_refused(found: list[tuple[Arrays, Any]], why: str = "") -> None:
    """No rank has a state, and somebody says what is wrong with the checkpoint."""
    from elastic.errors import BadCheckpoint

    errors = [error for _, error in found]
    assert all(isinstance(error, (BadCheckpoint, GroupBroken)) for error in errors), (why, errors)
    assert any(isinstance(error, BadCheckpoint) for error in errors), (why, errors)
    assert all(state.committed == -1 for state, _ in found), why


def write_part(store: Store, step: int, generation: int, part_name: str, arrays: Mapping[str, np.ndarray],
               boxes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] | None = None,
               chunk_bytes: int = MANIFEST_CHUNK) -> FileEntry:
    """A part file of these arrays. `boxes` has (shape of the whole array, start) of those that are only a part of one.
    """
    pieces = []
    for name in sorted(arrays):
        shape, start = (boxes or {}).get(name, (arrays[name].shape, (0,) * arrays[name].ndim))
        pieces.append(Piece(name, arrays[name].dtype.name, tuple(shape), tuple(start), tuple(arrays[name].shape)))
    image = Image(tuple(pieces))
    for piece in image.pieces:
        flat = np.ascontiguousarray(arrays[piece.name]).reshape(-1)
        image.bytes[piece.offset:piece.offset + piece.bytes].view(np.dtype(piece.dtype).newbyteorder("<"))[...] = flat
    return image.write(store, folder_of(step), f"{part_name}-g{generation:06d}.safetensors", chunk_bytes)


def load(store: Store, name: str) -> tuple[dict[str, np.ndarray], Manifest]:
    """All arrays of a checkpoint by name, whole, and its manifest. BadCheckpoint before anything of a bad one is given
    out."""
    manifest = manager.read_sound(store, name)
    arrays: dict[str, np.ndarray] = {}
    for entry in manifest.files:
        parts = manager.read_file(store, name, entry, manifest)
        for key, piece in safetensors.keyed(entry.pieces).items():
            if piece.count == piece.shape:
                arrays[piece.name] = parts[key]
                continue
            whole = arrays.setdefault(piece.name, np.empty(piece.shape, piece.dtype))
            whole[tuple(slice(s, s + c) for s, c in zip(piece.start, piece.count, strict=True))] = parts[key]
    return arrays, manifest


def hashes(arrays: Mapping[str, np.ndarray], cursor: int) -> tuple[str, str]:
    """(parameters_sha256, state_sha256)."""
    return hashes_of(((name, arrays[name]) for name in in_order(arrays)), cursor)
