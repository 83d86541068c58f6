"""Arrays that are NumPy's or torch's, asked nowhere else which; and a model's own buffers, of any dtype that a checkpoint holds.

What one shard changed in a buffer travels as float32 behind the gradients; a complex number as two. So a count's change
must be small enough to come out right.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy as np

from elastic.errors import UserError

MOST = 1 << 19  # by which a count may change: its mean over hundreds of shards is then right to less than a half

with suppress(ImportError):  # where only torch and NumPy are, nothing is kept as bfloat16
    import ml_dtypes  # noqa: F401  (NumPy knows "bfloat16" by it)


def like(array: Any, values: Any) -> Any:
    """Values, NumPy's or of the array's own kind, as its kind, dtype and device have them; NumPy's for NumPy as they
    are."""
    return values if isinstance(array, np.ndarray) or isinstance(values, type(array)) else array.new_tensor(values)


def fill(view: Any, values: Any) -> None:
    """Copies values into a view on any device."""
    view[...] = like(view, values)


def to_numpy(view: Any) -> np.ndarray:
    """A NumPy array of a view on any device; shares memory on the CPU."""
    return view if isinstance(view, np.ndarray) else view.detach().cpu().numpy()


def copied(x: Any) -> Any:
    return x.copy() if isinstance(x, np.ndarray) else x.clone()


def empty_like(x: Any, size: int) -> Any:
    """Flat."""
    return np.empty(size, x.dtype) if isinstance(x, np.ndarray) else x.new_empty(size)


def maximum(x: Any, y: Any) -> Any:
    return np.maximum(x, y) if isinstance(x, np.ndarray) else x.maximum(y)


def spec_of(view: Any) -> tuple[str, tuple[int, ...]]:
    """(dtype, shape)."""
    return str(view.dtype).removeprefix("torch."), tuple(view.shape)


def wide(values: np.ndarray) -> np.ndarray:
    """In numbers to reckon with: a large count has no room in a float."""
    kind = np.asarray(values).dtype.kind
    return np.asarray(values, np.int64 if kind in "iu" else np.complex128 if kind == "c" else np.float64)


def change(old: np.ndarray, now: np.ndarray) -> np.ndarray:
    """now - old, where equal infinities have not changed."""
    return np.subtract(now, old, out=np.zeros_like(old), where=now != old)


def weighed(name: str, old: np.ndarray, now: np.ndarray, weight: float) -> np.ndarray:
    """What a shard adds behind its gradients: its change times its weight, in the array's room. UserError for a count
    that leaps."""
    moved = change(wide(old), wide(now))
    if moved.dtype.kind == "i" and moved.size and (most := max(moved.max(), -moved.min())) > MOST:
        raise UserError(f"model.kind: the buffer {name}, of whole numbers, changes by {most} in one loss, and a mean "
                        f"over shards is right to the last digit only up to {MOST}; count in larger units, or in a "
                        "float64 buffer.")
    found = moved * weight
    return (np.stack([found.real, found.imag], -1) if found.dtype.kind == "c" else found).astype(np.float32)


def take_over(buffer: np.ndarray, mean: np.ndarray) -> None:
    """The array changes by the weighted mean over all shards, which lies in its room as float64."""
    kind = buffer.dtype.kind
    if kind in "iu":
        buffer += np.rint(mean).astype(buffer.dtype)
    elif kind == "c":
        buffer[...] = (buffer + (mean[..., 0] + 1j * mean[..., 1])).astype(buffer.dtype)
    else:
        buffer[...] = (wide(buffer) + (np.rint(mean) if kind == "b" else mean)).astype(buffer.dtype)


def follow(mean: np.ndarray, buffer: np.ndarray, share: float) -> None:
    """A buffer's average moves towards it by this share; what counts or says yes or no has none."""
    kind = mean.dtype.kind
    if kind == "f":
        mean += (change(mean, buffer) * share).astype(mean.dtype)
    elif kind in "cV":
        mean[...] = (wide(mean) + change(wide(mean), wide(buffer)) * share).astype(mean.dtype)
    else:
        mean[...] = buffer
