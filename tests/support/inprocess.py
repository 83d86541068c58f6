"""A whole run in one process: controller, state machine, workers, loop and checkpoints are real, processes are threads."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elastic import workload
from elastic.controller import membership as m
from elastic.controller import session
from elastic.controller.controller import Controller, Settings
from elastic.controller.thread_fleet import ThreadFleet
from elastic.driver.inference import check_checkpoint
from elastic.messages import Begin, Job
from elastic.observe.jsonl import read_lines
from elastic.observe.metrics import steps_of
from elastic.observe.verify import verify
from elastic.recipe import Recipe, dumps, parse
from tests.support.run_logs import CheckedRunLog

LIMIT_S = 120.0  # a run that takes longer hangs
MODULES = "tests.support.modules"
Hook = Callable[["Run"], None]


class WatchedRunLog(CheckedRunLog):
    """Calls `on_step(step)` and `on_event(name)` once the line is on disk, in the controller's thread."""

    on_step: Callable[[int], None] = staticmethod(lambda step: None)
    on_event: Callable[[str], None] = staticmethod(lambda name: None)

    def event(self, name: str, *where: Any, **fields: Any) -> None:
        super().event(name, *where, **fields)
        self.on_event(name)

    def metric(self, generation: int, fields: dict[str, Any]) -> None:
        before = self.written
        super().metric(generation, fields)
        if self.written > before:
            self.on_step(self.written)


class Run:
    """One run from a recipe. `hooks` act when a step's line is on disk; `fit` waits for the end."""

    def __init__(self, run_dir: Path, recipe: Recipe, chaos: Sequence[str] = (), capacity: int = 0, nodes: int = 1,
                 hooks: Mapping[int, Hook] | None = None):
        self.run_dir, self.recipe, self.hooks = run_dir, recipe, dict(hooks or {})
        self.begin, elastic = self.open(), recipe.elastic
        self.checkpoints = recipe.checkpoint.path or str(run_dir / "checkpoints")
        job = Job(f"run-{time.time_ns():x}", dumps(recipe), workload.prepare(recipe), str(run_dir), self.checkpoints,
                  (), tuple(chaos))
        self.job, self.settings = job, Settings.of(recipe)
        self.fleet = ThreadFleet(job, capacity or elastic.max_workers + elastic.spares, nodes)
        self.controller = self.build(WatchedRunLog(run_dir, self.begin.written, self.begin.evaluated,
                                                   self.begin.generation))
        self.opened()

    def build(self, run_log: WatchedRunLog) -> Controller:
        self.run_log = run_log
        run_log.on_step = self.after_step
        controller = Controller(self.job, self.settings, self.fleet, run_log, self.begin)
        self.fleet.controller = controller
        return controller

    def opened(self) -> None:
        self.controller.opened()

    def open(self) -> Begin:
        """A fresh run directory, or the place at which a run that has ended goes on."""
        self.run_dir.mkdir(parents=True, exist_ok=True)
        (self.run_dir / "recipe.toml").write_text(dumps(self.recipe))
        lines, events = (read_lines(self.run_dir / f"{name}.jsonl") for name in ("metrics", "events"))
        return Begin(max((f["step"] for f in lines if "eval" not in f), default=0),
                     max((f["step"] for f in lines if "eval" in f), default=0),
                     max((f["generation"] for f in events), default=0))

    def after_step(self, step: int) -> None:
        hook = self.hooks.pop(step, None)
        if hook is not None:
            hook(self)

    def work(self, found: list[Any]) -> None:
        """The controller's life; `found` gets its outcome, or its error."""
        try:
            found.append(session.run(self.controller))
        except BaseException as error:
            found.append(error)

    def fit(self) -> Result:
        """Runs to the end. AssertionError if it hangs."""
        found: list[Any] = []
        thread = threading.Thread(target=self.work, args=(found,), name="controller", daemon=True)
        thread.start()
        thread.join(LIMIT_S)
        assert found, f"the run hangs: {self.controller.state}"
        if isinstance(found[0], BaseException):
            raise found[0]
        return Result(self, found[0])

    # What hooks do.

    def scale(self, workers: int) -> None:
        self.controller.post(m.ScaleTo(workers))

    def scale_mesh(self, workers: int, degrees: tuple[int, int, int]) -> None:
        """`degrees`: pipeline, tensor, expert."""
        self.controller.post(m.ScaleTo(workers, degrees))

    def drain(self, *nodes: str) -> None:
        self.controller.post(m.Drain(nodes))

    def interrupt(self) -> None:
        self.controller.post(m.Interrupt())


