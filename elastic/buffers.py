"""A model's own buffers, of any dtype that a checkpoint holds: what one shard changed in them, and how they take a step's change over.

A change travels as float32 behind the gradients; a complex number as two. So a count's must be small enough to come out right.
"""

from __future__ import annotations

from contextlib import suppress

import numpy as np

from elastic.errors import UserError

MOST = 1 << 19  # by which a count may change: its mean over hundreds of shards is then right to less than a half

with suppress(ImportError):  # where only torch and NumPy are, nothing is kept as bfloat16
    import ml_dtypes  # noqa: F401  (NumPy knows "bfloat16" by it)


def wide(values: np.ndarray) -> np.ndarray:
    """In numbers to reckon with: a large count has no room in a float."""
    kind = np.asarray(values).dtype.kind
    return np.asarray(values, np.int64 if kind in "iu" else np.complex128 if kind == "c" else np.float64)


def change(old: np.ndarray, now: np.ndarray) -> np.ndarray:
    """now - old, where equal infinities have not changed."""
    return np.subtract(now, old, out=np.zeros_like(old), where=now != old)


def weighed(name: str, old: np.ndarray, now: np.ndarray, weight: float) -> np.ndarray:
    """What a shard adds behind its gradients: its change times its weight, in the array's room. UserError for a count that leaps."""
    moved = change(wide(old), wide(now))
    if moved.dtype.kind == "i" and moved.size and (most := max(moved.max(), -moved.min())) > MOST:
        raise UserError(f"model.kind: the buffer {name}, of whole numbers, changes by {most} in one loss, and a mean over shards is right to the "
                        f"last digit only up to {MOST}; count in larger units, or in a float64 buffer.")
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
