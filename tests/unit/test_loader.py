"""Batches from positions, in the foreground and ahead of time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from elastic.data import MapStyle, Prefetcher, Sampler, eval_batches, load_batch
from elastic.errors import RecipeError


class Squares:
    """A data set whose rows say which sample and epoch they are."""

    fills = True
    order = None
    num_samples = 10

    def batch(self, indices: np.ndarray, epochs: np.ndarray) -> dict[str, np.ndarray]:
        return {"x": np.stack([indices, indices**2, epochs], axis=1)}


def test_a_batch_has_the_rows_of_its_positions() -> None:
    sampler = Sampler(10, 4, 2, 0, True, steps=10)
    for step in range(1, 11):
        for shard in range(2):
            batch = load_batch(Squares(), sampler, step, shard)
            epochs, indices = sampler.locate(sampler.positions(step, shard))
            assert batch["x"].tolist() == [[i, i * i, e]
                                           for i, e in zip(indices.tolist(), epochs.tolist(), strict=True)]
            assert batch["row_weight"].tolist() == [1.0, 1.0]
            assert batch["row_weight"].dtype == np.float32


def test_filler_rows_keep_the_shape_and_weigh_nothing() -> None:
    sampler = Sampler(10, 8, 2, 0, True, epochs=1)
    first, last = (load_batch(Squares(), sampler, 2, shard) for shard in range(2))
    assert first["row_weight"].tolist() == [1.0, 1.0, 0.0, 0.0]
    assert first["x"][2:].tolist() == [[0, 0, 0]] * 2
    assert last["row_weight"].tolist() == [0.0] * 4
    assert last["x"].shape == first["x"].shape


def test_evaluation_goes_through_all_samples_in_order() -> None:
    batches = [load() for load in eval_batches(Squares(), 4)]
    rows = np.concatenate([b["x"] for b in batches])[np.concatenate([b["row_weight"] for b in batches]) > 0]
    assert rows[:, 0].tolist() == list(range(10))
    assert rows[:, 2].tolist() == [0] * 10
    assert {b["x"].shape for b in batches} == {(4, 3)}


class Items:
    """A user's map-style data set of dicts."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> Any:
        return {"x": np.full((2, 3), index, np.float32), "y": index}


class Pairs(Items):
    def __getitem__(self, index: int) -> Any:
        return [float(index)] * 3, index


def test_a_users_dicts_and_tuples_are_stacked() -> None:
    batch = MapStyle(Items()).batch(np.array([3, 1]), np.zeros(2, np.int64))
    assert batch["x"].tolist() == [[[3.0] * 3] * 2, [[1.0] * 3] * 2]
    assert batch["y"].tolist() == [3, 1]
    x, y = MapStyle(Pairs()).batch(np.array([4, 0, 2]), np.zeros(3, np.int64))
    assert x.tolist() == [[4.0] * 3, [0.0] * 3, [2.0] * 3]
    assert y.tolist() == [4, 0, 2]


def test_a_users_batches_hold_real_rows_only() -> None:
    sampler = Sampler(5, 8, 4, 0, False, epochs=1)
    batches = [load_batch(MapStyle(Items()), sampler, 1, shard) for shard in range(4)]
    assert [b["y"].tolist() for b in batches] == [[0, 1], [2, 3], [4], []]
    assert batches[3]["x"].shape == (0, 2, 3)
    assert set(batches[0]) == {"x", "y"}


class Ragged(Items):
    def __getitem__(self, index: int) -> Any:
        return {"x": np.zeros(index + 1)}


class Numbers(Items):
    def __getitem__(self, index: int) -> Any:
        return index


class Empty(Items):
    def __len__(self) -> int:
        return 0


@pytest.mark.parametrize(("source", "words"),
                         [(Ragged(), r"item\['x'\] is a ndarray of shape \(2,\) in item 1 and a ndarray of shape \(1,\)"),
                                               (Numbers(), "item 0 is a int"), (Empty(), "no samples"),
                          (iter([]), "has no __len__")])
def test_a_data_set_that_cannot_serve_is_refused_in_one_sentence(source: Any, words: str) -> None:
    with pytest.raises(RecipeError, match=words) as caught:
        MapStyle(source).batch(np.array([0, 1]), np.zeros(2, np.int64))
    assert str(caught.value).startswith("data.kind")


def keys(steps: range) -> list[tuple[int, int]]:
    return [(step, shard) for step in steps for shard in range(2)]


def test_prefetching_gives_the_same_batches() -> None:
    sampler = Sampler(10, 4, 2, 0, True, steps=20)
    load = Prefetcher(lambda step, shard: load_batch(Squares(), sampler, step, shard), depth=3)
    load.expect(iter(keys(range(1, 21))))
    asked = [*keys(range(1, 6)), *keys(range(4, 9)), *keys(range(6, 21))]  # with a step back, as after a failure
    for step, shard in asked:
        plain = load_batch(Squares(), sampler, step, shard)
        found = load(step, shard)
        assert all(found[name].tobytes() == plain[name].tobytes() for name in plain)
    load.close()


def test_prefetching_runs_ahead_in_another_thread_and_no_further_than_its_depth() -> None:
    loaded, three = [], threading.Event()

    def load(step: int, shard: int) -> dict[str, np.ndarray]:
        loaded.append((step, shard, threading.current_thread().name))
        if len(loaded) == 3:
            three.set()
        return {"x": np.array([step, shard])}

    prefetch = Prefetcher(load, depth=2)
    prefetch.expect(keys(range(1, 100)))
    assert three.wait(10)  # two in the buffer, one in hand
    prefetch.close()
    assert [entry[:2] for entry in loaded] == [(1, 0), (1, 1), (2, 0)]
    assert {entry[2] for entry in loaded} == {"prefetch_0"}


def test_a_loaders_error_reaches_whoever_asks_for_that_batch() -> None:
    def load(step: int, shard: int) -> dict[str, np.ndarray]:
        if step == 2:
            raise RecipeError("data.path: the file is gone.")
        return {"x": np.array([step])}

    prefetch = Prefetcher(load, depth=4)
    prefetch.expect(keys(range(1, 4)))
    assert [prefetch(1, shard)["x"].tolist() for shard in range(2)] == [[1], [1]]
    with pytest.raises(RecipeError, match="gone"):
        prefetch(2, 0)
    assert prefetch(3, 0)["x"].tolist() == [3]
    prefetch.close()


def test_closing_ends_the_thread_whatever_it_does() -> None:
    before = threading.active_count()
    prefetch = Prefetcher(lambda step, shard: {"x": np.zeros(3)}, depth=1)
    for _ in range(20):
        prefetch.expect(keys(range(1, 1000)))
        prefetch(1, 0)
    prefetch.expect([])
    assert prefetch(5, 1)["x"].shape == (3,)
    prefetch.close()
    prefetch.close()
    assert threading.active_count() == before
    assert prefetch(1, 0)["x"].shape == (3,)


class Still(Items):
    """Says that its items draw nothing at random."""

    draws = False


@pytest.mark.parametrize(("source", "seeds"), [(Items(), 1), (Still(), 0)])
def test_only_items_that_draw_nothing_are_loaded_while_the_model_computes(source: Any, seeds: int) -> None:
    """`seeded` is what keeps the threads apart."""
    entered: list[int] = []

    @contextmanager
    def seeded(number: int) -> Iterator[None]:
        entered.append(number)
        yield

    data = MapStyle(source, 7, seeded)
    assert data.batch(np.array([1, 3]), np.zeros(2, np.int64))["y"].tolist() == [1, 3]
    assert len(entered) == seeds
