"""The two state hashes against a few lines that share nothing with them."""

from __future__ import annotations

import hashlib
import struct

import numpy as np
import pytest

from tests.support.checkpoints import hashes

ARRAYS = {
    "parameter/b": np.arange(6, dtype=np.float32).reshape(2, 3),
    "parameter/a.weight": np.array([1.5, -0.0, np.nan], np.float32),
    "parameter/a": np.zeros((0, 4), np.float32),
    "optimizer/exp_avg_sq/b": np.full((2, 3), 0.25, np.float32),
    "optimizer/exp_avg/b": np.full((2, 3), 0.5, np.float32),
    "buffer/count": np.array(7, np.int64),
}


def test_hashes_are_as_documented() -> None:
    """Every byte written out by hand."""
    parameters = (b'["a", "float32", [0, 4]]\n'
                  b'["a.weight", "float32", [3]]\n' + struct.pack("<3f", 1.5, -0.0, float("nan"))
                  + b'["b", "float32", [2, 3]]\n' + struct.pack("<6f", *range(6)))
    state = (parameters
             + b'["optimizer/exp_avg/b", "float32", [2, 3]]\n' + struct.pack("<6f", *[0.5] * 6)
             + b'["optimizer/exp_avg_sq/b", "float32", [2, 3]]\n' + struct.pack("<6f", *[0.25] * 6)
             + b'["buffer/count", "int64", []]\n' + struct.pack("<q", 7)
             + b'["cursor", 960]\n')
    assert hashes(ARRAYS, 960) == (hashlib.sha256(parameters).hexdigest(), hashlib.sha256(state).hexdigest())


def test_order_and_layout_in_memory_do_not_matter() -> None:
    turned = {name: np.array(ARRAYS[name], order="F") for name in reversed(ARRAYS)}
    big_endian = {name: array.astype(array.dtype.newbyteorder(">")) for name, array in ARRAYS.items()}
    wide = np.zeros((2, 6), np.float32)
    wide[:, ::2] = ARRAYS["parameter/b"]
    strided = ARRAYS | {"parameter/b": wide[:, ::2]}
    for same in (turned, big_endian, strided):
        assert hashes(same, 1) == hashes(ARRAYS, 1)


@pytest.mark.parametrize("name", sorted(ARRAYS))
def test_every_array_counts(name: str) -> None:
    array = ARRAYS[name]
    changed = ARRAYS | {name: array.reshape(*array.shape, 1)}
    assert hashes(changed, 0)[1] != hashes(ARRAYS, 0)[1]
    assert (hashes(changed, 0)[0] != hashes(ARRAYS, 0)[0]) == name.startswith("parameter/")
    assert hashes({n: a for n, a in ARRAYS.items() if n != name}, 0)[1] != hashes(ARRAYS, 0)[1]


def test_the_cursor_and_the_sign_of_zero_count() -> None:
    assert hashes(ARRAYS, 0)[1] != hashes(ARRAYS, 1)[1]
    positive = ARRAYS | {"parameter/a.weight": np.array([1.5, 0.0, np.nan], np.float32)}
    assert hashes(positive, 0)[0] != hashes(ARRAYS, 0)[0]
