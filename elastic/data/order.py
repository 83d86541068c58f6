"""From a position, of which `sampler` makes batches, to a sample: orders as pure functions, by rows, by blocks of rows, and of several sources mixed.

An order maps a position, counted from the start of the run and on across epochs, to (epoch, sample). Every sample comes
once an epoch. Nothing is listed: rows cost no memory, blocks that of one number each.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np

from elastic.data.permutation import keyed_word, permute, permute_by_epoch

PERIOD = 4096  # positions over which a mixture keeps its shares exactly
BLOCK_KEY, ROW_KEY, SLOT_KEY, SOURCE_KEY = 1, 2, 3, 4  # keep the permutations of one seed apart


class Order(Protocol):
    """`sizes`: the samples of each source, which lie one after another."""

    sizes: tuple[int, ...]

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(epochs, samples), int64, of positions of at least 0."""


class Rows:
    """All rows of an epoch in one permutation; or in their own order."""

    def __init__(self, num_samples: int, seed: int, shuffle: bool):
        self.num_samples, self.seed, self.shuffle = num_samples, seed, shuffle
        self.sizes: tuple[int, ...] = (num_samples,)

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        epochs, samples = np.divmod(positions, self.num_samples)
        return epochs, permute_by_epoch(samples, epochs, self.num_samples, self.seed) if self.shuffle else samples


class Blocks:
    """Blocks of consecutive rows in a permutation, and the rows of each in another: a reader needs one block at a time.
    """

    def __init__(self, block_sizes: np.ndarray, seed: int):
        self.block_sizes, self.seed = np.asarray(block_sizes, np.int64), seed
        self.first = np.concatenate([[0], np.cumsum(self.block_sizes)])
        self.num_samples = int(self.first[-1])
        self.sizes: tuple[int, ...] = (self.num_samples,)
        self._laid_out = lru_cache(2)(self._lay_out)

    def _lay_out(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """An epoch's blocks in their order, and the place in the epoch at which each begins."""
        blocks = permute(np.arange(len(self.block_sizes)), len(self.block_sizes), self.seed, epoch, BLOCK_KEY)
        return blocks, np.concatenate([[0], np.cumsum(self.block_sizes[blocks])])

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        epochs, places = np.divmod(positions, self.num_samples)
        samples = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            blocks, begins = self._laid_out(epoch)
            mine = np.flatnonzero(epochs == epoch)
            turns = np.searchsorted(begins, places[mine], side="right") - 1
            for turn in np.unique(turns).tolist():
                block, chosen = int(blocks[turn]), mine[turns == turn]
                inside = permute(places[chosen] - begins[turn], int(self.block_sizes[block]), self.seed, epoch, block,
                                 ROW_KEY)
                samples[chosen] = self.first[block] + inside
        return epochs, samples


class Mixture:
    """Several sources by weight. Each run of `PERIOD` positions holds the same number of every source, in an order of
    its own.

    A source's epochs run on by themselves, one after the other: a small source with a large weight comes round more
    often.
    """

    def __init__(self, orders: Sequence[Order], weights: Sequence[float], seed: int):
        self.orders, self.seed, self.counts = orders, seed, shares(weights)
        self.begins = np.concatenate([[0], np.cumsum(self.counts)])
        self.sizes = tuple(size for order in orders for size in order.sizes)
        self.first = np.concatenate([[0], np.cumsum(self.sizes)])
        self.num_samples = int(self.first[-1])
        self._laid_out = lru_cache(2)(self._lay_out)

    def _lay_out(self, period: int) -> tuple[np.ndarray, np.ndarray]:
        """The source of each position of a period, and how many of that source's came before it in the period."""
        sources = np.searchsorted(self.begins, permute(np.arange(PERIOD), PERIOD, self.seed, period, SLOT_KEY),
                                  side="right") - 1
        turns = np.empty_like(sources)
        turns[np.argsort(sources, kind="stable")] = np.arange(PERIOD) - np.repeat(self.begins[:-1], self.counts)
        return sources, turns

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        periods, slots = np.divmod(positions, PERIOD)
        sources, own = np.empty_like(slots), np.empty_like(slots)
        for period in np.unique(periods).tolist():
            chosen = periods == period
            laid, turns = self._laid_out(period)
            sources[chosen], own[chosen] = laid[slots[chosen]], turns[slots[chosen]]
        own += periods * self.counts[sources]
        epochs, samples = np.empty_like(slots), np.empty_like(slots)
        for source in np.unique(sources).tolist():
            chosen = sources == source
            epochs[chosen], samples[chosen] = self.orders[source].locate(own[chosen])
            samples[chosen] += self.first[source]
        return epochs, samples


def shares(weights: Sequence[float]) -> np.ndarray:
    """How many of `PERIOD` positions each weight gets: rounded by largest remainders, at least one each."""
    exact = np.asarray(weights, np.float64) / np.sum(weights) * PERIOD
    counts = np.maximum(np.floor(exact).astype(np.int64), 1)
    while counts.sum() != PERIOD:
        off = exact - counts
        counts[np.argmax(off) if counts.sum() < PERIOD
               else np.argmin(np.where(counts > 1, off, np.inf))] += np.sign(PERIOD - counts.sum())
    return counts


def seed_of(seed: int, source: int) -> int:
    """The seed of one source of a mixture."""
    return keyed_word(seed, source, SOURCE_KEY) >> 1
