"""What passes between NumPy's memory and TensorFlow's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from backends.common import ALIGN_BYTES, mapped
from elastic.model.backend import Buffer


def tensor_over(view: np.ndarray) -> Any:
    """A tensor that shares the memory of a view. TensorFlow ends the process on DLPack memory that is aligned to less
    than 64 bytes."""
    assert view.ctypes.data % ALIGN_BYTES == 0, "parameters begin at multiples of 64 bytes"
    return tf.experimental.dlpack.from_dlpack(view.__dlpack__())


def lies_in(view: np.ndarray, buffer: np.ndarray) -> bool:
    first = view.ctypes.data - buffer.ctypes.data
    return first >= 0 and first + view.nbytes <= buffer.nbytes


def shaped(inputs: Buffer | None, shape: Sequence[int]) -> Any:
    return None if inputs is None else tf.constant(np.asarray(inputs).reshape(tuple(shape)))


def columns(batch: Any) -> Any:
    """The batch as its data set made it, dict or tuple, with tensors for arrays; float64 becomes float32."""
    return mapped(batch, in_tensor)


def in_tensor(leaf: Any) -> Any:
    array = np.asarray(leaf)
    return tf.constant(array.astype(np.float32) if array.dtype == np.float64 else array)
