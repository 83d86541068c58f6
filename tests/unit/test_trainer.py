"""What the trainer finds out before a worker starts."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from elastic.controller.run_log import RunLog
from elastic.driver import trainer as door
from elastic.driver.follow import Result
from elastic.driver.replay import replay
from elastic.driver.rundir import held
from elastic.driver.trainer import Trainer
from elastic.errors import RecipeError, UserError
from elastic.messages import Job
from elastic.observe.jsonl import JsonLines, read_lines
from elastic.recipe import Recipe, dumps
from tests.support import modules
from tests.support.inprocess import fit, gpt_recipe, module_recipe

pytest.importorskip("torch", reason="torch is not installed")


def small(**model: Any) -> Trainer:
    return Trainer(module_recipe("Small", 4, model=model))


@pytest.mark.parametrize(("changes", "words"), [
    ({"model": {"freeze": ["first.*"]}}, "model.freeze = 'first.*' matches no parameter; names look like line.weight, "
                                         "line.bias"),
    ({"model": {"freeze": ["*"]}}, "model.freeze leaves no parameter"),
    ({"optimizer": {"no_decay": ["*.bais"]}}, "optimizer.no_decay = '*.bais' matches no parameter"),
])
def test_patterns_are_held_against_a_users_own_module(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Trainer(module_recipe("Small", 4, **changes)).check()
    assert words in str(caught.value)


@pytest.mark.parametrize(("weights", "words"), [
    ({"line.weight": (1, 7)}, "line.weight of shape (1, 7), the model has shape (1, 6)"),
    ({"row.weight": (1, 6)}, "row.weight of shape (1, 6), the model has no such parameter, but line.weight"),
    ({}, "none.safetensors' cannot be read"),
])
def test_starting_weights_are_held_against_the_model(weights: dict[str, Any], words: str, tmp_path: Path) -> None:
    file = tmp_path / "none.safetensors"
    save_file({name: np.zeros(shape, np.float32) for name, shape in weights.items()}, file)
    trainer = small(init=str(file))
    if not weights:
        file.unlink()
    with pytest.raises(RecipeError) as caught:
        trainer.check()
    assert words in str(caught.value)


def test_weights_that_fit_are_sound(tmp_path: Path) -> None:
    save_file({"line.weight": np.zeros((1, 6), np.float32)}, tmp_path / "w.safetensors")
    trainer = small(init=str(tmp_path / "w.safetensors"), freeze=["*.bias"])
    assert trainer.check() == {"key": "100 samples"} and trainer.num_steps == 4


def test_this_machine_s_gpu_matters_only_to_workers_of_this_machine() -> None:
    if os.path.exists("/dev/nvidia0"):
        pytest.skip("this machine has a GPU")
    recipe = module_recipe("Small", 4, backend={"device": "cuda"})
    with pytest.raises(UserError, match="this machine has none"):
        Trainer(recipe).check()
    assert Trainer(recipe, address="auto").check() == {"key": "100 samples"}


def began(run_dir: Path, recipe: Recipe) -> Path:
    run_dir.mkdir()
    (run_dir / "recipe.toml").write_text(dumps(recipe))
    return run_dir


@pytest.mark.parametrize("change", ["run.seed=1", "model.width=7", "model.freeze=[\"*.bias\"]",
                                    "model.kind=tests.support.modules:Net",
                                    "data.batch_size=32", "data.shuffle=false", "data.eval_fraction=0.5",
                                    "data.options={size = 50}",
                                    "data.kind=tests.support.modules:Augmented", "elastic.logical_shards=4",
                                    "optimizer.name=sgd",
                                    "optimizer.ema=0.9"])
def test_a_resumed_run_stays_the_run_it_was(change: str, tmp_path: Path) -> None:
    run_dir, key = began(tmp_path / "run", module_recipe("Small", 4)), change.partition("=")[0]
    with pytest.raises(RecipeError, match=f"^{key} = .* is not what this run began with, .*; leave it as it was") as caught:
        Trainer.resume(run_dir, [change])
    assert str(caught.value).count(". ") == 0


def test_a_resumed_run_may_be_longer_and_on_other_machines(tmp_path: Path) -> None:
    run_dir = began(tmp_path / "run", module_recipe("Small", 4, elastic={"logical_shards": 8}))
    changes = ["run.steps=9", "run.name=again", "elastic.max_workers=8", "elastic.reduction=fast", "optimizer.lr=0.1",
               "backend.threads=2",
               "checkpoint.keep=9", "run.eval_every=5"]
    recipe = Trainer.resume(run_dir, changes).recipe
    assert (recipe.run.steps, recipe.elastic.max_workers, recipe.optimizer.lr, recipe.backend.threads) == (9, 8, 0.1, 2)


def test_a_resumed_run_finds_its_data_elsewhere_but_takes_no_other(plays: Path, tmp_path: Path,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run_dir, file = tmp_path / "run", Path(shutil.copy(plays, tmp_path))
    fit(run_dir, gpt_recipe(file, 2, elastic={"max_workers": 1})).assert_sound(2)
    moved = file.rename(tmp_path / "moved.txt")
    assert Trainer.resume(run_dir, [f"data.path={moved}"]).check()["num_tokens"] > 0
    moved.write_text(moved.read_text().replace("not", "nor"))
    with pytest.raises(RecipeError, match="data.path = .*moved.txt.* holds other data than this run began with"):
        Trainer.resume(run_dir, [f"data.path={moved}"]).check()


@pytest.mark.parametrize(("change", "now", "then"), [
    ({"size": 101}, "101 samples", "100 samples"),
    ({"mark": "b"}, "100 samples, key() = 'b'", "100 samples, key() = 'a'")])
def test_a_resumed_run_takes_no_other_data_set_of_ones_own(change: dict[str, Any], now: str, then: str, tmp_path: Path,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    """What the data set is follows from something outside the recipe, as files do."""
    if "mark" in change:
        monkeypatch.setattr(modules.Rows, "key", lambda self: self.mark, raising=False)
        monkeypatch.setattr(modules.Rows, "mark", "a", raising=False)
    run_dir = tmp_path / "run"
    fit(run_dir, module_recipe("Small", 2, elastic={"max_workers": 1})).assert_sound(2)
    assert Trainer.resume(run_dir, ["run.steps=4"]).check()["key"] == then
    if "mark" in change:
        monkeypatch.setattr(modules.Rows, "mark", change["mark"])
    else:
        monkeypatch.setattr(modules.Rows, "__len__", lambda self: change["size"])
    with pytest.raises(RecipeError) as caught:
        Trainer.resume(run_dir, ["run.steps=4"]).check()
    assert str(caught.value).startswith(f"data.kind = 'tests.support.modules:Rows' has {now}, and this run began with "
                                        f"{then}; put that data back")
    with pytest.raises(RecipeError) as caught:
        replay(run_dir)
    assert str(caught.value) == (f"data.kind = 'tests.support.modules:Rows' has {now}, and this run began with {then}; "
                                 "put that data back, then replay it again.")


def test_a_best_by_a_figure_needs_something_to_evaluate_on() -> None:
    best = {"best": "eval.wer", "best_mode": "min"}
    with pytest.raises(RecipeError, match='checkpoint.best = "eval.wer" .* nothing is set aside to evaluate on; set '
                                          'data.eval_fraction'):
        Trainer(module_recipe("Small", 4, checkpoint=best)).check()
    assert Trainer(module_recipe("Small", 4, checkpoint=best, data={"eval_fraction": 0.1})).check()
    assert Trainer(module_recipe("Small", 4)).check()


# Of those who would start a run in one directory, one does.

HOLD = """
import sys, time
from pathlib import Path
from elastic.driver.rundir import held
with held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What controllers would be started with: there is no Ray. A callable put first is called when one would be
    connected to."""
    found: list[Any] = []

    @contextmanager
    def connected(*arguments: Any) -> Any:
        for act in [act for act in found if callable(act)]:
            found.remove(act)
            act()
        yield "here:1"

    monkeypatch.setattr(door, "connected", connected)
    monkeypatch.setattr(door, "start_controller", lambda job, recipe, begin: found.append(begin))
    monkeypatch.setattr(door, "see_out", lambda controller, run_id, run_dir, telling, place: Result("done", {}, run_dir))
    return found


def cut_off(run_dir: Path) -> Path:
    """A run without a checkpoint that was killed as a whole."""
    began(run_dir, module_recipe("Small", 4))
    metrics, events = JsonLines(run_dir / "metrics.jsonl"), JsonLines(run_dir / "events.jsonl")
    for step in (1, 2):
        metrics.append({"step": step, "loss": 1.0, "generation": 3})
    events.append({"event": "run_started", "generation": 3, "step": 0, "time": 1.0})
    (run_dir / "journal.jsonl").write_text("{}\n")
    (run_dir / "summary.json").write_text("{}")
    return run_dir


def content(run_dir: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run_dir.iterdir() if path.is_file() and path.name != "driver.lock"}


def test_the_second_of_two_starts_is_refused_and_changes_nothing(started: list[Any], tmp_path: Path) -> None:
    run_dir = cut_off(tmp_path / "run")
    early, before = Trainer.resume(run_dir), content(run_dir)
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(run_dir)], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    for start in (early.fit, lambda: Trainer.resume(run_dir)):
        with pytest.raises(UserError, match="is alive, or is being started; stop it first, or look with `elastic "
                                            "status") as caught:
            start()
        assert str(caught.value).count(". ") == 0
    assert content(run_dir) == before and not started
    other.send_signal(signal.SIGKILL)
    other.wait()
    early.fit()  # the lock fell with its holder
    assert len(started) == 1 and not read_lines(run_dir / "metrics.jsonl") and not (run_dir / "summary.json").exists()


def test_a_run_whose_driver_is_gone_is_not_started_again(started: list[Any], tmp_path: Path) -> None:
    run_dir = cut_off(tmp_path / "run")
    trainer, before = Trainer.resume(run_dir), content(run_dir)
    controller = RunLog(run_dir)
    with pytest.raises(UserError, match="is alive"):
        trainer.fit()
    assert content(run_dir) == before and not started
    controller.close()
    trainer.fit()
    assert len(started) == 1


def test_a_run_that_went_on_since_it_was_looked_at_goes_on_from_there(started: list[Any], tmp_path: Path) -> None:
    run_dir = cut_off(tmp_path / "run")
    trainer = Trainer.resume(run_dir)
    started.append(lambda: JsonLines(run_dir / "events.jsonl").append({"event": "generation_started", "generation": 8,
                                                                       "step": 2}))
    trainer.fit()
    assert [(begin.generation, begin.events, begin.rewound_from, begin.written) for begin in started] == [(8, 2, 2, 0)]


def test_a_run_that_became_another_since_it_was_looked_at_is_left_alone(started: list[Any], tmp_path: Path) -> None:
    run_dir = cut_off(tmp_path / "run")
    trainer = Trainer.resume(run_dir)
    started.append(lambda: (run_dir / "recipe.toml").write_text(dumps(module_recipe("Small", 9))))
    with pytest.raises(UserError, match="resumed by somebody else meanwhile, with another recipe"):
        trainer.fit()
    assert len(read_lines(run_dir / "metrics.jsonl")) == 2 and not started


def test_two_new_runs_in_one_directory_are_one(started: list[Any], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    started.append(lambda: began(run_dir, module_recipe("Small", 9)))
    with pytest.raises(UserError, match="is already in use"):
        Trainer(module_recipe("Small", 4), run_dir).fit()
    assert (run_dir / "recipe.toml").read_text() == dumps(module_recipe("Small", 9)) and not started


@pytest.mark.parametrize("auto", [False, True])
def test_data_and_model_are_opened_once_before_a_run(auto: bool, started: list[Any], tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def counted(init: Any) -> Any:
        return lambda self, *keys, **more: made.append(type(self).__name__) or init(self, *keys, **more)

    for kind in (modules.Rows, modules.Small):
        monkeypatch.setattr(kind, "__init__", counted(kind.__init__))
    trainer = Trainer(module_recipe("Small", 4, mesh={"auto": auto}), tmp_path / "run")
    trainer.fit()
    assert sorted(made) == ["Rows", "Small"] and len(started) == 1 and trainer.opened is None
    Trainer(module_recipe("Small", 4)).check()
    assert len(made) == 4


def test_what_is_to_be_known_of_data_and_model_goes_to_the_controller_and_into_the_run_s_events(
        started: list[Any], plays: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    jobs: list[Job] = []
    monkeypatch.setattr(door, "start_controller", lambda job, recipe, begin: jobs.append(job))
    (tmp_path / "plays").mkdir()
    (tmp_path / "plays" / "a.txt").write_text(plays.read_text())
    (tmp_path / "plays" / ".b.txt").write_text(plays.read_text())
    text = {"format": "text", "path": [str(tmp_path / "plays")], "kind": ""}
    own = {"kind": "tests.support.torch_modules:EvalNorm"}
    gpt = {"kind": "nlp.gpt", "layers": 1, "heads": 2, "width": 16, "context": 8}
    for number, changes in enumerate(({"model": own},
                                      {"data": {**text, "options": {}}, "model": gpt, "mesh": {"auto": True}})):
        Trainer(module_recipe("Small", 4, **changes), tmp_path / f"run-{number}").fit()
    ((note,), texts) = (job.notes for job in jobs)
    assert note[0] == "noted" and "EvalNorm is made with norm in evaluation mode" in note[1]
    assert [name for name, _ in texts] == ["noted", "mesh_chosen"] and ".b.txt" in texts[0][1]


def test_a_start_that_was_killed_at_once_has_left_nothing(started: list[Any], tmp_path: Path) -> None:
    with held(tmp_path / "run"):
        pass
    Trainer(module_recipe("Small", 4), tmp_path / "run").fit()
    assert len(started) == 1


@pytest.mark.parametrize(("workers", "degrees", "words"), [
    (9, {}, "--workers 9 is outside elastic.min_workers = 1 .. elastic.max_workers = 2"),
    (1, {"tensor": 2}, "--workers 1 is less than a replica of this mesh; write --workers 2 or more"),
    (2, {"tensor": 3}, "needs 3 workers, and elastic.max_workers = 2"),
])
def test_a_scale_that_no_run_could_follow(workers: int, degrees: dict[str, int], words: str, tmp_path: Path,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = began(tmp_path / "run", module_recipe("Small", 4, elastic={"max_workers": 2}))
    monkeypatch.setattr(door, "live_of", lambda run_dir: {"address": "nowhere:1", "run_id": "run-1"})
    with pytest.raises(UserError, match=re.escape(words)):
        door.scale(run_dir, workers, **degrees)


@pytest.mark.parametrize("given", ["s3://bucket/run", Path("s3://bucket/run"), "gs://bucket/a run", "file:///tmp/run"])
def test_a_uri_is_no_run_directory(given: Any, started: list[Any]) -> None:
    uri = str(given).replace(":/", "://", 1) if isinstance(given, Path) else given
    for act in (Trainer(module_recipe("Small", 4), given).fit, lambda: Trainer.resume(given)):
        with pytest.raises(UserError, match=re.escape(f'The run directory {uri} is a URI')) as caught:
            act()
        assert f'checkpoint.path = "{uri}"' in str(caught.value) and "\n" not in str(caught.value)
    assert not started and not Path("s3:").exists()
