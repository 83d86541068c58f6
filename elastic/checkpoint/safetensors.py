"""The form of a safetensors file: the header's length (8 bytes, little-endian), a JSON header padded with spaces to where a
cache line begins, and the arrays' C-order little-endian bytes, the widest dtypes first so that each lies aligned.

The format has no complex128. Such an array is F64 with a last dimension of 2, real and imaginary part: the same bytes.
The header's metadata names it in a JSON list under "complex128"; `decode` and `index` put it together. Files of earlier
versions have a dtype "C128" of their own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import ml_dtypes  # noqa: F401  (NumPy knows "bfloat16" by it)
import numpy as np

from elastic.checkpoint.manifest import ITEM_BYTES, Piece
from elastic.errors import BadCheckpoint

CODES = {"float64": "F64", "float32": "F32", "float16": "F16", "int64": "I64", "int32": "I32", "int16": "I16",
         "int8": "I8",
         "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL",
         "bfloat16": "BF16", "complex64": "C64"}
WIDE = "complex128"
LINE = 64  # bytes of a cache line: copies to its start are faster
DTYPES = {code: dtype for dtype, code in CODES.items()} | {"C128": WIDE}


def lay_out(boxes: Iterable[Piece]) -> tuple[bytes, tuple[Piece, ...]]:
    """The file's first bytes, and the boxes in the order of the file, each with its offset.

    A second box of an array is named ARRAY#START in the header: only the manifest says that they belong together.
    """
    ordered = sorted(boxes, key=lambda piece: (-ITEM_BYTES.get(piece.dtype, 0), piece.name, piece.start))
    offset, placed, named = 0, [], keyed(ordered)
    header: dict[str, Any] = {"__metadata__": noted} if (noted := wide(key for key, piece in named.items()
                                                                       if piece.dtype == WIDE)) else {}
    for key, piece in named.items():
        if piece.dtype not in CODES and piece.dtype != WIDE:
            raise ValueError(f"the array {piece.name} has dtype {piece.dtype}, which a checkpoint cannot hold.")
        code, shape = (CODES[piece.dtype], [*piece.count]) if piece.dtype != WIDE else ("F64", [*piece.count, 2])
        header[key] = {"dtype": code, "shape": shape, "data_offsets": [offset, offset + piece.bytes]}
        placed.append(replace(piece, offset=offset))
        offset += piece.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % LINE)
    start = len(text).to_bytes(8, "little") + text
    return start, tuple(replace(piece, offset=piece.offset + len(start)) for piece in placed)


def wide(names: Iterable[str]) -> dict[str, str]:
    """The metadata that names arrays of complex128; none where there are none."""
    return {WIDE: json.dumps(found)} if (found := list(names)) else {}


def apart(arrays: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays as the format has them, in C order, and the metadata that goes with them."""
    split = [name for name, array in arrays.items() if array.dtype.name == WIDE]
    return {name: np.asarray(array, order="C") if name not in split else
            np.ascontiguousarray(array).view(np.float64).reshape(*array.shape, 2)
            for name, array in arrays.items()}, wide(split)


def keyed(pieces: Iterable[Piece]) -> dict[str, Piece]:
    """The boxes of a file by what they are called in its header."""
    found: dict[str, Piece] = {}
    for piece in pieces:
        found[piece.name if piece.name not in found else f"{piece.name}#{','.join(map(str, piece.start))}"] = piece
    return found


def decode(content: bytes, what: str) -> dict[str, np.ndarray]:
    """The arrays, as read-only views of `content`. BadCheckpoint names `what` where it is no safetensors file."""
    try:
        return {name: view(body, **entry) for name, entry, body in entries(content)}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise refusal(what, error) from error


def index(content: bytes, what: str) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """(dtype, shape, offset in the file) of every array. BadCheckpoint as `decode`."""
    try:
        return {name: (DTYPES[entry["dtype"]], tuple(entry["shape"]), len(content) - len(body)
                       + entry["data_offsets"][0])
                for name, entry, body in entries(content)}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise refusal(what, error) from error


def refusal(what: str, error: Exception) -> BadCheckpoint:
    return BadCheckpoint(f"{what} is not a safetensors file that this version reads ({str(error)[:80]}).")


def entries(content: bytes) -> Iterator[tuple[str, dict[str, Any], memoryview]]:
    """Name and entry of every array, and the bytes behind the header."""
    length = int.from_bytes(content[:8], "little")
    if len(content) < 8 or length > len(content) - 8:
        raise ValueError("its header is longer than the file")
    header = json.loads(content[8:8 + length])
    split = json.loads((header.pop("__metadata__", None) or {}).get(WIDE, "[]"))
    body = memoryview(content)[8 + length:]
    for name, entry in header.items():
        if name in split:
            if entry["dtype"] != "F64" or entry["shape"][-1:] != [2]:
                raise ValueError("an array named as complex128 is no F64 with a last dimension of 2")
            entry = {**entry, "dtype": "C128", "shape": entry["shape"][:-1]}
        yield name, entry, body


def view(body: memoryview, dtype: str, shape: list[int], data_offsets: list[int]) -> np.ndarray:
    kind = np.dtype(DTYPES[dtype]).newbyteorder("<")
    low, high = data_offsets
    if not 0 <= low <= high <= len(body) or high - low != math.prod(shape) * kind.itemsize or min([0, *shape]) < 0:
        raise ValueError("an array's bytes do not fit its shape")
    return np.frombuffer(body[low:high], kind).reshape(shape)
