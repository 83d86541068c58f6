"""Who counts as hung, by heartbeats alone."""

from __future__ import annotations

from dataclasses import replace

import pytest

from elastic.controller.failure_detector import Heartbeat, suspects
from elastic.messages import Progress


def beat(inside: int = 3, waiting: bool = True, changed_s: float = 0.0, received_s: float = 100.0,
         phase: str = "reduction") -> Heartbeat:
    return Heartbeat(Progress("w", 1, 7, phase, inside, waiting), changed_s, received_s)


def suspected(beats: dict[str, Heartbeat], now_s: float = 100.0) -> tuple[str, ...]:
    return suspects(beats, now_s, timeout_s=30.0, start_timeout_s=600.0)


def test_whoever_has_not_entered_the_collective_is_the_suspect() -> None:
    assert suspected({"a": beat(), "b": beat(inside=2, waiting=False, phase="forward"), "c": beat()}) == ("b",)
    assert suspected({"a": beat(), "b": beat(inside=2), "c": beat()}) == ("b",)  # it waits in the one before


def test_the_stages_of_a_pipeline_enter_different_collectives_and_only_who_waits_in_none_is_the_suspect() -> None:
    """The first and the last stage of two replicas, of which one loads data for ever: its peers' counts say nothing."""
    first, last = beat(inside=5), beat(inside=9)
    assert suspected({"a0": first, "a1": last, "b0": first,
                      "b1": beat(inside=8, waiting=False, phase="forward")}) == ("b1",)
    assert suspected({"a0": first, "a1": last, "b0": first, "b1": last}) == ("a0",)  # not both who hold the first stage


def test_nobody_is_suspect_while_anybody_moves() -> None:
    assert suspected({"a": beat(), "b": beat(inside=2, waiting=False, changed_s=80.0)}) == ()
    assert suspected({"a": beat(changed_s=71.0), "b": beat(inside=2, waiting=False)}) == ()


@pytest.mark.parametrize("phase", ["start", "checkpoint"])
def test_the_first_compile_and_the_disk_have_their_own_limit(phase: str) -> None:
    waiting, compiling = beat(inside=1), beat(inside=0, waiting=False, phase=phase)
    assert suspected({"a": waiting, "b": compiling}) == ()
    assert suspects({"a": replace(waiting, received_s=700), "b": replace(compiling, received_s=700)}, 700.0, 30.0,
                    600.0) == ("b",)


def test_one_that_is_not_heard_of_is_always_suspect() -> None:
    beats = {"a": beat(changed_s=99.0), "b": beat(changed_s=60.0, received_s=60.0)}
    assert suspected(beats) == ("b",)


def test_all_in_the_same_collective_blame_nobody_and_one_alone_itself() -> None:
    assert suspected({"a": beat(), "b": beat()}) == ()
    assert suspected({"a": beat(waiting=False)}) == ("a",)
    assert suspected({}) == ()


@pytest.mark.parametrize("who", ["a", "b"])
def test_all_stuck_outside_blame_nobody(who: str) -> None:
    """Where nobody waits for anybody, no peer can tell who hangs."""
    stuck = {name: beat(waiting=False) for name in "ab"}
    assert who not in suspected(stuck)
