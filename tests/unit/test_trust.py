"""Whose word imports a user's own modules: nothing of them runs where a place of somebody else's names them, unless --trust is given."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

from elastic import cli
from elastic.checkpoint.manifest import Manifest
from elastic.driver import trainer
from elastic.driver.trust import check_trust, own
from elastic.observe.verify import Verdict
from elastic.recipe import Recipe, dumps, parse
from elastic.worker.saver import Saver
from tests.support.checkpoints import Arrays, values

NAMES = "strange_model:Net"
MODULE = "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\nraise ImportError('this far')\n"


def recipe(kind: str = NAMES, data: str = "") -> Recipe:
    tree = {"kind": data} if data else {"format": "text", "path": "plays.txt"}
    return parse({"run": {"steps": 1}, "model": {"kind": kind}, "data": tree}, locate=False)


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of a model in a module that leaves a mark when it is imported, with one checkpoint; the current directory
    holds the module."""
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "strange_model.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.syspath_prepend(str(tmp_path / "here"))
    (tmp_path / "here" / "plays.txt").write_text("to be or not to be " * 100)
    return make_run(tmp_path / "run", recipe())


def make_run(folder: Path, of: Recipe) -> Path:
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "recipe.toml").write_text(dumps(of))
    (folder / "summary.json").write_text('{"status": "done"}')
    saver = Saver("w0", str(folder / "checkpoints"), Manifest(0, 0, 0, 0, dumps(of), extra={"info": {}}), 4,
                  lambda part: None)
    assert saver.leave(Arrays(values(1), 1), 1, {}, ())
    return folder


def ran() -> bool:
    sys.modules.pop("strange_model", None)
    mark = Path("ran")
    found = mark.exists()
    mark.unlink(missing_ok=True)
    return found


def of_somebody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on all files are another user's."""
    uid = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: uid + 1)


@pytest.mark.parametrize("command", ["evaluate {}", "evaluate {}/checkpoints/step-00000001", "sample {}", "resume {}",
                                     "verify {} --replay"])
def test_what_somebody_else_s_run_names_is_not_imported(command: str, run_dir: Path, monkeypatch: pytest.MonkeyPatch,
                                                        capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("elastic.driver.replay.verify", lambda *arguments: Verdict())
    monkeypatch.setattr(trainer.Trainer, "fit", lambda self, *calls: self.check())
    arguments = command.format(run_dir).split()
    of_somebody_else(monkeypatch)
    assert cli.run(arguments) == 2
    told = capsys.readouterr().err
    assert not ran()
    assert f"belongs to another user's run (uid {os.getuid()}), and" in told
    assert told.count("\n") == 1 and f'would import strange_model (model.kind = "{NAMES}"); look at what that would run, then add --trust' in told
    assert cli.run([*arguments, "--trust"]) == 2 and ran(), "with --trust it is imported"
    assert "cannot be imported (ImportError: this far)" in capsys.readouterr().err


def test_ones_own_run_is_trusted_and_a_checkpoint_alone_is_not(run_dir: Path, tmp_path: Path,
                                                               capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["evaluate", str(run_dir)]) == 2 and ran()
    alone = shutil.copytree(run_dir / "checkpoints" / "step-00000001", tmp_path / "alone")
    assert "cannot be imported" in capsys.readouterr().err
    assert cli.run(["evaluate", f"file://{run_dir}/checkpoints/step-00000001"]) == 2 and ran()
    assert cli.run(["evaluate", str(alone)]) == 2 and not ran()
    assert f"{alone} lies in no run directory of yours, and" in capsys.readouterr().err


def test_a_checkpoint_that_was_put_into_ones_own_run_names_nothing_else(run_dir: Path, tmp_path: Path,
                                                                           capsys: pytest.CaptureFixture[str]) -> None:
    for name, kind in (("shipped", "nlp.gpt"), ("mine", "own_model:Net")):
        mine = make_run(tmp_path / name, recipe(kind))
        shutil.rmtree(mine / "checkpoints" / "step-00000001")
        shutil.copytree(run_dir / "checkpoints" / "step-00000001", mine / "checkpoints" / "step-00000001")
        assert cli.run(["evaluate", str(mine)]) == 2 and not ran()
        assert f"names other modules than the recipe.toml of the run directory {mine}, and" in capsys.readouterr().err
    (tmp_path / "linked").symlink_to(run_dir / "checkpoints" / "step-00000001")
    assert own(tmp_path / "linked") == {("model.kind",
                                         NAMES)} and not own("s3://bucket/run") and not own(tmp_path / "absent")


def test_what_looks_at_arrays_alone_imports_nothing(run_dir: Path, tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    of_somebody_else(monkeypatch)
    for command in ("export {} --format safetensors --out {}/w.safetensors", "export {} --format torch --out {}/w.pt",
                    "inspect {}"):
        assert cli.run(command.format(run_dir, tmp_path).split()) == 0 and not ran(), command
    assert cli.run(["verify", str(run_dir)]) == 3 and not ran(), "a run without a step, but its hashes are checked"


def test_kinds_of_the_platform_need_no_trust_and_both_of_ones_own_are_named(tmp_path: Path) -> None:
    check_trust(recipe("nlp.gpt"), "s3://bucket/run", False)
    check_trust(recipe(NAMES, "strange_data:Rows"), "s3://bucket/run", True)
    with pytest.raises(trainer.UserError) as caught:
        check_trust(recipe(NAMES, "strange_data:Rows"), "s3://KEY:SECRET@bucket/run", False)
    assert f'import strange_model (model.kind = "{NAMES}") and strange_data (data.kind = "strange_data:Rows"); look' in str(caught.value)
    assert "SECRET" not in str(caught.value)
