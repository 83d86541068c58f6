"""The command: exit codes, one sentence on stderr for every mistake, and no run directory where none should be."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from elastic import cli
from elastic.driver.doctor import Finding
from elastic.driver.trainer import Result
from elastic.errors import NonFiniteLoss, RecipeError, RunFailed
from elastic.observe.verify import Verdict

RECIPE = """[run]
steps = 4
[model]
kind = "nlp.gpt"
layers = 1
heads = 2
width = 16
context = 8
[data]
format = "text"
path = "plays.txt"
batch_size = 4
"""


@pytest.fixture
def recipe(tmp_path: Path, plays: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copy(plays, tmp_path)
    (tmp_path / "r.toml").write_text(RECIPE)
    return "r.toml"


def told(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr."""
    err = capsys.readouterr().err
    assert err.startswith("elastic: ") and err.count("\n") == 1 and "Traceback" not in err
    return err


@pytest.mark.parametrize(("arguments", "says"), [
    ("train", "Missing argument 'RECIPE'"),
    ("train r.toml --nonsense", "No such option: --nonsense"),
    ("nonsense", "No such command 'nonsense'"),
    ("train absent.toml", "neither a file nor a shipped name"),
    ("train r.toml --set run.steps=none", 'run.steps = "none" cannot work'),
    ("train r.toml --set run.stesp=5", "did you mean run.steps?"),
    ("train r.toml --set data.path=absent.txt", "does not exist"),
    ("train r.toml --set data.path=empty.txt", "empty.txt"),
    ("train r.toml --set data.path=binary.txt", "binary.txt"),
    ("train r.toml --set model.context=100000", "model.context"),
    ("train r.toml --set model.heads=3", "model.width = 16 must be a multiple of model.heads = 3"),
    ("train r.toml --set model.wdith=3", "model.wdith"),
    ("train r.toml --set model.kind=no_such_module:Net", "no_such_module"),
    ("train r.toml --set optimizer.no_decay=nothing_like_it", "optimizer.no_decay"),
    ("train r.toml --set backend.name=mxnet --set backend.device=cuda", "backend.device"),
    ("train r.toml --chaos kill:x", "--chaos"),
    ("train r.toml --run-dir used", "already in use"),
    ("train r.toml --run-dir plays.txt", "plays.txt"),
    ("resume absent", "no run directory"),
    ("scale absent --workers 2", "absent"),
    ("scale absent --workers two", "--workers"),
    ("scale absent --workers 2 --tensor 0", "--tensor"),
    ("status absent", "no run directory"),
    ("verify absent", "no run directory"),
    ("evaluate absent", "no good checkpoint at absent"),
    ("sample absent", "no good checkpoint at absent"),
    ("sample used", "no good checkpoint"),
    ("inspect used", "no good checkpoint at used"),
    ("export used --format torch --out x", "no good checkpoint at used"),
])
def test_a_mistake_is_one_sentence_and_exit_code_2(recipe: str, tmp_path: Path, arguments: str, says: str,
                                                   capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00" * 1000)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "kept").write_text("kept")
    assert cli.run(arguments.split()) == 2
    assert says in told(capsys)
    assert not (tmp_path / "runs").exists() and os.listdir(tmp_path / "used") == ["kept"]


def test_cuda_where_there_is_none(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    if os.path.exists("/dev/nvidia0"):
        pytest.skip("this machine has a GPU")
    assert cli.run(["train", recipe, "--set", "backend.device=cuda"]) == 2
    assert 'backend.device = "cuda"' in told(capsys)


def test_check_says_what_it_found(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["train", recipe, "--check"]) == 0
    out = capsys.readouterr().out
    assert "vocab_size" in out and re.search(r"model: \d+ parameters; up to 2 workers", out) and "are sound" in out
    assert not (tmp_path / "runs").exists()
    assert re.search(r"model: (\d+) parameters;",
                     out) and "\nr: recipe, data, model" in out, "a run without a name has its file's"
    assert cli.run(["train", recipe, "--check", "--set", 'model.freeze=["wte", "*.weight"]', "--set",
                    'model.thaw=["*.weight"]']) == 0
    embedding = 16 * int(re.findall(r"vocab_size (\d+)", out)[0])
    assert f" parameters, {embedding} of them frozen;" in capsys.readouterr().out


OWN = """import torch
class Rows:
    def __len__(self): return 8
    def __getitem__(self, i): return {"x": torch.ones(2) * i}
class Net(torch.nn.Linear):
    def __init__(self): super().__init__(2, 1)
    def loss(self, batch): return LOSS
"""


@pytest.mark.parametrize(("loss", "says"), [
    ('self(batch["x"]).mean()', ""),
    ('self(batch["y"]).mean()', "KeyError: 'y' (own_MODULE.py, line 7, in loss)"),
    ('(self(batch["x"]).sum(), 4, 1)', "(sum, weight)"),
    ('self(batch["x"]).mean().detach()', "without any trainable parameter behind it; freeze less")],
                         ids=["sound", "raises", "three", "detached"])
def test_check_tries_ones_own_loss(loss: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                   capsys: pytest.CaptureFixture[str],
                                   request: pytest.FixtureRequest) -> None:
    name = request.node.callspec.id
    monkeypatch.chdir(tmp_path)
    (tmp_path / f"own_{name}.py").write_text(OWN.replace("LOSS", loss))
    (tmp_path / "r.toml").write_text(f'[model]\nkind = "own_{name}:Net"\n[data]\nkind = "own_{name}:Rows"\nbatch_size '
                                     '= 4\n')
    assert cli.run(["train", "r.toml", "--check"]) == (2 if says else 0)
    if says:
        assert says.replace("MODULE", name) in told(capsys)
    else:
        assert "data: own_sound:Rows, 8 samples\nmodel: 3 parameters;" in capsys.readouterr().out


def test_check_refuses_what_cannot_fit(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["train", recipe, "--check", "--set", "model.width=65536", "--set", "model.layers=100"]) == 2
    assert "and this machine has" in told(capsys)


class FakeTrainer:
    """Ends as it is told to."""

    ending: Any = None
    follows = False

    def __init__(self, recipe: Any, run_dir: Path | None = None, address: str = "local", chaos: tuple[str, ...] = ()):
        self.recipe, self.run_dir, self.address, self.chaos = recipe, run_dir, address, chaos
        FakeTrainer.made = self

    def fit(self, on_step: Any, on_eval: Any, on_event: Any) -> Result:
        if isinstance(self.ending, BaseException):
            raise self.ending
        on_event({"event": "run_started", "step": 0})
        on_step({"step": 1, "loss": 2.0, "time": 1.0, "step_s": 1.0, "world_size": 2, "generation": 1, "samples": 4})
        on_eval({"step": 1, "eval": {"loss": 2.5}})
        summary = {"steps": 1, "wall_s": 2.0, "final_loss": 2.0, "eval": {"loss": 2.5}, "recoveries": 0,
                   "steps_lost": 0}
        return Result(self.ending, summary, Path("runs/x"), "it broke" if self.ending == "failed" else "")


@pytest.mark.parametrize(("ending", "code"), [
    ("done", 0), ("failed", 3), ("interrupted", 130), (RunFailed("no worker came."), 3),
    (NonFiniteLoss("The loss of step 3, shard 1 is NaN."), 3), (RecipeError("run.steps is wrong."), 2),
    (KeyboardInterrupt(), 130),
])
def test_exit_codes(recipe: str, ending: Any, code: int, monkeypatch: pytest.MonkeyPatch,
                    capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("elastic.driver.trainer.Trainer", FakeTrainer)
    monkeypatch.setattr(FakeTrainer, "ending", ending)
    arguments = ["train", recipe, "--run-dir", "here", "--address", "auto", "--chaos", "kill:0@1", "--chaos",
                 "kill:1@2"]
    assert cli.run(arguments) == code
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err and captured.err.count("\n") <= 1
    if ending == "done":
        assert "step 1: evaluation loss 2.5000" in captured.out and "done: 1 steps" in captured.out and not captured.err
    if ending == "failed":
        assert captured.err == "elastic: it broke\n"
    made = FakeTrainer.made
    assert (made.run_dir, made.address, made.chaos) == (Path("here"), "auto", ("kill:0@1", "kill:1@2"))


def test_verify_tells_sound_from_unsound(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "recipe.toml").write_text(RECIPE)
    started = {"time": 1.0, "event": "generation_started", "generation": 1, "step": 0, "world_size": 1,
               "workers": [{"rank": 0}]}
    (tmp_path / "events.jsonl").write_text(json.dumps(started) + "\n")
    steps = [{"step": k, "loss": 1.0, "time": 2.0, "step_s": 1.0, "world_size": 1, "generation": 1, "samples": 4}
             for k in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    assert cli.run(["verify", str(tmp_path)]) == 0
    assert capsys.readouterr().out.endswith("sound\n")
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps[::2]))
    assert cli.run(["verify", str(tmp_path)]) == 3
    captured = capsys.readouterr()
    assert "step 3 where step 2 should be" in captured.err and captured.out.endswith("not sound\n")


def test_a_replay_s_problems_are_the_run_s(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("elastic.driver.replay.verify_run", lambda run_dir: Verdict())
    monkeypatch.setattr("elastic.driver.replay.replay", lambda *arguments: asked.append(arguments)
                        or Verdict(["other bits"], ["trained again"]))
    assert cli.run(["verify", "x"]) == 0 and not asked
    assert cli.run(["verify", "x", "--replay", "--address", "auto"]) == 3 and asked == [(Path("x"), "auto", False)]
    captured = capsys.readouterr()
    assert captured.err == "elastic: other bits\n" and captured.out.endswith("trained again\nnot sound\n")


def test_what_is_given_arrives(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Every option of the commands that hand theirs on."""
    given: list[Any] = []
    monkeypatch.setattr(cli, "fit", lambda trainer: 0)
    monkeypatch.setattr("elastic.driver.trainer.Trainer.resume", lambda *arguments: given.append(arguments))
    monkeypatch.setattr("elastic.driver.trainer.scale", lambda *arguments,
                        **degrees: given.append((*arguments, degrees)))
    monkeypatch.setattr("elastic.driver.inference.sample", lambda *arguments: given.append(arguments) or "KING:")
    monkeypatch.setattr("elastic.driver.inference.evaluate", lambda *arguments: given.append(arguments)
                        or {"loss": 1.5})
    for command in ("resume x --set run.steps=9 --set optimizer.lr=0.1 --address auto --chaos kill:0@1 --trust",
                    "scale x --workers 4 --tensor 2 --pipeline 1 --expert 2 --trust",
                    "sample s3://b/x --prompt KING --tokens 5 --temperature 0.5 --seed 3 --trust",
                    "evaluate s3://b/x --trust"):
        assert cli.run(command.split()) == 0
    assert given == [(Path("x"), ["run.steps=9", "optimizer.lr=0.1"], "auto", ("kill:0@1",), True),
                     (Path("x"), 4, True, {"tensor": 2, "pipeline": 1, "expert": 2}),
                     ("s3://b/x", "KING", 5, 0.5, 3, True), ("s3://b/x", True)]
    assert capsys.readouterr().out.endswith("KING:\nloss 1.5000\n")


def test_doctor_tells_ill_from_well(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ill = Finding("torch", "does not import", False, "reinstall it")
    for found, code in (([Finding("python", "3.11"), Finding("gpu", "none", None)], 0),
                        ([ill, Finding("python", "3.11")], 3)):
        monkeypatch.setattr("elastic.driver.doctor.findings", lambda: iter(found))
        assert cli.run(["doctor"]) == code
    assert "reinstall it" in capsys.readouterr().out


def test_the_command_is_installed_and_loads_no_framework_for_help() -> None:
    script = ("import sys\nfrom elastic import cli\ncode = cli.run(['--help'])\n"
              "heavy = {'ray', 'torch', 'tensorflow', 'mxnet'} & set(sys.modules)\nassert not heavy, "
              "heavy\nsys.exit(code)")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for command in ("train", "resume", "scale", "status", "evaluate", "sample", "verify", "inspect", "export", "plan",
                    "doctor"):
        assert f"  {command} " in done.stdout


def test_a_script_takes_what_it_needs_from_one_place_and_ray_comes_with_the_trainer() -> None:
    script = ("import sys, elastic\nfrom elastic import BadCheckpoint, Recipe, RecipeError, RunFailed, "
              "load_recipe\nfrom elastic import chaos\nheavy = {'ray', 'torch', 'tensorflow', 'mxnet'} & "
              "set(sys.modules)\nassert not heavy, heavy\nfrom elastic.driver import follow, trainer\nassert "
              "elastic.Trainer is trainer.Trainer and elastic.Result is follow.Result\nassert issubclass(RecipeError, "
              "elastic.UserError) and issubclass(elastic.NonFiniteLoss, RunFailed)\nassert not [name for name in "
              "elastic.__all__ if getattr(elastic, name).__name__ != name]\nassert not hasattr(elastic, "
              "'trainer')\nfrom elastic.trainer import Trainer  # as users' modules of older runs have it\nimport "
              "elastic.backend, elastic.layers, elastic.model.backend\nassert Trainer is trainer.Trainer and "
              "elastic.backend.Chain is elastic.model.backend.Chain and elastic.layers.Chained\n")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
