"""Tables as data sets: CSV, Parquet and Arrow IPC, their columns of numbers as NumPy arrays, any row or block of rows at a time.

`prepare` looks at the files and writes what it finds to the cache; `open_tables` makes data sets of that. A table whose
rows are to be shuffled together must let one row be read as cheaply as the next: it is mapped where it lies or
converted once. Else its row groups are shuffled as blocks, and a few decoded ones are kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from elastic.data.columns import view
from elastic.data.dataset import Dataset
from elastic.data.files import left_out, told
from elastic.data.formats import Arrays, open_arrow, read_unit, reading
from elastic.data.ids import read
from elastic.data.index import Facts, find_facts, kept_facts
from elastic.data.jagged import Jagged
from elastic.data.order import Blocks, Mixture, Order, Rows, seed_of
from elastic.errors import UserError
from elastic.tables.placing import Look, Placed, placed

Span = tuple[int, int]
KEPT_BLOCKS = 4  # decoded, at most: the one being fed, and some for a redone step or an evaluation
EMPTY = Jagged(np.empty(0, np.int64), np.zeros(1, np.int64))
KEPT_BYTES = 1 << 30  # of them together, where one is not larger by itself


def prepare(data: Any, cache_dir: str | Path, places: Placed | None = None) -> dict[str, Any]:
    """Plain facts about the tables of the recipe's `[data]`: num_rows, num_eval_rows, num_blocks, shuffle_by, folder,
    key, and notes (lines on what is left out); with `places` of embedding tables, whose columns are left out of the
    others, these as well.

    The key is the same for the same content, columns and way of shuffling, wherever the files lie. UserError or
    RecipeError names file, column and row of what cannot serve.
    """
    folder, facts = find_facts(data, Path(cache_dir), places.keys if places else {})
    for look in places.looks if places else ():
        if look.pooling == "none":
            check_lengths(Store(facts), look)
    training, evaluation = (sum(high - low for low, high in spans) for spans in spans_of(facts, data.eval_fraction))
    return {"num_rows": training, "num_eval_rows": evaluation,
            "num_blocks": sum(len(part.blocks) for part in facts.parts), "shuffle_by": facts.shuffle_by,
            "folder": str(folder), "key": facts.key, **({"placed": places.facts} if places else {}),
            "notes": [*left_out("data.path", data.path), *left_out("data.eval_path", data.eval_path),
                      *told("data.path", facts.unused, "as columns that are no numbers" if not data.columns
                            else "as not among data.columns")]}


def check_lengths(store: Store, look: Look) -> None:
    """UserError where a list that is not pooled is longer than the recipe says, as far as lists lie where a look costs
    nothing; in others, blocks that are decoded while a run trains, a step finds it."""
    column = next(column for column in store.columns if column.name == look.column)
    for block, (part, _) in enumerate(store.places):
        if column.is_list and not part.is_mapped:
            continue
        lengths = store.mapped(block)[column.name].lengths if column.is_list else np.array([max(1, column.width)])
        if lengths.max() > look.length:
            row = int(store.first[block] + np.argmax(lengths > look.length))
            raise UserError(f'tables.{look.table}.length = {look.length}: the column "{look.column}" has a list of '
                            f"{lengths[lengths > look.length][0]} in row {row} (counted from 0 over all files); write "
                            f'{lengths.max()} or more, or tables.{look.table}.pooling = "sum" or "mean".')


def open_tables(info: Mapping[str, Any], data: Any, cache_dir: str | Path, seed: int) -> tuple[Table, Table | None]:
    """The training set, in its order, and the evaluation set if there is one."""
    places = placed(info)
    ids = places.keys if places else {}
    facts = kept_facts(Path(info["folder"])) or find_facts(data, Path(cache_dir), ids)[1]
    if facts.key != info["key"]:
        raise UserError(f"data.path = {list(data.path)} holds other data on this machine than on the one that started "
                        "the run; copy it there.")
    store, (to_train, to_evaluate) = Store(facts), spans_of(facts, data.eval_fraction)
    looks = places.looks if places else ()
    training = Table(store, to_train, looks)
    training.order = order_of(facts, training, seed, data.shuffle, data.weights)
    return training, Table(store, to_evaluate, looks) if to_evaluate else None


def spans_of(facts: Facts, eval_fraction: float) -> tuple[list[Span], list[Span]]:
    """Ranges of rows, counted over all parts: one of each source to train on, and those to evaluate on. These are the
    last part where one was given for it, else the last rows of every source."""
    training, evaluation, first = list[Span](), list[Span](), 0
    for part in facts.parts:
        end = first + part.num_rows
        if part.is_eval:
            evaluation.append((first, end))
        else:
            kept = end - (0 if any(one.is_eval for one in facts.parts) else int(part.num_rows * eval_fraction))
            training.append((first, kept))
            evaluation += [(kept, end)] if kept < end else []
        first = end
    return training, evaluation


def order_of(facts: Facts, table: Table, seed: int, shuffle: bool, weights: tuple[float, ...]) -> Order:
    seeds = [seed_of(seed, source) for source in range(len(table.spans))] if weights else [seed]
    orders: list[Order] = []
    for (low, high), own in zip(table.spans, seeds):
        blocks = shuffle and facts.shuffle_by == "blocks"
        orders.append(Blocks(table.store.sizes_between(low, high), own) if blocks else Rows(high - low, own, shuffle))
    return Mixture(orders, weights, seed) if weights else orders[0]


class Table(Dataset):
    """Some rows of a store as a data set of users' own models. Samples are counted over `spans`, which lie one after
    another."""

    fills = False

    def __init__(self, store: Store, spans: list[Span], looks: Sequence[Look] = ()):
        self.store, self.spans, self.looks = store, spans, looks
        self.first = np.concatenate([[0], np.cumsum([high - low for low, high in spans])])
        self.shift = np.array([low for low, _ in spans]) - self.first[:-1]
        self.num_samples = int(self.first[-1])

    def batch(self, indices: np.ndarray, epochs: np.ndarray) -> Arrays:
        """{column: (rows,) or (rows, width)}, copies; what embedding tables are looked up by as `Bags` of its own.
        UserError where a file cannot be read any more."""
        found = self.store.rows(indices + self.shift[np.searchsorted(self.first, indices, side="right") - 1])
        if self.looks:
            found["bags"] = {look.name: look.bags(found.pop(look.column)) for look in self.looks}
        return found


class Store:
    """The rows of all parts, in blocks that are read when they are first asked for."""

    def __init__(self, facts: Facts):
        self.facts, self.columns = facts, facts.columns
        self.places = [(part, number) for part in facts.parts for number in range(len(part.blocks))]
        self.first = np.concatenate([[0], np.cumsum([part.blocks[number][3]
                                                     for part, number in self.places])]).astype(np.int64)
        largest = int(np.diff(self.first).max()) * sum(column.row_bytes for column in self.columns)
        self.decoded = lru_cache(max(1, min(KEPT_BLOCKS, KEPT_BYTES // largest)))(self.decode)
        self.mapped = lru_cache(None)(self.map)
        self.readers = lru_cache(None)(map_file)

    def sizes_between(self, low: int, high: int) -> np.ndarray:
        """Rows of each block within [low, high)."""
        sizes = np.diff(np.clip(self.first, low, high))
        return sizes[sizes > 0]

    def rows(self, rows: np.ndarray) -> Arrays:
        out: Arrays = {column.name: column.empty(len(rows)) for column in self.columns if not column.is_list}
        lists: dict[str, list[Jagged]] = {column.name: [] for column in self.columns if column.is_list}
        blocks = np.searchsorted(self.first, rows, side="right") - 1
        order = np.argsort(blocks, kind="stable")
        found, begins = np.unique(blocks[order], return_index=True)
        for block, chosen in zip(found.tolist(), np.split(order, begins[1:])):
            arrays = (self.mapped if self.places[block][0].is_mapped else self.decoded)(block)
            inside = rows[chosen] - self.first[block]
            for name, target in out.items():
                target[chosen] = arrays[name][inside]
            for name, pieces in lists.items():
                pieces.append(arrays[name][inside])
        for name, pieces in lists.items():
            whole = Jagged.joined(pieces or [EMPTY])
            out[name] = whole if len(pieces) < 2 else whole[np.argsort(order)]
        return out

    def decode(self, block: int) -> Arrays:
        part, number = self.places[block]
        file, unit, first_row, rows = part.blocks[number]
        return read_unit(self.facts.format, part.files[file], unit, first_row, rows, self.columns)

    def map(self, block: int) -> Arrays:
        part, number = self.places[block]
        file, unit, _, _ = part.blocks[number]
        batch = self.readers(part.files[file].where).get_batch(unit)
        return {column.name: read(batch.column(column.name), column, part.files[file].name, 0) if column.is_list
                else view(batch.column(column.name), column) for column in self.columns}


def map_file(where: str) -> pa.ipc.RecordBatchFileReader:
    with reading(where):
        return open_arrow(pa.memory_map(where).read_buffer())
