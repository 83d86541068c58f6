"""A log of clicks to train on without a download: made where a recipe's data.path says "made:recommender.click_log?rows=N&seed=S".

Users and items are 64-bit numbers, drawn by a bounded Zipf law, so new ones keep appearing; the items of a row's
history are drawn likewise. Each has a taste, a few numbers that follow from its id: whether a row is a click follows
from the tastes' products, the item's own appeal, the device and the price, so a model can learn it, and `chances` says
what there is to be learned. All of it is a pure function of options and row numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from elastic.data.jagged import offsets_of
from elastic.data.permutation import draws, keyed_word, mix
from elastic.storage.atomic import beside

OPTIONS = {"rows": 1_000_000, "users": 5_000_000, "items": 1_000_000, "seed": 0}
EXPONENT = 1.05
CHUNK = 100_000  # rows of a row group
HISTORY = 6  # items at most
TASTE = 3  # numbers
DEVICES = ("phone", "tablet", "desktop", "television")
DEVICE_WEIGHTS = np.array([0.3, 0.0, -0.2, -0.6])
USER, ITEM, DRAW, LIKING = range(4)  # apart in the draws of one seed


def make(folder: Path, options: Mapping[str, int]) -> None:
    """Writes the log into a folder, whole or not at all."""
    given = {**OPTIONS, **options}
    with beside(folder / "clicks.parquet") as unfinished, pq.ParquetWriter(unfinished, SCHEMA) as writer:
        for first in range(0, given["rows"], CHUNK):
            writer.write_table(rows(np.arange(first, min(first + CHUNK, given["rows"])), given))


SCHEMA = pa.schema([("click", pa.int8()), ("user", pa.int64()), ("item", pa.int64()), ("history", pa.list_(pa.int64())),
                    ("device", pa.string()), ("price", pa.float32())])


def rows(numbers: np.ndarray, options: Mapping[str, int]) -> pa.Table:
    """The rows of these numbers."""
    columns = drawn(numbers, options)
    uniform = shares(draws(np.array(keyed_word(options["seed"], LIKING), np.uint64), numbers, 1))[:, 0]
    click = uniform < chances(columns)
    history = pa.ListArray.from_arrays(pa.array(columns["offsets"].astype(np.int32)), pa.array(columns["history"]))
    device = pa.array(DEVICES).take(pa.array(columns["device"]))
    return pa.table([pa.array(click.astype(np.int8)), pa.array(columns["user"]), pa.array(columns["item"]), history,
                     device, pa.array(columns["price"])], schema=SCHEMA)


def drawn(numbers: np.ndarray, options: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Everything but the click. "history" are the ids of all lists, "offsets" where they begin."""
    seed = options["seed"]
    words = draws(np.array(keyed_word(seed, DRAW), np.uint64), numbers, 5 + HISTORY)
    uniform = shares(words)
    lengths = (words[:, 4] % np.uint64(HISTORY + 1)).astype(np.int64)
    listed = np.arange(HISTORY) < lengths[:, None]
    items = ids_of(zipf(uniform[:, 5:], options["items"]), keyed_word(seed, ITEM))
    return {"user": ids_of(zipf(uniform[:, 0], options["users"]), keyed_word(seed, USER)),
            "item": ids_of(zipf(uniform[:, 1], options["items"]), keyed_word(seed, ITEM)),
            "device": (words[:, 2] % np.uint64(len(DEVICES))).astype(np.int64),
            "price": np.exp(2 * uniform[:, 3] - 1).astype(np.float32),
            "history": items[listed], "offsets": offsets_of(lengths)}


def chances(columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """The probability of a click, of rows as `drawn` gives them."""
    user, item, past = (tastes(columns[name]) for name in ("user", "item", "history"))
    lengths = np.diff(columns["offsets"])
    sums = np.zeros((len(user), TASTE))
    np.add.at(sums, np.repeat(np.arange(len(user)), lengths), past[:, :TASTE])
    liked = sums / np.maximum(lengths, 1)[:, None]
    score = (user[:, :TASTE] * item[:, :TASTE]).sum(1) + 1.5 * (liked * item[:, :TASTE]).sum(1)
    score += item[:, TASTE] + DEVICE_WEIGHTS[columns["device"]] - 0.5 * np.log(columns["price"]) - 1.0
    return 1 / (1 + np.exp(-score))


def tastes(ids: np.ndarray) -> np.ndarray:
    """(ids, TASTE + 1) numbers of mean 0 and deviation 1: a taste, and an appeal."""
    return (2 * shares(draws(np.array(0, np.uint64), ids.view(np.uint64), TASTE + 1)) - 1) * np.sqrt(3)


def shares(words: np.ndarray) -> np.ndarray:
    """Words as numbers in [0, 1)."""
    return (words >> np.uint64(11)).astype(np.float64) * 2.0 ** -53


def zipf(uniform: np.ndarray, most: int) -> np.ndarray:
    """Ranks from 1 to `most`, the more often the lower: the continuous law's quantiles, rounded down."""
    power = 1 - EXPONENT
    return np.minimum((1 + uniform * ((most + 1.0) ** power - 1)) ** (1 / power), most).astype(np.int64)


def ids_of(ranks: np.ndarray, key: int) -> np.ndarray:
    """Ranks as ids that say nothing of them."""
    return mix(ranks.astype(np.uint64) + np.uint64(key)).view(np.int64)
