"""Rows looked up and updated a second, in one process on one thread: ours, torch's and FBGEMM's.

    python -m benchmarks.embedding [--rounds 15] [--rows 1000000] [--width 64] [--bags 4096] [--ids 20] [--skew 1.05]
    [--batches 8]

One table, bags of as many ids each, drawn by Zipf's law and scattered over the table. The contestants take turns within
a round, a turn is a few batches, the same for all and new in every round; a figure is the median over rounds of the ids
a second, a ratio the median of the ratios within a round, to the best of the peers. "lookup" sums each bag's rows.
"step" is that, and one update of the rows by slopes that are given: ours adds them up by distinct id, looks for numbers
that are none and commits row-wise Adagrad, with counts and last steps; torch's is sparse gradients with its Adagrad,
FBGEMM's its fused row-wise Adagrad. The growing table finds its rows by hash, all of them stored. FBGEMM's kernels take
part where `fbgemm_gpu` can be imported.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from benchmarks.kit.processes import ONE_THREAD

os.environ.update(ONE_THREAD)  # before NumPy and torch

import numpy as np  # noqa: E402
import torch  # noqa: E402

from benchmarks.kit import results  # noqa: E402
from elastic.tables.bags import Bags, Summed  # noqa: E402
from elastic.tables.row_store import kernels  # noqa: E402
from elastic.tables.spec import RowUpdate, TableSpec  # noqa: E402

LR, EPS = 0.01, 1e-8
STATIC, GROWING, TORCH, FBGEMM = "ours, static", "ours, growing", "torch", "fbgemm"
WARM = 3


class Ours:
    def __init__(self, options: Any, vocabulary: int):
        self.kernels = kernels("numba")
        self.spec = TableSpec("rows", options.width, init="uniform:0.01", vocabulary=vocabulary)
        self.store = self.kernels.create(self.spec, 0)
        self.store.hold(range(self.spec.num_buckets))
        self.step_number = 0
        for ids in np.array_split(np.arange(options.rows), 16):
            self.push(Summed(ids, np.zeros((ids.size, options.width), np.float32), np.ones(ids.size, np.int32)))

    def push(self, summed: Summed) -> None:
        self.step_number += 1
        self.store.prepare(self.step_number, summed)
        self.store.commit(RowUpdate(LR, eps=EPS))

    def lookup(self, ids: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        return self.store.lookup(Bags(ids, offsets))

    def step(self, ids: np.ndarray, offsets: np.ndarray, slopes: np.ndarray) -> None:
        bags = Bags(ids, offsets)
        self.store.lookup(bags)
        self.push(self.kernels.deduplicate(self.spec, bags, slopes))


class Torch:
    def __init__(self, options: Any):
        self.table = torch.nn.EmbeddingBag(options.rows, options.width, mode="sum", sparse=True)
        self.optimizer = torch.optim.Adagrad(self.table.parameters(), lr=LR, eps=EPS)

    def lookup(self, ids: np.ndarray, offsets: np.ndarray) -> torch.Tensor:
        with torch.no_grad():
            return self.table(torch.from_numpy(ids), torch.from_numpy(offsets[:-1]))

    def step(self, ids: np.ndarray, offsets: np.ndarray, slopes: np.ndarray) -> None:
        self.optimizer.zero_grad()
        self.table(torch.from_numpy(ids), torch.from_numpy(offsets[:-1])).backward(torch.from_numpy(slopes))
        self.optimizer.step()


class Fbgemm:
    def __init__(self, options: Any):
        from fbgemm_gpu.split_embedding_configs import EmbOptimType
        from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
        from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
            ComputeDevice,
            SplitTableBatchedEmbeddingBagsCodegen,
        )

        self.table = SplitTableBatchedEmbeddingBagsCodegen(
            [(options.rows, options.width, EmbeddingLocation.HOST, ComputeDevice.CPU)],
            optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
            learning_rate=LR, eps=EPS)
        self.table.init_embedding_weights_uniform(-0.01, 0.01)

    def lookup(self, ids: np.ndarray, offsets: np.ndarray) -> torch.Tensor:
        with torch.no_grad():
            return self.table(torch.from_numpy(ids), torch.from_numpy(offsets))

    def step(self, ids: np.ndarray, offsets: np.ndarray, slopes: np.ndarray) -> None:
        self.table(torch.from_numpy(ids), torch.from_numpy(offsets)).backward(torch.from_numpy(slopes))


@cache
def zipf(rows: int, skew: float) -> tuple[np.ndarray, np.ndarray]:
    """(the share of the first, of the first two ... ranks, which id has which rank)."""
    weights = np.arange(1, rows + 1, dtype=np.float64) ** -skew
    return np.cumsum(weights / weights.sum()), np.random.default_rng(0).permutation(rows)


def draw(luck: np.random.Generator, options: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ids, offsets, slopes) of one batch."""
    shares, ids = zipf(options.rows, options.skew)
    ranks = np.minimum(np.searchsorted(shares, luck.random(options.bags * options.ids)), options.rows - 1)
    slopes = luck.standard_normal((options.bags, options.width)).astype(np.float32)
    return ids[ranks], np.arange(options.bags + 1) * options.ids, slopes


def contest(contestants: Mapping[str, Any], options: Any) -> dict[tuple[str, str], list[float]]:
    """Ids a second of every round, by what is done and by whom."""
    luck = np.random.default_rng(1)
    found: dict[tuple[str, str], list[float]] = {}
    names = list(contestants)
    for turn in range(options.rounds + WARM):  # the first ones compile, and touch the memory
        batches = [draw(luck, options) for _ in range(options.batches)]
        for name in (*names[turn % len(names):], *names[:turn % len(names)]):
            one = contestants[name]
            seconds = {"lookup": timed(one.lookup, [batch[:2] for batch in batches]), "step": timed(one.step, batches)}
            if turn >= WARM:
                for what, taken in seconds.items():
                    found.setdefault((what, name), []).append(options.batches * options.bags * options.ids / taken)
    return found


def timed(call: Callable[..., Any], batches: Sequence[tuple[np.ndarray, ...]]) -> float:
    started = time.perf_counter()
    for batch in batches:
        call(*batch)
    return time.perf_counter() - started


def ratio(mine: list[float], others: list[list[float]]) -> str:
    """To the best of the others in each round."""
    return f"{statistics.median(a / max(b) for a, b in zip(mine, zip(*others))):.2f}"


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, default in (("rounds", 15), ("rows", 1_000_000), ("width", 64), ("bags", 4096), ("ids", 20),
                          ("batches", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--skew", type=float, default=1.05)
    options = parser.parse_args()
    torch.set_num_threads(1)
    contestants: dict[str, Any] = {STATIC: Ours(options, options.rows), GROWING: Ours(options, 0),
                                   TORCH: Torch(options)}
    if importlib.util.find_spec("fbgemm_gpu"):
        contestants[FBGEMM] = Fbgemm(options)
    times = contest(contestants, options)
    peers = [name for name in contestants if name in (TORCH, FBGEMM)]
    rows = [[what, *(f"{statistics.median(times[what, name]) / 1e6:.1f}" for name in contestants),
             ratio(times[what, STATIC], [times[what, name] for name in peers]),
             ratio(times[what, GROWING], [times[what, STATIC]])]
            for what in ("lookup", "step")]
    head = ["", *(f"{name}, M ids/s" for name in contestants), "static / the best peer", "growing / static"]
    results.write("embedding", "Rows of embedding tables",
                  [__doc__.split("\n\n")[2].replace("\n", " "), results.table(head, rows)])


if __name__ == "__main__":
    main()
