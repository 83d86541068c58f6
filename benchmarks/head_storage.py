"""A checkpoint of a worker that does not see the run's directory: written and loaded through the head node's storage actor, beside a disk.

    python -m benchmarks.head_storage [--rounds 3] [--scale 1.0]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import psutil
import ray

from benchmarks.kit import results
from benchmarks.kit.own_checkpoints import Own
from benchmarks.kit.steploop import Durable, make_arrays
from elastic.collective.solo import SoloGroup
from elastic.controller.checkpoints import Checkpoints
from elastic.messages import NAMESPACE, Save
from elastic.storage.head import CHUNK, IN_FLIGHT, at_head, end_storage, head_files
from elastic.storage.remote import join

DISK, HEAD = "the disk itself", "the storage actor"
RUN, LOOK_S = "benchmark", 0.02
STORE = 160e6  # bytes of Ray's object store: what is under way must fit, or it is spilled to the disk
SAVE, LOAD = "save, s", "load, s"
MINE, ITS = "most memory beside the state: worker, MB", "most memory beside idle: actor, MB"


@contextmanager
def watched(process: psutil.Process, before: int, into: dict[str, float], name: str) -> Iterator[None]:
    """The most memory of its own that a process has had, beyond `before` bytes, in MB."""
    over = threading.Event()
    most = [before]

    def look() -> None:
        while not over.wait(LOOK_S):
            most.append(process.memory_full_info().uss)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    yield
    over.set()
    thread.join()
    into[name] = (max(most) - before) / 1e6


def measure(own: Own, kind: str, folder: Path, step: int, actor: psutil.Process, idle: int) -> dict[str, float]:
    """One checkpoint: saved, committed, loaded."""
    figures: dict[str, float] = {}
    own.saver.location = str(folder) if kind == DISK else at_head(RUN, str(folder))
    own.checkpoints, own.durable, own.state.committed = Checkpoints(str(folder), 1, ""), Durable(), step
    me = psutil.Process()
    with watched(me, me.memory_full_info().uss, figures, MINE), watched(actor, idle, figures, ITS):
        began = time.perf_counter()
        own.saver.save(own.state, Save(1, step), {})
        assert own.durable.event.wait(300.0) and not own.durable.error, own.durable.error
        figures[SAVE] = time.perf_counter() - began
        began = time.perf_counter()
        own.saver.restore(join(own.saver.location, f"step-{step:08d}"), own.state, SoloGroup(), lambda window: nullcontext())
        figures[LOAD] = time.perf_counter() - began
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="gigabytes of state")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        ray.init(address="local", num_cpus=1, object_store_memory=int(STORE), include_dashboard=False, namespace=NAMESPACE,
                 log_to_driver=False, logging_level="ERROR")
        spilled = Path(ray._private.worker.global_worker.node.get_session_dir_path())
        try:
            rounds = all_rounds(Path(place), arguments.rounds, arguments.scale)
            files = [file for file in spilled.rglob("*spilled_objects*/*") if file.is_file()]
        finally:
            end_storage(RUN)
            ray.shutdown()
    report(rounds, arguments.scale, len(files))


def all_rounds(place: Path, count: int, scale: float) -> list[dict[str, dict[str, float]]]:
    own = Own(make_arrays(scale), place, 0.0)
    head_files(RUN).info(str(place))  # the actor is there
    actor = next(child for child in psutil.Process().children(recursive=True) if "ray::HeadStorage" in child.cmdline()[0])
    idle = actor.memory_full_info().uss  # before it has done anything
    rounds: list[Any] = []
    for number in range(count + 1):  # the first makes buffers
        kinds = (DISK, HEAD) if number % 2 else (HEAD, DISK)
        rounds.append({kind: measure(own, kind, place / kind.replace(" ", "-"), 2 * number + 1 + (kind == HEAD), actor, idle) for kind in kinds})
        print(rounds[-1], flush=True)
    return rounds[1:]


def report(rounds: list[dict[str, dict[str, float]]], scale: float, spilled: int) -> None:
    def cell(kind: str, key: str) -> str:
        values = sorted(one[kind][key] for one in rounds)
        form = ".2f" if key in (SAVE, LOAD) else ".0f"
        return f"{format(statistics.median(values), form)} ({format(values[0], form)} - {format(values[-1], form)})"

    columns = (SAVE, LOAD, MINE, ITS)
    rows = [[kind, *(cell(kind, key) for key in columns)] for kind in (DISK, HEAD)]
    note = (f"{scale:g} GB of state. One node: worker and actor share its object store of {STORE / 1e6:.0f} MB, from which {spilled} objects were "
            f"spilled. Chunks of {CHUNK >> 20} MB, {IN_FLIGHT} under way. Memory is what belongs to the process alone, looked at every "
            f"{LOOK_S * 1e3:.0f} ms while it saves and loads; medians of the rounds, with the lowest and the highest.")
    results.write("head_storage", "Checkpoints through the head node",
                  [note, results.table(["checkpoints go to", *columns], rows)])


if __name__ == "__main__":
    main()
