"""Runs that end badly: what is kept, the exit code and the sentence of each, and a resumption to the bits of a run that nothing happened to.

`tests.support.ends` has the table; what needs processes and signals is in tests/cluster. On threads.
"""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from elastic.controller import membership as m
from elastic.driver.console import EXIT
from elastic.driver.inference import check_checkpoint
from elastic.observe import jsonl as events
from elastic.observe import ledger_files as ledger
from elastic.observe.verify import verify
from elastic.recipe import Recipe
from elastic.storage.store import Store
from elastic.worker import worker
from tests.support import modules
from tests.support.ends import (
    CHAPTERS,
    DISKS,
    ERRORS,
    LAST,
    LIMITS,
    LOSSES,
    NEWEST,
    PAGE,
    SIGNALS,
    START,
    End,
    page,
    said,
)
from tests.support.inprocess import Result, Run, WatchedRunLog, fit, module_recipe
from tests.support.oracle import undisturbed
from tests.support.tables import rows, table_recipe, write

pytest.importorskip("torch", reason="torch is not installed")
# a saver's thread dies with its process
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")

STEPS, EVERY, AT = 40, 9, 20  # row 70 comes by at steps 21, 25 and 34: no checkpoint is due before any of them
WIDE = 2 * (1 << 16)  # parameters: with the others each of three workers has a block to own
ARMED = modules.Fragile.armed


@pytest.fixture(autouse=True)
def disarmed() -> Iterator[None]:
    ARMED.clear()
    yield
    ARMED.clear()


def recipe(**changes: Any) -> Recipe:
    base = {"run": {"eval_every": 30}, "data": {"kind": f"{modules.__name__}:FragileRows", "eval_fraction": 0.1},
            "elastic": {"max_workers": 2},
            "checkpoint": {"every_steps": EVERY, "keep": 9}}
    return module_recipe("Fragile", STEPS, **{name: {**base.get(name, {}), **changes.get(name, {})}
                                              for name in {**base, **changes}})


def shared(**elastic: int) -> Recipe:
    return recipe(model={"wide": WIDE}, elastic={"max_workers": 3, **elastic}, optimizer={"sharded": True})


def assert_ended(run: Run, result: Result, end: End, **places: Path) -> None:
    """As the table says, and nothing is left running."""
    outcome, newest, written = run.controller.outcome, run.controller.checkpoints.newest, run.run_log.written
    assert outcome is not None and EXIT[outcome.status] == end.code, outcome
    there = (run.run_dir / "summary.json").exists()
    error = result.summary["error"] if there and outcome.status == "failed" else outcome.error
    if end.code == 3:
        assert said(error, RUN=run.run_dir, PLACE=Path(run.checkpoints),
                    **places).rstrip(".") == end.says.rstrip("."), error
    assert {LAST: newest == written > 0, NEWEST: 0 < newest < written,
            START: newest == written == 0}[end.kept], (newest, written)
    assert not any(thread.is_alive() for thread in run.fleet.threads)
    if end.kept != START:
        assert check_checkpoint(f"{run.checkpoints}/step-{newest:08d}").step == newest


def assert_resumes(run: Run, mended: Recipe) -> Result:
    """With what failed mended: each step once, from what was kept, to the bits of an undisturbed run."""
    newest, lines = run.controller.checkpoints.newest, Result(run, m.Finish("")).steps
    again = fit(run.run_dir, mended)
    assert again.outcome.status == "done", again.outcome.error
    assert again.sha == undisturbed(mended).sha and again.steps == list(range(1, mended.run.steps + 1))
    assert [e["step"] for e in again.named("loaded")][-1:] == [newest][:bool(newest)]
    rewound = [e for e in again.named("rewound") if e["to"] == newest]
    assert len(rewound) == (bool(lines) and lines[-1] > newest), rewound
    problems = verify(run.run_dir, check_checkpoint).problems
    assert not problems, problems
    return again


