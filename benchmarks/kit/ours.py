"""The platform on the timings' recipe, through its own command; and the same with all collectives over TCP.

`python -m benchmarks.kit.ours [elastic's arguments]` is `elastic` with gloo in place of shared memory between the
workers of a node: what they would use on several nodes, and what the peers use here.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.kit.logs import Step, Tail
from benchmarks.kit.mlp import ROWS_PER_WORKER
from benchmarks.kit.processes import ROOT, python
from elastic import cli
from elastic.controller import actor as controller_actor
from elastic.driver import trainer

RECIPE = str(ROOT / "benchmarks" / "mlp.toml")


class GlooFleet(controller_actor.RayFleet):
    """Never shared memory."""

    def transport(self, ready: Sequence[Any]) -> str:
        return "gloo"


class GlooController(controller_actor.ControllerActor):
    """A controller whose fleet talks over TCP. The name is looked up in the actor's own process."""

    def __init__(self, *arguments: Any):
        controller_actor.RayFleet = GlooFleet  # type: ignore[misc]
        super().__init__(*arguments)


def command(run_dir: Path, workers: int, steps: int, *, gloo: bool = False, settings: Sequence[str] = (),
            options: Sequence[str] = ()) -> list[str]:
    """`elastic train` on the recipe: 32 rows a worker, two logical shards each."""
    pairs = [f"run.steps={steps}", f"data.batch_size={ROWS_PER_WORKER * workers}", f"elastic.max_workers={workers}",
             f"elastic.logical_shards={2 * workers}", *settings]
    sets = [word for pair in pairs for word in ("--set", pair)]
    return python("benchmarks.kit.ours" if gloo else "elastic.cli", "train", RECIPE, "--run-dir", run_dir, *sets,
                  *options)


class Run:
    """A live or finished run's own lines."""

    def __init__(self, run_dir: Path):
        self._events, self._metrics = Tail(run_dir / "events.jsonl"), Tail(run_dir / "metrics.jsonl")
        self.events: list[dict[str, Any]] = []
        self.steps: list[dict[str, Any]] = []

    def read(self) -> None:
        self.steps += [line for line in self._metrics.read() if "eval" not in line]
        self.events += self._events.read()

    def generations(self) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == "generation_started"]

    def as_steps(self) -> list[Step]:
        return [Step(line["time"], line["step"], line["world_size"], 0) for line in self.steps]


if __name__ == "__main__":
    trainer.ControllerActor = GlooController  # type: ignore[misc]
    sys.argv[0] = "elastic"
    cli.main()
