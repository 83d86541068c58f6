"""Where a batch comes from and what it costs: the first one of a 100 GB table in a cold process, permuting, and reading at random.

    python -m benchmarks.data [--rounds 5] [--gigabytes 100]

The table is one file of 100 MB under many names: to the reader it is many files. "Cold" is a new process with an empty
cache folder; the files themselves lie in the page cache.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.kit import results
from elastic.data import Sampler, load_batch, table
from elastic.data.order import Rows

FILE_BYTES, COLUMNS, GROUP = 100_000_000, 12, 1 << 17
BATCH, SHARDS = 256, 8
GOAL_S = 1.0


def section(path: Path, **keys: Any) -> SimpleNamespace:
    given = {"format": path.suffix[1:] or "parquet", "path": (str(path),), "eval_path": (), "eval_fraction": 0.0,
             "shuffle": True,
             "shuffle_by": "auto", "columns": (), "weights": ()} | keys
    return SimpleNamespace(**given)


def write_file(file: Path, num_bytes: int = FILE_BYTES) -> None:
    """Random numbers: nothing to compress."""
    rows = num_bytes // (8 * COLUMNS)
    columns = {f"c{n}": np.random.default_rng(n).standard_normal(rows) for n in range(COLUMNS)}
    if file.suffix == ".parquet":
        pq.write_table(pa.table(columns), file, row_group_size=GROUP, compression="none", use_dictionary=False)
        return
    with pa.ipc.new_file(file, pa.table(columns).schema) as writer:
        writer.write_table(pa.table(columns), GROUP)


def many_names(folder: Path, file: Path, num: int) -> Path:
    folder.mkdir()
    for number in range(num):
        (folder / f"{number:05d}{file.suffix}").symlink_to(file)
    return folder


def first_batch(folder: Path, format: str, cache: Path) -> dict[str, float]:
    """In this process: seconds to look at all files, to open them, and to the first batch; bytes read (a mapped file's
    are not counted)."""
    data, before = section(folder, format=format, shuffle_by="blocks"), psutil.Process().io_counters().read_chars
    begin, worked = time.perf_counter(), time.process_time()
    info = table.prepare(data, cache)
    looked = time.perf_counter()
    training, _ = table.open_tables(info, data, cache, 0)
    sampler = Sampler(training.num_samples, BATCH, SHARDS, 0, True, epochs=1, order=training.order)
    opened = time.perf_counter()
    load_batch(training, sampler, 1, 0)
    found = {"look": looked - begin, "open": opened - looked, "batch": time.perf_counter() - opened,
             "cpu": time.process_time() - worked}
    return {**found, "rows": info["num_rows"],
            "blocks": training.store.decoded.cache_info().misses,
            "bytes": psutil.Process().io_counters().read_chars - before}


def cold(folder: Path, format: str, again: bool) -> dict[str, float]:
    """In a new process, with an empty cache or one that a first process has filled; "process" is all of its life,
    imports too."""
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-m", "benchmarks.data", "--first-batch", str(folder), "--format", format, "--cache",
                   cache]
        found: dict[str, float] = {}
        for _ in range(1 + again):
            begin = time.perf_counter()
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found = {**json.loads(done.stdout), "process": time.perf_counter() - begin}
        return found


def start(folder: Path, gigabytes: int, rounds: int) -> str:
    rows = []
    for format in ("parquet", "arrow"):
        file = folder / f"one.{format}"
        write_file(file)
        files = many_names(folder / format, file, gigabytes * 10**9 // FILE_BYTES)
        for again in (False, True):
            all_found = [cold(files, format, again) for _ in range(rounds)]
            found = {key: statistics.median(one[key] for one in all_found) for key in all_found[0]}
            whole = found["look"] + found["open"] + found["batch"]
            seconds = [f"{found[key]:.3f}" for key in ("look", "open", "batch")]
            rows.append([format, "again" if again else "first time", f"{found['rows'] / 1e9:.2f} billion", *seconds,
                         f"{found['bytes'] / 1e6:.0f}",
                         f"{whole:.2f} ({'met' if whole < GOAL_S else 'missed'})", f"{found['cpu']:.2f}",
                         f"{found['process']:.2f}"])
    return "\n\n".join([f"## The first batch of {gigabytes} GB in {gigabytes * 10**9 // FILE_BYTES} files, shuffled by "
                        f"blocks\n\nSeconds. Goal: under {GOAL_S:g} from the recipe's path to the batch. \"CPU\" is "
                        "what that takes of a processor, which others' load hardly lengthens; \"process\" is its whole "
                        "life, with Python's and pyarrow's start.",
                        results.table(["format", "", "rows", "looking", "opening", "batch", "read, MB",
                                       "together (goal)", "CPU", "process"], rows)])


def permuting(rounds: int) -> str:
    rows, at_once = [], 1 << 16
    for size in (10**6, 10**7, 10**9):
        order, times = Rows(size, 1, True), []
        for _ in range(rounds):
            begin = time.perf_counter()
            for first in range(0, 10**6, at_once):
                order.locate(np.arange(first, first + at_once))
            times.append((time.perf_counter() - begin) / (-(-10**6 // at_once) * at_once))
        tracemalloc.start()
        order.locate(np.arange(at_once))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        rows.append([f"{size:,}", f"{statistics.median(times) * 1e9:.0f}", f"{peak / 2**20:.1f}"])
    return "\n\n".join(["## Permuting positions\n\n64 Ki positions a call.",
                        results.table(["rows of the epoch", "ns a position", "peak memory, MiB"], rows)])


def reading(folder: Path, rounds: int) -> str:
    """Rows a second in batches of 256, after the first batch."""
    rows, steps = [], 400
    for format, way in (("arrow", "rows"), ("parquet", "rows"), ("parquet", "blocks")):
        data = section(folder / f"one.{format}", shuffle_by=way)
        begin = time.perf_counter()
        info = table.prepare(data, folder / "cache")
        converted = time.perf_counter() - begin
        training, _ = table.open_tables(info, data, folder / "cache", 0)
        sampler = Sampler(training.num_samples, BATCH, 1, 0, True, epochs=rounds, order=training.order)
        load_batch(training, sampler, 1, 0)
        rates = []
        for number in range(rounds):
            begin = time.perf_counter()
            for step in range(2 + number * steps, 2 + (number + 1) * steps):
                load_batch(training, sampler, step, 0)
            rates.append(steps * BATCH / (time.perf_counter() - begin))
        rows.append([format, way, f"{converted:.2f}", f"{statistics.median(rates) / 1e3:.0f}"])
    return "\n\n".join([f"## Reading at random\n\n100 MB, {COLUMNS} columns of float64, batches of {BATCH} rows, order "
                        "and copies included. Parquet by rows is converted once.",
                        results.table(["format", "shuffled by", "prepared in, s", "thousand rows/s"], rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--gigabytes", type=int, default=100)
    parser.add_argument("--first-batch", type=Path, help=argparse.SUPPRESS)  # what the cold process does
    parser.add_argument("--format", help=argparse.SUPPRESS)
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.first_batch:
        print(json.dumps(first_batch(options.first_batch, options.format, options.cache)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sections = [start(folder, options.gigabytes, options.rounds), permuting(options.rounds),
                    reading(folder, options.rounds)]
        results.write("data", "Data", sections)


if __name__ == "__main__":
    main()
