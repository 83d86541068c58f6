"""Nodes that come and go: a cluster of several Ray nodes on this machine, one CPU and so one worker each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ray.cluster_utils import Cluster

from elastic.driver.trainer import Trainer
from tests.support.inprocess import module_recipe
from tests.support.oracle import undisturbed
from tests.support.runs import assert_sound, assert_survivors_kept, events

STEPS = 200  # held until all that is to come has come


class Story:
    """Calls an action once, when an event line arrives that its condition takes."""

    def __init__(self, *acts: tuple[Any, Any]):
        self.acts = list(acts)

    def __call__(self, line: dict[str, Any]) -> None:
        if self.acts and self.acts[0][0](line):
            _, act = self.acts.pop(0)
            act()  # on the driver's main thread: Ray starts nodes on no other


def named(name: str) -> Any:
    return lambda line: line.get("event") == name


def at(step: int) -> Any:
    return lambda line: "event" not in line and line["step"] >= step


def test_a_node_that_joins_is_used_and_nodes_that_die_leave_the_run_waiting_until_another_comes(nodes: Cluster, tmp_path: Path) -> None:
    given = module_recipe("Held", STEPS, model={"by": str(tmp_path / "held"), "seconds": 0.25},
                          checkpoint={"every_steps": 0},
                          elastic={"min_workers": 2, "max_workers": 3, "hang_timeout_s": 20.0})
    oracle = undisturbed(given)
    held = tmp_path / "held"
    held.touch()
    there = [nodes.add_node(num_cpus=1) for _ in range(2)]

    def join() -> None:
        there.append(nodes.add_node(num_cpus=1))

    def die() -> None:
        for node in there[1:]:
            nodes.remove_node(node, allow_graceful=False)

    story = Story((at(3), join), (named("resized"), die), (named("waiting"), join),
                  (named("generation_started"), held.unlink))
    result = Trainer(given, tmp_path / "run", "auto").fit(on_step=story, on_event=story)
    assert not story.acts
    assert_sound(result, oracle.sha, STEPS)
    assert_survivors_kept(result)
    sizes = result.summary["world_sizes"]
    assert sizes[:2] == [2, 3] and sizes[-1] == 2
    assert {e["transport"] for e in events(result, "generation_started")} == {"gloo"}
    assert [(e["from"], e["to"]) for e in events(result, "resized")][0] == (2, 3)
    assert len(events(result, "waiting")) == 1
    assert len(events(result, "worker_lost")) == 2
