"""What a run leaves on disk, and what it makes of it: fallbacks, last words, orphans, disks that fail. On threads."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from elastic.checkpoint.manager import read_manifest, verify
from elastic.controller import thread_fleet as inprocess_fleet
from elastic.controller.checkpoints import Checkpoints
from elastic.observe.jsonl import JsonLines, read_lines
from elastic.storage.store import Store
from tests.support import modules
from tests.support.inprocess import Result, Run, fit, module_recipe
from tests.support.sampling import sample

pytest.importorskip("torch", reason="torch is not installed")
# a saver's thread dies with its process
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")

STEPS = 60


def recipe(**changes: Any) -> Any:
    checkpoint = {"every_steps": 10, "keep": 9, **changes.pop("checkpoint", {})}
    return module_recipe("Small", STEPS, checkpoint=checkpoint, **changes)


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Result:
    result = fit(tmp_path_factory.mktemp("one") / "run", recipe(elastic={"max_workers": 1}))
    result.assert_sound(STEPS)
    return result


def names(run_dir: Path) -> list[str]:
    return sorted(path.parent.name for path in run_dir.glob("checkpoints/*/manifest.json"))


def interrupted(run_dir: Path, at: int = 35, **changes: Any) -> Result:
    result = fit(run_dir, recipe(**changes), hooks={at: lambda run: run.interrupt()})
    assert result.outcome.status == "interrupted"
    return result


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(bytes(content))


# The fallback chain.


def test_a_bad_checkpoint_is_reported_left_in_place_and_an_older_one_taken(oracle: Result, tmp_path: Path) -> None:
    interrupted(tmp_path)
    newest, before, *_ = reversed(names(tmp_path))
    flip(next((tmp_path / "checkpoints" / newest).glob("state-0002-*")))
    flip(next((tmp_path / "checkpoints" / before).glob("state-0000-*")))
    bad = {path: path.read_bytes() for name in (newest, before) for path in (tmp_path / "checkpoints" / name).iterdir()}
    result = fit(tmp_path, recipe(elastic={"max_workers": 2}))
    assert result.outcome.status == "done" and result.sha == oracle.sha and result.steps == oracle.steps
    rejected = result.named("checkpoint_rejected")
    assert [Path(e["path"]).name for e in rejected] == [newest, before]
    assert all("does not have the hash" in e["reason"] for e in rejected)
    loaded = result.named("loaded")
    assert len(loaded) == 1 and Path(loaded[0]["path"]).name == names(tmp_path)[-7 + 2] or loaded[0]["bytes"] > 0
    assert loaded[0]["step"] == result.named("rewound")[-1]["to"] < int(before.removeprefix("step-"))
    later = {path: path.read_bytes() for path in bad if path.exists()}
    assert all(later[path] == content or path.parent.name in {Path(e["path"]).name
                                                              for e in result.named("checkpoint_committed")}
               for path, content in bad.items() if path in later), "a bad checkpoint was touched by somebody who did not save it again"


def test_with_every_checkpoint_bad_it_starts_anew(oracle: Result, tmp_path: Path) -> None:
    interrupted(tmp_path)
    bad = names(tmp_path)
    for name in bad:
        flip(next((tmp_path / "checkpoints" / name).glob("state-0001-*")))
    result = fit(tmp_path, recipe())
    assert result.outcome.status == "done" and result.sha == oracle.sha and result.steps == oracle.steps
    assert sorted(Path(e["path"]).name for e in result.named("checkpoint_rejected")) == bad and not result.named("loaded")


def test_every_rank_loads_its_part(oracle: Result, tmp_path: Path) -> None:
    interrupted(tmp_path, elastic={"max_workers": 1})
    result = fit(tmp_path, recipe(elastic={"max_workers": 3}))
    assert result.sha == oracle.sha
    (loaded,) = result.named("loaded")
    assert loaded["bytes"] > 0 and loaded["seconds"] >= 0 and loaded["path"].endswith(f"step-{loaded['step']:08d}")


# Last words.


def test_below_what_is_needed_one_survivor_saves_and_nothing_is_lost(oracle: Result, tmp_path: Path) -> None:
    """One of three falls, another writes all of it down; then both fall as well, and three others go on from the very
    step."""
    run = Run(tmp_path, recipe(elastic={"min_workers": 3, "max_workers": 3}), ["kill:2@26/backward"], capacity=3)
    run.hooks[5] = lambda run: run.fleet.grow(1)
    savers = []

    def on_event(name: str) -> None:
        state = run.controller.state
        if name == "checkpoint_committed" and state.phase == "waiting" and not savers:
            savers.extend(state.savers)
            for worker in list(state.ready):
                run.controller.give_up_on(worker, "killed")
            run.fleet.grow(3)

    run.run_log.on_event = on_event
    result = run.fit()
    assert len(savers) == 1 and len(result.named("worker_lost")) == 3
    result.assert_sound(STEPS)
    assert result.sha == oracle.sha and not result.named("rewound")
    (alone,) = [e for e in result.named("checkpoint_committed") if e["step"] % 10]
    assert alone["step"] == result.named("loaded")[0]["step"] == 25
    assert read_manifest(Store.open(tmp_path / "checkpoints"),
                         f"step-{alone['step']:08d}").files[0].name.startswith("state-0000-of-0001-")


def test_what_is_saved_already_is_not_saved_again(oracle: Result, tmp_path: Path) -> None:
    run = Run(tmp_path, recipe(elastic={"min_workers": 2, "max_workers": 2}, checkpoint={"every_steps": 1}),
              ["kill:1@26/forward"], capacity=2)
    run.hooks[5] = lambda run: run.fleet.grow(1)
    run.run_log.on_event = lambda name: run.fleet.grow(2) if name == "waiting" else None
    result = run.fit()
    assert result.outcome.status == "done" and result.sha == oracle.sha
    steps = [e["step"] for e in result.named("checkpoint_committed")]
    assert steps == sorted(set(steps))


class Deaf(Exception):
    """The controller is gone, and nobody comes in its place."""


def orphaned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every_steps: int, **options: Any) -> None:
    """The controller falls silent at step 12, or as soon as a checkpoint of step 10 is committed; the workers go on,
    give up, and save."""
    monkeypatch.setattr(inprocess_fleet, "ORPHAN_TIMEOUT_S", 0.3)
    run = Run(tmp_path, recipe(elastic={"max_workers": 2}, checkpoint={"every_steps": every_steps}), **options)

    def fall(run: Run, step: int = 12) -> None:
        if every_steps and not [e for e in read_lines(tmp_path / "events.jsonl")
                                if (e["event"], e["step"]) == ("checkpoint_committed", 10)]:
            run.hooks[step + 1] = partial(fall, step=step + 1)
            return

        def deaf(*arguments: Any) -> int:
            raise ConnectionError("the controller is gone")

        run.fleet.closed = True  # who starts workers is gone with it
        run.controller.receive = run.controller.deliver = deaf  # type: ignore[method-assign]
        raise Deaf

    run.hooks[12] = fall
    look = modules.Rows.__getitem__
    with monkeypatch.context() as patch:  # the run must not end before they notice
        patch.setattr(modules.Rows, "__getitem__", lambda self, index: time.sleep(0.002) or look(self, index))
        with pytest.raises(Deaf):
            run.fit()
        for thread in run.fleet.threads:
            thread.join(20)
            assert not thread.is_alive()
    run.run_log.close()
    run.controller.journal.lines.close()


def test_orphans_write_down_what_they_have_with_their_lines(oracle: Result, tmp_path: Path,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    """A later run goes on from there: no step twice, none lost."""
    orphaned(tmp_path, monkeypatch, 0)
    (name,) = names(tmp_path)
    manifest = verify(Store.open(tmp_path / "checkpoints"), name)
    known = max(f["step"] for f in read_lines(tmp_path / "metrics.jsonl"))
    assert manifest.step >= known >= 12
    carried = [f["step"] for f in manifest.extra["lines"]]
    assert set(range(known + 1, manifest.step + 1)) <= set(carried)
    result = fit(tmp_path, recipe(elastic={"max_workers": 3}))
    assert result.outcome.status == "done" and result.steps == list(range(1, STEPS + 1))
    assert result.sha == oracle.sha
    assert result.named("loaded")[0]["step"] == manifest.step and not result.named("rewound")


@pytest.mark.parametrize("chaos", [(), ("kill:1@8/reduction",)])
def test_an_orphan_s_checkpoint_brings_all_lines_since_the_one_before(oracle: Result, tmp_path: Path,
                                                                      monkeypatch: pytest.MonkeyPatch,
                                                                      chaos: tuple[str, ...]) -> None:
    """The machine of the run directory falls with the controller: what was not synced when the last checkpoint was
    committed is gone."""
    orphaned(tmp_path, monkeypatch, 5, chaos=chaos)
    *_, before, name = names(tmp_path)
    store, known = Store.open(tmp_path / "checkpoints"), read_lines(tmp_path / "metrics.jsonl")
    saved, manifest = read_manifest(store, before).step, verify(store, name)
    assert manifest.step > max(f["step"] for f in known) > saved >= 10
    assert [f["step"] for f in manifest.extra["lines"] if "eval" not in f] == list(range(saved + 1, manifest.step + 1))
    JsonLines(tmp_path / "metrics.jsonl").cut_back(saved)
    result = fit(tmp_path, recipe(elastic={"max_workers": 3}))
    assert result.outcome.status == "done" and result.steps == list(range(1, STEPS + 1))
    assert result.sha == oracle.sha and not result.named("rewound")
    assert result.named("loaded")[0]["step"] == manifest.step


# Disks that fail.


@pytest.mark.parametrize("how", sample(["error", "short", "full", "delay", "crash"], 3))
def test_a_disk_that_fails_in_the_middle_costs_one_checkpoint(how: str, oracle: Result, tmp_path: Path) -> None:
    result = fit(tmp_path, recipe(), [f"disk:1@20/{how}"])
    result.assert_sound(STEPS)
    assert result.sha == oracle.sha
    assert [e["fault"] for e in result.named("chaos")] == [f"disk:1@20/{how}"]
    steps = [e["step"] for e in result.named("checkpoint_committed")]
    if how == "delay":
        assert steps == [10, 20, 30, 40, 50, 60] and not result.named("checkpoint_rejected")
    elif how == "crash":
        assert len(result.named("worker_lost")) == 1 and 60 in steps
    else:
        assert 20 not in steps and steps[-1] == 60
        (rejected,) = result.named("checkpoint_rejected")
        assert rejected["step"] == 20 and Path(rejected["path"]).name == "step-00000020" and "\n" not in rejected["reason"]
        assert not list((tmp_path / "checkpoints").glob("step-00000020/*.safetensors")), "what is left of it is in the way"



def test_who_cannot_see_the_files_says_so_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers write where the controller does not look."""
    run = Run(tmp_path, recipe())
    run.controller.checkpoints = Checkpoints(str(tmp_path / "elsewhere"), 3, "")
    result = run.fit()
    assert result.outcome.status == "failed" and "put the run directory where all nodes share it" in result.outcome.error


