"""Which buckets move between which steps, and who holds what in each: a pure function of the generation, the same on all members."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import count, groupby

import numpy as np

from elastic.messages import Buckets

Move = tuple[int, int, int]  # bucket, source and receiver
Ranks = np.ndarray  # by bucket, -1 for nobody


class Moving:
    """The moves of a generation that began at `committed`, in chunks: the first is carried out before its first step, the next
    between that and the second. In a chunk no member sends or gets more than `each` buckets. A bucket changes its holders once, when
    all that is copied of it has been.

    Invariants. A chunk that is carried out after commit k copies rows of step k. From step k + 1 on the new holders answer and get the
    sums; the old ones get none, but keep their rows, of step k, until they commit k + 1 themselves. So as long as k + 1 may have to be
    done anew, all rows of step k are where they were, and whoever sees vote k + 1 complete knows that every receiver had its rows: none
    votes before that.
    """

    def __init__(self, buckets: Buckets, committed: int, each: int = 1):
        self.committed = committed
        self.first = np.array(buckets.owners, np.int64), np.array(buckets.twins, np.int64)
        last = (buckets.last_owners, buckets.last_twins) if buckets.moves else (buckets.owners, buckets.twins)
        self.last = np.array(last[0], np.int64), np.array(last[1], np.int64)
        chunks = in_chunks(buckets.moves, each)
        self.rounds = [chunks] if buckets.at_once and chunks else [[chunk] for chunk in chunks]
        self.due = np.zeros(len(buckets.owners), np.int64)  # by bucket, the round in which it changes its holders
        for number, found in enumerate(self.rounds):
            self.due[[bucket for chunk in found for bucket, _, _ in chunk]] = number

    def at(self, step: int) -> tuple[Ranks, Ranks]:
        """The owners and the twins that serve `step`, any from the generation's start on; of the start itself, who had the rows."""
        done = step - self.committed  # rounds
        if done >= len(self.rounds):
            return self.last
        owners, twins = (np.where(self.due < done, last, first) for first, last in zip(self.first, self.last))
        return owners, twins

    def before(self, step: int) -> Sequence[Sequence[Move]]:
        """What is copied between the commit before and `step`, chunk by chunk."""
        number = step - self.committed - 1
        return self.rounds[number] if 0 <= number < len(self.rounds) else ()

    def is_last(self, step: int) -> bool:
        """Whether nothing is left to move once `step` begins, and something was until then."""
        return bool(self.rounds) and step - self.committed == len(self.rounds)


def in_chunks(moves: Iterable[Move], each: int) -> list[list[Move]]:
    """In the order of their buckets, each bucket in the first chunk in which its ends have room."""
    chunks: list[list[Move]] = []
    load, first = Counter[tuple[int, int, bool]](), Counter[tuple[int, bool]]()
    for _, found in groupby(moves, key=lambda move: move[0]):
        mine = list(found)
        ends = [end for _, source, to in mine for end in ((source, True), (to, False))]
        at = next(n for n in count(max(first[end] for end in ends)) if all(load[n, *end] < each for end in ends))
        chunks += [[] for _ in range(at + 1 - len(chunks))]
        chunks[at] += mine
        for end in ends:
            load[at, *end] += 1
            while load[first[end], *end] >= each:
                first[end] += 1
    return chunks


def roles_of(rank: int, holders: tuple[Ranks, Ranks]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What a rank owns, and what it keeps as a twin."""
    owned, twins = (tuple(np.flatnonzero(ranks == rank).tolist()) for ranks in holders)
    return owned, twins
