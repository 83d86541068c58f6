"""Shipped recipes on real data, through the command: the evaluation of the last step beside a published figure, and the minutes.

    python -m benchmarks.learning [NAME ...] [--data NAME=FOLDER ...] [--workers 2] [--seeds 0] [--backends torch
    tensorflow mxnet]

NAME is a line of `LINES`, all of them where none is given; each writes results/NAME.md. Where a line's data come from
is said by --data or by its variable of the environment; a line without its data is left out. Processor minutes are
those of all processes together: what the machine's load does not change.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil

from benchmarks.kit import ours, results
from benchmarks.kit.processes import python, started, tidy_on_termination
from elastic.driver.inference import restore

LOOK_S = 2.0
TIMEOUT_S = 3600


@dataclass(frozen=True)
class Line:
    """A recipe, and what its last evaluation is to reach. {data} in `overrides` is the folder of its data."""

    title: str
    recipe: str
    metric: str
    bar: float
    source: str
    variable: str = ""  # of the environment, which names the data's folder; none: the recipe finds its data itself
    overrides: tuple[str, ...] = ()
    frameworks: tuple[str, ...] = ("torch", "tensorflow", "mxnet")
    seed: int = 0
    lower: bool = False  # whether the bar is met from above
    variants: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: {"": ()})  # overrides beside, by name
    close: float = 0.0  # how far the variants' figures of one backend and seed may be apart; 0: there is one

    def meets(self, value: float) -> bool:
        return value <= self.bar if self.lower else value >= self.bar


IDX = ('data.path="{data}/train-images-idx3-ubyte.gz"', 'data.eval_path="{data}/t10k-images-idx3-ubyte.gz"')
IMAGES = "All 10,000 test images; no checkpoint was chosen by its score, but rates, batch and epochs were, between a few runs by these same images."
ADULT = ('data.path="{data}/adult.data"', 'data.eval_path="{data}/adult.test"')
CATEGORIES = ["workclass", "education", "marital_status", "occupation", "relationship", "race", "sex", "native_country"]
LINES = {
    "adult": Line("A small DLRM on UCI Adult", "recommender/adult_dlrm", "auc", 0.89,
                  "32,561 rows once, in file order. Published for this setting (PERSIA): 0.8929.", "ADULT", ADULT),
    "adult_tables": Line("A small DLRM on UCI Adult, its categories dense and in an embedding table", "recommender/adult_dlrm", "auc", 0.89,
                         "32,561 rows once, in file order. Tables: all categories in one, updated by Adam at the rate of the dense parameters.",
                         "ADULT", ADULT, variants={"dense": ("data.tables=dense",), "tables": (
                             f"tables.categories.columns={json.dumps(CATEGORIES)}", "tables.categories.optimizer=adam")}, close=0.002),
    "fashion_resnet": Line("A small residual network on Fashion-MNIST", "vision/fashion_resnet", "accuracy", 0.91,
                           IMAGES, "FASHION_MNIST", IDX),
    "fashion_vit": Line("A small vision transformer on Fashion-MNIST", "vision/fashion_vit", "accuracy", 0.88, IMAGES,
                        "FASHION_MNIST", IDX),
    "nanogpt": Line("nanoGPT's CPU setting", "nlp/gpt_tiny_shakespeare", "loss", 1.90,
                    "The mean over the whole last tenth of the text. Published: 1.88, which nanoGPT's script estimates "
                    "from 20 random batches.",
                    "TINY_SHAKESPEARE", ('data.path="{data}/tiny-shakespeare.txt"',), ("torch",), 1337, lower=True),
    "bert": Line("A small BERT on Shakespeare", "nlp/bert_shakespeare", "loss", 3.2094,
                 "Nats a hidden character, over the whole evaluation text, whose unigram entropy is the bar: what "
                 "always guessing by frequency would lose.", frameworks=("torch",), lower=True),
}
HEAD = ("backend", "seed", "parameters", "the evaluation", "step, ms", "minutes, start included", "processor minutes",
        "load average", "met")


class Clock:
    """Processor seconds of a process and all below it, those that end within `LOOK_S` of a look left out."""

    def __init__(self, pid: int):
        self.spent: dict[int, float] = {}
        self._root, self._over = psutil.Process(pid), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._over.wait(LOOK_S):
            try:
                for process in [self._root, *self._root.children(recursive=True)]:
                    times = process.cpu_times()
                    self.spent[process.pid] = times.user + times.system
            except psutil.NoSuchProcess:
                continue  # it ended between two looks; what it had spent by the last one counts

    def stop(self) -> float:
        self._over.set()
        self._thread.join()
        return sum(self.spent.values())


def train(line: Line, data: Path | None, backend: str, variant: str, workers: int, seed: int,
          folder: Path) -> tuple[list[str], float]:
    """(one row of the table, its figure)."""
    begun, run_dir, log = time.monotonic(), folder / "run", folder / "log"
    sets = [text.replace("{data}", str(data)) for text in (*line.overrides, *line.variants[variant])]
    sets += [f"backend.name={backend}", f"elastic.max_workers={workers}", f"run.seed={seed}"]
    words = [word for pair in sets for word in ("--set", pair)]
    with started(python("elastic.cli", "train", line.recipe, "--run-dir", run_dir, *words), log) as process:
        clock = Clock(process.pid)
        code = process.wait(TIMEOUT_S)
        spent = clock.stop()
    if code:
        raise RuntimeError(f"the run ended with {code}:\n" + log.read_text(errors="replace")[-2000:])
    minutes, done = (time.monotonic() - begun) / 60, ours.Run(run_dir)
    done.read()
    found = json.loads((run_dir / "summary.json").read_text())["eval"]
    size = sum(int(np.prod(spec.shape)) for spec in restore(run_dir).backend.parameters.values())
    name = f"{backend}, {variant}" if variant else backend
    return [name, str(seed), f"{size:,}", ", ".join(f"{name} {value:.4f}" for name, value in found.items()),
            f"{1000 * statistics.median(step['step_s'] for step in done.steps):.1f}", f"{minutes:.1f}",
            f"{spent / 60:.1f}",
            f"{os.getloadavg()[0]:.0f}", "yes" if line.meets(found[line.metric]) else "no"], found[line.metric]


def apart(line: Line, values: Mapping[tuple[str, int, str], float]) -> str:
    """How far the variants of one backend and seed are from each other."""
    groups: dict[tuple[str, int], list[float]] = {}
    for (backend, seed, _), value in values.items():
        groups.setdefault((backend, seed), []).append(value)
    most = max(max(found) - min(found) for found in groups.values())
    return (f"{line.metric} of {' and '.join(line.variants)} at most {line.close} apart: {most:.4f}, "
            f"{'met' if most <= line.close else 'missed'}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(LINES))
    parser.add_argument("--data", nargs="+", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", help="else the line's own")
    parser.add_argument("--backends", nargs="+", help="else the line's own")
    arguments = parser.parse_args()
    if wrong := [name for name in arguments.names if name not in LINES]:
        parser.error(f"there is no line {wrong[0]}; there are {', '.join(LINES)}")
    tidy_on_termination()
    folders = dict(pair.split("=", 1) for pair in arguments.data)
    for name in arguments.names or LINES:
        line, rows, values = LINES[name], [], {}
        place = folders.get(name, os.environ.get(line.variable, ""))
        if line.variable and not place:
            print(f"{name} is left out: name the folder of its data with --data {name}=FOLDER or in {line.variable}.")
            continue
        for backend, seed, variant in itertools.product(arguments.backends or line.frameworks, arguments.seeds or [line.seed],
                                                        line.variants):
            with tempfile.TemporaryDirectory() as folder:
                row, values[backend, seed, variant] = train(line, Path(place).absolute(), backend, variant, arguments.workers, seed,
                                                            Path(folder))
            rows.append(row)
            print(" · ".join(rows[-1]), flush=True)
        about = f"The shipped recipe `{line.recipe}`, {arguments.workers} workers, one thread each. {line.source}"
        bar = f"Bar: {line.metric} at {'most' if line.lower else 'least'} {line.bar}."
        results.write(name, line.title, [about, results.table(HEAD, rows), bar, *([apart(line, values)] if line.close else [])],
                      script="learning")


if __name__ == "__main__":
    main()
