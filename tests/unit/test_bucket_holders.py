"""Who holds which bucket next: everybody as many, no copy that is not needed, and nothing from those who have nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest

from elastic.controller.bucket_holders import has_all, holders_now, with_buckets
from elastic.messages import Generation, Ready, Standing
from elastic.tables.buckets import bits_of, from_bits
from elastic.tables.moving import Moving, roles_of

SIZE = 16


def ready(twin: bool = True, buckets: int = SIZE) -> Ready:
    return Ready("a", "n", 1, "a:1", buckets=buckets, twin=twin)


def report(worker: str, owned: list[int], twins: list[int]) -> Standing:
    return Standing(worker, 1, "broken", 9, buckets=SIZE, owned=bits_of(owned, SIZE), twins=bits_of(twins, SIZE))


def generation(*members: str, committed: int = 9) -> Generation:
    return Generation(2, members, "", "local", committed)


def settled(found: Generation) -> dict[str, Standing]:
    """What its members report once they have all that it gives them."""
    assert found.buckets
    last = Moving(found.buckets, 9).last
    return {w: report(w, *map(list, roles_of(r, last))) for r, w in enumerate(found.members)}


@pytest.mark.parametrize("buckets", [[], [0], [3, 4, 15], list(range(16))])
def test_bits_and_back(buckets: list[int]) -> None:
    assert from_bits(bits_of(buckets, SIZE)) == buckets and len(bits_of(buckets, SIZE)) == SIZE // 4


def test_a_run_without_tables_has_no_buckets() -> None:
    assert with_buckets(generation("a", "b"), ready(buckets=0), {}) == generation("a", "b")


def test_a_first_generation_copies_nothing() -> None:
    found = with_buckets(generation("a", "b", "c", committed=-1), ready(), {"a": report("a", list(range(16)), [])}).buckets
    assert found and found.moves == ()
    assert sorted(found.owners.count(r) for r in range(3)) == [5, 5, 6] and -1 not in found.twins
    assert all(owner != twin for owner, twin in zip(found.owners, found.twins))


def test_the_twins_of_a_lost_worker_own_and_only_new_twins_are_copied() -> None:
    first = settled(with_buckets(generation("a", "b", "c", committed=-1), ready(), {}))
    lost = set(from_bits(first["b"].owned)) | set(from_bits(first["b"].twins))
    del first["b"]
    found = with_buckets(generation("a", "c"), ready(), first).buckets
    assert found and {bucket for bucket, _, _ in found.moves} == lost
    assert all({o, t} == {0, 1} for o, t in zip(found.last_owners, found.last_twins))
    for bucket, (owner, twin) in enumerate(zip(found.owners, found.twins)):
        assert owner in (0, 1) and (twin == -1 if bucket in lost else twin == 1 - owner)
    assert has_all(first.values())
    assert not has_all([first["a"]])


def test_a_joiner_gets_its_share_and_no_more() -> None:
    first = settled(with_buckets(generation("a", "b", committed=-1), ready(twin=False), {}))
    found = with_buckets(generation("a", "b", "c"), ready(twin=False), first).buckets
    assert found and found.twins == found.last_twins == (-1,) * SIZE
    assert set(found.owners) == {0, 1} and found.last_owners.count(2) == 5
    assert len(found.moves) == 5 and {to for _, _, to in found.moves} == {2}


def test_who_leaves_hands_over() -> None:
    first = settled(with_buckets(generation("a", "b", "c", committed=-1), ready(twin=False), {}))
    found = with_buckets(generation("a", "b", "c"), ready(twin=False), first, ("a",)).buckets
    assert found and set(found.owners) == {0, 1, 2} and set(found.last_owners) == {0} and not found.at_once
    late = with_buckets(generation("a", "b", "c"), ready(twin=False), first, ("a",), at_once=True).buckets
    assert late == replace(found, at_once=True)
    assert {(bucket, source) for bucket, source, _ in found.moves} == {
        (bucket, rank) for rank, w in ((1, "b"), (2, "c")) for bucket in from_bits(first[w].owned)}


def test_roles_change_at_once_where_nothing_is_copied() -> None:
    """Of two that have everything one owned it all."""
    first = {"a": report("a", list(range(16)), []), "b": report("b", [], list(range(16)))}
    found = with_buckets(generation("a", "b"), ready(), first).buckets
    assert found and not found.moves and found.owners.count(1) == 8 and not found.last_owners


def test_of_two_owners_the_first_is_one_and_a_twin_stands_in() -> None:
    now = holders_now({"a": report("a", [0, 1], []), "b": report("b", [1], [2])}, 4)
    assert now.owners == ("a", "a", "b", "") and now.twins == ("", "b", "", "")
