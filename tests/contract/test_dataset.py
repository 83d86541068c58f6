"""One contract, every data set: what a batch holds follows from its indices and epochs alone, on every worker and whatever was asked before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from elastic.data.collate import num_rows
from elastic.data.dataset import Dataset
from elastic.data.loader import eval_batches, load_batch
from elastic.data.sampler import Sampler
from elastic.recipe import Recipe, parse
from elastic.tables.bags import Bags
from elastic.workload import open_data, prepare
from tests.support.clicks import clicks, clicks_recipe
from tests.support.images import idx_files, vision_recipe
from tests.support.inprocess import MODULES
from tests.support.tables import rows, table_recipe, write


def text(folder: Path, kind: str = "nlp.gpt") -> Recipe:
    words = np.random.default_rng(0).choice(["to", "be", "or", "not"], 900)
    (folder / "text.txt").write_text(" ".join(words))
    return parse({"model": {"kind": kind, "context": 16}, "data": {"format": "text", "path": str(folder / "text.txt")}})


def own(folder: Path, kind: str = "Plain") -> Recipe:
    return parse({"model": {"kind": f"{MODULES}:Small"}, "data": {"kind": f"{__name__}:{kind}"},
                  "backend": {"name": "torch"}})


def table(folder: Path, **data: Any) -> Recipe:
    files = [write(folder / f"{n}.parquet", rows(200 + n, 1000 * n), 30) for n in range(2)]
    return table_recipe(files, run={"epochs": None, "steps": 9}, data={"eval_fraction": 0.2, **data})


def looked_up(folder: Path, way: str) -> Recipe:
    """A user's own model with embedding tables of numbers, texts and lists."""
    luck = np.random.default_rng(0)
    lists = [luck.integers(0, 99, luck.integers(0, 4)).tolist() for _ in range(300)]
    source = rows(300).append_column("list", pa.array(lists, pa.list_(pa.int32())))
    tables = {"some": {"columns": ["id", "list"]}, "words": {"columns": ["word"], "pooling": "none", "length": 2}}
    return table_recipe(write(folder / "t.parquet", source, 37), run={"epochs": None, "steps": 9},
                        data={"eval_fraction": 0.2, "shuffle_by": way}, tables=tables)


def clicks_in_tables(folder: Path) -> Recipe:
    return clicks_recipe(clicks(folder / "clicks.csv"), data={"categorical": ["item"], "tables": "rows"},
                         tables={"users": {"columns": ["user"]}}, model={"arch": "mf"})


class Plain:
    """A user's own, of dicts; nothing in it is drawn."""

    draws = False

    def __len__(self) -> int:
        return 50

    def __getitem__(self, index: int) -> Any:
        return {"x": np.full(3, index, np.float32), "y": (index, [float(index)] * 2)}


class Drawing(Plain):
    """Rows of a batch that are drawn together."""

    draws = True

    def __getitem__(self, index: int) -> Any:
        return {"x": np.random.standard_normal(3).astype(np.float32), "y": index}


@dataclass(frozen=True)
class Kind:
    make: Callable[[Path], Recipe]
    by_row: bool = True  # a row is the same in any batch


KINDS = {
    "windows of text": Kind(text),
    "masked windows": Kind(lambda folder: text(folder, "nlp.bert")),
    "a table by rows": Kind(lambda folder: table(folder, shuffle_by="rows")),
    "a table by blocks": Kind(lambda folder: table(folder, shuffle_by="blocks")),
    "tables mixed": Kind(lambda folder: table(folder, weights=[3.0, 1.0])),
    "images": Kind(lambda folder: vision_recipe("vision.vit", idx_files(folder))),
    "images mixed up": Kind(lambda folder: vision_recipe("vision.vit", idx_files(folder), data={"mixup": 0.3})),
    "clicks": Kind(lambda folder: clicks_recipe(clicks(folder / "clicks.csv"))),
    "clicks in tables": Kind(clicks_in_tables),
    "bags by rows": Kind(lambda folder: looked_up(folder, "rows")),
    "bags by blocks": Kind(lambda folder: looked_up(folder, "blocks")),
    "a user's": Kind(own),
    "a user's that draws": Kind(lambda folder: own(folder, "Drawing"), by_row=False),
}


@dataclass(frozen=True)
class Opened:
    """The same data, opened twice, as two workers do; `both` has the training sets, `others` those to evaluate on."""

    kind: Kind
    recipe: Recipe
    both: tuple[Dataset, Dataset]
    others: tuple[Dataset, Dataset]


