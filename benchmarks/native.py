"""Our step against the same model written natively, in one process with one thread, turn by turn.

    python -m benchmarks.native [--backend torch tensorflow mxnet] [--steps 100] [--rows 12]

A GPT of nanoGPT's CPU size (0.8 M parameters, context 64). Ours is what a lone worker computes of a step: gradients of
one shard into the flat buffer and AdamW over its blocks. The peer is an nn.Module with torch's fused AdamW in a plain
loop, a Keras model with Keras' AdamW in one `tf.function`, or a hybridised Gluon block with Gluon's trainer (Adam: it
has no AdamW).
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmarks.kit import results
from elastic.model.backend import UpdateRule
from elastic.state.flat_layout import BLOCK
from elastic.state.state import State
from nlp import gpt

MODEL = {"layers": 4, "heads": 4, "width": 128, "context": 64}
VOCAB = 65
PEERS = {"torch": ("torch", "torch_gpt", 1.05), "tensorflow": ("Keras", "keras_gpt", 1.05),
         "mxnet": ("Gluon", "gluon_gpt", 1.15)}
FOLDERS = {"torch": "pytorch"}  # of backends, where it is not the name


def ours(name: str, batch: dict[str, np.ndarray]) -> Callable[[], float]:
    create = importlib.import_module(f"backends.{FOLDERS.get(name, name)}.backend").framework.create
    settings = SimpleNamespace(device="cpu", precision="float32", threads=1, compile=False)
    backend = create(gpt.build(MODEL, {"vocab_size": VOCAB}), settings)
    state = State(backend, "adamw")
    state.start(0)
    end = state.layout.trainable
    gradient, steps = backend.allocate(state.layout.gradient), [0]
    views = state.layout.views(gradient, state.layout.trainable_names)

    def step() -> float:
        steps[0] += 1
        gradient[:] = 0
        found = backend.gradients(batch, steps[0], views)
        rule = UpdateRule("adamw", 1e-3, 0.1, 1 / found.weight, steps[0], 0.9, 0.99, 1e-8, 0.9)
        backend.update(rule, state.param[:end], gradient[:end], state.slots, BLOCK)
        return found.loss_sum / found.weight

    return step


def timed(step: Callable[[], float], times: list[tuple[float, float]]) -> None:
    wall, spent = time.perf_counter(), time.process_time()
    step()
    times.append((time.perf_counter() - wall, time.process_time() - spent))


def measure(name: str, num_steps: int, rows: int) -> str:
    """The section on one backend. For a process of its own: a framework's threads and settings are the whole process's.
    """
    tokens = np.random.default_rng(0).integers(0, VOCAB, (rows, MODEL["context"] + 1))
    peer, module, limit = PEERS[name]
    mine = ours(name, {"tokens": tokens, "row_weight": np.ones(rows, np.float32)})
    # after ours, which sets the framework's threads
    stepper = importlib.import_module(f"benchmarks.peers.{module}").stepper

    steps: dict[str, Callable[[], float]] = {peer: stepper(MODEL, VOCAB, tokens), "ours": mine}
    for step in steps.values():
        first = step()
        assert step() < first, "a step on the same rows must lower the loss"
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for _ in range(num_steps):
        for side, step in steps.items():
            timed(step, times[side])
    middle = {side: [statistics.median(column) * 1e3 for column in zip(*taken)] for side, taken in times.items()}
    ratio: list[Any] = [mine / theirs for mine, theirs in zip(middle["ours"], middle[peer], strict=True)]
    lines = [[side, *(f"{value:.1f}" for value in values)] for side, values in middle.items()]
    table = results.table(["one step, median", "wall, ms", "processor, ms"],
                          [*lines, ["ratio", *(f"{value:.3f}" for value in ratio)]])
    verdict = f"Goal: at most {limit} of the native processor time; {'reached' if ratio[1] <= limit else 'missed'}."
    return "\n\n".join([f"## {name}", table, verdict])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=list(PEERS), nargs="+", default=list(PEERS))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rows", type=int, default=12)
    arguments = parser.parse_args()
    sections = []
    for name in arguments.backend:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as apart:
            sections.append(apart.submit(measure, name, arguments.steps, arguments.rows).result())
    setting = (f"A GPT of 0.8 M parameters, {arguments.rows} rows of {MODEL['context']} tokens, one process a "
               "framework, one thread, turn by turn.")
    results.write("native", "Our step against the same model written natively", [setting, *sections])


if __name__ == "__main__":
    main()