def test_the_page_says_what_the_tests_show() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "write it anew: python -m tests.support.ends"
    assert sum(len(chapter.ends) for chapter in CHAPTERS) >= 20
    assert all(Path(__file__).parents[2].joinpath(end.test).exists() for chapter in CHAPTERS
               for end in chapter.ends.values())


# A user's own code and data.


@pytest.mark.parametrize("name", ["loss", "data", "warm-up", "evaluation", "metrics", "nan", "norm", "gradient",
                                  "sharded"])
def test_an_error_of_the_user_s(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    what = {"norm": "gradient", "sharded": "loss"}.get(name, name)
    given = recipe(optimizer={"clip_norm": 1.0}) if name == "norm" else shared() if name == "sharded" else recipe()
    if name == "warm-up":
        ARMED.add(what)
    run = Run(tmp_path / "run", given, hooks={AT: lambda run: ARMED.add(what)})
    result = run.fit()
    assert_ended(run, result, ERRORS[name])
    assert len(result.named("generation_started")) == (name != "warm-up"), "nobody tries that again"
    assert "Traceback" in capsys.readouterr().err, "in the worker's log"
    ARMED.clear()
    again = assert_resumes(run, given)
    if name == "sharded":
        assert len(list(Path(again.named("loaded")[0]["path"]).glob("*.safetensors"))) == 3


def test_a_file_of_the_data_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    files = [write(tmp_path / f"{n}.parquet", rows(800, 800 * n), 100) for n in range(2)]
    given = table_recipe(files, data={"shuffle_by": "blocks", "columns": ["x", "y"], "batch_size": 40},
                         checkpoint={"every_steps": 5},
                         elastic={"max_workers": 2})

    def away(run: Run) -> None:
        for file in files:
            file.rename(file.with_suffix(".aside"))

    run = Run(tmp_path / "run", given.model_copy(update={"run": given.run.model_copy(update={"steps": STEPS, "epochs": None})}), hooks={7: away})
    result = run.fit()
    assert_ended(run, result, ERRORS["file"], FILE=next(file for file in files if str(file) in result.outcome.error))
    for file in files:
        file.with_suffix(".aside").rename(file)
    assert_resumes(run, run.recipe)


# Signals and drivers, as the controller hears of them.


@pytest.mark.parametrize(("name", "workers"), [("interrupt", 1), ("interrupt", 3), ("again", 3), ("driver", 1)])
def test_an_end_that_is_asked_for(name: str, workers: int, tmp_path: Path) -> None:
    word = {"interrupt": m.Interrupt(), "again": m.GiveUp("", "interrupted"),
            "driver": m.GiveUp("The driver gave the run up.")}[name]
    run = Run(tmp_path / "run", recipe(elastic={"max_workers": workers}),
              hooks={7: lambda run: run.controller.post(word)})
    assert_ended(run, run.fit(), SIGNALS[name])
    generation = run.controller.state.generation
    assert assert_resumes(run, recipe(elastic={"max_workers": 4 - workers})).named("generation_started")[-1]["generation"] > generation


# Losses.


def test_all_workers_are_lost_at_once(tmp_path: Path) -> None:
    def kill(run: Run) -> None:
        for name in list(run.controller.state.group):
            run.controller.give_up_on(name, "killed")

    run = Run(tmp_path / "run", recipe(), hooks={AT: kill}, capacity=4)
    result = run.fit()
    assert EXIT[result.outcome.status] == LOSSES["workers"].code and LOSSES["workers"].kept == NEWEST
    assert result.sha == undisturbed(recipe()).sha and result.steps == list(range(1, STEPS + 1))
    (rewound,) = result.named("rewound")
    assert rewound["from"] == AT and rewound["to"] in (EVERY, 2 * EVERY), "the second may have been under way"


@pytest.mark.parametrize("name", ["too few", "twin"])
def test_too_few_are_left_and_none_comes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warm_up, full = worker.warm_up, []

    def no_room(*arguments: Any, **options: Any) -> None:
        if full:
            raise MemoryError("no room")
        warm_up(*arguments, **options)

    monkeypatch.setattr(worker, "warm_up", no_room)
    given = shared(min_workers=3) if name == "twin" else recipe(elastic={"min_workers": 2})
    run = Run(tmp_path / "run", given, ["kill:1@26/vote"])
    run.run_log.on_event = lambda event: full.append(event) if event == "chaos" else None  # it fires when that is said
    assert_ended(run, run.fit(), LOSSES[name])
    full.clear()
    again = assert_resumes(run, given)
    parts = [path.name.partition("-g")[0] for path in Path(again.named("loaded")[0]["path"]).glob("*.safetensors")]
    assert sorted(parts) == [f"state-{rank:04d}-of-{len(parts):04d}" for rank in range(3 if name == "twin" else 1)]


# Disks.


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True,
                              text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount here")
    if done.returncode:
        pytest.skip(f"this user may not mount: {done.stderr}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(disk: Path) -> None:
    with open(disk / "ballast", "ab", buffering=0) as file:
        for size in (1 << 16, 1 << 8, 1):
            try:
                while True:
                    if file.write(b"x" * size) < size:
                        break
            except OSError:
                continue


def placed(name: str, disk: Path, tmp_path: Path) -> tuple[Path, Recipe]:
    """The run directory and the recipe where the disk is under what `name` says."""
    run_dir = tmp_path / "run" if name == "checkpoints" else disk / "run"
    path = {"run": str(tmp_path / "elsewhere"), "ledger": str(tmp_path / "elsewhere"),
            "checkpoints": str(disk / "elsewhere"), "both": ""}[name]
    return run_dir, recipe(checkpoint={"path": path} if path else {}, data={"ledger": name == "ledger"})


@pytest.mark.parametrize("name", ["run", "ledger", "checkpoints", "both"])
def test_a_disk_that_stays_full(name: str, disk: Path, tmp_path: Path) -> None:
    run_dir, given = placed(name, disk, tmp_path)
    run = Run(run_dir, given, hooks={AT: lambda run: fill(disk)})
    result = run.fit()
    assert run.run_log.written == STEPS, "training went on to the end"
    assert_ended(run, result, DISKS[name])
    assert name == "checkpoints" or not (run_dir / "summary.json").exists()
    (disk / "ballast").unlink()
    assert_resumes(run, given)


@pytest.mark.parametrize("name", ["run", "ledger"])
def test_a_disk_that_is_full_for_a_while(name: str, disk: Path, tmp_path: Path) -> None:
    run_dir, given = placed(name, disk, tmp_path)
    there: list[int] = []

    def free(run: Run) -> None:
        lines = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
        assert all(line.endswith("\n") for line in lines)
        there.append(len(lines))
        (disk / "ballast").unlink()

    result = Run(run_dir, given, hooks={12: lambda run: fill(disk), 32: free}).fit()
    assert there and there[0] < 30, "lines waited"
    assert EXIT[result.outcome.status] == DISKS["room"].code and result.named("run_finished")
    assert result.sha == undisturbed(given).sha and result.steps == list(range(1, STEPS + 1))
    assert not verify(run_dir, check_checkpoint).problems


def test_an_interrupt_ends_the_run_though_it_cannot_be_saved(disk: Path, tmp_path: Path) -> None:
    run_dir, given = placed("checkpoints", disk, tmp_path)

    def act(run: Run) -> None:
        fill(disk)
        run.interrupt()

    run = Run(run_dir, given, hooks={AT: act})
    result = run.fit()
    assert_ended(run, result, DISKS["interrupt"])
    assert run.run_log.written < STEPS and len(result.named("generation_started")) <= 4
    (disk / "ballast").unlink()
    assert_resumes(run, given)


def test_checkpoints_that_the_controller_does_not_see_end_the_run_at_once(tmp_path: Path) -> None:
    def away(run: Run) -> None:
        run.controller.checkpoints.store = Store.open(tmp_path / "another")

    run = Run(tmp_path / "run", recipe(run={"steps": 1000}), hooks={AT: away})
    result = run.fit()
    assert_ended(run, result, DISKS["unseen"])
    rejected = result.named("checkpoint_rejected")
    assert [e["step"] for e in rejected][:2] == [27, 36] and run.run_log.written < 500


def test_the_place_of_the_checkpoints_is_taken_away(tmp_path: Path) -> None:
    place, aside = tmp_path / "place", tmp_path / "aside"

    def away(run: Run) -> None:
        place.rename(aside)
        place.write_text("a file where the folder was")

    given = recipe(checkpoint={"path": str(place)})
    run = Run(tmp_path / "run", given, hooks={AT: away})
    result = run.fit()
    place.unlink()
    aside.rename(place)
    assert_ended(run, result, DISKS["taken"])
    assert_resumes(run, given)


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """What files of a run directory, by how their names end, take no more lines, and the error of each."""
    found: dict[str, int] = {}

    def failing(file: Any, piece: bytes) -> None:
        for end, number in found.items():
            if str(file.name).endswith(end):
                raise OSError(number, os.strerror(number))
        whole(file, piece)

    whole = events.write_whole
    for module in (events, ledger):
        monkeypatch.setattr(module, "write_whole", failing)
    return found


def test_the_file_of_the_metrics_takes_no_more(broken: dict[str, int], tmp_path: Path) -> None:
    given = recipe()
    run = Run(tmp_path / "run", given, hooks={AT: lambda run: broken.update({"metrics.jsonl": errno.EIO})})
    result = run.fit()
    assert run.run_log.written == STEPS
    assert_ended(run, result, DISKS["lines"])
    broken.clear()
    assert_resumes(run, given)


class Fallen(BaseException):
    """The controller's process is gone."""


class Falling(Run):
    """Its controller falls where a hook says so, and another one takes over once there is room."""

    room: Callable[[], None] = staticmethod(lambda: None)

    def work(self, found: list[Any]) -> None:
        super().work(found)
        if isinstance(found[0], Fallen):
            found.clear()
            self.controller.journal.lines.close()
            self.run_log.close()  # as the end of its process would: what it held back is gone
            self.room()
            self.controller = self.build(WatchedRunLog.take_over(self.run_dir))
            super().work(found)


def fall(run: Run) -> None:
    raise Fallen


def fallen(run_dir: Path, given: Recipe, broken: dict[str, int], *chaos: str) -> Falling:
    """A run whose directory has no room for a while, till its controller has fallen."""
    full = dict.fromkeys((".jsonl", ".arrow"), errno.ENOSPC)
    run = Falling(run_dir, given, chaos, hooks={AT: lambda run: broken.update(full), 28: fall})
    run.room = broken.clear
    return run


def test_a_controller_falls_with_lines_that_a_full_disk_held_back(broken: dict[str, int], tmp_path: Path) -> None:
    steps = 150
    given = recipe(run={"steps": steps, "eval_every": 0}, data={"ledger": True})
    result = fallen(tmp_path / "run", given, broken).fit()
    assert EXIT[result.outcome.status] == DISKS["controller, disk"].code and len(result.named("controller_restarted")) == 1
    assert result.steps == list(range(1, steps + 1)) and not result.named("rewound") and not result.named("worker_lost")
    assert result.sha == undisturbed(given).sha and not verify(tmp_path / "run", check_checkpoint).problems
    saved = [e["step"] for e in result.named("checkpoint_committed")]
    assert [step for step in saved if 28 < step < steps], "the lines were there again while it trained on"


def test_a_controller_falls_with_a_group_that_a_full_disk_did_not_take(broken: dict[str, int], tmp_path: Path) -> None:
    given = recipe()
    run = fallen(tmp_path / "run", given, broken, "kill:1@22/vote")
    assert_ended(run, run.fit(), DISKS["controller, disk, worker"])
    assert_resumes(run, given)


# The end of the recipe.


def test_a_run_at_its_last_step_goes_on_where_it_gets_more(tmp_path: Path) -> None:
    given = recipe(optimizer={"schedule": "constant"})
    run = Run(tmp_path / "run", given.model_copy(update={"run": given.run.model_copy(update={"steps": AT})}))
    assert_ended(run, run.fit(), LIMITS["steps"])
    assert_resumes(run, given)
