"""A worker's first run through a model over embedding tables: on the rows that ids start from, as a store that nothing was committed to has them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from elastic.errors import UserError
from elastic.state.state import State
from elastic.tables.bags import Bags
from elastic.tables.features import Feature, Tables
from elastic.tables.row_store import kernels
from elastic.tables.spec import RowUpdate, TableSpec
from elastic.tables.untrained import with_starting_rows
from elastic.worker.rehearsal import warm_up
from elastic.worker.training import Placement, Plan, Training
from tests.support.lookups import LENGTH, ROWS, WIDTH, Lookups
from tests.support.models import rig_of
from tests.support.rules import OPTIMIZER

SPECS = (TableSpec("people", WIDTH, init="normal:0.5", seed=5, num_buckets=4),
         TableSpec("things", 2, init="uniform:1.0", seed=5, num_buckets=4, vocabulary=9))
TABLES = Tables(SPECS, (Feature("history", "people", "none", LENGTH), Feature("spare", "things", "mean"),
                        Feature("user", "people")), {spec.name: RowUpdate(0.1) for spec in SPECS}, kernels="reference")


def batch(seed: int, rows: int = ROWS) -> dict[str, Any]:
    luck, bags = np.random.default_rng(seed), {}
    for feature in TABLES.features:
        lengths = luck.integers(0, LENGTH + 1, rows)
        ids = luck.integers(0, 9, lengths.sum())
        weights = luck.random(ids.size).astype(np.float32) if feature.name == "spare" else None
        bags[feature.name] = Bags(ids, np.concatenate([[0], np.cumsum(lengths)]), weights, feature.pooling, LENGTH)
    return {"bags": bags, "label": luck.standard_normal(rows).astype(np.float32),
            "row_weight": np.ones(rows, np.float32)}


def looked_up(given: dict[str, Any]) -> dict[str, np.ndarray]:
    """By stores that hold every bucket."""
    stores = {spec.name: kernels("reference").create(spec, 0) for spec in SPECS}
    for store in stores.values():
        store.hold(range(4))
    return {feature.name: stores[feature.table].lookup(given["bags"][feature.name]) for feature in TABLES.features}


def assert_same(found: Any, wanted: dict[str, np.ndarray]) -> None:
    assert found.keys() == wanted.keys()
    for feature, rows in wanted.items():
        assert rows.any() and found[feature].dtype == np.float32 and np.array_equal(found[feature], rows), feature


def test_starting_rows_are_those_of_a_store_that_nothing_was_committed_to() -> None:
    given = batch(0)
    found = with_starting_rows(TABLES, given)
    assert_same(found["rows"], looked_up(given))
    assert sorted(found) == ["label", "row_weight", "rows"] and found["label"] is given["label"]
    assert "bags" in given and with_starting_rows(None, given) is given
    given["bags"]["spare"].ids[0] = 9
    with pytest.raises(UserError, match="table things: id 9 is not in its vocabulary, 0 to 8"):
        with_starting_rows(TABLES, given)


class Loader:
    def __call__(self, step: int, shard: int) -> dict[str, Any]:
        return batch(10 * step + shard, 2 if (step, shard) == (3, 1) else ROWS)

    def expect(self, keys: Iterable[tuple[int, int]]) -> None: ...

    def close(self) -> None: ...


@dataclass
class Recorded:
    """A backend's method, and the batches that it has seen."""

    method: Callable[..., Any]
    seen: list[dict[str, Any]]

    def __call__(self, batch: dict[str, Any], *rest: Any) -> Any:
        self.seen.append(batch)
        return self.method(batch, *rest)


def test_training_and_evaluation_are_tried_on_them(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = rig_of("reference", Lookups()).backend
    seen: list[dict[str, Any]] = []
    for name in ("gradients", "metrics"):
        monkeypatch.setattr(backend, name, Recorded(getattr(backend, name), seen))

    def positions(step: int, shard: int) -> np.ndarray:
        return np.where(np.arange(ROWS) < (2 if (step, shard) == (3, 1) else ROWS), np.arange(ROWS), -1)

    training = Training(Plan(3, 2, 5, True, {**OPTIMIZER, "name": "adamw"}), Loader(), positions,
                        (lambda: batch(40), lambda: batch(41, 3)), fills=False, tables=TABLES)
    place = Placement(backend, State(backend, "adamw"))
    warm_up(training, place)
    wanted = [batch(10), batch(31, 2), batch(40), batch(41, 3)]
    assert len(seen) == len(wanted)
    for found, given in zip(seen, wanted):
        assert "bags" not in found
        assert_same(found["rows"], looked_up(given))
