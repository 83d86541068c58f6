"""Tables of labels, categories and numbers for recommenders: read once through pyarrow, memory-mapped afterwards.

The data door of a recommender: `prepare` turns the recipe's `[data]` into plain facts (`info`), `open_dataset` turns
the facts into a data set. The rows of all embedding tables lie one after the other: `sizes` says how many each column
has.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from elastic.data.arrow import read_tokens, write_tokens
from elastic.data.cache import facts_once
from elastic.data.convert import write
from elastic.data.dataset import Dataset
from elastic.data.files import File, find, left_out, told
from elastic.data.formats import Arrays
from elastic.data.index import Facts, Part
from elastic.data.permutation import keyed_word, mix, permute
from elastic.data.table import Store
from elastic.errors import UserError
from elastic.recipe.embedding import TableSection
from elastic.storage.atomic import write_atomically
from elastic.tables.placing import Placed, placed
from recommender.encode import CATEGORICAL, GROUP, IDS, LABEL, NUMERIC, Encoder, columns_of, hashed
from recommender.placing import growing, place

VERSION = 4
NO_TABLES: Mapping[str, TableSection] = MappingProxyType({})
UNIT = ""  # weights count rows
EMBEDDING_DIM = 16
MOST_ROWS = (1 << 31) - 1  # of embeddings: their numbers are int32
MOST_LISTED = 1 << 22  # rows to evaluate on in lists: all of them are gathered at once
HASHED_ROWS = 8  # of a vocabulary, for values outside it, where data.oov = "hash"
LEAST_HIDDEN = 0.01  # of the times that a training row holds a value, it is fed as unknown
HIDING_KEY = 3  # apart from other draws of the same seed
SPLIT_SEED = 2718281828  # a random split is the same in every run
VOCABULARIES = "vocabularies.json"  # beside what was read
PRIVATE = ("embedding_dim", "tables", "batch_size", "shuffle", "ledger", "options")  # keys of [data] that change nothing here


def prepare(data: Any, model_config: Mapping[str, Any], cache_dir: str | Path,
            tables: Mapping[str, TableSection] = NO_TABLES, is_free: bool = False) -> dict[str, Any]:
    """Facts that a model and `open_dataset` need, as plain values; reads the tables where `cache_dir` does not hold
    them yet. `tables` are the recipe's own, `is_free` whether it may have some besides.

    Keys of the result: sizes (embedding rows of each categorical column), num_numeric, embedding_dim, num_rows,
    num_eval_rows, train_file, folder, notes (lines on what is left out), placed (where columns lie in embedding tables),
    and key, the same for the same content and settings. UserError names file, column and row of what cannot serve.
    """
    is_binary = model_config.get("loss", "binary") == "binary"
    paths = {key: path for key, path in (("data.path", data.path), ("data.eval_path", data.eval_path)) if path}
    sources = [(key, find(key, path)) for key, path in paths.items()]
    settings = {key: value for key, value in data.model_dump().items() if key not in (*PRIVATE, "path", "eval_path")}
    apart = growing(data, tables)
    settings |= {"growing": list(apart)} if apart else {}
    files = [[key, [[file.where, file.size, file.mtime_ns] for file in found]] for key, found in sources]
    asked = json.dumps([VERSION, is_binary, settings, files])
    folder = Path(cache_dir) / f"columns-{hashlib.sha256(asked.encode()).hexdigest()[:32]}"
    known = facts_once(folder, lambda: read(Encoder(data, is_binary, apart), sources, folder, settings), VOCABULARIES)
    notes = [line for key, path in paths.items() for line in left_out(key, path)]
    notes += told("data.path", known["unused"], "as columns that neither data.categorical nor data.numeric names")
    places, why = place(data, model_config, tables, is_free, known["sizes"])
    apart_facts = {"placed": places.facts, "categorical": list(data.categorical)} if places else {}
    return {**known, **apart_facts, "notes": notes + why, "embedding_dim": data.embedding_dim or EMBEDDING_DIM,
            "folder": str(folder), "train_file": str(folder / "rows.arrow")}


def vocabularies_of(info: Mapping[str, Any], data: Any, model_config: Mapping[str, Any],
                    tables: Mapping[str, TableSection] = NO_TABLES) -> dict[str, dict[str, int]]:
    """By column which row of the dense table of all columns each known value has, or of the embedding table that it
    lies in; columns that are hashed into buckets have none.

    UserError where the cache holds them no more and the data are not there to be read again.
    """
    file = Path(info["folder"]) / VOCABULARIES
    if not file.exists() and prepare(data, model_config, file.parent.parent, tables)["key"] != info["key"]:
        raise UserError(f"data.path = {list(data.path)} holds other data than the checkpoint was trained on, and its "
                        "vocabularies come from them; put those data back.")
    found: dict[str, dict[str, int]] = json.loads(file.read_text())
    shifts = shifts_of(info, data.categorical) if "placed" in info else {}
    return {name: {value: row + shifts.get(name, 0) for value, row in known.items()} for name, known in found.items()}


def shifts_of(info: Mapping[str, Any], names: Sequence[str]) -> dict[str, int]:
    """What becomes of a row of the table of all columns, where some columns lie apart: how far it moves, by column."""
    places, starts = placed(info), list(accumulate(info["sizes"], initial=0))
    assert places is not None
    found = {look.column: look.shift for look in places.looks}
    first = 0
    for number in places.dense:
        found[names[number]] = first - starts[number]
        first += info["sizes"][number]
    return found


def open_dataset(info: Mapping[str, Any], split: str, seed: int = 0) -> Samples:
    """The "train" or the "eval" split, in the order of the files."""
    return Samples(store_of(info), rows_of(info, split), info, None if split == "eval" else seed)


@dataclass(frozen=True)
class Vocabulary:
    """What a column's codes become: row numbers of the model's table, or -1 for those that no training row holds often
    enough."""

    rows: np.ndarray  # by code
    size: int
    counts: np.ndarray  # by code, how many training rows hold it; none where the column is hashed
    extra: int = 0  # rows at the end, for what no training row holds


class Samples(Dataset):
    """Rows of the mapped table. "label" (rows,) float32; "numeric" (rows, columns) float32, of mean 0 and deviation 1
    over the training rows, 0 where missing; "categorical" (rows, columns) int32, rows of the table of all columns, in
    training now and then one for unknown values; "bags" what is looked up in embedding tables, whose columns
    "categorical" does not have. Rows to evaluate on in lists have "group" and "row" (rows,), the list
    and the row's own number."""

    def __init__(self, store: Store, rows: range | np.ndarray, info: Mapping[str, Any], seed: int | None):
        """`seed` is for training, None for evaluation, in which nothing is hidden."""
        self.store, self.rows, self.num_samples, self.seed = store, rows, len(rows), seed
        self.mean, self.scale = (np.array(info[key]) for key in ("mean", "scale"))
        self.codes = read_tokens(Path(info["folder"]) / "codes.arrow") if info["sizes"] else np.zeros(0, np.int32)
        self.first_code = np.array(info["first_codes"], np.int64)
        self.hiding = read_tokens(Path(info["folder"]) / "hiding.arrow") if info["sizes"] and seed is not None else np.zeros(0, np.uint32)
        self.unknown = np.array(info["unknown"], np.int64).reshape(-1, 2)
        self.places, self.names = placed(info), info.get("categorical", ())
        if self.places:
            self.dense = np.array(self.places.dense, np.int64)
            shifts = shifts_of(info, self.names)
            self.shifts = np.array([shifts[self.names[number]] for number in self.places.dense], np.int32)

    def batch(self, indices: np.ndarray, epochs: np.ndarray) -> Arrays:
        rows = self.rows.start + indices if isinstance(self.rows, range) else self.rows[indices]
        found = self.store.rows(np.asarray(rows, np.int64))
        if NUMERIC in found:
            found[NUMERIC] = np.nan_to_num((found[NUMERIC] - self.mean) * self.scale).astype(np.float32)
        if CATEGORICAL in found:
            codes = found[CATEGORICAL] + self.first_code
            found[CATEGORICAL] = self.codes[codes] if self.seed is None else self.hidden(codes, self.seed, indices, epochs)
        if GROUP in found:
            lists = found.pop(GROUP)
            found |= {GROUP: lists, "row": np.asarray(indices, np.int64)} if self.seed is None else {}
        return found if self.places is None else self.apart(found, self.places)

    def apart(self, found: Arrays, places: Placed) -> Arrays:
        """What lies in embedding tables, out of the other columns."""
        categories = found.pop(CATEGORICAL, np.empty((0, 0), np.int32))
        values = {name: categories[:, number] for number, name in enumerate(self.names)}
        values |= {name.removeprefix(IDS): found.pop(name) for name in list(found) if name.startswith(IDS)}
        if self.dense.size:
            found[CATEGORICAL] = categories[:, self.dense] + self.shifts
        return {**found, "bags": {look.name: look.bags(values[look.column]) for look in places.looks}}

    def hidden(self, codes: np.ndarray, seed: int, indices: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        """Rows of the table, some of them those for unknown values: which is a function of the seed, epoch, sample and
        column."""
        words = np.array([keyed_word(seed, epoch, HIDING_KEY) for epoch in epochs.tolist()],
                         np.uint64) ^ mix(indices.astype(np.uint64))
        words = mix(mix(words)[:, None] + np.arange(codes.shape[1], dtype=np.uint64))
        found, (rows, columns) = self.codes[codes], np.nonzero(words.astype(np.uint32) < self.hiding[codes])
        first, extra = self.unknown[columns].T
        found[rows, columns] = first + (words[rows, columns] >> np.uint64(32)).astype(np.int64) % extra
        return found


def store_of(info: Mapping[str, Any]) -> Store:
    """The rows of both splits as they were written."""
    columns = tuple(columns_of(info["num_numeric"], len(info["sizes"]), bool(info["top"]), info.get("growing", ())))
    blocks = tuple((0, unit, 0, rows) for unit, rows in enumerate(info["blocks"]))
    return Store(Facts("arrow", "", "rows", columns,
                       (Part((File(str(Path(info["folder"]) / "rows.arrow"), 0, 0),), blocks, True),)))


def rows_of(info: Mapping[str, Any], split: str) -> range | np.ndarray:
    """Which rows a split has: a run of them, or a list on disk."""
    kept = info["splits"][split]
    return range(*kept) if kept else read_tokens(Path(info["folder"]) / f"{split}.arrow")


def read(encoder: Encoder, sources: list[tuple[str, list[File]]], folder: Path,
         settings: Mapping[str, Any]) -> dict[str, Any]:
    """The one pass; then what follows from which rows are trained on."""
    data, counted = encoder.data, [0]
    if encoder.growing:
        encoder.wanted(sources[0][1][0])  # which tells what is to be written

    def encoded() -> Iterator[Arrays]:
        for key, files in sources:
            for part in encoder.encoded(files):
                yield part
                counted[-1] += len(part[LABEL])
            if not counted[-1]:
                raise UserError(f"{key}: {', '.join(file.name for file in files[:3])} has no rows; give a table with "
                                "at least one.")
            counted.append(0)

    blocks, digest = write(encoded(), columns_of(len(data.numeric), len(data.categorical), bool(data.group),
                                                 encoder.is_listed()),
                           folder / "rows.arrow")
    splits = split_rows(data, counted, encoder.apart)
    for name, rows in splits.items():
        if not isinstance(rows, range):
            write_tokens(folder / f"{name}.arrow", rows)
    refuse_sizes(data, splits)
    info = {"blocks": blocks, "top": data.top if data.group else 0,
            "num_numeric": len(data.numeric), "sizes": [0] * len(data.categorical), "folder": str(folder),
            "splits": {name: [rows.start, rows.stop] if isinstance(rows, range) else None
                       for name, rows in splits.items()},
            "num_rows": len(splits["train"]), "num_eval_rows": len(splits["eval"]),
            **({"growing": encoder.is_listed()} if encoder.growing else {})}
    store = store_of(info)
    mean, scale = moments(store, splits["train"], len(data.numeric))
    label_mean = math.fsum(found[LABEL].sum(dtype=np.float64)
                           for found, _ in chunks(store, splits["train"])) / len(splits["train"])
    parts = vocabularies(encoder, store, splits)
    first = np.cumsum([0, *(len(part.rows) for part in parts)])[:-1].tolist()
    starts = np.cumsum([0, *(part.size for part in parts)])
    known: dict[str, dict[str, int]] = {}
    if parts:
        if starts[-1] > MOST_ROWS:
            raise UserError(f"data.categorical needs {starts[-1]} rows of embeddings, and {MOST_ROWS} can be told "
                            "apart; hash the largest column into fewer by data.buckets.")
        codes = np.concatenate([part.rows + start for part, start in zip(parts, starts)]).astype(np.int32)
        write_tokens(folder / "codes.arrow", codes)
        known = {name: {value: int(codes[base + code]) for value, code in column.known.items()}
                 for (name, column), base in zip(encoder.codes.items(), first) if not column.buckets}
        write_tokens(folder / "hiding.arrow", np.concatenate([hiding(part) for part in parts]))
        digest += hashlib.sha256(codes.tobytes()).hexdigest()
    write_atomically(folder / VOCABULARIES, json.dumps(known))
    said = json.dumps([VERSION, digest, settings, counted,
                       [hashlib.sha256(a.tobytes()).hexdigest() for a in encoder.apart]])
    return {**info, "unused": encoder.unused, "label_mean": label_mean, "mean": mean, "scale": scale,
            "first_codes": first, "sizes": [part.size for part in parts],
            "unknown": [[int(end) - part.extra, part.extra] for part, end in zip(parts, starts[1:])],
            "vocabulary": {name: len(codes.known) for name, codes in encoder.codes.items() if not codes.buckets},
            "key": hashlib.sha256(said.encode()).hexdigest()[:32]}


def refuse_sizes(data: Any, splits: Mapping[str, range | np.ndarray]) -> None:
    if not len(splits["train"]):
        raise UserError(f'data.split = "{data.split}" leaves no row to train on; mend data.eval_fraction or '
                        'data.eval_values.')
    if data.group and len(splits["eval"]) > MOST_LISTED:
        raise UserError(f'data.group = "{data.group}" is for at most {MOST_LISTED} rows to evaluate on, and there are '
                        f'{len(splits["eval"])}; '
                        "evaluate on fewer, or leave it out.")


def split_rows(data: Any, counted: list[int], apart: list[np.ndarray]) -> dict[str, range | np.ndarray]:
    """Rows to train and to evaluate on, counted over all files."""
    size = counted[0]
    if data.eval_path:
        return {"train": range(size), "eval": range(size, size + counted[1])}
    held = int(size * data.eval_fraction)
    if data.split == "end":
        return {"train": range(size - held), "eval": range(size - held, size)}
    is_eval = np.zeros(size, bool)
    if data.split == "random":
        is_eval[permute(np.arange(held), size, SPLIT_SEED)] = True
    elif data.split == "time":
        is_eval[np.argsort(np.concatenate(apart), kind="stable")[size - held:]] = True
    else:
        is_eval = np.concatenate(apart)
    return {"train": np.flatnonzero(~is_eval), "eval": np.flatnonzero(is_eval)}


def chunks(store: Store, rows: range | np.ndarray, most: int = 1 << 18) -> Iterator[tuple[Arrays, int]]:
    """The rows of a split, many at a time, and how many came before."""
    for low in range(0, len(rows), most):
        chosen = rows[low:low + most]
        yield store.rows(np.asarray(chosen, np.int64)), low


def moments(store: Store, rows: range | np.ndarray, columns: int) -> tuple[list[float], list[float]]:
    """Mean and 1/deviation of every number over the rows that have it, in float64: first the means, then the squares of
    what is off them. A column whose deviation its numbers' own rounding could make is taken as constant, its deviation
    for 1."""
    def sums(of: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        parts = (np.nansum(of(found[NUMERIC]), 0) for found, _ in chunks(store, rows))
        return sum(parts, np.zeros(columns))

    if not columns:
        return [], []
    count = np.maximum(sums(lambda values: ~np.isnan(values)), 1)
    first = np.nan_to_num(next(chunks(store, rows, 1))[0][NUMERIC][0])
    mean = first + sums(lambda values: values - first) / count
    deviation = np.sqrt(sums(lambda values: np.square(values - mean)) / count)
    varies = deviation > 2 * np.finfo(np.float64).eps * np.abs(mean)
    return mean.tolist(), (1 / np.where(varies, deviation, 1.0)).tolist()


def vocabularies(encoder: Encoder, store: Store, splits: Mapping[str, Any]) -> list[Vocabulary]:
    """For every column, which of its codes have a row of their own, and where the others go, by data.oov."""
    data = encoder.data
    counts = {column: np.zeros(len(codes), np.int64) for column, codes in enumerate(encoder.codes.values())
              if not codes.buckets}
    for found, _ in chunks(store, splits["train"]) if counts else ():
        for column, count in counts.items():
            count += np.bincount(found[CATEGORICAL][:, column], minlength=len(count))
    parts = []
    for column, codes in enumerate(encoder.codes.values()):
        if codes.buckets:
            parts.append(Vocabulary(np.arange(codes.buckets, dtype=np.int32), codes.buckets,
                                    np.zeros(codes.buckets, np.int64)))
            continue
        known = counts[column] >= data.min_count
        rows, size = np.where(known, np.cumsum(known) - 1, -1), int(known.sum())
        extra = {"hash": HASHED_ROWS, "row": 1, "error": 0}[data.oov]
        for value, code in codes.known.items():
            if not known[code] and extra:
                rows[code] = size + hashed(value, extra)
        if data.oov == "error" and not known.all():
            refuse_unknown(encoder, store, column, known)
        parts.append(Vocabulary(rows, size + extra, counts[column], extra))
    return parts


def hiding(part: Vocabulary) -> np.ndarray:
    """uint32 by code: how often, of 2^32 times, a training row's value is fed as one that nobody knows, so that the
    rows for those are trained: about once an epoch for each value, so that they come to stand for a value as such, and
    at least 1 % of the time."""
    share = np.maximum(1 / (1 + part.counts), LEAST_HIDDEN) if part.extra else np.zeros(len(part.rows))
    return np.minimum(share * (1 << 32), (1 << 32) - 1).astype(np.uint32)


def refuse_unknown(encoder: Encoder, store: Store, column: int, known: np.ndarray) -> None:
    """UserError names the first row with a value outside the vocabulary."""
    data, name = encoder.data, encoder.data.categorical[column]
    for found, before in chunks(store, range(int(store.first[-1]))):
        wrong = np.flatnonzero(~known[found[CATEGORICAL][:, column]])
        if len(wrong):
            code, (where, row) = int(found[CATEGORICAL][wrong[0], column]), encoder.place(before + int(wrong[0]))
            value = next(value for value, number in encoder.codes[name].known.items() if number == code)
            held = "no training row holds" if data.min_count == 1 else f"fewer than data.min_count = {data.min_count} training rows hold"
            raise UserError(f'data.oov = "error": the column "{name}" of {where} holds {value!r} in row {row} (counted '
                            f'from 0), which {held}; mend the row, or write data.oov = "row" or "hash".')
