"""The canonical sum of gradients against gloo's own all-reduce, and the vote, by the kind of group.

    python -m benchmarks.reduction [--rounds 15] [--workers 2 3 4] [--megabytes 14 64]

The same processes hold a gloo group and a shared-memory group. The contestants take turns within a round; a figure is
the median over rounds of the slowest member's time; a ratio is the median of the ratios within a round. Eight logical
shards, so with 3 workers a run is no whole subtree and the members exchange two sums each. What is summed lies where
the loop has it: in the group's own buffers.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.kit import results
from elastic.collective.gloo import GlooGroup
from elastic.collective.kv_store import Endpoint
from elastic.collective.reduction import Scratch, maximal_subtrees, out_size
from elastic.collective.shared import SharedGroup
from elastic.mesh import shards_of
from elastic.state.flat_layout import BLOCK

SHARDS = 8
VOTES = 200
GLOO, EXACT_GLOO, FAST_SHARED, EXACT_SHARED = CONTESTANTS = (
    "gloo all_reduce", "exact over gloo", "fast over shared memory", "exact over shared memory")


def zeros(size: int) -> np.ndarray:
    return np.zeros(size, np.float32)


def contestants(group: Any, allocate: Callable[[int], np.ndarray],
                numel: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The library's all-reduce of one buffer, and the exact reduction of this member's sums."""
    nodes = maximal_subtrees(shards_of(group.rank, group.size, SHARDS), SHARDS)
    sums = [(node, allocate(numel)) for node in nodes]
    for (low, high), buffer in sums:
        buffer[:] = (high - low) / SHARDS
    plain, out, scratch = allocate(numel), allocate(out_size(numel, BLOCK, group.size)), Scratch(zeros)

    def exact() -> None:
        found = group.reduce_tree(sums, SHARDS, out, numel, BLOCK, scratch)
        if found[0] != 1.0 or found[numel - 1] != 1.0:
            raise RuntimeError("the sum is wrong")

    return lambda: group.all_reduce(plain), exact


def member(rank: int, size: int, address: str, numel: int, rounds: int, pipe: Any) -> None:
    gloo = GlooGroup.form(rank, size, address, "gloo", threading.Event(), 60, "127.0.0.1")
    shared = SharedGroup.form(rank, size, address, "shared", threading.Event(), 60)
    calls = dict(zip(CONTESTANTS, (*contestants(gloo, zeros, numel), *contestants(shared, shared.allocate, numel)),
                     strict=True))
    times: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    for turn in range(rounds + 2):  # the first two touch the memory
        for name in (*CONTESTANTS[turn % 4:], *CONTESTANTS[:turn % 4]):
            shared.barrier()
            started = time.perf_counter()
            calls[name]()
            if turn >= 2:
                times[name].append(time.perf_counter() - started)
    for name, group in (("vote over gloo", gloo), ("vote over shared memory", shared)):
        part, out = np.zeros(2 * SHARDS + 1), np.empty(size * (2 * SHARDS + 1))
        group.barrier()
        started = time.perf_counter()
        for _ in range(VOTES):
            group.all_gather(out, part)
        times[name] = [(time.perf_counter() - started) / VOTES]
    pipe.send(times)
    shared.barrier()


def contest(size: int, numel: int, rounds: int) -> dict[str, list[float]]:
    """The slowest member's seconds of every round, by contestant."""
    endpoint, context = Endpoint(), multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(size)]
    processes = [context.Process(target=member, args=(rank, size, endpoint.address, numel, rounds, pipes[rank][1]),
                                 daemon=True)
                 for rank in range(size)]
    for process in processes:
        process.start()
    found = [pipe.recv() for pipe, _ in pipes]
    for process in processes:
        process.join()
    return {name: [max(times) for times in zip(*(one[name] for one in found), strict=True)] for name in found[0]}


def row(size: int, megabytes: int, times: dict[str, list[float]]) -> list[str]:
    cells = [f"{megabytes} MB", str(size)]
    for name in CONTESTANTS:
        ratio = statistics.median(a / b for a, b in zip(times[name], times[GLOO], strict=True))
        cells.append(f"{1e3 * statistics.median(times[name]):.1f}" + (f" ({ratio:.2f})" if name != GLOO else ""))
    return [*cells, *(f"{1e6 * times[name][0]:.0f}" for name in ("vote over gloo", "vote over shared memory"))]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--megabytes", type=int, nargs="+", default=[14, 64])
    options = parser.parse_args()
    rows = [row(size, megabytes, contest(size, megabytes * 250_000, options.rounds))
            for megabytes in options.megabytes for size in options.workers]
    head = ["gradient", "workers", f"{GLOO}, ms", *(f"{name}, ms (ratio)" for name in CONTESTANTS[1:]),
            "vote, gloo, us",
            "vote, shared, us"]
    results.write("reduction", "The sum of gradients",
                  [__doc__.split("\n\n")[2].replace("\n", " "), results.table(head, rows)])


if __name__ == "__main__":
    main()
