"""The two hashes by which runs are compared, over arrays named as in a checkpoint: parameter/NAME, optimizer/SLOT/NAME, buffer/NAME.

Each array is one line of JSON, [name, dtype, shape], and then its C-order little-endian bytes. `parameters_sha256` takes the
parameters, by NAME alone and in sorted order. `state_sha256` goes on from there with "optimizer/SLOT/NAME" in sorted order (moving
averages are the slot "ema"), with "buffer/NAME" in sorted order, and ends with the line ["cursor", CURSOR].
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

AVERAGE = "optimizer/ema/"  # moving averages, of parameters and buffers
PARAMETER, OPTIMIZER, BUFFER = "parameter/", "optimizer/", "buffer/"


def little_endian(array: np.ndarray) -> np.ndarray:
    """The array's bytes as flat uint8; a view where the array is contiguous and little-endian."""
    array = np.ascontiguousarray(array)
    return array.astype(array.dtype.newbyteorder("<"), copy=False).reshape(-1).view(np.uint8)


def hashes(arrays: Mapping[str, np.ndarray], cursor: int) -> tuple[str, str]:
    """(parameters_sha256, state_sha256) in one pass."""
    digest = hashlib.sha256()
    for name in chosen(arrays, PARAMETER):
        update(digest, name.removeprefix(PARAMETER), arrays[name])
    parameters = digest.hexdigest()
    for prefix in (OPTIMIZER, BUFFER):
        for name in chosen(arrays, prefix):
            update(digest, name, arrays[name])
    digest.update((json.dumps(["cursor", cursor]) + "\n").encode())
    return parameters, digest.hexdigest()


def parameters_sha256(arrays: Mapping[str, np.ndarray]) -> str:
    return hashes({name: arrays[name] for name in chosen(arrays, PARAMETER)}, 0)[0]


def state_sha256(arrays: Mapping[str, np.ndarray], cursor: int) -> str:
    return hashes(arrays, cursor)[1]


def chosen(arrays: Mapping[str, Any], prefix: str) -> list[str]:
    return sorted(name for name in arrays if name.startswith(prefix))


def update(digest: Any, name: str, array: np.ndarray) -> None:
    digest.update((json.dumps([name, array.dtype.name, list(array.shape)]) + "\n").encode())
    digest.update(little_endian(array))