def test_a_checkpoint_that_is_due_while_one_is_written_is_skipped_by_all(oracle: Result, tmp_path: Path) -> None:
    result = fit(tmp_path, recipe(checkpoint={"every_steps": 5, "busy": "skip", "keep": 99}), ["disk:1@20/delay"])
    result.assert_sound(STEPS)
    assert result.sha == oracle.sha
    skipped, saved = ([e["step"] for e in result.named(f"checkpoint_{word}")] for word in ("skipped", "committed"))
    assert skipped and not set(skipped) & set(saved) and saved[-1] == STEPS
    assert sorted(skipped + saved) == list(range(5, STEPS + 1, 5))


# Elsewhere.


def test_checkpoints_on_s3(oracle: Result, tmp_path: Path, s3: Any) -> None:
    location = s3.bucket("/runs/one")
    first = fit(tmp_path, recipe(checkpoint={"path": location}), hooks={3: lambda run: run.interrupt()})
    assert first.outcome.status == "interrupted" and not (tmp_path / "checkpoints").exists()
    at = first.summary["steps"]
    paths = [e["path"] for e in first.named("checkpoint_committed")]
    assert all(path.startswith("s3://") and "test:test" not in path and "?" not in path for path in paths), paths
    second = fit(tmp_path, recipe(checkpoint={"path": location}, elastic={"max_workers": 2}))
    assert second.outcome.status == "done" and second.sha == oracle.sha and second.steps == oracle.steps
    assert second.named("loaded")[0]["step"] == at and not second.named("rewound")


