"""nanoGPT's CPU setting with the shipped recipe, on tiny-shakespeare, two workers: the final validation loss and the minutes.

    python -m benchmarks.nanogpt --data tiny-shakespeare.txt [--workers 2] [--seeds 1337]

The validation loss is the mean over the whole last tenth of the text. nanoGPT's README says 1.88, which its script
estimates from 20 random batches of 12 windows.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks.kit import ours, results
from benchmarks.kit.processes import python, run, tidy_on_termination

RECIPE = "nlp/gpt_tiny_shakespeare"
PUBLISHED, GOAL = 1.88, 1.90


def train(data: Path, workers: int, seed: int, folder: Path) -> tuple[float, float, float]:
    """Final validation loss, minutes of the whole command, seconds of a median step."""
    started = time.monotonic()
    run(python("elastic.cli", "train", RECIPE, "--run-dir", folder / "run", "--set", f'data.path="{data.absolute()}"',
               "--set", f"elastic.max_workers={workers}", "--set", f"run.seed={seed}"), folder / "log", timeout_s=1800)
    minutes = (time.monotonic() - started) / 60
    done = ours.Run(folder / "run")
    done.read()
    summary = json.loads((folder / "run" / "summary.json").read_text())
    return summary["eval"]["loss"], minutes, statistics.median(line["step_s"] for line in done.steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("TINY_SHAKESPEARE"), help="the text; else TINY_SHAKESPEARE names it")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1337])
    arguments = parser.parse_args()
    tidy_on_termination()
    if not arguments.data:
        print("nanogpt is left out: name Karpathy's tiny-shakespeare (1,115,394 characters) with --data or in TINY_SHAKESPEARE.")
        return
    if not arguments.data.is_file():
        parser.error(f"--data {arguments.data} is no file")
    rows, losses = [], []
    for seed in arguments.seeds:
        with tempfile.TemporaryDirectory() as folder:
            loss, minutes, step_s = train(arguments.data, arguments.workers, seed, Path(folder))
        losses.append(loss)
        rows.append([str(seed), f"{loss:.4f}", f"{minutes:.1f}", f"{step_s * 1000:.1f}"])
        print(f"seed {seed}: validation loss {loss:.4f} after {minutes:.1f} minutes", flush=True)
    verdict = f"Goal: at most {GOAL}; {'reached' if statistics.median(losses) <= GOAL else 'missed'}. Published: {PUBLISHED}."
    about = (f"nanoGPT's CPU setting with the shipped recipe `{RECIPE}`, on tiny-shakespeare, {arguments.workers} workers. The validation "
             "loss is the mean over the whole last tenth of the text; nanoGPT's script estimates its 1.88 from 20 random batches.")
    results.write("nanogpt", "nanoGPT's CPU setting",
                  [about, results.table(["seed", "validation loss", "minutes, start included", "step, ms"], rows), verdict])


if __name__ == "__main__":
    main()
