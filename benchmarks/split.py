"""One step of a GPT on one worker, and split over two by heads, hidden units and vocabulary.

    python -m benchmarks.split [--widths 128 256 512] [--steps 15] [--backend pytorch]

Gradients of 8 rows of 128 tokens through 4 layers, one thread a worker, the two over shared memory. A figure is the
median over steps of the slower worker's time; "between workers" is the part of it in their sums, waiting for each other
included: two a layer forward, two back, and three at the ends. The ideal is two: what is not split (norms, residual
additions) both of them compute.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import statistics
import threading
import time
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmarks.kit import results
from elastic.buffers import fill
from elastic.collective.kv_store import Endpoint
from elastic.collective.shared import SharedGroup
from elastic.mesh import Mesh
from elastic.model.initial import initial_values
from elastic.parallel.axis import Axis
from elastic.parallel.layout import Layout
from elastic.state.flat_layout import FlatLayout, shaped
from nlp.gpt import build

ROWS, TIME, VOCAB, LAYERS, HEADS = 8, 128, 512, 4, 4
SETTINGS = SimpleNamespace(device="cpu", precision="float32", threads=1, compile=False)


@dataclass(frozen=True)
class Job:
    width: int
    steps: int
    backend: str
    address: str


class Timed(Axis):
    """Counts the seconds in its collectives."""

    seconds = 0.0

    def sum(self, x: Any) -> Any:
        started = time.perf_counter()
        found = super().sum(x)
        self.seconds += time.perf_counter() - started
        return found


def member(rank: int, size: int, job: Job, pipe: Any) -> None:
    """Sends the seconds of each step, those of them between workers, and the loss."""
    backends = importlib.import_module(f"backends.{job.backend}.backend").framework
    model = build({"layers": LAYERS, "heads": HEADS, "width": job.width, "context": TIME}, {"vocab_size": VOCAB})
    layout, values = Layout(model, Mesh(1, tensor=size)), initial_values(model.parameters, 1, {})
    coordinate = layout.mesh.coordinate(rank)
    boxes = layout.boxes(coordinate)
    model.parameters = layout.specs(coordinate)
    backend = backends.create(model, SETTINGS)
    flat = FlatLayout(backend.parameters)
    param, gradient = backend.allocate(flat.size), backend.allocate(flat.trainable)
    for name, view in flat.views(param).items():
        fill(view, values[name][boxes[name].slices])
    backend.bind(flat.views(param), {})
    axis = None
    if size > 1:
        axis = Timed("tensor", SharedGroup.form(rank, size, job.address, f"{job.width}", threading.Event(), 60))
        backend.connect(dict.fromkeys(layout.dims, axis))
    tokens = np.random.default_rng(0).integers(0, VOCAB, (ROWS, TIME + 1)).astype(np.int32)
    batch, into = {"tokens": tokens, "row_weight": np.ones(ROWS, np.float32)}, shaped(gradient, flat.places)
    times, between, loss = [], [], 0.0
    for _ in range(job.steps + 3):
        before, started = axis.seconds if axis else 0.0, time.perf_counter()
        loss = backend.gradients(batch, 1, into).loss_sum
        times.append(time.perf_counter() - started)
        between.append((axis.seconds if axis else 0.0) - before)
    pipe.send((times[3:], between[3:], loss))


def contest(size: int, job: Job) -> list[tuple[list[float], list[float], float]]:
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(size)]
    processes = [context.Process(target=member, args=(rank, size, job, pipes[rank][1]), daemon=True)
                 for rank in range(size)]
    for process in processes:
        process.start()
    found = [pipe.recv() for pipe, _ in pipes]
    for process in processes:
        process.join()
    return found


def row(width: int, steps: int, backend: str) -> list[str]:
    job = Job(width, steps, backend, Endpoint().address)
    ((alone, _, loss),), split = contest(1, job), contest(2, job)
    if any(abs(other - loss) > 1e-4 * abs(loss) for _, _, other in split):
        raise RuntimeError(f"the split model's loss is {[other for _, _, other in split]}, not {loss}")
    together = statistics.median(max(pair) for pair in zip(*(times for times, _, _ in split)))
    between = statistics.median(max(pair) for pair in zip(*(seconds for _, seconds, _ in split)))
    one = statistics.median(alone)
    return [str(width), f"{ROWS * TIME * width * 4 / 1e6:.1f} MB", f"{1e3 * one:.1f}", f"{1e3 * together:.1f}",
            f"{one / together:.2f}",
            f"{1e3 * between:.1f}"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 256, 512])
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--backend", default="pytorch")
    options = parser.parse_args()
    rows = [row(width, options.steps, options.backend) for width in options.widths]
    head = ["width", "activation", "one worker, ms", "two workers, ms", "ratio", "between workers, ms"]
    results.write("split", "A model split over two workers",
                  [__doc__.split("\n\n")[2].replace("\n", " "), results.table(head, rows)])


if __name__ == "__main__":
    main()
