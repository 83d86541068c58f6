"""The two hashes by which runs are compared (a file's own: `part`), over arrays named as in a checkpoint.

The names are parameter/NAME, optimizer/SLOT/NAME, buffer/NAME.
Each array is one line of JSON, [name, dtype, shape], and then its C-order little-endian bytes. `parameters_sha256`
takes the parameters, by NAME alone and in sorted order. `state_sha256` goes on from there with "optimizer/SLOT/NAME" in
sorted order (moving averages are the slot "ema"), with "buffer/NAME" in sorted order, and ends with the line ["cursor",
CURSOR].
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

import numpy as np

AVERAGE = "optimizer/ema/"  # moving averages, of parameters and buffers
PARAMETER, OPTIMIZER, BUFFER = "parameter/", "optimizer/", "buffer/"


def hashes_of(arrays: Iterable[tuple[str, np.ndarray]], cursor: int) -> tuple[str, str]:
    """(parameters_sha256, state_sha256) in one pass over arrays that come one by one, as `in_order` says."""
    digest, parameters = hashlib.sha256(), ""
    for name, array in arrays:
        is_parameter = name.startswith(PARAMETER)
        if not is_parameter and not parameters:
            parameters = digest.hexdigest()
        head = [name.removeprefix(PARAMETER) if is_parameter else name, array.dtype.name, list(array.shape)]
        digest.update((json.dumps(head) + "\n").encode())
        digest.update(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).reshape(-1).view(np.uint8).data)
    parameters = parameters or digest.hexdigest()
    digest.update((json.dumps(["cursor", cursor]) + "\n").encode())
    return parameters, digest.hexdigest()


def in_order(names: Iterable[str]) -> list[str]:
    """Parameters, then optimizer state, then buffers, each sorted."""
    listed = sorted(names)
    return [name for prefix in (PARAMETER, OPTIMIZER, BUFFER) for name in listed if name.startswith(prefix)]
