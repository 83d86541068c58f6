"""The shipped recipe for BERT on Shakespeare, two workers: the loss on hidden characters, beside the text's unigram entropy.

    python -m benchmarks.bert [--workers 2] [--seeds 0]

Always guessing by frequency, the hidden characters' own in the evaluation text, would lose its unigram entropy.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.kit import results
from benchmarks.kit.processes import python, run, tidy_on_termination
from elastic.data.arrow import read_tokens
from elastic.recipe import load_recipe
from elastic.workload import prepare

RECIPE = "nlp/bert_shakespeare"


def entropy(tokens: np.ndarray) -> float:
    """Nats a token, from the tokens' own shares."""
    shares = np.bincount(tokens) / len(tokens)
    shares = shares[shares > 0]
    return float(-(shares * np.log(shares)).sum())


def train(workers: int, seed: int, folder: Path) -> tuple[dict[str, float], float]:
    """The figures of the last step, and the minutes of the whole command."""
    begun = time.monotonic()
    run(python("elastic.cli", "train", RECIPE, "--run-dir", folder / "run", "--set", f"elastic.max_workers={workers}", "--set", f"run.seed={seed}"),
        folder / "log", timeout_s=3600)
    return json.loads((folder / "run" / "summary.json").read_text())["eval"], (time.monotonic() - begun) / 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    arguments = parser.parse_args()
    tidy_on_termination()
    info = prepare(load_recipe(RECIPE))
    level, rows = entropy(read_tokens(info["eval_file"])), []
    for seed in arguments.seeds:
        with tempfile.TemporaryDirectory() as folder:
            found, minutes = train(arguments.workers, seed, Path(folder))
        rows.append([str(seed), f"{found['loss']:.4f}", f"{level:.4f}", f"{found['accuracy']:.4f}", f"{minutes:.1f}",
                     "yes" if found["loss"] < level else "no"])
        print(" · ".join(rows[-1]), flush=True)
    about = f"The shipped recipe `{RECIPE}`, {arguments.workers} workers, one thread each; over the whole evaluation text, nats a hidden character."
    head = ["seed", "loss", "unigram entropy", "guessed right", "minutes, start included", "below the entropy"]
    results.write("bert", "A small BERT on Shakespeare", [about, results.table(head, rows)])


if __name__ == "__main__":
    main()
