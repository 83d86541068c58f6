"""Random views of images: crops, mirror images, mixtures. Each is a pure function of (seed, epoch, index of the sample)."""

from __future__ import annotations

import numpy as np

from elastic.data import permutation
from elastic.data.permutation import keyed_word

WORDS = 4  # drawn for each sample: down, across, mirrored, mixture
CROP, PARTNER = 2, 3  # what a key is for


def draws(seed: int, epochs: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """(rows, WORDS) uint64."""
    keys = np.array([keyed_word(CROP, seed, epoch) for epoch in np.asarray(epochs).tolist()], np.uint64)
    return permutation.draws(keys, np.asarray(indices) + 1, WORDS)


def crop_and_flip(images: np.ndarray, words: np.ndarray, crop: int, flip: bool) -> np.ndarray:
    """(rows, h, w, c) moved by up to `crop` pixels in each direction, black where nothing comes after, half of them
    mirrored."""
    rows, height, width, _ = images.shape
    around = (crop, crop)
    wide = np.pad(images, ((0, 0), around, around, (0, 0)))
    down, across = ((words[:, i] % np.uint64(2 * crop + 1)).astype(np.int64) for i in (0, 1))
    y, x = down[:, None] + np.arange(height), across[:, None] + np.arange(width)
    if flip:
        mirrored = (words[:, 2] >> np.uint64(63)).astype(bool)
        x[mirrored] = x[mirrored, ::-1]
    return wide[np.arange(rows)[:, None, None], y[:, :, None], x[:, None, :]]


def proportions(words: np.ndarray, alpha: float) -> np.ndarray:
    """(rows,) float32 from Beta(alpha, alpha), the first sample's part (Zhang et al. 2018, mixup)."""
    generators = (np.random.Generator(np.random.Philox(key=int(word))) for word in words[:, 3])
    return np.array([generator.beta(alpha, alpha) for generator in generators], np.float32)
