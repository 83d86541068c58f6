"""Random schedules: each store beside the NumPy one, in equal bits after everything."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic.tables.buckets import buckets_of
from elastic.tables.row_store import RowKernels, RowStore, kernels
from elastic.tables.spec import SLOTS, RowUpdate, TableSpec
from tests.support.rows import assert_same, ids, listed, random_bags, random_sums, spec, summed, whole
from tests.support.tight_rows import STORES, kernels_of

ORACLE = kernels("reference")
specs = st.builds(TableSpec, name=st.just("t"), width=st.sampled_from([1, 3, 16, 17, 70]),
                  optimizer=st.sampled_from(sorted(SLOTS)),
                  init=st.sampled_from(["zeros", "normal:0.1", "uniform:1"]), num_buckets=st.sampled_from([1, 2, 8]),
                  vocabulary=st.sampled_from([0, 0, 61]), admit=st.sampled_from([0, 0, 1, 3]),
                  ttl_steps=st.sampled_from([0, 0, 2, 40]),
                  max_rows=st.sampled_from([0, 0, 24, 200]))
ACTIONS = ["lookup", "push", "push", "push", "redo", "move", "split"]


class Pair:
    """Two stores that are asked the same."""

    def __init__(self, rows: RowKernels, spec: TableSpec, seed: int):
        self.rows, self.spec, self.luck, self.step = rows, spec, np.random.default_rng(seed), 0
        self.stores: tuple[RowStore, RowStore] = rows.create(spec, 0), ORACLE.create(spec, 0)
        self.kernels = rows, ORACLE
        for store in self.stores:
            store.hold(range(spec.num_buckets))
        self.choices = np.arange(spec.vocabulary) if spec.vocabulary else self.luck.integers(-(1 << 63), (1 << 63) - 1, self.luck.integers(1, 300))

    def lookup(self) -> None:
        bags = random_bags(self.luck, self.choices, self.luck.choice(["sum", "mean", "none"]),
                           bool(self.luck.random() < 0.5), 20)
        assert_same(*(store.lookup(bags) for store in self.stores))
        assert_same(*(store.read(bags.ids) for store in self.stores))
        assert_same(*(store.slots(bags.ids) for store in self.stores))

    def push(self) -> None:
        leaves = []
        for _ in range(2):
            bags = random_bags(self.luck, self.choices, self.luck.choice(["sum", "mean", "none"]),
                               bool(self.luck.random() < 0.5), 20)
            slopes = self.luck.standard_normal(bags.shape(self.spec.width)).astype(np.float32)
            found, wanted = (rows.deduplicate(self.spec, bags, slopes) for rows in self.kernels)
            assert_same(found, wanted)
            leaves.append(found)
        total, wanted = (rows.merge(*leaves) for rows in self.kernels)
        assert_same(total, wanted)
        self.step += int(self.luck.integers(1, 5))
        assert_same(*(store.prepare(self.step, total) for store in self.stores))
        assert_same(*(store.squared_norms() for store in self.stores))
        update = RowUpdate(0.1, *self.luck.choice([1, 0.3], 1), *self.luck.choice([0, 0.01], 1))
        for store in self.stores:
            store.commit(update)

    def redo(self) -> None:
        sums = random_sums(self.luck, self.choices, self.spec.width)
        assert_same(*(store.prepare(self.step + 1, sums) for store in self.stores))
        for store in self.stores:
            store.forget()

    def move(self) -> None:
        """A bucket goes away and comes back, in the other store's rows."""
        bucket = int(self.luck.integers(self.spec.num_buckets))
        exported = [store.export(bucket) for store in self.stores]
        assert_same(*exported)
        for store, rows in zip(self.stores, reversed(exported)):
            store.drop([bucket])
            store.hold([bucket])
            store.load(rows)

    def split(self) -> None:
        """All rows of one store into a new one of other buckets."""
        other = self.rows.create(TableSpec(**{**vars(self.spec), "num_buckets": 4, "max_rows": 0}), 0)
        other.hold(range(4))
        for bucket in self.stores[1].held:
            other.load(self.stores[1].export(bucket))
        assert listed(other) == listed(self.stores[0])


@pytest.mark.parametrize("name", STORES)
@given(specs, st.lists(st.sampled_from(ACTIONS), min_size=3, max_size=12), st.integers(0, 1 << 32))
@settings(max_examples=60, deadline=None)
def test_any_schedule_has_the_oracles_bits(name: str, spec: TableSpec, actions: list[str], seed: int) -> None:
    pair = Pair(kernels_of(name), spec, seed)
    for action in actions:
        getattr(pair, action)()
        assert whole(pair.stores[0]) == whole(pair.stores[1])


@pytest.mark.parametrize("name", [*STORES, "reference"])
def test_a_bucket_that_was_let_go_is_in_nobody_s_way(name: str) -> None:
    one = spec()
    store = kernels_of(name).create(one, 0)
    store.hold(range(4))
    store.prepare(1, summed(dict.fromkeys(range(200), 1.0)))
    store.commit(RowUpdate(0.1))
    store.drop([2])
    kept = [id for id in range(200, 400) if buckets_of(one, ids(id))[0] != 2]
    store.prepare(2, summed(dict.fromkeys(kept, 1.0)))
    store.commit(RowUpdate(0.1))
    assert {*kept} < {*listed(store)} and store.held == {0, 1, 3}
