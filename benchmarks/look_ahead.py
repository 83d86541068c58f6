"""How much of a slow network between tables' owners shows in a step: each exchange of rows, ids and sums takes 5 ms longer.

    python -m benchmarks.look_ahead [--rounds 5] [--delay 5]

Two workers on this machine, a dense part of six million parameters. Without looking ahead a step waits for three
exchanges; with it they lie beside the computation, the dense reduction and the dense update.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from benchmarks.kit import ours, results
from benchmarks.kit.processes import python, started, tidy_on_termination
from benchmarks.kit.rows import EACH, write_log
from elastic.recipe import dumps, parse

WIDTH, BATCH, STEPS, FIRST = 32, 48, 120, 20
SAMPLES = 4800  # of a hundred ids each
WAIT_S = 300.0


def recipe_of(log: Path, look_ahead: int, delay_ms: float) -> str:
    return dumps(parse({
        "run": {"name": "look-ahead", "steps": STEPS, "eval_every": 0},
        "model": {"kind": "benchmarks.kit.delayed:Wide", "width": WIDTH, "delay_ms": delay_ms},
        "backend": {"device": "cpu"},
        "data": {"format": "parquet", "path": str(log), "columns": ["y"], "batch_size": BATCH, "eval_fraction": 0.0},
        "tables": {"ids": {"columns": ["ids"], "width": WIDTH, "pooling": "mean", "lr": 0.01}},
        "embedding": {"look_ahead": look_ahead}, "elastic": {"max_workers": 2, "min_workers": 2, "logical_shards": 4},
        "optimizer": {"name": "adamw", "lr": 0.001}, "checkpoint": {"every_steps": 0, "best": ""}}))


def measure(log: Path, folder: Path, look_ahead: int, delay_ms: float) -> tuple[float, str]:
    """Seconds of the median step, and the run's hash."""
    folder.mkdir()
    (folder / "recipe.toml").write_text(recipe_of(log, look_ahead, delay_ms))
    with started(python("elastic.cli", "train", folder / "recipe.toml", "--run-dir", folder / "run"),
                 folder / "log") as process:
        process.wait(WAIT_S)
    run = ours.Run(folder / "run")
    run.read()
    if len(run.steps) < STEPS:
        raise RuntimeError("the run did not end: " + (folder / "log").read_text(errors="replace")[-2000:])
    summary = json.loads((folder / "run" / "summary.json").read_text())
    return statistics.median(line["step_s"] for line in run.steps[FIRST:]), summary["state_sha256"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--delay", type=float, default=5.0, help="milliseconds")
    asked = parser.parse_args()
    tidy_on_termination()
    found: dict[tuple[int, float], list[float]] = {(ahead, delay): [] for ahead in (0, 2) for delay in (0.0, asked.delay)}
    hashes = set()
    with tempfile.TemporaryDirectory() as place:
        write_log(Path(place) / "log.parquet", SAMPLES * EACH)
        for number in range(asked.rounds):
            for ahead, delay in found:
                step_s, sha = measure(Path(place) / "log.parquet", Path(place) / f"{number}-{ahead}-{delay}", ahead, delay)
                found[ahead, delay].append(step_s)
                hashes.add(sha)
    middle = {key: statistics.median(times) * 1e3 for key, times in found.items()}
    added = {ahead: middle[ahead, asked.delay] - middle[ahead, 0.0] for ahead in (0, 2)}
    rows = [[f"look_ahead = {ahead}", f"{middle[ahead, 0.0]:.1f} ms", f"{middle[ahead, asked.delay]:.1f} ms",
             f"{added[ahead]:.1f} ms"] for ahead in (0, 2)]
    results.write("look_ahead", "Exchanges of tables beside the computation", [
        results.table(("", "median step", f"each exchange {asked.delay:g} ms longer", "added"), rows),
        f"Hidden: 1 - {added[2]:.1f} / {added[0]:.1f} = {1 - added[2] / added[0]:.2f}. "
        f"{'All runs have one hash.' if len(hashes) == 1 else f'DIFFERENT HASHES: {sorted(hashes)}'} "
        f"{asked.rounds} rounds, alternating."])


if __name__ == "__main__":
    main()
