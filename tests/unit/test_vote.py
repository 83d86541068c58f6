"""A vote as it travels: what every member packs, and what all of them come to."""

from __future__ import annotations

import numpy as np
import pytest

from elastic.messages import GO, STOP, STOP_AND_SAVE
from elastic.worker.vote import Vote

SHARDS = 5


def votes(size: int, with_ledger: bool) -> list[Vote]:
    """Of members that have a run of shards each; every number is another, and a digest takes all of a float64."""
    found = []
    for rank, own in enumerate(np.array_split(np.arange(SHARDS), size)):
        mine = [np.zeros(SHARDS) for _ in range(3)]
        for values, scale in zip(mine, (0.1, 10.0, 2.0 ** 48 - 1)):
            values[own] = scale - own
        found.append(Vote(mine[0], mine[1], 0.3 * (rank == 0), rank == size - 1, (GO, STOP_AND_SAVE, STOP)[rank], *(mine[2:] if with_ledger else [])))
    return found


@pytest.mark.parametrize("with_ledger", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_everything_that_is_said_arrives(size: int, with_ledger: bool) -> None:
    rows = np.stack([one.pack() for one in votes(size, with_ledger)])
    assert rows.dtype == np.float64 and rows.shape == (size, (3 if with_ledger else 2) * SHARDS + 3)
    found = Vote.of_all(rows, SHARDS)
    shards = np.arange(SHARDS)
    np.testing.assert_array_equal(found.losses, 0.1 - shards)
    np.testing.assert_array_equal(found.weights, 10.0 - shards)
    np.testing.assert_array_equal(found.fed, 2.0 ** 48 - 1 - shards if with_ledger else [])
    assert (found.squared_norm, found.busy, found.stop) == (0.3, True, GO if size == 1 else STOP_AND_SAVE)


@pytest.mark.parametrize("with_ledger", [False, True])
def test_one_alone_gets_what_it_gave(with_ledger: bool) -> None:
    (given,) = votes(1, with_ledger)
    found = Vote.of_all(given.pack()[None], SHARDS)
    assert all(np.array_equal(was, now) for was, now in zip(vars(given).values(), vars(found).values(), strict=True))
