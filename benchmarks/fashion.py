"""The shipped recipes on Fashion-MNIST, two workers: accuracy over all 10,000 test images, and the minutes of the whole command.

    python -m benchmarks.fashion --data FOLDER [--workers 2] [--seeds 0] [--backends torch] [--models resnet vit]

FOLDER holds the four IDX files. Processor minutes are those of all processes together: what the machine's load does not change.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil

from benchmarks.kit import results
from benchmarks.kit.processes import python, started, tidy_on_termination
from elastic.inference import restore

GOALS = {"resnet": 0.91, "vit": 0.88}
LIMIT_MINUTES = 10.0
LOOK_S = 2.0


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


def train(data: Path, model: str, backend: str, workers: int, seed: int, folder: Path) -> tuple[float, float, float, int]:
    """Test accuracy, minutes, processor minutes, number of parameters."""
    begun, run_dir, log = time.monotonic(), folder / "run", folder / "log"
    sets = [f'data.path="{data}/train-images-idx3-ubyte.gz"', f'data.eval_path="{data}/t10k-images-idx3-ubyte.gz"',
            f"backend.name={backend}", f"elastic.max_workers={workers}", f"run.seed={seed}"]
    with started(python("elastic.cli", "train", f"vision/fashion_{model}", "--run-dir", run_dir,
                        *(word for pair in sets for word in ("--set", pair))), log) as process:
        clock = Clock(process.pid)
        code = process.wait(3600)
        spent = clock.stop()
    if code:
        raise RuntimeError(f"the run ended with {code}:\n" + log.read_text(errors="replace")[-2000:])
    minutes = (time.monotonic() - begun) / 60
    size = sum(int(np.prod(spec.shape)) for spec in restore(run_dir).backend.parameters.values())
    return json.loads((run_dir / "summary.json").read_text())["eval"]["accuracy"], minutes, spent / 60, size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("FASHION_MNIST"), help="the folder; else FASHION_MNIST names it")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--backends", nargs="+", default=["torch"])
    parser.add_argument("--models", nargs="+", choices=list(GOALS), default=list(GOALS))
    arguments = parser.parse_args()
    tidy_on_termination()
    if not arguments.data:
        print("fashion is left out: name the folder of Fashion-MNIST's IDX files with --data or in FASHION_MNIST.")
        return
    data, rows = arguments.data.absolute(), []
    if not (data / "train-images-idx3-ubyte.gz").is_file():
        parser.error(f"--data {data} holds no train-images-idx3-ubyte.gz")
    for model, backend, seed in itertools.product(arguments.models, arguments.backends, arguments.seeds):
        with tempfile.TemporaryDirectory() as folder:
            accuracy, minutes, spent, size = train(data, model, backend, arguments.workers, seed, Path(folder))
        reached = accuracy >= GOALS[model] and minutes <= LIMIT_MINUTES
        rows.append([f"vision/fashion_{model}", backend, str(seed), f"{size:,}", f"{accuracy:.4f}", f"{GOALS[model]:.2f}", f"{minutes:.1f}",
                     f"{spent:.1f}", "yes" if reached else "no", f"{os.getloadavg()[0]:.0f}"])
        print(" · ".join(rows[-1]), flush=True)
    head = ["recipe", "backend", "seed", "parameters", "test accuracy", "goal", "minutes, start included", "processor minutes",
            f"goal reached within {LIMIT_MINUTES:.0f} minutes", "load average"]
    about = (f"The shipped recipes, {arguments.workers} workers, one thread each. The accuracy is that of the last step over all 10,000 test "
             "images; no checkpoint was chosen by its score.")
    results.write("fashion", "Small image models on Fashion-MNIST", [about, results.table(head, rows)])


if __name__ == "__main__":
    main()
