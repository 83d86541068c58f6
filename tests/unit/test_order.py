"""Orders against plain lists: each sample once an epoch, blocks one at a time, sources by their weights; and no memory for it."""

from __future__ import annotations

import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic.data import Sampler
from elastic.data.order import PERIOD, Blocks, Mixture, Order, Rows, seed_of, shares

SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(sizes=SIZES, seed=st.integers(0, 2**63 - 1))
def test_blocks_come_one_after_another_and_each_row_once_an_epoch(sizes: list[int], seed: int) -> None:
    size = sum(sizes)
    block_of = np.repeat(np.arange(len(sizes)), sizes)
    epochs, samples = Blocks(np.array(sizes), seed).locate(np.arange(3 * size))
    assert epochs.tolist() == [epoch for epoch in range(3) for _ in range(size)]
    for epoch in range(3):
        rows = samples[epoch * size:(epoch + 1) * size]
        assert sorted(rows.tolist()) == list(range(size))
        assert 1 + np.count_nonzero(np.diff(block_of[rows])) == len(sizes)  # a block is left only when it is done


def test_blocks_and_rows_are_both_shuffled_and_anew_every_epoch() -> None:
    order = Blocks(np.full(50, 20), 3)
    _, samples = order.locate(np.arange(3000))
    first, second, third = samples.reshape(3, 50, 20)
    assert len({tuple((epoch[:, 0] // 20).tolist()) for epoch in (first, second, third)}) == 3
    assert len({tuple((block % 20).tolist()) for block in first}) == 50  # no two blocks in the same inner order


def test_positions_may_be_asked_for_in_any_order() -> None:
    order = Blocks(np.array([7, 1, 30, 12]), 9)
    whole = order.locate(np.arange(150))
    mixed = np.random.default_rng(0).permutation(150)
    for found, expected in zip(order.locate(mixed), whole):
        assert found.tolist() == expected[mixed].tolist()


def mixture(sizes: tuple[int, ...], weights: tuple[float, ...], seed: int = 5) -> Mixture:
    orders: list[Order] = [Rows(size, seed_of(seed, n), True) for n, size in enumerate(sizes)]
    return Mixture(orders, weights, seed)


def test_a_mixture_keeps_its_shares_and_feeds_each_source_epoch_by_epoch() -> None:
    sizes, weights, periods = (1000, 301, 5), (0.5, 0.3, 0.2), 6
    mixed = mixture(sizes, weights)
    epochs, samples = mixed.locate(np.arange(periods * PERIOD))
    sources = np.searchsorted(np.cumsum(sizes), samples, side="right")
    first = np.concatenate([[0], np.cumsum(sizes)])
    for period in range(periods):
        found = np.bincount(sources[period * PERIOD:(period + 1) * PERIOD])
        assert found.tolist() == shares(weights).tolist()
    for source, size in enumerate(sizes):
        mine = sources == source
        rows, own = int(mine.sum()), (samples[mine] - first[source]).tolist()
        assert rows == periods * shares(weights)[source]
        assert epochs[mine].tolist() == [place // size for place in range(rows)]
        for epoch in range(rows // size):
            assert sorted(own[epoch * size:(epoch + 1) * size]) == list(range(size))


def test_a_mixture_is_mixed_at_every_scale() -> None:
    _, samples = mixture((1000, 1000), (0.75, 0.25)).locate(np.arange(PERIOD))
    from_second = (samples >= 1000).reshape(-1, 64).sum(axis=1)
    assert abs(from_second - 16).max() <= 14 and len(set(from_second.tolist())) > 3


@pytest.mark.parametrize("weights", [(1.0,), (1, 1, 1), (0.7, 0.2, 0.1), (1e-9, 1.0), (3, 5, 7, 11)])
def test_shares_are_the_weights_rounded(weights: tuple[float, ...]) -> None:
    counts, exact = shares(weights), np.array(weights) / sum(weights) * PERIOD
    assert counts.sum() == PERIOD and counts.min() >= 1 and abs(counts - np.maximum(exact, 1)).max() < 2


def test_orders_never_change_between_versions() -> None:
    """Checkpoints hold one integer for the place in these orders."""
    assert Blocks(np.array([3, 2, 4]), 7).locate(np.arange(18))[1].tolist() == GOLDEN_BLOCKS
    assert mixture((4, 3), (2, 1)).locate(np.arange(12))[1].tolist() == GOLDEN_MIXTURE


GOLDEN_BLOCKS = [1, 0, 2, 7, 8, 6, 5, 4, 3, 2, 1, 0, 4, 3, 5, 6, 8, 7]
GOLDEN_MIXTURE = [3, 1, 2, 4, 0, 0, 1, 6, 3, 5, 4, 6]


def test_ten_million_positions_are_permuted_in_constant_memory() -> None:
    """Every one of them once, 64 Ki at a time; the peak does not depend on how many there are."""
    peaks = []
    for size in (1_000_000, 10_000_000):
        seen, at_once = np.zeros(size, bool), 1 << 16
        order = Rows(size, 1, True)
        tracemalloc.start()
        for first in range(0, size, at_once):
            _, samples = order.locate(np.arange(first, min(first + at_once, size)))
            seen[samples] = True
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert seen.all()
    assert peaks[1] < 1.2 * peaks[0] and peaks[1] < 10 << 20, peaks


@pytest.mark.parametrize("way", ["rows", "blocks", "mixture"])
def test_a_billion_rows_cost_nothing_to_open(way: str) -> None:
    size, blocks = 1_000_000_000, 8_000
    tracemalloc.start()
    started = time.perf_counter()
    rows, by_blocks = Rows(size, 0, True), Blocks(np.full(blocks, size // blocks), 0)
    order = {"rows": rows, "blocks": by_blocks, "mixture": Mixture([rows, by_blocks], (1, 3), 0)}[way]
    sampler = Sampler(order.num_samples, 4096, 8, 0, True, steps=10**9, order=order)
    for step in (1, 10**6, sampler.num_steps):
        epochs, samples = sampler.locate(sampler.positions(step, 7))
        assert len(set(samples.tolist())) == 512 and 0 <= samples.min() <= samples.max() < order.num_samples
    taken, peak = time.perf_counter() - started, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 << 20, peak
    assert taken < 5.0, taken