@dataclass
class Result:
    """How a run ended, and what it left on disk."""

    run: Run
    outcome: m.Finish

    @property
    def sha(self) -> str:
        return self.summary["state_sha256"]

    @property
    def summary(self) -> dict[str, Any]:
        return json.loads((self.run.run_dir / "summary.json").read_text())

    @property
    def events(self) -> list[dict[str, Any]]:
        return read_lines(self.run.run_dir / "events.jsonl")

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return read_lines(self.run.run_dir / "metrics.jsonl")

    @property
    def steps(self) -> list[int]:
        return [fields["step"] for fields in steps_of(self.metrics)]

    def named(self, event: str) -> list[dict[str, Any]]:
        return [fields for fields in self.events if fields["event"] == event]

    def arrays(self) -> dict[str, Any]:
        """The final checkpoint's arrays by name."""
        from elastic.checkpoint.manager import split
        from tests.support.checkpoints import load

        return load(*split(self.run.run_dir / "checkpoints" / f"step-{self.summary['steps']:08d}"))[0]

    def assert_sound(self, num_steps: int, steps_lost: int = 0) -> None:
        """It is done, wrote each step once and in order, lost none, and `elastic verify` finds nothing."""
        assert self.outcome.status == "done", self.outcome.error
        assert self.steps == list(range(1, num_steps + 1)), self.steps
        problems = verify(self.run.run_dir, check_checkpoint).problems
        assert not problems, problems
        assert self.summary["steps_lost"] == steps_lost, [e for e in self.events if e["event"] != "chaos"]
        assert (self.run.run_dir / "checkpoints" / f"step-{num_steps:08d}" / "manifest.json").exists(), "no final checkpoint"


def fit(run_dir: Path, recipe: Recipe, chaos: Sequence[str] = (), **options: Any) -> Result:
    return Run(run_dir, recipe, chaos, **options).fit()


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    return {name: {**base.get(name, {}), **changes.get(name, {})} for name in {**base, **changes}}


def gpt_recipe(text: Path, steps: int = 24, **changes: Mapping[str, Any]) -> Recipe:
    """A GPT that a thread trains in milliseconds a step; L = 8."""
    base = {"run": {"steps": steps, "eval_every": 10},
            "model": {"kind": "nlp.gpt", "layers": 1, "heads": 2, "width": 16, "context": 8},
            "data": {"format": "text", "path": [str(text)], "batch_size": 16, "eval_fraction": 0.02},
            "elastic": {"max_workers": 4, "logical_shards": 8, "hang_timeout_s": 5.0}, "checkpoint": {"every_steps": 8},
            "optimizer": {"lr": 1e-2, "weight_decay": 0.1, "no_decay": ["*ln*"], "schedule": "cosine",
                          "warmup_steps": 5}}
    return parse(merged(base, changes))


def module_recipe(module: str, steps: int | None = 24, options: Mapping[str, Any] | None = None,
                  **changes: Mapping[str, Any]) -> Recipe:
    """A user's module and data set of `tests.support.modules`, by name."""
    base = {"run": {"steps": steps, "eval_every": 0} if steps else {"eval_every": 0},
            "model": {"kind": f"{MODULES}:{module}"},
            "data": {"kind": f"{MODULES}:Rows", "options": dict(options or {}), "batch_size": 16, "eval_fraction": 0.0},
            "elastic": {"max_workers": 4, "logical_shards": 8, "hang_timeout_s": 5.0}, "checkpoint": {"every_steps": 8}}
    return parse(merged(base, changes))
