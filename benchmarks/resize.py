"""A node joins three workers: when the fourth makes its first step, and how long the others paused for it.

    python -m benchmarks.resize [--joins 8] [--peer-joins 2] [--only ours "Ray Train"]

Ray's own test cluster (ray.cluster_utils.Cluster) adds a node of one CPU and takes it away again. The clock runs from
the moment when the node is registered; the pause is the gap between two commits of the others, beyond one ordinary
step. The gap is taken from metrics.jsonl, and from the step logs of Ray Train; the platform's own word
(`resized.pause_s`) stands beside it.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.kit import ours, results
from benchmarks.kit.kills import wait_until
from benchmarks.kit.logs import Folder, Step
from benchmarks.kit.processes import python, started, tidy_on_termination

SMALL, LARGE = 3, 4
ENDLESS = 1_000_000
STEADY = 20  # steps of a group before and after a join
WAIT_S = 180.0


@dataclass(frozen=True)
class Join:
    first_step_s: float  # from the node's registration to the first step of the larger group
    pause_s: float  # of the others, beyond one step
    own_word_s: float  # what the system itself says; nan if it says nothing
    redone: int  # steps done twice


@contextmanager
def cluster(cpus: int) -> Iterator[Any]:
    """A head node for the first workers."""
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": cpus})
    try:
        yield nodes
    finally:
        nodes.shutdown()


def of_world(steps: list[Step], world: int, since: float) -> list[Step]:
    return [step for step in steps if step.world == world and step.time > since]


def joins(nodes: Any, steps: Callable[[], list[Step]], count: int, alive: Callable[[], bool], name: str,
          own_word: Callable[[float], float]) -> list[Join]:
    """Adds a node and takes it away again, `count` times."""
    found: list[Join] = []
    since = time.time()

    def settle(world: int, since: float) -> None:
        wait_until(lambda: len(of_world(steps(), world, since)) >= STEADY, WAIT_S,
                   f"no group of {world} went on for {STEADY} steps", alive)

    for _ in range(count):
        settle(SMALL, since)
        node = nodes.add_node(num_cpus=1)
        arrived = time.time()
        settle(LARGE, arrived)
        found.append(measure(steps(), arrived, own_word(arrived)))
        print(f"{name}: {found[-1]}", flush=True)
        nodes.remove_node(node, allow_graceful=False)
        since = time.time()
    return found


def measure(steps: list[Step], arrived: float, own_word_s: float) -> Join:
    first = of_world(steps, LARGE, arrived)[0]
    before = [s for s in steps if s.time < first.time and s.world == SMALL]
    last = max(before, key=lambda s: s.time)
    after = [s.time for s in steps if s.pid == first.pid and s.time >= first.time and s.world == LARGE]
    step_s = statistics.median(b - a for a, b in zip(after, after[1:], strict=False))
    redone = max(0, max(s.step for s in before) + 1 - first.step)
    return Join(first.time - arrived, max(0.0, first.time - last.time - step_s), own_word_s, redone)


def ours_joins(count: int) -> list[Join]:
    with tempfile.TemporaryDirectory() as folder, cluster(SMALL) as nodes:
        run = ours.Run(Path(folder) / "run")

        def steps() -> list[Step]:
            run.read()
            return run.as_steps()

        def own_word(arrived: float) -> float:
            return next((e["pause_s"] for e in run.events if e["event"] == "resized" and e["to"] == LARGE
                         and e["time"] > arrived), float("nan"))

        command = ours.command(Path(folder) / "run", LARGE, ENDLESS, options=["--address", nodes.address])
        with started(command, Path(folder) / "log") as process:
            found = joins(nodes, steps, count, lambda: process.poll() is None, "ours", own_word)
            process.terminate()
            process.wait(60)
        return found


def ray_train_joins(count: int) -> list[Join]:
    with tempfile.TemporaryDirectory() as folder, cluster(SMALL) as nodes:
        logs = Folder(Path(folder))
        command = python("benchmarks.peers.ray_train", "--workers", LARGE, "--elastic", "--steps", ENDLESS,
                         "--checkpoint-every", 10,
                         "--monitor-s", 1, "--folder", folder, "--address", nodes.address)
        with started(command, Path(folder) / "log") as process:
            return joins(nodes, logs.read, count, lambda: process.poll() is None, "Ray Train",
                         lambda arrived: float("nan"))


def row(name: str, found: list[Join]) -> list[str]:
    def both(values: list[float]) -> str:
        return f"{statistics.median(values):.3f} ({max(values):.3f})" if all(v == v for v in values) else "-"

    return [name, str(len(found)), both([j.first_step_s for j in found]), both([j.pause_s for j in found]),
            both([j.own_word_s for j in found]),
            f"{statistics.mean(j.redone for j in found):.1f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--joins", type=int, default=8)
    parser.add_argument("--peer-joins", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=["ours", "Ray Train"], default=["ours", "Ray Train"])
    arguments = parser.parse_args()
    tidy_on_termination()
    found = {}
    if "ours" in arguments.only:
        found["ours"] = ours_joins(arguments.joins)
    if "Ray Train" in arguments.only:
        found["Ray Train"] = ray_train_joins(arguments.peer_joins)
    head = ["", "joins", "node to first step, s: median (worst)", "pause of the others, s", "by its own word, s",
            "steps redone"]
    text = __doc__.split("\n\n")
    sections = [text[0], text[2].strip(), NOTE,
                results.table(head, [row(name, joined) for name, joined in found.items()])]
    if "ours" in found:
        pause = statistics.median(j.pause_s for j in found["ours"])
        sections.append(f"Goal: a pause under 0.3 s; {'reached' if pause < 0.3 else 'missed'} with a median of "
                        f"{pause:.3f} s.")
    results.write("resize", "A node joins", sections)


NOTE = """Ray Train looks for new resources every second here (its default is every 60) and has a checkpoint every 10 steps; it starts all
processes again. The workers are on several nodes, so ours talk over TCP."""


if __name__ == "__main__":
    main()
