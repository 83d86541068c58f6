"""Rows of an embedding table move to another number of owners while it trains: bytes beside the least there are, and the longest step.

    python -m benchmarks.reshard [--rows 10000000] [--only "2 to 3" "4 to 3"]

Width 32 with Adagrad's state, no twins, all workers on this machine. Every row was updated before the move. Steps while rows
move are held against steps of as many workers without moves; a generation's first is part of its pause. The peer is what everybody
else does: the same run's checkpoint, written, and read by the other number of workers.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.kit import ours, results
from benchmarks.kit.processes import python, started, tidy_on_termination
from benchmarks.kit.rows import EACH, write_log
from elastic.recipe import dumps, parse

WIDTH, BATCH = 32, 1000
STILL, START = 40, 200  # steps without moves, and steps in which a worker starts beside the training
ROW_BYTES = 8 + 4 * WIDTH + 4 * WIDTH + 8  # id, values, Adagrad's sums, count and last step
MOVES = {"2 to 3": (2, 3), "4 to 3": (4, 3)}
WAIT_S = 1500.0


def recipe_of(log: Path, num_ids: int, most: int) -> str:
    steps = at_step(num_ids) + START + STILL + num_ids // 40_000
    return dumps(parse({
        "run": {"name": "reshard", "steps": steps, "eval_every": 0},
        "model": {"kind": "benchmarks.kit.rows:Sums", "width": WIDTH}, "backend": {"device": "cpu"},
        "data": {"format": "parquet", "path": str(log), "columns": ["y"], "batch_size": BATCH, "shuffle": False,
                 "eval_fraction": 0.0},
        "tables": {"ids": {"columns": ["ids"], "width": WIDTH, "optimizer": "adagrad", "pooling": "mean",
                           "lr": 0.01}},
        "embedding": {"twin": False}, "elastic": {"max_workers": most, "logical_shards": 8},
        "optimizer": {"name": "sgd", "lr": 0.001}, "checkpoint": {"every_steps": 0, "best": ""}}))


def at_step(num_ids: int) -> int:
    """The step of the move: each row was updated at least once."""
    return num_ids // EACH // BATCH + STILL


def measure(name: str, num_ids: int) -> list[str]:
    before, after = MOVES[name]
    most, step = max(before, after), at_step(num_ids)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_log(folder / "log.parquet", num_ids)
        (folder / "reshard.toml").write_text(recipe_of(folder / "log.parquet", num_ids, most))
        chaos = ["--chaos", f"scale:{before}@1", "--chaos", f"scale:{after}@{step}"]
        run = ours.Run(folder / "run")
        with started(python("elastic.cli", "train", folder / "reshard.toml", "--run-dir", folder / "run", *chaos),
                     folder / "log") as process:
            process.wait(WAIT_S)
        run.read()
        again = resumed(folder, after)
    return row_of(name, num_ids, run, step, again)


def resumed(folder: Path, workers: int) -> dict[str, Any]:
    """Seconds of the final checkpoint's writing and of its reading by another number of workers."""
    run = ours.Run(folder / "run")
    began = time.time()
    with started(python("elastic.cli", "resume", folder / "run", "--set", f"elastic.max_workers={workers}",
                        "--set", f"run.steps={1_000_000}", "--chaos", "scale:1@999999"), folder / "log2") as process:
        while time.time() < began + WAIT_S and process.poll() is None:
            run.read()
            loaded = [e for e in run.events if e["event"] == "loaded"]
            if loaded and any(step["time"] > loaded[0]["time"] for step in run.steps):
                break
            time.sleep(0.1)
        else:
            raise RuntimeError("the resumed run made no step: " + (folder / "log2").read_text(errors="replace")[-2000:])
        process.terminate()
        process.wait(60)
    saved = [e for e in run.events if e["event"] == "checkpoint_committed"][0]
    first = next(step["time"] for step in run.steps if step["time"] > loaded[0]["time"])
    return {"save_s": saved["seconds"], "load_s": loaded[0]["seconds"], "restart_s": first - began}


def row_of(name: str, num_ids: int, run: ours.Run, step: int, again: dict[str, Any]) -> list[str]:
    before, after = MOVES[name]
    (moved,) = [e for e in run.events if e["event"] == "tables_resharded" and e["step"] >= step]
    began = next(e["time"] for e in run.generations() if e["generation"] == moved["generation"])
    moving = {line["step"]: line["step_s"] for line in run.steps
              if line["generation"] == moved["generation"] and line["step"] <= moved["step"] + 1}
    still = [line["step_s"] for line in run.steps if line["world_size"] == max(before, after) and line["step"] not in moving
             and line["step"] > step - STILL + 5]
    median, first = statistics.median(still), moving.pop(min(moving))  # a joiner has not run any of it before
    ideal = num_ids * ROW_BYTES * abs(after - before) / max(before, after)
    pause = sum(e["pause_s"] for e in run.events if e["event"] == "resized" and e["step"] >= step)
    return [name, f"{num_ids:,}", f"{moved['bytes'] / 1e6:,.0f} MB", f"{moved['bytes'] / ideal:.3f}",
            f"{moved['time'] - began:.1f} s, {moved['steps']} steps", f"{moved['seconds']:.1f} s", f"{pause:.2f} s",
            f"{median * 1e3:.0f} ms", f"{statistics.median(moving.values()) / median:.2f}", f"{max(moving.values()) / median:.2f}",
            f"{max(still) / median:.2f}", f"{first / median:.2f}",
            f"{again['save_s'] + again['restart_s']:.1f} s ({again['save_s']:.1f} + {again['restart_s']:.1f}, of which "
            f"{again['load_s']:.1f} reading)"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--only", nargs="*", choices=MOVES, default=list(MOVES))
    asked = parser.parse_args()
    tidy_on_termination()
    head = ("owners", "rows", "moved", "of the ideal", "in", "moving alone", "pauses", "median step without moves",
            "median with, of it", "longest with, of it", "longest without, of it", "the generation's first, of it",
            "checkpoint, restart and first step")
    results.write("reshard", "Rows move to another number of owners",
                  [results.table(head, [measure(name, asked.rows) for name in asked.only])])


if __name__ == "__main__":
    main()
