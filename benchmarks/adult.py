"""The shipped recipe on UCI Adult, official split, one pass in file order: the AUC over all 16,281 test rows, on every framework.

    python -m benchmarks.adult --data FOLDER [--workers 2] [--seeds 0] [--backends torch tensorflow mxnet]

FOLDER holds adult.data and adult.test.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import tempfile
import time
from pathlib import Path

from benchmarks.kit import results
from benchmarks.kit.processes import python, run, tidy_on_termination

RECIPE = "recommender/adult_dlrm"
GOAL, PUBLISHED = 0.89, 0.8929


def train(data: Path, backend: str, workers: int, seed: int, folder: Path) -> tuple[dict[str, float], float]:
    """The figures of the last step, and the minutes of the whole command."""
    begun = time.monotonic()
    sets = [f'data.path="{data}/adult.data"', f'data.eval_path="{data}/adult.test"', f"backend.name={backend}", f"elastic.max_workers={workers}",
            f"run.seed={seed}"]
    run(python("elastic.cli", "train", RECIPE, "--run-dir", folder / "run", *(word for pair in sets for word in ("--set", pair))),
        folder / "log", timeout_s=1800)
    return json.loads((folder / "run" / "summary.json").read_text())["eval"], (time.monotonic() - begun) / 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("ADULT"), help="the folder; else ADULT names it")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--backends", nargs="+", default=["torch", "tensorflow", "mxnet"])
    arguments = parser.parse_args()
    tidy_on_termination()
    if not arguments.data:
        print("adult is left out: name the folder of UCI Adult's adult.data and adult.test with --data or in ADULT.")
        return
    data, rows = arguments.data.absolute(), []
    if not (data / "adult.data").is_file():
        parser.error(f"--data {data} holds no adult.data")
    for backend, seed in itertools.product(arguments.backends, arguments.seeds):
        with tempfile.TemporaryDirectory() as folder:
            found, minutes = train(data, backend, arguments.workers, seed, Path(folder))
        rows.append([backend, str(seed), f"{found['auc']:.4f}", f"{found['loss']:.4f}", f"{found['normalized_entropy']:.4f}", f"{minutes:.1f}",
                     "yes" if found["auc"] >= GOAL else "no"])
        print(" · ".join(rows[-1]), flush=True)
    about = (f"The shipped recipe `{RECIPE}`, {arguments.workers} workers, one thread each: 32,561 rows once, in file order, 128 a step. "
             f"Published for this setting (PERSIA): {PUBLISHED}.")
    head = ["backend", "seed", "AUC", "log-loss", "normalised entropy", "minutes, start included", f"AUC at least {GOAL}"]
    results.write("adult", "A small DLRM on UCI Adult", [about, results.table(head, rows)])


if __name__ == "__main__":
    main()
