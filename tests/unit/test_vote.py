"""A vote as it travels: what every member packs, and what all of them come to."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from elastic.messages import GO, STOP, STOP_AND_SAVE
from elastic.worker.vote import counted, packed

SHARDS = 5


def votes(size: int, with_ledger: bool) -> list[tuple[Any, ...]]:
    """Of members that have a run of shards each; every number is another, and a digest takes all of a float64."""
    found = []
    for rank, own in enumerate(np.array_split(np.arange(SHARDS), size)):
        mine = [np.zeros(SHARDS) for _ in range(3)]
        for values, scale in zip(mine, (0.1, 10.0, 2.0 ** 48 - 1)):
            values[own] = scale - own
        fed = mine[2] if with_ledger else np.zeros(0)
        found.append((mine[0], mine[1], fed, 0.3 * (rank == 0), rank == size - 1, (GO, STOP_AND_SAVE, STOP)[rank]))
    return found


@pytest.mark.parametrize("with_ledger", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_everything_that_is_said_arrives(size: int, with_ledger: bool) -> None:
    rows = np.stack([packed(*one) for one in votes(size, with_ledger)])
    assert rows.dtype == np.float64 and rows.shape == (size, (3 if with_ledger else 2) * SHARDS + 3)
    found, digests = counted(7, rows, SHARDS)
    shards = np.arange(SHARDS)
    np.testing.assert_array_equal(found.losses, 0.1 - shards)
    np.testing.assert_array_equal(found.weights, 10.0 - shards)
    np.testing.assert_array_equal(digests, 2.0 ** 48 - 1 - shards if with_ledger else [])
    assert (found.step, found.squared_norm, found.busy,
            found.stop) == (7, 0.3, True, GO if size == 1 else STOP_AND_SAVE)


@pytest.mark.parametrize("with_ledger", [False, True])
def test_one_alone_gets_what_it_gave(with_ledger: bool) -> None:
    ((losses, weights, fed, *rest),) = votes(1, with_ledger)
    found, digests = counted(7, packed(losses, weights, fed, *rest)[None], SHARDS)
    assert (found.losses, found.weights) == (tuple(losses), tuple(weights)) and np.array_equal(digests, fed)
    assert [found.squared_norm, found.busy, found.stop] == rest
