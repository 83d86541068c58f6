"""The fault injector: what a fault's text means, when it fires, and that it fires once."""

from __future__ import annotations

from typing import Any

import pytest

from elastic.chaos import Fault, Injector, parse
from elastic.errors import RecipeError


@pytest.mark.parametrize(("spec", "kind", "number", "step", "phase"), [
    ("kill:2@10", "kill", 2, 10, "forward"), ("kill:0@1/update", "kill", 0, 1, "update"),
    ("stop:1@7/vote", "stop", 1, 7, "vote"),
    ("cont:1@9", "cont", 1, 9, "forward"), ("node:3@4", "node", 3, 4, "forward"),
    ("scale:4@20", "scale", 4, 20, "forward"),
    ("corrupt@30", "corrupt", 0, 30, "forward")])
def test_a_fault_s_text(spec: str, kind: str, number: int, step: int, phase: str) -> None:
    assert parse(spec) == Fault(kind, number, step, phase, spec)


@pytest.mark.parametrize("spec", ["", "kill", "kill:1", "kill@5", "kill:x@5", "kill:1@", "kill:-1@5", "kill:1@5/",
                                  "kill:1@5/lunch", "scale:2@5/vote",
                                  "corrupt:1@5", "kill:1@5 ", "explode:1@5", "controller:0@5", "disk:1@5",
                                  "disk:1@5/vote",
                                  "disk@5/full", "kill:1@5/full", "kill:1@5/Vote"])
def test_what_is_no_fault_gets_one_sentence(spec: str) -> None:
    with pytest.raises(RecipeError) as error:
        parse(spec)
    assert repr(spec) in str(error.value) and "\n" not in str(error.value)


class Rim:
    """Keeps what was announced and struck, in order."""

    def __init__(self, *specs: str, rank: int = 0):
        self.log: list[str] = []
        self.injector = Injector(specs, rank, lambda spec: self.log.append(f"announce {spec}"),
                                 lambda fault: self.log.append(f"strike {fault.spec}"), self.cut_short)

    def cut_short(self, fault: Fault, group: Any) -> Any:
        self.log.append(f"cut {fault.spec}")
        return f"cut {group}"


def test_a_fault_is_announced_before_it_strikes_and_fires_once() -> None:
    rim = Rim("kill:0@5/vote")
    for step, phase in ((4, "vote"), (5, "forward")):
        rim.injector.at(step, phase)
    assert rim.log == []
    for _ in range(3):
        rim.injector.at(5, "vote")
    assert rim.log == ["announce kill:0@5/vote", "strike kill:0@5/vote"]


def test_a_step_that_was_missed_fires_at_the_next_chance() -> None:
    rim = Rim("kill:0@5/heal")
    rim.injector.at(9, "heal")
    assert len(rim.log) == 2


def test_a_rank_strikes_itself_only_and_rank_0_announces_the_rest() -> None:
    specs = ("kill:0@1", "kill:1@1", "stop:2@1", "node:1@1", "cont:2@1", "scale:3@1", "corrupt@1")
    wanted = {0: ["announce kill:0@1", "strike kill:0@1", "announce cont:2@1", "announce scale:3@1",
                  "announce corrupt@1"],
              1: ["announce kill:1@1", "strike kill:1@1", "announce node:1@1", "strike node:1@1"],
              2: ["announce stop:2@1", "strike stop:2@1"], 3: []}
    for rank, log in wanted.items():
        rim = Rim(*specs, rank=rank)
        rim.injector.at(1, "forward")
        assert rim.log == log


def test_a_collective_is_cut_short_once() -> None:
    rim = Rim("kill:0@5/reduction", "scale:2@5")
    assert rim.injector.cut("group", 4, "reduction") == "group"
    assert rim.injector.cut("group", 5, "vote") == "group"
    assert rim.injector.cut("group", 5, "reduction") == "cut group"
    assert rim.injector.cut("group", 5, "reduction") == "group"
    assert rim.log == ["announce kill:0@5/reduction", "cut kill:0@5/reduction"]
