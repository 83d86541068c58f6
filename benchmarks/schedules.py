"""A step of a pipeline of four processes against its simulation, by schedule and by kind of group.

    python -m benchmarks.schedules [--rounds 4] [--micro-batches 8] [--kilobytes 256] [--unit-ms 40]

A stage sleeps for what its computation is said to cost, so that four stages fit on any machine; messages are real. A
figure is the median over rounds of the slowest stage's time from a barrier to its last action; the schedules take turns
within a round. The simulation is told the stages' costs and the median seconds of a message, which both halves of the
stages measure in every round with nothing else to do.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import threading
import time
from typing import Any

import numpy as np

from benchmarks.kit import results
from elastic.collective.gloo import GlooGroup
from elastic.collective.kv_store import Endpoint
from elastic.collective.shared import SharedGroup
from elastic.parallel.actions import NAMES, Schedule
from elastic.parallel.executor import Executor
from elastic.parallel.schedules import build
from elastic.parallel.simulator import Costs, simulate

STAGES = 4
PINGS = 20
CHUNKS = {"gpipe": 1, "1f1b": 1, "interleaved": 2, "zb-h1": 1}
CASES = {"backward = forward": (2, 1, 1), "backward = 2 forward": (1, 1, 1)}  # paces


def zeros(size: int) -> np.ndarray:
    return np.zeros(size, np.float32)


class Sleeper:
    """A stage that takes its time and makes nothing."""

    def __init__(self, stage: int, schedule: Schedule, costs: Costs, size: int):
        self.chunks, self.made = schedule.num_chunks, zeros(size)
        self.seconds = {"forward": costs.forward[stage], "input": costs.backward_input[stage],
                        "weight": costs.backward_weight[stage]}

    def sleep(self, *parts: str) -> np.ndarray:
        time.sleep(sum(self.seconds[part] for part in parts) / self.chunks)
        return self.made

    def forward(self, chunk: int, micro_batch: int, inputs: np.ndarray | None) -> np.ndarray:
        return self.sleep("forward")

    def backward(self, chunk: int, micro_batch: int, output_gradients: np.ndarray | None) -> np.ndarray:
        return self.sleep("input", "weight")

    def backward_input(self, chunk: int, micro_batch: int, output_gradients: np.ndarray | None) -> np.ndarray:
        return self.sleep("input")

    def backward_weight(self, chunk: int, micro_batch: int) -> None:
        self.sleep("weight")


def costs_of(pace: tuple[int, int, int], unit_s: float, message_s: float) -> Costs:
    """A forward and a backward pass together take three units."""
    return Costs.equal(STAGES, *(part * 3 * unit_s / sum(pace) for part in pace), message_s)


def ping(group: Any, size: int) -> list[float]:
    """Seconds of messages between the stages of each half."""
    buffer, times, peer = zeros(size), [], group.rank ^ 1
    group.barrier()
    for _ in range(PINGS):
        started = time.perf_counter()
        for sender in sorted((group.rank, peer)):
            if group.rank == sender:
                group.send(buffer, peer)
            else:
                group.receive(buffer, peer)
        times.append((time.perf_counter() - started) / 2)
    return times


def stage(rank: int, kind: str, address: str, options: argparse.Namespace, pipe: Any) -> None:
    """One process: the time of every step, by case and schedule, and of a message."""
    flag = threading.Event()
    group: Any = (GlooGroup.form(rank, STAGES, address, kind, flag, 60, "127.0.0.1") if kind == "gloo"
                  else SharedGroup.form(rank, STAGES, address, kind, flag, 60))
    size = options.kilobytes * 256
    contestants = {}
    for case, pace in CASES.items():
        for name in NAMES:
            schedule = build(name, STAGES, options.micro_batches, CHUNKS[name], pace)
            work = Sleeper(rank, schedule, costs_of(pace, options.unit_ms / 1e3, 0.0), size)
            contestants[case, name] = Executor(schedule, group, [size] * (schedule.num_depths - 1), zeros), work
    times: dict[Any, list[float]] = {key: [] for key in contestants}
    pings: list[float] = []
    for turn in range(options.rounds + 1):  # the first touches the memory and forms the pairs
        pings = ping(group, size) + (pings if turn > 1 else [])
        for key, (executor, work) in contestants.items():
            group.barrier()
            started = time.perf_counter()
            executor.run(work)
            if turn:
                times[key].append(time.perf_counter() - started)
    pipe.send((statistics.median(pings), times))
    group.barrier()


def rows(kind: str, options: argparse.Namespace) -> list[list[str]]:
    endpoint, context = Endpoint("127.0.0.1"), multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(STAGES)]
    processes = [context.Process(target=stage, args=(rank, kind, endpoint.address, options, pipes[rank][1]),
                                 daemon=True)
                 for rank in range(STAGES)]
    for process in processes:
        process.start()
    messages, found = zip(*(pipe.recv() for pipe, _ in pipes), strict=True)
    message_s = statistics.median(messages)
    for process in processes:
        process.join()
    lines = []
    for (case, name), first in found[0].items():
        pace = CASES[case]
        schedule = build(name, STAGES, options.micro_batches, CHUNKS[name], pace)
        said = simulate(schedule, costs_of(pace, options.unit_ms / 1e3, message_s))
        steps = [max(one[case, name][turn] for one in found) for turn in range(len(first))]
        took = statistics.median(steps)
        busy = 3 * options.unit_ms / 1e3 * options.micro_batches
        lines.append([kind, case, name, f"{1e3 * said.seconds:.0f}",
                      f"{1e3 * took:.0f} ({1e3 * min(steps):.0f}-{1e3 * max(steps):.0f})",
                      f"{took / said.seconds:.3f}", f"{said.bubble:.3f}", f"{1 - busy / took:.3f}",
                      f"{1e3 * message_s:.2f}"])
    return lines


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--micro-batches", type=int, default=8)
    parser.add_argument("--kilobytes", type=int, default=256)
    parser.add_argument("--unit-ms", type=float, default=40.0)
    options = parser.parse_args()
    head = ["group", "costs", "schedule", "simulated, ms", "measured, ms (range)", "ratio", "bubble, simulated",
            "bubble, measured", "a message, ms"]
    table = results.table(head, [row for kind in ("shared", "gloo") for row in rows(kind, options)])
    results.write("schedules", "Pipeline schedules", [__doc__.split("\n\n")[2].replace("\n", " "), table])


if __name__ == "__main__":
    main()
