"""Ids to buckets, and buckets to their owners and twins. Pure functions of numbers and names."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from elastic.data.permutation import mix
from elastic.tables.spec import TableSpec


def buckets_of(spec: TableSpec, ids: np.ndarray) -> np.ndarray:
    """int64, as the ids: id mod B of a static vocabulary, mix64(id) mod B of a table that grows."""
    words = ids.view(np.uint64)
    return ((words if spec.vocabulary else mix(words)) & np.uint64(spec.num_buckets - 1)).astype(np.int64)


@dataclass(frozen=True)
class Holders:
    """By bucket: its owner, and its twin, the second keeper, or "" where there is none."""

    owners: tuple[str, ...]
    twins: tuple[str, ...]

    def owned(self, member: str) -> list[int]:
        return [bucket for bucket, owner in enumerate(self.owners) if owner == member]

    def held(self, member: str) -> list[int]:
        """What it owns, and that of which it is the twin."""
        return [bucket for bucket, pair in enumerate(zip(self.owners, self.twins)) if member in pair]

    def lacking(self, members: Sequence[str]) -> list[int]:
        """The buckets that none of these has."""
        there = set(members)
        return [bucket for bucket, pair in enumerate(zip(self.owners, self.twins)) if there.isdisjoint(pair)]


@dataclass(frozen=True)
class Move:
    """One bucket that one member copies to another."""

    bucket: int
    source: str
    to: str


def holders(members: Sequence[str], num_buckets: int, twin: bool, before: Holders | None = None) -> Holders:
    """Who holds what among `members`, all evenly, with the fewest moves from `before`.

    A holder is never asked to copy what it has: a twin becomes the owner of a bucket whose owner is gone.
    """
    copies = 2 if twin and len(members) > 1 else 1
    kept = [[m for m in pair if m in set(members)] for pair in zip(before.owners,
                                                                   before.twins)] if before else [[] for _ in range(num_buckets)]
    if copies == 1:
        kept = [pair[:1] for pair in kept]
    places = spread(members, kept, copies)
    owners = oriented(members, places)
    twins = tuple(next((m for m in pair if m != owner), "") for pair, owner in zip(places, owners))
    return Holders(tuple(owners), twins)


def spread(members: Sequence[str], kept: Sequence[list[str]], copies: int) -> list[list[str]]:
    """Each bucket's `copies` different holders, each member with as many buckets as any other, or one more; all that
    can stay stays.

    Partners are mixed: whoever is lost, its buckets' other holders are all the others alike, so none has to move for
    evenness alone.
    """
    places = [list(pair) for pair in kept]
    num = Counter(m for pair in places for m in pair)
    each, more = divmod(copies * len(places), len(members))
    rich = set(sorted(members, key=lambda m: -num[m])[:more])  # stable: of equals the first
    quota = {m: each + (m in rich) for m in members}
    for m in members:
        for bucket in leaving(m, places)[:max(0, num[m] - quota[m])]:
            places[bucket].remove(m)
            num[m] -= 1
    joint = Counter(tuple(pair) for pair in places)
    for pair in places:
        while len(pair) < copies:
            free = [m for m in members if m not in pair]
            m = max(free, key=lambda m: (quota[m] - num[m], -joint[*pair, m] - joint[m, *pair]))
            # who has room has this bucket already: it takes another's, whose holder takes this one
            if num[m] >= quota[m]:
                m = exchanged(places, pair, free, next(m for m in pair if num[m] < quota[m]), num)
            pair.append(m)
            num[m] += 1
            joint[tuple(pair)] += 1
    return places


def leaving(m: str, places: Sequence[list[str]]) -> list[int]:
    """A member's buckets, first those that it should give up first: another keeps them, and each of its partners in
    turn."""
    seen: Counter[str] = Counter()
    found = []
    for bucket, pair in enumerate(places):
        if m in pair:
            partner = next((other for other in pair if other != m), "")
            found.append((not partner, seen[partner], bucket))
            seen[partner] += 1
    return [bucket for *_, bucket in sorted(found)]


def exchanged(places: Sequence[list[str]], pair: list[str], free: Sequence[str], roomy: str, num: Counter[str]) -> str:
    """Hands a bucket from a member of `free` to `roomy`, and says from which: it has room for `pair` now."""
    other = next(p for p in places if p is not pair and roomy not in p and any(m in free for m in p))
    m = next(m for m in other if m in free)
    other[other.index(m)] = roomy
    num[roomy] += 1
    num[m] -= 1
    return m


def oriented(members: Sequence[str], places: Sequence[list[str]]) -> list[str]:
    """The owner among each bucket's holders, so that all own as many, or one more. Of a pair the first owns it unless
    that is uneven.

    What is uneven then is mended along paths of buckets whose roles are exchanged, from who owns most to who owns
    least.
    """
    load = Counter(dict.fromkeys(members, 0))
    owners = []
    for pair in places:
        owners.append(pair[0] if load[pair[0]] < len(places) // len(members) else min(pair, key=lambda m: load[m]))
        load[owners[-1]] += 1
    while path := next((path for m in members if (path := path_down(places, owners, load, m))), []):
        for bucket in path:
            load[owners[bucket]] -= 1
            owners[bucket] = next(m for m in places[bucket] if m != owners[bucket])
            load[owners[bucket]] += 1
    return owners


def path_down(places: Sequence[list[str]], owners: Sequence[str], load: Counter[str], most: str) -> list[int]:
    """Buckets to exchange so that `most` owns one less and somebody with at least two fewer one more; [] where there is
    nobody."""
    if load[most] - min(load.values()) < 2:
        return []
    twins: dict[str, dict[str, int]] = {m: {} for m in load}  # owner -> twin -> one of their buckets
    for bucket, (pair, owner) in enumerate(zip(places, owners)):
        for m in pair:
            if m != owner:
                twins[owner].setdefault(m, bucket)
    came: dict[str, tuple[str, int]] = {}
    todo = deque([most])
    while todo:
        here = todo.popleft()
        if load[here] <= load[most] - 2:
            path = []
            while here != most:
                here, bucket = came[here]
                path.append(bucket)
            return path
        for m, bucket in twins[here].items():
            if m != most and m not in came:
                came[m] = here, bucket
                todo.append(m)
    return []


def moves(before: Holders, after: Holders) -> list[Move]:
    """What is copied, each bucket from whichever of its holders that stays has sent least so far. ValueError where
    nobody has one."""
    sent: dict[str, int] = {}
    found = []
    members = {*after.owners, *after.twins} - {""}
    for bucket, pair in enumerate(zip(after.owners, after.twins)):
        have = [m for m in (before.owners[bucket], before.twins[bucket]) if m]
        sources = [m for m in have if m in members] or have
        for to in pair:
            if to and to not in have:
                if not sources:
                    raise ValueError(f"nobody has bucket {bucket}, which {to} wants.")
                source = min(sources, key=lambda m: (sent.get(m, 0), m))
                sent[source] = sent.get(source, 0) + 1
                found.append(Move(bucket, source, to))
    return found


def bits_of(buckets: Iterable[int], num_buckets: int) -> str:
    """Some buckets as bits in hexadecimal digits, the lowest bucket last."""
    return f"{sum(1 << bucket for bucket in buckets):0{-(-num_buckets // 4)}x}"


def from_bits(text: str) -> list[int]:
    """The buckets of `bits_of`, ascending."""
    return [at for at, bit in enumerate(reversed(f"{int(text or '0', 16):b}")) if bit == "1"]
