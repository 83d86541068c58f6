"""A run as a job of a Ray with a token: submitted over HTTP, followed, asked, stopped and submitted again."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from elastic.cli import run
from elastic.driver.inference import check_checkpoint
from elastic.observe.jsonl import read_lines
from elastic.observe.verify import verify
from elastic.recipe import load_recipe
from tests.support.ends import LOSSES, SIGNALS
from tests.support.job_server import JobServer, serving
from tests.support.oracle import undisturbed
from tests.support.sampling import sometimes

pytest.importorskip("aiohttp", reason="Ray's job server comes with the extra `submit`")
ELASTIC = [sys.executable, "-m", "elastic.cli"]
MODELS = """
import time, torch
from mine.pace import seconds
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.line = torch.nn.Linear(1, 1)
    def loss(self, batch):
        time.sleep(seconds())
        return (self.line(batch["x"]) - 1).square().mean()
class Rows:
    def __len__(self): return 40
    def __getitem__(self, i): return {"x": torch.full((1,), i / 40)}
"""
OWN = """
[run]
steps = %d
eval_every = 0
[model]
kind = "mine.models:Net"
[data]
kind = "mine.models:Rows"
batch_size = 4
eval_fraction = 0.0
[elastic]
max_workers = 2
logical_shards = 4
[checkpoint]
every_steps = 2
"""


@pytest.fixture(scope="module")
def server() -> Iterator[JobServer]:
    with serving() as found:
        yield found


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder with a package of the user's own, whose steps take as long as the file `pace` says."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "models.py").write_text(MODELS)
    (tmp_path / "mine" / "pace.py").write_text(f"def seconds():\n    return float(open({str(tmp_path / 'pace')!r}).read())\n")
    (tmp_path / "r.toml").write_text(OWN % 100_000)
    (tmp_path / "pace").write_text("0.05")
    return tmp_path


STARTED = list[subprocess.Popen[str]]()


@pytest.fixture(autouse=True)
def commands_end() -> Iterator[None]:
    yield
    for process in STARTED:
        process.kill()
        process.communicate()
    STARTED.clear()


def elastic(here: Path, environment: dict[str, str], *arguments: str, stdin: int = subprocess.DEVNULL) -> subprocess.Popen[str]:
    STARTED.append(subprocess.Popen([*ELASTIC, *arguments], cwd=here, env=environment, text=True, stdin=stdin,
                                    stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True))
    return STARTED[-1]


def says(process: subprocess.Popen[str], words: str) -> str:
    """Its lines up to one with these words."""
    said = list[str]()
    assert process.stdout is not None
    for line in process.stdout:
        said.append(line)
        if words in line:
            return "".join(said)
    raise AssertionError("".join(said))


def told(here: Path, environment: dict[str, str], *arguments: str) -> tuple[int, str]:
    process = elastic(here, environment, *arguments)
    said = process.communicate(timeout=120)[0]
    assert "Traceback" not in said, said
    return process.returncode, said


def assert_one_sentence(found: tuple[int, str], *words: str) -> None:
    code, said = found
    last = [line for line in said.splitlines() if not line.startswith("Ray 2.")]
    assert code == 2 and len(last) == 1 and all(word in said for word in words), found


def id_in(said: str) -> str:
    found = re.search(r"submitted (\S+);", said)
    assert found, said
    return found[1]


def appears(file: Path) -> None:
    until = time.monotonic() + 60
    while not file.exists():
        assert time.monotonic() < until, f"{file} does not come"
        time.sleep(0.05)


def summary(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())


def test_a_shipped_recipe_is_submitted_followed_and_has_the_bits_of_an_undisturbed_run(server: JobServer, tmp_path: Path) -> None:
    code, said = told(tmp_path, server.environment, "submit", "nlp/gpt_shakespeare", "--address", server.address, "--follow",
                      "--run-dir", str(tmp_path / "run"), "--set", "run.steps=20", "--set", "elastic.max_workers=2", "--set",
                      "data.path=package:shksprdata/texts/hamlet_gut.txt", "--set", "model.width=32", "--set", "model.layers=1")
    assert code == 0, said
    assert re.match(rf"Ray [\d.]+ at {server.address}, 1 node\nsubmitted run-", said), said
    assert "step 0: Ray 2." in said, "its driver says so, too"
    assert "generation 1: 2 workers" in said and "step 20/20 · loss" in said and "done: 20 steps" in said, said
    lines = said.splitlines()
    assert len(lines) == len(set(lines)), said
    assert summary(tmp_path / "run")["state_sha256"] == undisturbed(load_recipe(tmp_path / "run" / "recipe.toml")).sha
    started = next(e for e in read_lines(tmp_path / "run" / "events.jsonl") if e["event"] == "run_started")
    assert started["run"] in said, "the submission and the run have one id"


@pytest.mark.timeout(400)  # on a busy machine
def test_a_run_that_is_not_seen_here_is_followed_asked_stopped_and_resumed(server: JobServer, here: Path,
                                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    """Its head's user has another home. Stopped in a step that takes longer than Ray waits, its driver is killed; the
    controller saves alone."""
    own = {**server.environment, "HOME": str(here)}
    address = ("--address", server.address)
    again = ("submit", "r.toml", *address, "--run-dir", f"~/{here.name}", "--follow")
    run = Path(server.environment["HOME"]) / here.name
    monkeypatch.syspath_prepend(here)
    first = elastic(here, own, *again)
    name = id_in(said := says(first, "submitted"))
    said += says(first, "checkpoint step-")
    assert "generation 1: 2 workers" in said
    assert_one_sentence(told(here, own, *again), "is alive", name, "ray job stop")
    code, status = told(here, own, "status", name, *address)
    assert code == 0 and "running" in status and "2 workers" in status, status
    code, scaled = told(here, own, "scale", name, "--workers", "1", *address)
    assert code == 0 and "asked for 1 workers" in scaled, scaled
    says(first, "generation 2: 1 worker")
    (here / "pace").write_text("2")  # a shard, of which one worker now has four
    subprocess.run([sys.executable, "-m", "ray.scripts.scripts", "job", "stop", name, *address], env=own, check=True,
                   capture_output=True)
    said = first.communicate(timeout=60)[0]
    assert first.returncode == SIGNALS["job stop"].code and SIGNALS["job stop"].says in said, said
    appears(run / "summary.json")
    stopped = summary(run)
    assert stopped["status"] == "interrupted"
    assert (run / "checkpoints" / f"step-{stopped['steps']:08d}" / "manifest.json").exists()
    (here / "pace").write_text("0")
    (here / "r.toml").write_text(OWN % (stopped["steps"] + 20))
    second = elastic(here, own, *again)
    said = second.communicate(timeout=120)[0]
    assert second.returncode == 0 and f"goes on from step {stopped['steps']}" in said, said
    assert id_in(said) != name
    assert summary(run)["state_sha256"] == undisturbed(load_recipe(run / "recipe.toml", locate=False)).sha
    assert not verify(run, check_checkpoint).problems


@sometimes("ctrl_c", 0.4)
@pytest.mark.timeout(400)  # on a busy machine
def test_ctrl_c_asks_and_stops_and_what_is_left_is_gone_on_from_without_the_run_directory(
        server: JobServer, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(here)
    (here / "r.toml").write_text(f'{OWN % 100_000}path = "{here / "kept"}"\n')
    again = ("submit", "r.toml", "--address", server.address, "--run-dir", "run", "--follow")
    ours, theirs = pty.openpty()
    first = elastic(here, server.environment, *again, stdin=theirs)
    says(first, "checkpoint step-")
    first.send_signal(signal.SIGINT)
    os.write(ours, b"s\n")
    said = first.communicate(timeout=60)[0]
    assert first.returncode == SIGNALS["stop"].code and "Detach" in said and "interrupted: " in said, said
    at = summary(here / "run")["steps"]
    shutil.rmtree(here / "run")
    (here / "pace").write_text("0")
    code, said = told(here, server.environment, *again, "--set", f"run.steps={at + 10}")
    assert code == LOSSES["directory"].code and f"goes on from step {at}" in said, said
    lines = [line["step"] for line in read_lines(here / "run" / "metrics.jsonl")]
    assert lines == list(range(at + 1, at + 11))
    assert summary(here / "run")["state_sha256"] == undisturbed(load_recipe(here / "run" / "recipe.toml", locate=False)).sha
    assert not verify(here / "run", check_checkpoint).problems
    other = told(here, server.environment, *again[:-3], "--run-dir", "new", "--follow", "--set", "run.seed=7")
    assert other[0] == 2 and "holds step" in other[1] and "run.seed = 7" in other[1], other


def closed_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def test_another_token_or_none_and_what_only_the_cluster_can_know_are_one_sentence(server: JobServer, here: Path) -> None:
    tokenless = {name: value for name, value in server.environment.items() if not name.startswith("RAY_AUTH")}
    stranger = {**server.environment, "RAY_AUTH_TOKEN": "0" * 32}
    (here / "heavy.py").write_text("import nowhere_to_be_found\nNet = 1\n")
    to = ("--address", server.address)
    for environment, arguments, words in (
            (stranger, ("submit", "r.toml", *to), ("token", "RAY_AUTH_TOKEN", server.address)),
            (tokenless, ("submit", "r.toml", *to), ("token", "RAY_AUTH_TOKEN", server.address)),
            (stranger, ("train", "r.toml", "--address", server.gcs, "--run-dir", "run"), ("token", "RAY_AUTH_TOKEN", server.gcs)),
            (server.environment, ("status", "nothing-1", *to), ("nothing-1", "ray job list"))):
        before = time.monotonic()
        assert_one_sentence(told(here, environment, *arguments), *words)
        assert time.monotonic() - before < 20, "about one, on a quiet machine"
    assert sorted(path.name for path in here.iterdir()) == ["heavy.py", "mine", "pace", "r.toml"]
    code, said = told(here, server.environment, "submit", "r.toml", *to, "--follow", "--set", "model.kind=heavy:Net")
    assert code == 2 and "nowhere_to_be_found" in said and "--runtime-env" in said, said


@pytest.mark.parametrize(("environment", "arguments", "words"), [
    ({}, ("submit", "r.toml", "--address", "http://{nobody}"), ("{nobody}", "http://HEAD:8265")),
    ({"RAY_ADDRESS": "http://{nobody}"}, ("submit", "r.toml"), ("{nobody}",)),
    ({"RAY_ADDRESS": "{nobody}"}, ("submit", "r.toml"), ("{nobody}", "RAY_ADDRESS")),
    ({"RAY_ADDRESS": "{nobody}"}, ("train", "r.toml"), ("{nobody}", "RAY_ADDRESS")),
    ({"RAY_ADDRESS": "http://{nobody}"}, ("train", "r.toml"), ("{nobody}", "elastic submit")),
    ({}, ("submit", "r.toml"), ("--address", "RAY_ADDRESS")),
    ({"RAY_ADDRESS": "{nobody}"}, ("submit", "r.toml", "--address", "other://x"), ("--address other://x",)),
])
@pytest.mark.usefixtures("no_ray")
def test_an_address_at_which_there_is_nothing_is_one_sentence(
        environment: dict[str, str], arguments: tuple[str, ...], words: tuple[str, ...], here: Path,
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What is given goes before what the environment has."""
    monkeypatch.chdir(here)
    monkeypatch.syspath_prepend(here)
    nobody = f"127.0.0.1:{closed_port()}"
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value.format(nobody=nobody))
    code = run([word.format(nobody=nobody) for word in arguments])
    out, err = capsys.readouterr()
    assert_one_sentence((code, out + err), *(word.format(nobody=nobody) for word in words))
    assert sorted(path.name for path in here.iterdir() if path.name != "__pycache__") == ["mine", "pace", "r.toml"]
