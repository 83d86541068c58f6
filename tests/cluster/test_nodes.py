"""Nodes that come and go: a cluster of several Ray nodes on this machine, one CPU and so one worker each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ray.cluster_utils import Cluster

from elastic.driver.trainer import Result, Trainer
from tests.support.runs import assert_sound, assert_survivors_kept, bits, events, recipe

STEPS = 300
SIZES: dict[str, dict[str, Any]] = {"run": {"steps": STEPS, "eval_every": 0}, "checkpoint": {"every_steps": 0}}


class Story:
    """Calls an action once, when an event line arrives that its condition takes."""

    def __init__(self, *acts: tuple[Any, Any]):
        self.acts = list(acts)

    def __call__(self, line: dict[str, Any]) -> None:
        if self.acts and self.acts[0][0](line):
            _, act = self.acts.pop(0)
            act()  # on the driver's main thread: Ray starts nodes on no other


def fit(folder: Path, story: Story, **elastic: Any) -> Result:
    made = recipe(2, **SIZES, elastic={"max_workers": 2, **elastic})
    return Trainer(made, folder, "auto").fit(on_step=story, on_event=story)


def named(name: str) -> Any:
    return lambda line: line.get("event") == name


def at(step: int) -> Any:
    return lambda line: "event" not in line and line["step"] >= step


def test_a_node_that_joins_is_used(nodes: Cluster, tmp_path: Path) -> None:
    nodes.add_node(num_cpus=1)
    result = fit(tmp_path / "run", Story((at(5), lambda: nodes.add_node(num_cpus=1))))
    assert_sound(result, bits(**SIZES), STEPS)
    assert_survivors_kept(result)
    assert result.summary["world_sizes"] == [1, 2]
    assert [e["transport"] for e in events(result, "generation_started")][-1] == "gloo"
    (resized,) = events(result, "resized")
    assert (resized["from"], resized["to"]) == (1, 2)


def test_a_node_that_dies_leaves_the_run_waiting_until_another_comes(nodes: Cluster, tmp_path: Path) -> None:
    nodes.add_node(num_cpus=1)
    second = nodes.add_node(num_cpus=1)
    story = Story((at(5), lambda: nodes.remove_node(second, allow_graceful=False)), (named("waiting"), lambda: nodes.add_node(num_cpus=1)))
    result = fit(tmp_path / "run", story, min_workers=2)
    assert_sound(result, bits(**SIZES), STEPS)
    assert_survivors_kept(result)
    assert len(events(result, "waiting")) == 1
    assert len(events(result, "worker_lost")) == 1
