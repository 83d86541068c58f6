"""Everything a run consists of is killed at once: the driver, Ray, the controller, the workers. `elastic resume` goes on."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
from ray.cluster_utils import Cluster

from elastic.observe.jsonl import read_lines
from elastic.observe.metrics import steps_of
from elastic.recipe import dumps
from tests.support.ends import LOSSES
from tests.support.inprocess import module_recipe
from tests.support.oracle import undisturbed
from tests.support.runs import bits, recipe

ROOT = Path(__file__).resolve().parents[2]
ROUNDS = int(os.environ.get("ELASTIC_TEST_ROUNDS", "1"))
STEPS = max(160, 130 * ROUNDS)  # each round gets some steps further
CHANGES: dict[str, dict[str, Any]] = {"run": {"steps": STEPS, "eval_every": 100}, "checkpoint": {"every_steps": 25}}
LIMIT_S = 90.0
LONG = 400  # held while three other commands come to it


def start(here: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-m", "elastic.cli", *arguments], cwd=here,
                            env={**os.environ, "PYTHONPATH": str(ROOT)},
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_step(process: subprocess.Popen[str], run: Path, step: int) -> int:
    """Until that step's line is on disk, or the process has ended; the newest step."""
    until = time.monotonic() + LIMIT_S
    while process.poll() is None and time.monotonic() < until:
        found = steps_of(read_lines(run / "metrics.jsonl"))
        if found and found[-1]["step"] >= step:
            return int(found[-1]["step"])
        time.sleep(0.02)
    raise AssertionError(f"step {step} did not come: {process.stdout and process.stdout.read()}")


def kill_all(process: subprocess.Popen[str]) -> None:
    """SIGKILL to the process and to all that it has started, from the top, so that nobody can react."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        with_suppressed(member.kill)
    psutil.wait_procs(family, LIMIT_S)
    process.wait(LIMIT_S)


def with_suppressed(kill: Any) -> None:
    try:
        kill()
    except psutil.NoSuchProcess:
        pass




def assert_ended_well(run: Path, steps: int, bits: str) -> list[dict[str, Any]]:
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "done" and summary["state_sha256"] == bits
    assert [fields["step"] for fields in steps_of(read_lines(run / "metrics.jsonl"))] == list(range(1, steps + 1))
    return read_lines(run / "events.jsonl")


def test_everything_at_once_and_resumed(tmp_path: Path) -> None:
    """At random moments: between two checkpoints, and during one as well, as they follow each other closely."""
    chance = random.Random(7)
    (tmp_path / "r.toml").write_text(dumps(recipe(2, **CHANGES)))
    run, reached, rewinds = tmp_path / "run", 0, 0
    process = start(tmp_path, "train", "r.toml", "--run-dir", str(run))
    for _ in range(ROUNDS):
        target = min(reached + chance.randint(1, max(2, 2 * STEPS // (ROUNDS + 1))), STEPS - 20)
        wait_for_step(process, run, target)
        time.sleep(chance.random() * 0.1)  # a moment within a step: what it is does not matter
        kill_all(process)
        reached = steps_of(read_lines(run / "metrics.jsonl"))[-1]["step"]
        if reached >= STEPS:
            break
        process = start(tmp_path, "resume", str(run))
        rewinds += 1
        if reached >= STEPS - 20:
            break
    out, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, out
    lines = assert_ended_well(run, STEPS, bits(**CHANGES))
    found = [e for e in lines if e["event"] == "rewound"]
    assert len(found) == rewinds and all(e["from"] >= e["to"] for e in found)


def test_the_driver_alone_is_killed_and_others_follow(cluster: Cluster, tmp_path: Path) -> None:
    """On a cluster the run lives on without its driver; `resume` and `status` find it, and `--set` cannot change it.
    Two follow to the end."""
    (held := tmp_path / "held").touch()
    given = module_recipe("Held", LONG, model={"by": str(held), "seconds": 0.1}, elastic={"max_workers": 2},
                          checkpoint={"every_steps": 25})
    (tmp_path / "r.toml").write_text(dumps(given))
    run = tmp_path / "run"
    driver = start(tmp_path, "train", "r.toml", "--run-dir", str(run), "--address", cluster.address)
    wait_for_step(driver, run, 2)
    driver.send_signal(signal.SIGKILL)
    driver.wait(LIMIT_S)
    refused, _ = (process := start(tmp_path, "resume", str(run), "--set",
                                   "optimizer.lr=1")).communicate(timeout=LIMIT_S)
    assert process.returncode == 2 and "is alive" in refused and "Traceback" not in refused
    status, _ = start(tmp_path, "status", str(run)).communicate(timeout=LIMIT_S)
    assert status.startswith("running")
    both = [start(tmp_path, "resume", str(run)) for _ in range(2)]
    for process in both:
        assert process.stdout is not None and any("is alive: following it" in line for line in process.stdout)
    held.unlink()
    for process in both:
        out, _ = process.communicate(timeout=LIMIT_S)
        assert process.returncode == LOSSES["driver lost"].code and "done: " in out, out
    lines = assert_ended_well(run, LONG, undisturbed(given).sha)
    assert len([e for e in lines if e["event"] == "run_started"]) == 1, "it was followed, not started anew"
    assert not [e for e in lines if e["event"] in ("worker_lost", "rewound")]
    assert not (run / "live.json").exists()
