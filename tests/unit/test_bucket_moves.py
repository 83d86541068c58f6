"""Buckets move between steps: who holds what is a pure function of the step, nobody sends or gets too much at a time, and rows stay what they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import pytest

from elastic.chaos import Injector
from elastic.controller.bucket_holders import has_all, with_buckets
from elastic.controller.recovery import find_whole
from elastic.errors import GroupBroken
from elastic.messages import Ballot, Buckets, Generation, Line, Moved, Ready, Save, Standing
from elastic.tables.buckets import bits_of, from_bits, holders
from elastic.tables.features import Tables
from elastic.tables.moving import Moving, in_chunks, roles_of
from elastic.tables.spec import RowUpdate
from elastic.worker.bucket_moves import held_buckets
from tests.support.sampling import sample
from tests.support.table_members import BUCKETS, Member, first_buckets, stored, tables_of
from tests.support.threads import together

LONG = 18  # steps, in which all buckets move one by one


def between(before: list[str], after: list[str], size: int = 64, twin: bool = True) -> Buckets:
    """What a generation of all of them carries."""
    members = sorted({*before, *after})
    now = holders(before, size, twin)
    reports = {w: Standing(w, 1, "stopped", 7, buckets=size, owned=bits_of(now.owned(w), size),
                           twins=bits_of(set(now.held(w)) - set(now.owned(w)), size)) for w in before}
    found = with_buckets(Generation(2, tuple(members), "", "local", 7), Ready("a", "n", 1, "", buckets=size, twin=twin),
                         reports, after).buckets
    assert found
    return found


CASES = [(["a", "b"], ["a", "b", "c"]), (["a", "b", "c", "d"], ["a", "b", "c"]), (["a", "b"], list("abcde")),
         (list("abcde"), ["a"]), (["a"], ["a", "b"]), (["a", "b"], ["c", "d"])]


@pytest.mark.parametrize(("before", "after"), CASES)
@pytest.mark.parametrize("twin", [True, False])
@pytest.mark.parametrize("each", [1, 3, 1000])
def test_holders_are_a_function_of_the_step(before: list[str], after: list[str], twin: bool, each: int) -> None:
    """Played by hand: whoever holds a bucket in a step had it in the step before, or gets a copy from one that had."""
    buckets = between(before, after, twin=twin)
    moving, copies = Moving(buckets, 7, each), list[tuple[int, int, int]]()
    owners, twins = moving.at(7)
    assert (owners >= 0).all()
    for step in range(8, 8 + len(moving.rounds) + 2):
        have = [{int(a), int(b)} - {-1} for a, b in zip(owners, twins)]
        ends = Counter[tuple[int, str]]()
        for chunk in moving.before(step):
            for bucket, source, to in chunk:
                assert source in have[bucket]
                copies.append((bucket, source, to))
                ends.update([(source, "sends"), (to, "gets")])
        for bucket, _, to in (move for chunk in moving.before(step) for move in chunk):
            have[bucket].add(to)
        assert max(ends.values(), default=0) <= max(each, 2)  # two copies of one bucket are not parted
        owners, twins = moving.at(step)
        assert all({int(a), int(b)} - {-1} <= pair for a, b, pair in zip(owners, twins, have)) and (owners >= 0).all()
        assert moving.is_last(step) == (step == 7 + len(moving.rounds))
    assert sorted(copies) == sorted(buckets.moves)
    assert tuple(owners.tolist()) == buckets.last_owners and tuple(twins.tolist()) == buckets.last_twins
    assert each < 1000 or len(moving.rounds) == 1


def test_the_ends_of_a_chunk_are_busy_together() -> None:
    """Fifty pairs move at once, and a pair's own moves one after the other."""
    found = in_chunks([(bucket, bucket % 50, 50 + bucket % 50) for bucket in range(200)], 1)
    assert [len(chunk) for chunk in found] == [50] * 4
    moves = [(0, 0, 1), (1, 2, 1), (2, 3, 4), (3, 2, 4)]
    assert in_chunks(moves, 1) == [[moves[0], moves[2]], [moves[1]], [moves[3]]]


def test_all_at_once_is_before_the_first_step() -> None:
    moving = Moving(replace(between(["a", "b"], ["c"]), at_once=True), 7, 1)
    assert len(moving.rounds) == 1 and len(moving.before(8)) == 64 and moving.is_last(8) and not moving.before(9)
    assert set(moving.at(8)[0].tolist()) == {2} and set(moving.at(7)[0].tolist()) == {0, 1}


def test_a_member_without_moves_asks_nobody() -> None:
    moving = Moving(Buckets((0, 1), (1, 0)), 3)
    assert not moving.rounds and not moving.is_last(3) and roles_of(0, moving.at(3)) == ((0,), (1,))