@pytest.fixture(params=KINDS)
def opened(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Opened:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    kind = KINDS[request.param]
    recipe = kind.make(tmp_path)
    found = [open_data(recipe, prepare(recipe)) for _ in range(2)]
    (one, other, _), (two, another, _) = found
    assert other is not None and another is not None
    return Opened(kind, recipe, (one, two), (other, another))


def leaves(batch: Any) -> list[np.ndarray]:
    """Every column, as NumPy has it."""
    if isinstance(batch, dict):
        return [leaf for name in sorted(batch) for leaf in leaves(batch[name])]
    if isinstance(batch, (list, tuple)):
        return [leaf for entry in batch for leaf in leaves(entry)]
    if isinstance(batch, Bags):
        said = batch.pooling, batch.length, batch.weights, batch.is_filler
        return [np.array([f"{batch.ids[low:high].tolist()} {said}" for low, high in pairwise(batch.offsets)], "U300")]
    return [np.asarray(batch)]


def bits(batch: Any) -> list[tuple[Any, ...]]:
    return [(leaf.dtype, leaf.shape, leaf.tobytes()) for leaf in leaves(batch)]


def some(data: Dataset, count: int = 6, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    return random.integers(0, data.num_samples, count), random.integers(0, 3, count)


def test_a_row_for_each_index_in_every_column(opened: Opened) -> None:
    for data in (opened.both[0], opened.others[0]):
        for count in (1, 6):
            batch = data.batch(*some(data, count))
            assert num_rows(batch) == count and {len(leaf) for leaf in leaves(batch)} == {count}
        if not data.fills:
            none = data.batch(np.zeros(0, np.int64), np.zeros(0, np.int64))
            assert [(leaf.dtype, leaf.shape[1:]) for leaf in leaves(none)] == [(leaf.dtype, leaf.shape[1:]) for leaf in leaves(batch)]
            assert num_rows(none) == 0


def test_the_same_on_every_worker_and_whatever_was_asked_before(opened: Opened) -> None:
    for one, other in (opened.both, opened.others):
        assert (one.num_samples, one.fills, one.key) == (other.num_samples, other.fills,
                                                         other.key) and one.num_samples > 1
        indices, epochs = some(one)
        asked = indices.copy(), epochs.copy()
        first = one.batch(indices, epochs)
        before = bits(first)
        for seed in (1, 2):
            other.batch(*some(other, 6, seed))
            one.batch(*some(one, 6, seed))
        assert bits(first) == before, "a batch that was given has changed"
        assert bits(other.batch(indices, epochs)) == before == bits(one.batch(indices, epochs))
        assert all(np.array_equal(*pair) for pair in zip(asked, (indices, epochs)))


def test_a_row_does_not_depend_on_its_neighbours(opened: Opened) -> None:
    data = opened.both[0]
    indices, epochs = some(data)
    whole = leaves(data.batch(indices, epochs))
    alone = [leaves(data.batch(indices[n:n + 1], epochs[n:n + 1])) for n in range(len(indices))]
    same = all(leaf[n].tobytes() == one[0].tobytes() for n, one_row in enumerate(alone)
               for leaf, one in zip(whole, one_row, strict=True))
    assert same == opened.kind.by_row


def test_an_evaluation_goes_through_all_samples_as_they_are_in_epoch_0(opened: Opened) -> None:
    """Filled up or cut short at the end."""
    data, size = opened.others[0], 7
    batches = [load() for load in eval_batches(data, size)]
    weights = [batch["row_weight"] if data.fills else np.ones(num_rows(batch)) for batch in batches]
    assert sum(weight.sum() for weight in weights) == data.num_samples and len(batches) == -(-data.num_samples // size)
    assert {num_rows(batch) for batch in batches[:-1]} <= {size} and (num_rows(batches[-1]) == size or not data.fills)
    first = {name: value for name, value in batches[0].items() if name != "row_weight"}
    count = num_rows(batches[0]) if not data.fills else size
    assert bits(first) == bits(data.batch(np.arange(count), np.zeros(count, np.int64)))


def test_an_order_names_samples_that_there_are(opened: Opened) -> None:
    """And each once an epoch, but in a mixture, whose sources have epochs of their own."""
    data = opened.both[0]
    sampler = Sampler(data.num_samples, 8, 4, 5, True, steps=3 * data.num_samples // 8, order=data.order)
    epochs, samples = sampler.order.locate(np.arange(2 * data.num_samples))
    assert samples.min() >= 0 and samples.max() < data.num_samples and sum(sampler.order.sizes) == data.num_samples
    if not opened.recipe.data.weights:
        assert [sorted(samples[epochs == epoch].tolist()) for epoch in range(2)] == [list(range(data.num_samples))] * 2
    assert num_rows(load_batch(data, sampler, 1, 0)) == sampler.shard_size
