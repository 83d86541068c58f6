"""What other threads may ask of a running loop."""

from __future__ import annotations

import pytest

from elastic.errors import GroupBroken
from elastic.messages import GO, STOP, STOP_AND_SAVE
from elastic.worker.loop_control import Control


class Group:
    def __init__(self) -> None:
        self.is_aborted = False

    def abort(self) -> None:
        self.is_aborted = True


def inside(generation: int) -> tuple[Control, Group]:
    control, group = Control(), Group()
    control.enter(generation)
    control.attach(group)
    return control, group


def test_a_stop_request_belongs_to_its_generation_and_the_largest_wins() -> None:
    control, _ = inside(2)
    control.request_stop(1, STOP_AND_SAVE)
    assert control.stop_request() == GO
    control.request_stop(2, STOP_AND_SAVE)
    control.request_stop(2, STOP)
    assert control.stop_request() == STOP_AND_SAVE
    control.request_stop(3, STOP)
    control.enter(3)
    assert control.stop_request() == STOP


def test_aborting_reaches_the_group_and_ends_the_next_phase() -> None:
    control, group = inside(2)
    control.at(5, "forward")
    control.abort(2)
    assert group.is_aborted and control.aborted.is_set()
    with pytest.raises(GroupBroken, match="Generation 2"):
        control.at(5, "backward")
    with pytest.raises(GroupBroken), control.collective(5, "vote"):
        pass
    assert (control.inside, control.waiting) == (0, False)


def test_an_older_generation_s_abort_does_nothing() -> None:
    control, group = inside(3)
    control.abort(2)
    control.at(1, "forward")
    assert not group.is_aborted


def test_a_generation_aborted_before_it_began_stays_so() -> None:
    control = Control()
    control.abort(4)
    control.enter(4)
    late = Group()
    control.attach(late)
    assert control.aborted.is_set() and late.is_aborted
    control.enter(5)
    control.at(1, "forward")
    assert control.generation == 5


def test_an_abort_between_entry_and_group_reaches_the_group() -> None:
    control, group = Control(), Group()
    control.enter(1)
    control.abort(1)
    control.attach(group)
    assert group.is_aborted


def test_the_count_of_collectives_tells_where_it_waits() -> None:
    control, _ = inside(1)
    assert (control.phase, control.inside) == ("start", 0)
    with control.collective(7, "reduction"):
        assert (control.step, control.phase, control.inside, control.waiting) == (7, "reduction", 1, True)
    with pytest.raises(ValueError, match="gone"), control.collective(7, "vote"):
        raise ValueError("gone")
    assert (control.phase, control.inside, control.waiting) == ("vote", 2, False)
    control.enter(2, written=12)
    assert (control.phase, control.inside, control.written) == ("start", 0, 12)
