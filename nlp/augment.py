"""Tokens hidden for a model to guess (Devlin et al. 2019, section 3.1): which ones is a function of (seed, epoch, window) alone."""

from __future__ import annotations

from typing import Any

import numpy as np

from elastic.data.dataset import Dataset
from elastic.data.permutation import draws, keyed_word

HIDDEN, OTHER = 0.8, 0.1  # of the chosen tokens: replaced by the hidden token, by any other; the rest stays as it is
KEY = 5  # apart from what else is drawn from a seed and an epoch


class MaskedWindows(Dataset):
    """`windows` of tokens with the same number of tokens chosen in each: "tokens", "places" and "targets" as `nlp.bert`
    reads them.

    `vocab_size` is also the number of the hidden token. Every epoch hides other tokens.
    """

    def __init__(self, windows: Any, vocab_size: int, mask: float, seed: int):
        self.windows, self.vocab_size, self.seed = windows, vocab_size, seed
        self.num_samples, self.context = windows.num_samples, windows.context
        self.num_chosen = max(1, round(mask * self.context))

    def batch(self, indices: np.ndarray, epochs: np.ndarray) -> dict[str, np.ndarray]:
        tokens = self.windows.batch(indices, epochs)["tokens"][:, :self.context].astype(np.int64)
        keys = np.array([keyed_word(self.seed, epoch, KEY) for epoch in epochs.tolist()], np.uint64)
        drawn = draws(keys, np.asarray(indices), self.context + 2 * self.num_chosen)
        order, fate, other = np.split(drawn, [self.context, self.context + self.num_chosen], 1)
        places = np.sort(np.argsort(order, 1, kind="stable")[:, :self.num_chosen], 1)
        targets = np.take_along_axis(tokens, places, 1)
        chance = (fate >> np.uint64(11)).astype(np.float64) * 2.0 ** -53
        other = (other % np.uint64(self.vocab_size)).astype(np.int64)
        replaced = np.where(chance < HIDDEN, self.vocab_size, np.where(chance < HIDDEN + OTHER, other, targets))
        np.put_along_axis(tokens, places, replaced, 1)
        return {"tokens": tokens, "places": places, "targets": targets}
