"""Scaling and failure policies: numbers in, decisions out."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from elastic.controller.policy import (
    BACKOFF_S,
    MAX_FRUITLESS,
    NODE_BAN_S,
    NODE_LOSSES,
    NODE_WINDOW_S,
    Bounds,
    Losses,
    banned_nodes,
    gives_up,
    note_loss,
    restart_delay_s,
    world_size,
)


@given(low=st.integers(1, 6), more=st.integers(0, 6), shards=st.integers(1, 32), available=st.integers(0, 20),
       target=st.integers(1, 20))
def test_world_size_is_the_smallest_that_is_as_fast(low: int, more: int, shards: int, available: int,
                                                    target: int) -> None:
    bounds = Bounds(low, low + more, shards)
    allowed = [w for w in range(low, low + more + 1) if w <= min(available, target, shards)]
    found = world_size(available, target, bounds)
    if not allowed:
        assert found == 0
    else:
        fastest = min(math.ceil(shards / w) for w in allowed)
        assert found == min(w for w in allowed if math.ceil(shards / w) == fastest)


def test_world_sizes_of_eight_shards() -> None:
    assert [world_size(n, 9, Bounds(1, 9, 8)) for n in range(10)] == [0, 1, 2, 3, 4, 4, 4, 4, 8, 8]


def test_progress_clears_the_count() -> None:
    losses = Losses()
    for _ in range(3):
        losses = note_loss(losses, "n", committed=5, now_s=0.0)
    assert losses.fruitless == 3
    assert note_loss(losses, "n", committed=6, now_s=0.0).fruitless == 1


def test_gives_up_after_fruitless_starts_but_lets_every_member_fall_once() -> None:
    for members in (0, 4):
        losses = Losses()
        for number in range(1, MAX_FRUITLESS + members + 1):
            losses = note_loss(losses, "n", 0, 0.0)
            assert gives_up(losses, members) == (number >= MAX_FRUITLESS + members)


def test_one_error_again_and_again_ends_it_early() -> None:
    losses = Losses()
    for error in ("a", "b", "b"):
        losses = note_loss(losses, "n", 0, 0.0, was_ready=False, error=error)
        assert not gives_up(losses, 4)
    assert gives_up(note_loss(losses, "n", 0, 0.0, was_ready=False, error="b"), 4)
    for other in (note_loss(losses, "n", 1, 0.0, False, "b"), note_loss(losses, "n", 0, 0.0, True, "b"),
                  note_loss(losses, "n", 0, 0.0, False)):
        assert not gives_up(other, 4), "a step, a start that succeeded and a kill between them each make it another matter"


def test_restarts_back_off_up_to_a_limit() -> None:
    losses, delays = Losses(), []
    for _ in range(len(BACKOFF_S) + 2):
        losses = note_loss(losses, "n", 0, 0.0)
        delays.append(restart_delay_s(losses))
    assert delays == [*BACKOFF_S[1:], *[BACKOFF_S[-1]] * 3]
    assert delays[0] == 0.0 and sorted(delays) == delays


def losses_on(node: str, *times: float, losses: Losses | None = None) -> Losses:
    losses = losses or Losses()
    for time in times:
        losses = note_loss(losses, node, 0, time)
    return losses


def test_a_node_that_keeps_killing_is_left_out_for_a_while() -> None:
    times = [10.0 * i for i in range(NODE_LOSSES)]
    losses = losses_on("bad", *times, losses=losses_on("good", 1.0))
    assert banned_nodes(losses, times[-1], ["bad", "good"]) == ("bad",)
    assert banned_nodes(losses, times[-1] + NODE_BAN_S - 1, ["bad", "good"]) == ("bad",)
    assert banned_nodes(losses, times[-1] + NODE_BAN_S + 1, ["bad", "good"]) == ()
    assert banned_nodes(losses_on("bad", *times[:-1]), 100.0, ["bad", "good"]) == ()


def test_losses_far_apart_ban_nobody() -> None:
    losses = losses_on("slow", *[NODE_WINDOW_S * i for i in range(NODE_LOSSES)])
    assert banned_nodes(losses, NODE_WINDOW_S * NODE_LOSSES, ["slow", "other"]) == ()


def test_not_all_nodes_are_banned() -> None:
    losses = losses_on("only", 0.0, 1.0, 2.0, 3.0)
    assert banned_nodes(losses, 3.0, ["only"]) == ()
    assert banned_nodes(losses_on("", 0.0, 1.0, 2.0), 3.0, ["a", "b"]) == ()  # a worker that never said where it was
