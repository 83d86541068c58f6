"""The controller stepped by hand, on a fleet that only writes down what it is asked for and a clock that is turned by hand."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from elastic.chaos import parse
from elastic.controller import controller as controllers
from elastic.controller import membership as m
from elastic.controller.controller import FENCED
from elastic.controller.journal import replay
from elastic.controller.policy import Bounds
from elastic.controller.session import close
from elastic.messages import Ballot, Line, Part, Progress, Ready, Save, Standing
from elastic.observe.jsonl import read_lines
from tests.support.rig import SETTINGS, Clock, Rig, metric, save


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    found = Clock()
    monkeypatch.setattr(controllers, "time", found)
    return found


@pytest.fixture
def rig(tmp_path: Path, clock: Clock) -> Rig:
    return Rig(tmp_path, clock)


def pulse(worker: str, step: int = 7, phase: str = "reduction", inside: int = 3, waiting: bool = True,
          detail: int = 0) -> Progress:
    return Progress(worker, 1, step, phase, inside, waiting, detail)


# Generations.


def test_a_generation_is_on_disk_before_its_members_hear_of_it(rig: Rig) -> None:
    seen: list[int] = []
    rig.fleet.send = lambda worker, generation: seen.append(len(rig.events("generation_started")))
    rig.start("a", "b")
    assert seen == [1, 1]
    (event,) = rig.events("generation_started")
    assert (event["generation"], event["step"], event["world_size"]) == (1, 0, 2)
    assert [(w["worker"], w["rank"], w["node"]) for w in event["workers"]] == [("a", 0, "node-a"), ("b", 1, "node-b")]
    assert [e["worker"] for e in rig.events("worker_joined")] == ["a", "b"]


def test_the_journal_is_on_the_disk_before_anything_follows_from_it(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    path, sync, synced, seen = rig.run_dir / "journal.jsonl", os.fsync, [0], list[tuple[str, bool]]()

    def fsync(descriptor: int) -> None:
        sync(descriptor)
        if os.fstat(descriptor).st_ino == path.stat().st_ino:
            synced[0] = path.stat().st_size

    monkeypatch.setattr(os, "fsync", fsync)
    rig.fleet.send = lambda *order: seen.append((*read_lines(path)[-1], path.stat().st_size == synced[0]))
    rig.start("a", "b")
    rig.controller.advance(m.Lost("a", "killed"))
    assert seen == [("published", True), ("published", True), ("event", True)]


def test_a_wait_is_told_with_how_many_are_there(tmp_path: Path, clock: Clock) -> None:
    rig = Rig(tmp_path, clock, replace(SETTINGS, bounds=Bounds(2, 3, 6)))
    rig.start("a")
    assert [(e["ready"], e["needed"]) for e in rig.events("waiting")] == [(1, 2)]


def test_a_new_run_starts_from_the_recipe_and_a_resumed_one_from_its_checkpoint(rig: Rig, clock: Clock) -> None:
    rig.start("a")
    assert (rig.assigned()[0].load, rig.assigned()[0].committed) == ("recipe", 0)
    rig.steps(*range(1, 6))
    rig.say(save(rig, 5))
    rig.run_log.close()
    again = Rig(rig.run_dir, clock, written=5, generation=4)
    again.start("a")
    generation, _ = again.assigned()
    assert (generation.number, generation.committed, generation.written, generation.checkpointed) == (5, 5, 5, 5)
    assert generation.load.endswith("step-00000005")


def test_lines_that_a_dead_rank_0_took_with_it_come_from_the_survivors(rig: Rig) -> None:
    rig.start("a", "b", "c")
    rig.steps(1, 2)
    rig.controller.advance(m.Lost("a", "killed"))
    lines = tuple(metric(step).fields for step in (2, 3, 4))
    rig.say(Standing("b", 1, "broken", 3, holds=4, lines=lines[:2]))
    assert rig.written() == [1, 2, 3]
    rig.say(Standing("c", 1, "broken", 4, ballot=Ballot(4, 1.0, 1.0), lines=lines))
    assert rig.written() == [1, 2, 3, 4]
    generation, workers = rig.assigned()
    assert (generation.committed, generation.written, workers) == (4, 4, ["c", "b"])


def test_a_change_of_mesh_is_told_and_can_be_replayed(tmp_path: Path, clock: Clock) -> None:
    bounds = Bounds(1, 4, 8, meshes=((1, 1, 1), (1, 2, 1)))
    rig = Rig(tmp_path, clock, replace(SETTINGS, bounds=bounds))
    rig.start("a", "b", "c", "d")
    rig.steps(1, 2)
    rig.controller.advance(m.ScaleTo(4, (1, 2, 1)))
    for worker in "abcd":
        rig.say(Standing(worker, 1, "stopped", 2, ballot=Ballot(2, 1.0, 1.0, 1), mesh=(4, 1, 1, 1), coordinate=0))
    generation, workers = rig.assigned()
    assert (generation.mesh, workers, len(generation.resharded)) == ((2, 1, 2, 1), list("abcd"), 4)
    was, now = ({"data": 4, "pipeline": 1, "tensor": 1, "expert": 1},
                {"data": 2, "pipeline": 1, "tensor": 2, "expert": 1})
    assert [e["mesh"] for e in rig.events("generation_started")] == [was, now]
    rig.steps(3, generation=2)
    (resized,) = rig.events("resized")
    assert (resized["from"], resized["to"], resized["mesh"]) == (4, 4, now)
    past = replay(read_lines(tmp_path / "journal.jsonl")[1:], bounds, 0)
    assert past.state == rig.controller.state and past.published == generation


def test_lines_of_an_older_generation_are_not_taken(rig: Rig) -> None:
    rig.start("a", "b")
    rig.controller.advance(m.Lost("a", "killed"))
    rig.say(Standing("b", 1, "broken", 0))
    rig.say(Standing("b", 1, "broken", 1, lines=(metric(1).fields,)))
    assert rig.written() == [] and rig.controller.state.generation == 2


def test_every_copy_gone_goes_back(rig: Rig) -> None:
    rig.start("a")
    rig.steps(1, 2, 3, 4)
    rig.say(save(rig, 2), save(rig, 3))
    (rig.run_dir / "checkpoints" / "step-00000003" / "state-a-g000001.safetensors").write_bytes(b"")
    rig.controller.advance(m.Lost("a", "killed"))
    rig.start("b")
    generation, _ = rig.assigned()
    assert (generation.committed, generation.written, generation.checkpointed) == (2, 2, 2)
    assert rig.written() == [1, 2]
    assert [(e["from"], e["to"]) for e in rig.events("rewound")] == [(4, 2)]
    assert [Path(e["path"]).name for e in rig.events("checkpoint_rejected")] == ["step-00000003"]
    rig.say(metric(3, 2), save(rig, 3, generation=2), worker="b")  # written again, it counts again
    assert [e["step"] for e in rig.events("checkpoint_committed")] == [2, 3, 3]
    assert rig.events("recovered")[0]["steps_lost"] == 2


# Fencing.


def test_nothing_that_a_lost_worker_says_is_heard(rig: Rig) -> None:
    rig.start("a", "b")
    rig.steps(1)
    rig.controller.advance(m.Lost("a", "killed"))
    state, before = rig.controller.state, {p: p.read_bytes() for p in rig.run_dir.rglob("*") if p.is_file()}
    for word in (Standing("a", 1, "done", 9), Standing("a", 1, "failed", 9, error="ghost", fatal=True), metric(2),
                 Part("a", 1, 9, "{}", 0, 0),
                 Line(1, "events", {"event": "healed"}), pulse("a"), Ready("a", "n", 1, "a:1")):
        assert rig.say(word, worker="a") == FENCED
    assert rig.controller.state == state and {p: p.read_bytes() for p in rig.run_dir.rglob("*")
                                              if p.is_file()} == before


def test_words_under_way_when_a_worker_was_given_up_are_not_heard_either(rig: Rig) -> None:
    rig.start("a", "b")
    assert rig.controller.deliver("a", [metric(1), Standing("a", 1, "done", 9)]) == 0  # in the mailbox, not yet handled
    rig.controller.give_up_on("a", "hangs")
    rig.drain()
    assert rig.written() == [] and "a" not in rig.controller.state.standing
    assert rig.fleet.of("kill") == [("a",)]


def test_an_older_checkpoint_does_not_replace_a_newer(rig: Rig) -> None:
    rig.start("a")
    rig.steps(1, 2, 3, 4)
    rig.say(save(rig, 4))
    rig.say(save(rig, 2))
    assert [e["step"] for e in rig.events("checkpoint_committed")] == [4]
    assert not (rig.run_dir / "checkpoints" / "step-00000002" / "manifest.json").exists()


# Time.


def test_a_silent_worker_is_given_up_and_its_group_told(rig: Rig) -> None:
    rig.start("a", "b", "c")
    rig.wait(29, pulse("a"), pulse("c"))
    assert rig.fleet.of("kill") == []
    rig.wait(3, pulse("a"), pulse("c"))
    assert rig.fleet.of("kill") == [("b",)] and sorted(order.worker for order in rig.fleet.aborted()) == ["a", "c"]
    assert rig.events("hang")[0]["worker"] == rig.events("worker_lost")[0]["worker"] == "b"
    assert "hang_timeout_s = 30" in rig.events("worker_lost")[0]["cause"]


def test_who_does_not_enter_the_collective_is_given_up(rig: Rig) -> None:
    rig.start("a", "b", "c")
    rig.wait(33, pulse("a"), pulse("b", phase="forward", inside=2, waiting=False), pulse("c"))
    assert rig.fleet.of("kill") == [("b",)]


def test_a_long_phase_that_moves_is_no_hang(rig: Rig) -> None:
    rig.start("a", "b")
    for shard in range(10):
        rig.wait(20, pulse("a"), pulse("b", phase="forward", inside=2, waiting=False, detail=shard), every=1.0)
    assert rig.fleet.of("kill") == []


def test_while_the_controller_was_held_up_silence_does_not_count(rig: Rig) -> None:
    rig.start("a", "b")
    rig.wait(5, pulse("a"), pulse("b"))
    rig.clock.now += 3600  # a machine put to sleep
    rig.controller.check()
    assert rig.fleet.of("kill") == []
    rig.wait(33, pulse("a"))
    assert rig.fleet.of("kill") == [("b",)]


def test_one_that_never_gets_ready_is_given_up(rig: Rig) -> None:
    rig.controller.advance(m.Starting("a"))
    rig.wait(599, every=1.0)
    assert rig.fleet.of("kill") == []
    rig.wait(3, every=1.0)
    assert rig.fleet.of("kill") == [("a",)] and "start_timeout_s = 600" in rig.events("worker_lost")[0]["cause"]


def test_losses_without_a_step_are_answered_later_and_later_and_end_the_run(rig: Rig) -> None:
    for number in range(50):
        rig.start(f"w{number}")
        asked = len(rig.fleet.of("want"))
        rig.controller.advance(m.Lost(f"w{number}", "no such file"))
        rig.drain()
        if rig.controller.outcome is not None:
            break
        for _ in range(20):
            rig.wait(1, every=1.0)
            if len(rig.fleet.of("want")) > asked:
                break
    assert rig.controller.outcome is not None and rig.controller.outcome.status == "failed"
    assert "no such file" in rig.controller.outcome.error and 5 < number < 12


# Faults, scaling, the end.


def test_a_fault_fires_once_and_is_written_down(tmp_path: Path, clock: Clock) -> None:
    rig = Rig(tmp_path, clock, chaos=("scale:1@5", "kill:1@9"))
    rig.start("a", "b")
    assert rig.assigned()[0].chaos == ("scale:1@5", "kill:1@9")
    for _ in range(2):
        rig.controller.post(("a", parse("scale:1@5")))
        rig.drain()
    assert [e["fault"] for e in rig.events("chaos")] == ["scale:1@5"]
    assert rig.controller.state.target == 1
    for worker in "ab":
        rig.say(Standing(worker, 1, "stopped", 5, ballot=Ballot(5, 1.0, 1.0, 1)))
    assert rig.assigned()[0].chaos == ("kill:1@9",)


def test_a_continuation_goes_to_whoever_was_stopped(tmp_path: Path, clock: Clock) -> None:
    rig = Rig(tmp_path, clock, chaos=("stop:1@5", "cont:1@9"))
    rig.start("a", "b", "c")
    rig.controller.post(("b", parse("stop:1@5")))
    rig.drain()
    rig.controller.give_up_on("b", "hangs")
    rig.controller.post(("a", parse("cont:1@9")))
    rig.drain()
    ((fault, stopped),) = rig.fleet.of("inject")
    assert (fault.spec, stopped.worker) == ("cont:1@9", "b")


def test_the_end_is_written_down(rig: Rig) -> None:
    rig.start("a")
    rig.steps(1, 2)
    rig.say(save(rig, 2))
    rig.say(Standing("a", 1, "done", 2, state_sha256="s", parameters_sha256="p"))
    assert rig.controller.outcome is not None
    rig.controller.mailbox.put(("a", metric(3)))  # a line that was under way
    close(rig.controller, rig.controller.outcome)
    summary = json.loads((rig.run_dir / "summary.json").read_text())
    assert (summary["status"], summary["steps"], summary["state_sha256"],
            summary["parameters_sha256"]) == ("done", 3, "s", "p")
    assert rig.events("run_finished") and rig.fleet.of("close") == [()]


def test_a_failure_is_written_down_with_its_error(rig: Rig) -> None:
    rig.start("a")
    rig.say(Standing("a", 1, "failed", 2, error="The loss is nan at step 3.", fatal=True))
    assert rig.controller.outcome is not None and rig.fleet.of("send")[-1] == ("a", Save(1, 2))
    rig.controller.mailbox.put(("a", Part("a", 1, 2, "", 0.0, 0.0, error="no room")))
    close(rig.controller, rig.controller.outcome)
    assert rig.events("step_failed")[0]["error"] == rig.events("run_failed")[0]["error"] == "The loss is nan at step 3."
    assert json.loads((rig.run_dir / "summary.json").read_text())["error"] == "The loss is nan at step 3."
