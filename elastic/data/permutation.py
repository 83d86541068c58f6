"""A keyed permutation of range(size) in constant memory: any element can be asked for without listing the others.

An alternating Feistel network over Z_a x Z_b with a * b just above `size` (Black and Rogaway, "Ciphers with arbitrary
finite domains", 2002, the generalised Feistel cipher), and cycle walking for the few values that fall outside.
"""

from __future__ import annotations

import hashlib
import math
from functools import lru_cache

import numpy as np

from elastic.model.ops import GOLDEN

ROUNDS = 8  # each half is mixed four times; fewer leave visible order in small domains


def keyed_words(num: int, *key: int) -> np.ndarray:
    """`num` uint64 words that depend on nothing but `key`, at most 8 words a hash of 64 bytes."""
    text = "/".join(str(int(part)) for part in key).encode()
    blocks = b"".join(hashlib.sha512(text + b"#%d" % block).digest() for block in range(-(-num // 8)))
    return np.frombuffer(blocks, "<u8")[:num].astype(np.uint64)


@lru_cache(maxsize=1024)
def keyed_word(*key: int) -> int:
    """One of `keyed_words`, drawn once: an epoch's, as a rule."""
    return int(keyed_words(1, *key)[0])


def draws(keys: np.ndarray, numbers: np.ndarray, count: int) -> np.ndarray:
    """(rows, count) uint64, of each row's key and number alone: SplitMix64 (Steele, Lea and Flood 2014)."""
    start = mix(keys + numbers.astype(np.uint64) * np.uint64(GOLDEN))
    return mix(start[:, None] + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(GOLDEN))


def mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea and Flood, 2014): a bijection of 64-bit words that spreads every bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def permute(values: np.ndarray, size: int, *key: int) -> np.ndarray:
    """The images of `values` (int64, in [0, size)) under the permutation of range(size) that `key` names."""
    rows = math.isqrt(size - 1) + 1
    columns = -(-size // rows)
    words = keyed_words(ROUNDS, *key)
    out = np.array(values, np.int64).reshape(-1)
    inside = np.arange(out.size)
    while inside.size:
        out[inside] = _rounds(out[inside], rows, columns, words)
        inside = inside[out[inside] >= size]
    return out.reshape(np.shape(values))


def permute_by_epoch(values: np.ndarray, epochs: np.ndarray, size: int, *key: int) -> np.ndarray:
    """The same, in every epoch under a permutation of its own."""
    out = np.empty_like(values)
    for epoch in np.unique(epochs).tolist():
        chosen = epochs == epoch
        out[chosen] = permute(values[chosen], size, *key, epoch)
    return out


def _rounds(values: np.ndarray, rows: int, columns: int, words: np.ndarray) -> np.ndarray:
    a, b = np.uint64(rows), np.uint64(columns)
    left, right = np.divmod(values.astype(np.uint64), b)
    for number, word in enumerate(words):
        if number % 2:
            right = (right + mix(left + word) % b) % b
        else:
            left = (left + mix(right + word) % a) % a
    return (left * b + right).astype(np.int64)