def test_a_checkpoint_of_another_model_ends_the_run_with_what_to_do(tmp_path: Path) -> None:
    interrupted(tmp_path, elastic={"max_workers": 2})
    before = {path: path.read_bytes() for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()}
    result = fit(tmp_path, recipe(elastic={"max_workers": 2}, optimizer={"name": "sgd", "momentum": 0.9}))
    assert result.outcome.status == "failed"
    assert "optimizer/exp_avg/" in result.outcome.error and "and " in result.outcome.error and "\n" not in result.outcome.error
    assert "put [model] and optimizer.name back, or start a new run with model.init" in result.outcome.error
    assert {path: path.read_bytes() for path in before} == before and not result.named("checkpoint_rejected")


def test_the_best_by_a_figure_of_ones_own_is_the_one_that_the_recipe_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeping one checkpoint and the best: its rate is the least of all that were written down."""
    monkeypatch.setattr(modules.Small, "metrics", lambda self,
                        batch: {"wer": ((self.line(batch["x"]) - batch["y"]).abs().sum(), len(batch["y"]))},
                        raising=False)
    for mode, least in (("min", True), ("max", False)):
        changes = {"run": {"steps": 8, "eval_every": 1}, "data": {"eval_fraction": 0.3},
                   "optimizer": {"name": "sgd", "lr": 0.5},
                   "checkpoint": {"every_steps": 1, "keep": 1, "best": "eval.wer", "best_mode": mode},
                   "elastic": {"max_workers": 1}}
        result = fit(tmp_path / mode, module_recipe("Small", 8, **changes))
        rates = {line["step"]: line["eval"]["wer"] for line in result.metrics if "eval" in line}
        best = (min if least else max)(rates, key=lambda step: rates[step])
        assert len(set(rates.values())) > 3 and names(tmp_path / mode) == sorted({f"step-{step:08d}" for step in (best, 8)})


def test_a_best_that_no_evaluation_tells_is_refused_before_the_first_step(tmp_path: Path) -> None:
    changes = {"data": {"eval_fraction": 0.3}, "checkpoint": {"best": "eval.wer", "best_mode": "min"},
               "elastic": {"max_workers": 2}}
    result = fit(tmp_path, module_recipe("Small", 8, **changes))
    assert result.outcome.status == "failed" and not result.steps
    assert result.outcome.error == 'checkpoint.best = "eval.wer" is none of the figures of this evaluation, loss; write one of them.'
