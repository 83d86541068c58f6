"""Who keeps what, over random histories of worlds. The oracle is a set of holders for every single block."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic.boxes import union, without
from elastic.state.ownership import by_twins, cuts, held, lacking, moves, owned, rounds

ranges = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)).map(lambda pair: (min(pair), max(pair))),
                  max_size=5)


def places(found: list) -> set[int]:
    return {place for low, high in found for place in range(low, high)}


@pytest.mark.parametrize("num_blocks", [1, 2, 3, 7, 12])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
def test_every_block_has_one_owner_and_one_twin_beside_it(size: int, num_blocks: int) -> None:
    for block in range(num_blocks):
        owners = [r for r in range(size) if block in places([held(r, size, num_blocks, True)[0]])]
        twins = [r for r in range(size) if block in places([held(r, size, num_blocks, True)[1]])]
        assert len(owners) == 1 and twins == ([(owners[0] + 1) % size] if size > 1 else [])
    most = -(-num_blocks // size)
    for rank in range(size):
        own, twin = held(rank, size, num_blocks, True)
        assert own[1] - own[0] <= most and twin[1] - twin[0] <= most
        assert own == owned(rank, size, num_blocks) == (cuts(size, num_blocks)[rank], cuts(size, num_blocks)[rank + 1])
        assert held(rank, size, num_blocks, False) == (own, (0, 0))


@given(ranges, ranges)
@settings(max_examples=300, deadline=None)
def test_union_and_without_are_those_of_sets(one: list, other: list) -> None:
    assert places(union(one)) == places(one)
    assert all(a[1] < b[0] for a, b in zip(union(one), union(one)[1:])) and all(low < high for low, high in union(one))
    assert places(without(one, other)) == places(one) - places(other)
    assert places(lacking([one, other], 12)) == set(range(12)) - places(one) - places(other)


@given(st.lists(ranges, min_size=1, max_size=5), st.integers(1, 4), st.randoms())
@settings(max_examples=300, deadline=None)
def test_moves_bring_everybody_what_it_wants_and_nothing_else(have: list, grain: int, luck: random.Random) -> None:
    somewhere = [one for ranges in have for one in ranges]
    want = [[luck.choice(somewhere)] if somewhere and luck.random() < 0.7 else [] for _ in have]
    found = moves(have, want, grain)
    for rank in range(len(have)):
        came = [place for move in found if move.to == rank for place in range(move.low, move.high)]
        assert len(came) == len(set(came)) and set(came) == places(want[rank]) - places(have[rank])
    assert all(0 < move.size <= grain and places([(move.low, move.high)]) <= places(have[move.source])
               for move in found)
    packed = rounds(found, 6)
    assert [move for part in packed for move in part] == found and all(part for part in packed)
    assert all(len(part) == 1 or sum(move.size for move in part) <= 6 for part in packed)


def test_what_nobody_has_cannot_be_moved() -> None:
    with pytest.raises(ValueError, match="nobody has 2 to 4, which member 1 wants"):
        moves([[(0, 2)], []], [[], [(0, 4)]], 8)


def test_many_takers_do_not_all_ask_the_same_holder() -> None:
    found = moves([[(0, 64)]] * 4 + [[]], [[]] * 4 + [[(0, 64)]], 4)
    assert {move.source for move in found} == {0, 1, 2, 3}
    assert max(sum(m.size for m in found if m.source == rank) for rank in range(4)) == 16


@pytest.mark.parametrize("twin", [True, False])
@pytest.mark.parametrize("seed", range(20))
def test_one_loss_at_a_time_loses_nothing_with_a_twin(seed: int, twin: bool) -> None:
    """Histories of one loss, any number of joins, then everything is moved. Every block's value is a number that only
    moves carry."""
    luck, num_blocks = random.Random(seed), luck_blocks(seed)
    state = [{block: (block,) for block in range(num_blocks)}]  # of each member
    is_whole = True
    for _ in range(12):
        size = len(state)
        lost = luck.randrange(size) if size > 1 and luck.random() < 0.7 else None
        alive = [(r, mine) for r, mine in enumerate(state) if r != lost]
        luck.shuffle(alive)
        have = [held(r, size, num_blocks, twin) for r, _ in alive]
        if lost is not None:
            assert places(by_twins(have)) == (places([owned(lost, size, num_blocks)]) if twin else set())
        gone = lacking(have, num_blocks)
        if gone:
            is_whole = False
            break
        joined = [{} for _ in range(luck.randrange(3) if len(alive) < 5 else 0)]
        before, have = [mine for _, mine in alive] + joined, have + [((0, 0), (0, 0)) for _ in joined]
        want = [held(r, len(before), num_blocks, twin) for r in range(len(before))]
        state = [{block: mine[block] for block in places(list(w)) & mine.keys()} for mine, w in zip(before, want)]
        for move in moves(have, want, 2):
            for block in range(move.low, move.high):
                state[move.to][block] = before[move.source][block]
        for mine, w in zip(state, want):
            assert mine == {block: (block,) for block in places(list(w))}
    assert is_whole or not twin


def luck_blocks(seed: int) -> int:
    return random.Random(-seed - 1).randrange(1, 23)
