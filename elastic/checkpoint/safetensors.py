"""Arrays as the bytes of a safetensors file, without a copy of the arrays, and back.

The form: the header's length (8 bytes, little-endian), a JSON header padded with spaces to a multiple of 8, and the
arrays' C-order little-endian bytes, the widest dtypes first so that each lies aligned.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from elastic.checkpoint.hashing import little_endian
from elastic.errors import BadCheckpoint

CODES = {"float64": "F64", "float32": "F32", "float16": "F16", "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8",
         "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL"}
DTYPES = {code: dtype for dtype, code in CODES.items()}


def encode(arrays: Mapping[str, np.ndarray]) -> Iterator[Any]:
    """The file's bytes, piece by piece."""
    names = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))
    header, offset = {}, 0
    for name in names:
        array = arrays[name]
        if array.dtype.name not in CODES:
            raise ValueError(f"the array {name} has dtype {array.dtype}, which a checkpoint cannot hold.")
        header[name] = {"dtype": CODES[array.dtype.name], "shape": list(array.shape), "data_offsets": [offset, offset + array.nbytes]}
        offset += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        yield little_endian(arrays[name])


def decode(content: bytes, what: str) -> dict[str, np.ndarray]:
    """The arrays, as read-only views of `content`. BadCheckpoint names `what` where it is no safetensors file."""
    try:
        length = int.from_bytes(content[:8], "little")
        if len(content) < 8 or length > len(content) - 8:
            raise ValueError("its header is longer than the file")
        header = json.loads(content[8:8 + length])
        header.pop("__metadata__", None)
        body = memoryview(content)[8 + length:]
        return {name: view(body, **entry) for name, entry in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise BadCheckpoint(f"{what} is not a safetensors file that this version reads ({str(error)[:80]}).") from error


def view(body: memoryview, dtype: str, shape: list[int], data_offsets: list[int]) -> np.ndarray:
    brain = dtype == "BF16"  # NumPy has none: it is read as float32, which holds all its values
    kind = np.dtype("uint16" if brain else DTYPES[dtype]).newbyteorder("<")
    low, high = data_offsets
    if not 0 <= low <= high <= len(body) or high - low != math.prod(shape) * kind.itemsize or min([0, *shape]) < 0:
        raise ValueError("an array's bytes do not fit its shape")
    array = np.frombuffer(body[low:high], kind).reshape(shape)
    return (array.astype(np.uint32) << np.uint32(16)).view(np.float32) if brain else array
