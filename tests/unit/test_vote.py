"""A vote as it travels: what every member packs of what is its own, and what all of them come to."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from elastic.messages import GO, STOP, STOP_AND_SAVE
from elastic.worker.own_figures import OwnFigures
from elastic.worker.vote import counted, packed

SHARDS = 5


def owners(size: int) -> np.ndarray:
    return np.concatenate([np.full(len(run), rank) for rank, run in enumerate(np.array_split(np.arange(SHARDS), size))])


def votes(size: int, with_ledger: bool) -> list[tuple[Any, ...]]:
    """Of members that have a run of shards each; every number is another, and a digest takes all of a float64."""
    found = []
    for rank in range(size):
        mine = [np.where(owners(size) == rank, scale - np.arange(SHARDS), 0.0) for scale in (0.1, 10.0, 2.0 ** 48 - 1)]
        found.append((mine if with_ledger else mine[:2], 0.3 * (rank == 0), rank == size - 1,
                      (GO, STOP_AND_SAVE, STOP)[rank]))
    return found


@pytest.mark.parametrize("with_ledger", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_everything_that_is_said_arrives(size: int, with_ledger: bool) -> None:
    own = OwnFigures(owners(size), size)
    rows = np.stack([packed(own, rank, *one) for rank, one in enumerate(votes(size, with_ledger))])
    assert rows.dtype == np.float64
    assert rows.shape == (size, (3 if with_ledger else 2) * -(-SHARDS // size) + 3), "of others' shards nothing is said"
    found, norm, busy, stop = counted(own, rows)
    for figures, scale in zip(found, (0.1, 10.0, 2.0 ** 48 - 1)[:3 if with_ledger else 2], strict=True):
        np.testing.assert_array_equal(figures, scale - np.arange(SHARDS))
    assert (norm, busy, stop) == (0.3, True, GO if size == 1 else STOP_AND_SAVE)


def test_members_of_a_replica_are_added_in_their_order() -> None:
    """The oracle is a sum over all that each would say of all shards."""
    draw, size, each = np.random.default_rng(5), 3, 4
    own = OwnFigures(owners(size), size)
    whole = np.where(np.repeat(np.arange(size), each)[:, None] == own.owners, draw.normal(size=(size * each, SHARDS)), 0.0)
    rows = np.stack([packed(own, rank // each, [one], draw.normal(), False, GO) for rank, one in enumerate(whole)])
    (found,), norm, _, _ = counted(own, rows)
    wanted = sum(rows[:, -3].tolist())
    assert norm == wanted, "in another order it would have other bits"
    assert found.tolist() == [sum(column) for column in whole.T.tolist()]


def test_owners_of_any_number_of_things_in_any_order() -> None:
    draw = np.random.default_rng(7)
    for size in (1, 2, 5, 40):
        own, figures = OwnFigures(draw.integers(0, size, 23), size), draw.normal(size=23)
        said = np.stack([own.of(member, np.where(own.owners == member, figures, np.nan)) for member in range(size)])
        assert said.shape == (size, np.bincount(own.owners).max())
        assert own.together(said).tolist() == figures.tolist()
