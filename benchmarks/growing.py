"""A table that outgrows memory: 50 million rows of two workers, most of them on disk, and what that costs.

    python -m benchmarks.growing [--rows 50000000] [--memory-gb 1.7] [--folder DIR]

Width 32, row-wise Adagrad, no twins, 2 workers on real Ray, all on this machine. The log has 2.5 draws for each row: 0.4 of the
draws are an id that nobody has seen, the others one of those before, by a power law that changes from phase to phase,
from mostly old favourites to all alike. PSS is the sum over all processes of the run, Ray's too, every few seconds.
The hit rate, the share of a step's stored rows that are in memory, is measured on one store alone, of a million rows in
64 megabytes, whose steps touch 20,000 rows each: a share of those used last, the others long unused.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.kit import ours, results
from benchmarks.kit.processes import python, started, tidy_on_termination
from benchmarks.kit.rows import EACH, ids_of
from elastic.recipe import dumps, parse
from elastic.tables.bags import Summed
from elastic.tables.row_store import kernels
from elastic.tables.spec import RowUpdate, TableSpec

WIDTH, BATCH, AFTER = 32, 1000, 5
DRAWS, NEW = 2.5, 0.4  # draws a row; the share of them that are new
POWERS = (8, 4, 2, 1)  # a phase each: the higher, the more the first ids are preferred
SAVES = 30  # checkpoints of the run
WAIT_S, POLL_S = 3000.0, 2.0
GB = 1e9
ALONE_ROWS, ALONE_BYTES, ALONE_EACH = 1_000_000, 64_000_000, 20_000


def chunks(rows: int) -> Iterator[np.ndarray]:
    """The numbers of the ids that are drawn, a step's at a time."""
    luck, seen, steps = np.random.default_rng(0), 0, num_steps(rows)
    for step in range(steps):
        fresh = round(rows * (step + 1) / steps) - seen
        power = POWERS[step * len(POWERS) // steps]
        old = (max(1, seen) * luck.random(BATCH * EACH - fresh) ** power).astype(np.int64)
        numbers = np.append(np.arange(seen, seen + fresh), old)
        luck.shuffle(numbers)
        yield numbers
        seen += fresh


def num_steps(rows: int) -> int:
    return round(rows * DRAWS / EACH / BATCH)


def every(rows: int) -> int:
    """Steps between two checkpoints."""
    return max(1, num_steps(rows) // SAVES)


def write_log(file: Path, rows: int) -> dict[int, int]:
    """The distinct ids since the checkpoint before, by the step of each checkpoint."""
    schema = pa.schema([("ids", pa.list_(pa.int64())), ("y", pa.float32())])
    touched, recent = dict[int, int](), list[np.ndarray]()
    luck, offsets = np.random.default_rng(1), np.arange(0, BATCH * EACH + 1, EACH, dtype=np.int32)
    with pq.ParquetWriter(file, schema, use_dictionary=False) as writer:
        for step, numbers in enumerate(chunks(rows), 1):
            lists = pa.ListArray.from_arrays(offsets, pa.array(ids_of(numbers)))
            writer.write_table(pa.table([lists, pa.array(luck.standard_normal(BATCH).astype(np.float32))], schema=schema))
            recent.append(np.unique(numbers))
            if step % every(rows) == 0:
                touched[step] = int(np.unique(np.concatenate(recent)).size)
                recent = []
    return touched


def recipe_of(folder: Path, rows: int, memory_gb: float) -> str:
    return dumps(parse({
        "run": {"name": "growing", "steps": num_steps(rows), "eval_every": 0},
        "model": {"kind": "benchmarks.kit.rows:Sums", "width": WIDTH}, "backend": {"device": "cpu"},
        "data": {"format": "parquet", "path": str(folder / "log.parquet"), "columns": ["y"], "batch_size": BATCH,
                 "shuffle": False, "eval_fraction": 0.0},
        "tables": {"ids": {"columns": ["ids"], "width": WIDTH, "pooling": "mean", "lr": 0.01}},
        "embedding": {"twin": False, "memory_gb": memory_gb, "disk_path": str(folder / "cold")},
        "elastic": {"max_workers": 2, "logical_shards": 8}, "optimizer": {"name": "sgd", "lr": 0.001},
        "checkpoint": {"every_steps": every(rows), "full_every": 1000, "best": ""}}))


class Watch(threading.Thread):
    """The most memory (PSS) and disk that a process's tree and a folder take."""

    def __init__(self, pid: int, folder: Path):
        super().__init__(daemon=True)
        self.pid, self.folder, self.over = pid, folder, threading.Event()
        self.pss = self.disk = 0
        self.start()

    def run(self) -> None:
        while not self.over.wait(POLL_S):
            try:
                tree = [psutil.Process(self.pid)]
                tree += tree[0].children(recursive=True)
            except psutil.Error:
                continue
            self.pss = max(self.pss, sum(pss_of(process.pid) for process in tree))
            self.disk = max(self.disk, disk_of(self.folder))


def pss_of(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:  # it has ended
        return 0
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def disk_of(folder: Path) -> int:
    total = 0
    for file in folder.rglob("*"):
        try:
            total += file.stat().st_blocks * 512
        except OSError:
            continue
    return total


def play(folder: Path, *command: object) -> tuple[ours.Run, Watch, float]:
    """A command to its end."""
    run, began = ours.Run(folder / "run"), time.perf_counter()
    with started(python("elastic.cli", *command), folder / "output") as process:
        watch = Watch(process.pid, folder)
        code = process.wait(WAIT_S)
        watch.over.set()
    if code:
        raise RuntimeError((folder / "output").read_text(errors="replace")[-3000:])
    run.read()
    return run, watch, time.perf_counter() - began


def speeds(run: ours.Run, rows: int) -> list[list[str]]:
    """By phase."""
    found, steps = [], num_steps(rows)
    for phase, power in enumerate(POWERS):
        took = [line["step_s"] for line in run.steps if (line["step"] - 1) * len(POWERS) // steps == phase]
        found.append([str(power), f"{BATCH * EACH / statistics.median(took) / 1e3:,.0f}",
                      f"{BATCH * EACH * len(took) / sum(took) / 1e3:,.0f}"])
    return found


def increments(run: ours.Run, touched: dict[int, int]) -> list[list[str]]:
    """Where saving is slower than the steps between, an increment goes further back, to what was committed then."""
    saved = {event["step"]: event["bytes"] for event in run.events if event["event"] == "checkpoint_committed"}
    return [[str(step), f"{touched[step]:,}", f"{bytes / 1e6:,.0f} MB", f"{bytes / touched[step]:.0f}"]
            for step, bytes in [item for item in saved.items() if item[0] in touched][::SAVES // 6]]


def hit_rates(folder: Path) -> list[list[str]]:
    """Rows a second of looking up and updating, on one store, whose hot rows are a share of each step's."""
    spec = TableSpec("alone", WIDTH)
    store: Any = kernels("numba").create(spec, ALONE_BYTES, str(folder / "alone"))
    store.hold(range(spec.num_buckets))
    num, each, step = ALONE_ROWS, ALONE_EACH, 0
    got, rows, began = list[int](), 0, 0.0
    read = store.cold.get

    def noted(numbers: np.ndarray) -> np.ndarray:
        got.append(numbers.size)
        return read(numbers)  # type: ignore[no-any-return]

    store.cold.get = noted

    def push(numbers: np.ndarray) -> None:
        nonlocal step
        step += 1
        ids = np.sort(ids_of(numbers))
        store.read(ids)
        store.prepare(step, Summed(ids, np.zeros((ids.size, WIDTH), np.float32), np.ones(ids.size, np.int32)))
        store.commit(RowUpdate(0.1))

    for low in range(0, num, each):
        push(np.arange(low, min(low + each, num)))
    luck, hot, found = np.random.default_rng(2), np.arange(num - num // 16, num), list[list[str]]()
    for share in (1.0, 0.9, 0.7, 0.5, 0.0):
        for turn in range(12):
            if turn == 2:  # what was used before is still coming in
                got.clear()
                began, rows = time.perf_counter(), 0
            some = np.unique(np.append(luck.choice(hot, round(share * each)), luck.integers(0, num - num // 16, each - round(share * each))))
            push(some)
            rows += some.size if turn >= 2 else 0
        taken = time.perf_counter() - began
        found.append([f"{1 - sum(got) / 2 / rows:.2f}", f"{rows / taken / 1e3:,.0f}"])
    store.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=50_000_000)
    parser.add_argument("--memory-gb", type=float, default=1.7)
    parser.add_argument("--folder", type=Path, default=None)
    asked = parser.parse_args()
    tidy_on_termination()
    folder, began = Path(tempfile.mkdtemp(prefix="growing-", dir=asked.folder)), time.perf_counter()
    try:
        touched = write_log(folder / "log.parquet", asked.rows)
        (folder / "growing.toml").write_text(recipe_of(folder, asked.rows, asked.memory_gb))
        run, watch, seconds = play(folder, "train", folder / "growing.toml", "--run-dir", folder / "run")
        again, after, again_s = play(folder, "resume", folder / "run", "--set", "elastic.max_workers=3", "--set",
                                     f"embedding.memory_gb={asked.memory_gb * 2 / 3}", "--set",
                                     f"run.steps={num_steps(asked.rows) + AFTER}")
        loaded = [event for event in again.events if event["event"] == "loaded"][-1]
        whole = time.perf_counter() - began
        alone = hit_rates(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    facts = [[f"{asked.rows:,}", f"{num_steps(asked.rows) * BATCH * EACH:,}", f"{2 * asked.memory_gb:.2f} GB",
              f"{max(watch.pss, after.pss) / GB:.2f} GB", f"{max(watch.disk, after.disk) / GB:.1f} GB", f"{seconds / 60:.1f} min",
              f"{again_s / 60:.1f} min, of which {loaded['seconds']:.0f} s loading", f"{whole / 60:.1f} min"]]
    results.write("growing", "A table that outgrows memory", [
        results.table(("rows", "draws", "rows and index in memory, at most", "PSS of all processes", "disk", "the run",
                       f"resumed on 3 owners, {AFTER} steps more", "all, with the log"), facts),
        results.table(("power of the draws", "thousand draws a second, median step", "mean"), speeds(run, asked.rows)),
        results.table(("hit rate in memory", "thousand rows a second, looked up and updated, one store"), alone),
        results.table(("checkpoint of step", "rows touched since the one before", "bytes", "bytes a row"), increments(run, touched))])


if __name__ == "__main__":
    main()