class Keeper(Member):
    """Notes what it owns where a checkpoint is due."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.owned: list[tuple[int, ...]] = []

    def save(self, order: Save) -> None:
        assert self.tables
        self.owned.append(self.tables.owned)


def trained(buckets: Buckets, size: int, options: dict[str, Any], look_ahead: int = 0) -> list[Keeper]:
    """One bucket at a time; `clip_norm` counts the slope of every row once in each step, and so does an evaluation."""
    members = [Keeper(replace(tables_of(**options), move_bytes=1, look_ahead=look_ahead), bent=True, optimizer={"clip_norm": 0.5}, num_steps=LONG,
                      eval_every=6, checkpoint_every=1) for _ in range(size)]
    generation = Generation(1, tuple(f"w{r}" for r in range(size)), "", "local", 0, mesh=(size, 1, 1, 1), buckets=buckets)
    assert together(size, lambda rank, group: members[rank].train(group, generation), 60.0) == ["done"] * size
    return members


OPTIONS: list[dict[str, Any]] = [
    {"optimizer": "adam", "init": "normal:0.1", "update": RowUpdate(0.05, weight_decay=0.01)},
    {"optimizer": "rowwise_adagrad", "init": "uniform:0.1", "update": RowUpdate(0.1), "admit": 2, "ttl_steps": 3}]


WHO = {"joiner": (["w0", "w1"], ["w0", "w1", "w2"]), "leavers": (["w0", "w1", "w2", "w3"], ["w1"]), "others": (["w0"], ["w1", "w2"])}


@pytest.mark.parametrize(("who", "look_ahead", "twin", "number"), sample(list(product(WHO, (0, 2), (True, False), (0, 1))), 6))
def test_rows_are_the_same_bits_while_they_move(who: str, look_ahead: int, twin: bool, number: int) -> None:
    (before, after), options = WHO[who], OPTIONS[number]
    one = trained(first_buckets(1, tables_of()), 1, options)
    plan = between(before, after, BUCKETS, twin)
    members = trained(plan, len({*before, *after}), {**options, "twin": twin}, look_ahead)
    for table in ("ads", "users"):
        assert stored(members, table) == stored(one, table)
    assert lines(members) == lines(one)
    for owned in zip(*(member.owned for member in members)):
        assert sorted(bucket for each in owned for bucket in each) == list(range(BUCKETS))
    for rank, member in enumerate(members):
        assert member.tables and (member.tables.owned, member.tables.twins) == roles_of(rank, Moving(plan, 0).last)
    (told,) = [message for message in members[0].posted if isinstance(message, Moved)]
    assert (told.buckets, told.generation) == (len(plan.moves), 1) and told.bytes > 0
    assert told.steps == len(Moving(plan, 0, 1).rounds) == told.step + 1 > 4


def lines(members: Sequence[Member]) -> list[Any]:
    return [line.fields.get("loss", line.fields.get("eval")) for line in members[0].posted
            if isinstance(line, Line) and line.file == "metrics"]


# What is left when somebody falls.


class Fallen(Exception):
    """A process is gone."""


def fall(*_: Any) -> Any:
    raise Fallen


def until(fault: str, tables: Tables) -> list[Member]:
    """All buckets move from the first of two members to the second before step 1, in which one of them falls."""
    members = [Member(tables, bent=True) for _ in range(2)]
    generation = Generation(1, ("w0", "w1"), "", "local", 0, mesh=(2, 1, 1, 1),
                            buckets=between(["w0"], ["w1"], BUCKETS, twin=False))

    def body(rank: int, group: Any) -> None:
        with pytest.raises((Fallen, GroupBroken)):
            members[rank].train(group, generation, Injector((fault,), rank, lambda spec: None, fall, fall))
        group.abort()

    together(2, body, 60.0)
    return members


def report(name: str, member: Member) -> Standing:
    state, held = member.place.state, member.held
    return Standing(name, 1, "broken", state.committed, held.step, held.ballot, **held_buckets(member.tables, True))


ALL = list(range(BUCKETS))


@pytest.mark.parametrize(("fault", "left"), [*((f"kill:1@1/{phase}", 0) for phase in ("move", "rows", "push", "vote")),
                                             *((f"kill:0@1/{phase}", 1) for phase in ("rows", "push", "vote"))])
def test_until_a_vote_completes_both_ends_have_the_rows(fault: str, left: int) -> None:
    tables = tables_of("adam", "normal:0.1", RowUpdate(0.05), twin=False)
    one = [Member(tables, bent=True)]
    generation = Generation(2, ("w0",), "", "local", 0, mesh=(1, 1, 1, 1), buckets=first_buckets(1, tables))
    together(1, lambda rank, group: one[rank].train(group, generation), 60.0)
    survivor = until(fault, tables)[left]
    found = report("w0", survivor)
    assert from_bits(found.owned) == ALL and found.committed == 0 and from_bits(found.stale) == (ALL if left == 0 and "move" not in
                                                                                                fault else [])
    together(1, lambda rank, group: survivor.train(group, generation), 60.0)
    assert all(stored([survivor], table) == stored(one, table) for table in ("ads", "users"))


def test_whoever_sees_the_vote_lets_go_of_what_was_not_fed() -> None:
    """The new owner fell with the only rows of step 1: nobody may take the old ones for them."""
    source, _ = until("kill:1@1/update", tables_of(twin=False))
    found = report("w0", source)
    assert found.committed == 1 and from_bits(found.owned) == [] and not has_all([found])


def test_who_did_not_see_the_vote_counts_as_if_it_had_applied_it() -> None:
    vote = Ballot(1, 0.0, 1.0)
    whole, half = bits_of(ALL, BUCKETS), bits_of(ALL[:8], BUCKETS)
    saw = Standing("w0", 1, "broken", 1, 1, vote, buckets=BUCKETS, owned=half)
    behind = Standing("w1", 1, "broken", 0, 1, buckets=BUCKETS, owned=whole, stale=half)
    found = find_whole({"w0": saw, "w1": behind}, ("w0", "w1"))
    assert found and from_bits(found.reports["w1"].owned) == ALL[8:]
    assert not find_whole({"w0": replace(saw, owned=bits_of([], BUCKETS)), "w1": behind}, ("w0", "w1"))
    nobody = replace(behind, committed=0), replace(saw, committed=0, holds=-1, ballot=None, owned=bits_of([], BUCKETS))
    assert find_whole({"w1": nobody[0], "w0": nobody[1]}, ("w0", "w1")), "without a vote the old rows are the rows"
