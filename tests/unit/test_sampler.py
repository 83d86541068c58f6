"""The sampler against plain lists: every sample of an epoch exactly once, whatever the sizes."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic.data import Sampler
from elastic.data.permutation import permute

SIZES = st.integers(1, 700)


@settings(max_examples=60, deadline=None)
@given(size=SIZES, seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 1000))
def test_a_permutation_is_a_bijection(size: int, seed: int, epoch: int) -> None:
    assert sorted(permute(np.arange(size), size, seed, epoch).tolist()) == list(range(size))


def test_a_permutation_asks_for_elements_one_by_one_or_together() -> None:
    whole = permute(np.arange(1009), 1009, 3, 1)
    assert [int(permute(np.array([i]), 1009, 3, 1)[0]) for i in range(1009)] == whole.tolist()


def test_the_order_of_samples_never_changes_between_versions() -> None:
    """Checkpoints hold one integer for the place in this order."""
    assert permute(np.arange(12), 12, 0, 0).tolist() == GOLDEN[0]
    assert permute(np.arange(12), 12, 0, 1).tolist() == GOLDEN[1]
    assert permute(np.arange(3), 1_000_000_007, 5, 2).tolist() == GOLDEN[2]


GOLDEN = ([0, 1, 9, 3, 6, 4, 8, 10, 11, 2, 7, 5], [1, 4, 9, 7, 0, 10, 3, 2, 5, 6, 11, 8],
          [774741028, 518736813, 184299387])


def test_permutations_look_random() -> None:
    """Mean rank correlation over keys within four standard errors of 0, and each element lands everywhere about equally
    often."""
    size, keys = 101, 400
    images = np.stack([permute(np.arange(size), size, 7, key) for key in range(keys)])
    correlations = [np.corrcoef(np.arange(size), image)[0, 1] for image in images]
    assert abs(np.mean(correlations)) < 4 / math.sqrt((size - 1) * keys)
    assert 0.8 < np.std(correlations) * math.sqrt(size - 1) < 1.2
    counts = np.stack([np.bincount(images[:, place], minlength=size) for place in range(size)])
    chi_square = ((counts - keys / size) ** 2 / (keys / size)).sum()
    freedom = (size - 1) ** 2
    assert abs(chi_square - freedom) < 5 * math.sqrt(2 * freedom)


def plain_positions(num_positions: int, batch_size: int, shards: int) -> dict[tuple[int, int], list[int]]:
    """The same cut with lists: fill up with -1, cut into steps, cut steps into shards."""
    run = list(range(num_positions))
    run += [-1] * (-len(run) % batch_size)
    each = batch_size // shards
    return {(first // batch_size + 1, shard): run[first + shard * each:first + (shard + 1) * each]
            for first in range(0, len(run), batch_size) for shard in range(shards)}


@settings(max_examples=60, deadline=None)
@given(size=SIZES, each=st.integers(1, 5), shards=st.integers(1, 8), epochs=st.integers(1, 4), shuffle=st.booleans())
def test_every_sample_of_an_epoch_is_fed_exactly_once(size: int, each: int, shards: int, epochs: int,
                                                      shuffle: bool) -> None:
    sampler = Sampler(size, each * shards, shards, 11, shuffle, epochs=epochs)
    expected = plain_positions(epochs * size, each * shards, shards)
    assert sampler.num_steps == max(step for step, _ in expected)
    fed: dict[int, list[int]] = {}
    for (step, shard), positions in expected.items():
        found = sampler.positions(step, shard)
        assert found.dtype == np.int64
        assert found.tolist() == positions
        for position, epoch, index in zip(positions, *(a.tolist() for a in sampler.locate(found)), strict=True):
            if position < 0:
                assert (epoch, index) == (-1, -1)
            else:
                assert epoch == position // size
                fed.setdefault(epoch, []).append(index)
    assert {epoch: sorted(indices) for epoch, indices in fed.items()} == {e: list(range(size)) for e in range(epochs)}
    if not shuffle:
        assert fed[0] == list(range(size))


def test_steps_run_on_across_epochs_without_fillers() -> None:
    sampler = Sampler(10, 4, 2, 0, True, steps=6)
    positions = np.concatenate([sampler.positions(step, shard) for step in range(1, 7) for shard in range(2)])
    assert sampler.num_steps == 6
    assert positions.tolist() == list(range(24))
    epochs, indices = sampler.locate(positions)
    assert sorted(indices[:10].tolist()) == sorted(indices[10:20].tolist()) == list(range(10))
    assert epochs.tolist() == [0] * 10 + [1] * 10 + [2] * 4
    assert indices[:10].tolist() != indices[10:20].tolist()


def test_another_seed_is_another_order() -> None:
    one, other = (Sampler(50, 10, 1, seed, True, epochs=1).locate(np.arange(50))[1].tolist() for seed in (0, 1))
    assert one != other


def test_a_part_of_an_epoch_ends_early() -> None:
    sampler = Sampler(7, 2, 1, 0, False, epochs=0.5)
    assert sampler.num_steps == 2
    assert sampler.positions(2, 0).tolist() == [2, 3]


@pytest.mark.parametrize("options", [{"batch_size": 10, "logical_shards": 4}, {"num_samples": 0}, {"epochs": None},
                                     {"steps": 3}])
def test_impossible_numbers_are_refused(options: dict) -> None:
    with pytest.raises(ValueError, match=r"must be|give"):
        Sampler(**{"num_samples": 8, "batch_size": 4, "logical_shards": 2, "seed": 0, "shuffle": True, "epochs": 1}
                | options)


def test_steps_and_shards_outside_the_run_are_refused() -> None:
    sampler = Sampler(8, 4, 2, 0, True, epochs=1)
    for step, shard in ((0, 0), (3, 0), (1, 2), (1, -1)):
        with pytest.raises(ValueError, match="outside"):
            sampler.positions(step, shard)


@pytest.mark.parametrize(("batch_size", "options"),
                         [(6, {"epochs": 2.6}), (6, {"steps": 1500}), (3000, {"steps": 3}), (6000, {"epochs": 1})])
def test_a_shard_s_rows_are_those_of_its_positions(batch_size: int, options: dict) -> None:
    sampler = Sampler(9001, batch_size, 2, 4, True, **options)
    for step in {1, 2, sampler.num_steps // 2, sampler.num_steps - 1, sampler.num_steps} - {0}:
        for shard in range(2):
            for found, wanted in zip(sampler.rows(step, shard), sampler.locate(sampler.positions(step, shard)),
                                     strict=True):
                np.testing.assert_array_equal(found, wanted)


def test_a_huge_source_costs_nothing() -> None:
    started = time.perf_counter()
    sampler = Sampler(100_000_000_000, 4096, 8, 0, True, epochs=3)
    _, indices = sampler.locate(np.concatenate([sampler.positions(sampler.num_steps - 1, shard) for shard in range(8)]))
    assert len(set(indices.tolist())) == 4096
    assert 0 <= indices.min() <= indices.max() < 100_000_000_000
    assert time.perf_counter() - started < 1.0
