"""The row that an id starts from: a pure function of seed, table and id, so a row that was never updated need not be stored.

Four values come from one SplitMix64 word (Steele, Lea and Flood 2014): each 16 bits of it choose one of 65,536 equally
likely quantiles. Nothing is computed in floating point, so every implementation draws the same bits.
"""

from __future__ import annotations

import math
from functools import lru_cache
from statistics import NormalDist

import numpy as np

from elastic.data.permutation import draws, keyed_word
from elastic.errors import RecipeError
from elastic.model.ops import tag_key

NUM_LEVELS = 1 << 16
PARTS = 4  # 16-bit parts of a word


def check_init(key: str, init: str) -> None:
    kind, _, scale = init.partition(":")
    try:
        fits = init == "zeros" or (kind in ("normal", "uniform") and 0 < float(scale) < math.inf)
    except ValueError:
        fits = False
    if not fits:
        raise RecipeError(f'{key} = {init!r} must be "zeros", "normal:S" or "uniform:S" with a number S above 0, as '
                          '"normal:0.02".')


@lru_cache(maxsize=8)
def levels(init: str) -> np.ndarray:
    """The (65536,) float32 quantiles of a checked `init`: of a normal distribution of deviation S, or of a uniform one
    over -S..S."""
    kind, _, scale = init.partition(":")
    shares = (np.arange(NUM_LEVELS) + 0.5) / NUM_LEVELS
    if kind == "zeros":
        found = np.zeros(NUM_LEVELS)
    elif kind == "uniform":
        found = (2 * shares - 1) * float(scale)
    else:
        upper = [NormalDist().inv_cdf(share) for share in shares[NUM_LEVELS // 2:]]
        found = np.array([*(-value for value in reversed(upper)), *upper]) * float(scale)
    return found.astype(np.float32)


def key_of(seed: int, table: str) -> int:
    """The word that all of a table's draws depend on."""
    return keyed_word(seed, tag_key(table))


def starting_rows(key: int, init: str, ids: np.ndarray, width: int) -> np.ndarray:
    """(ids, width) float32."""
    words = draws(np.array(key, np.uint64), ids.view(np.uint64), -(-width // PARTS))
    parts = words.astype("<u8").view("<u2")[:, :width]
    return levels(init)[parts]
