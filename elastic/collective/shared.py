"""A group of processes on one node over shared memory.

Every call is one or two meetings: a member stages its data in its own segment, counts up for every peer, waits for
every peer's count, and reads the peers' data where it lies. Two stages alternate: whoever has counted up for a meeting
has read all of the one before, so the stage of the one before that is free. A member writes to its own segment alone,
so one that was stopped and goes on can change nothing of another generation's.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from elastic.collective.group import SLICE_S, Buffer, Sums
from elastic.collective.kv_store import StoreClient
from elastic.collective.member import Meeting, zeros
from elastic.collective.reduction import Scratch, all_nodes, checked_nodes, fold, part_size
from elastic.collective.segment import GONE, POSTS, Peer, Segment
from elastic.errors import GroupBroken

STAGE = 4 * 1024 * 1024  # bytes staged at a time by calls that can go piece by piece
PIECE = 32 * 1024  # elements summed at a time: what is being added stays in the cache
LITTLE = 16 * 1024  # elements up to which every member sums everything by itself


class SharedGroup(Meeting):
    """Made by `form`. Buffers are NumPy arrays or CPU tensors; those from `allocate` are reduced where they lie."""

    sums_in_order = True  # `all_reduce` adds in rank order

    def __init__(self, segment: Segment, peers: Sequence[Peer | None], store: StoreClient, key: str, rank: int,
                 aborted: threading.Event,
                 timeout_s: float):
        super().__init__(rank, len(peers), aborted)
        self._segment, self._store, self._key, self._timeout_s = segment, store, key, timeout_s
        self._peers = [(r, peer) for r, peer in enumerate(peers) if peer is not None]
        self._number = 0  # of the last meeting
        self._stages = [segment.allocate(PIECE, np.uint8), segment.allocate(PIECE, np.uint8)]
        self._views: list[np.ndarray] = [peer.bytes if peer else segment.bytes for peer in peers]
        self._kept: dict[Any, np.ndarray] = {}
        self._spare: dict[Any, np.ndarray] = {}
        self._delivered_to: Collection[int] = [r for r, _ in self._peers]
        self._then: Callable[[], None] = lambda: None

    @classmethod
    def form(cls, rank: int, size: int, store_address: str, prefix: str, aborted: threading.Event,
             timeout_s: float) -> SharedGroup:
        """Meets the other members, all on this node, at the store under `prefix`."""
        return cls._join(StoreClient(store_address, prefix, aborted, timeout_s), "", rank, size, aborted, timeout_s)

    @classmethod
    def _join(cls, store: StoreClient, key: str, rank: int, size: int, aborted: threading.Event,
              timeout_s: float) -> SharedGroup:
        try:
            segment = Segment("elastic", size)
            store.set(f"{key}{rank}", segment.card.encode())
            cards = [store.get(f"{key}{r}") for r in range(size)]
            peers = [Peer(card.decode(), rank) if r != rank else None for r, card in enumerate(cards)]
        except (OSError, ValueError, OverflowError) as error:  # a card may be anything, and this process may have no descriptor left
            raise GroupBroken(f"Rank {rank} of {size}: the group could not form: {error}.") from error
        group = cls(segment, peers, store, key, rank, aborted, timeout_s)
        group.barrier()  # until every peer has opened this member's file: it may close, and the group be dropped
        segment.close()
        return group

    def allocate(self, size: int, plain: Callable[[int], Buffer] = zeros) -> np.ndarray:
        return self._segment.allocate(size)

    def _meet(self, *payload: np.ndarray) -> list[np.ndarray]:
        """Every member's payload as bytes, where it lies, in rank order; to be read before the next meeting but one."""
        self._check()
        self._number += 1
        turn = self._number % 2
        length = sum(part.nbytes for part in payload)
        if length > self._stages[turn].nbytes:
            self._stages[turn] = self._segment.allocate(2 * length, np.uint8)
        at = 0
        for part in payload:
            self._stages[turn][at:at + part.nbytes] = part.view(np.uint8)
            at += part.nbytes
        words = self._segment.words
        words[POSTS + 2 * turn], words[POSTS + 2 * turn + 1] = self._segment.offset(self._stages[turn]) or 0, length
        for rank in self._delivered_to:
            self._segment.count(rank, self._number)
        self._then()
        for _, peer in self._peers:
            while (seen := peer.counter()) < self._number:
                peer.sleep(seen, SLICE_S)
                self._look()
        found = [self._stages[turn][:length]] * self.size
        for rank, peer in self._peers:
            low = peer.words[POSTS + 2 * turn]
            found[rank] = peer.bytes[low:low + peer.words[POSTS + 2 * turn + 1]]
        return found

    def _look(self) -> None:
        """In every slice of a wait: raises if the group was aborted, or someone who has yet to come never will."""
        self._check()
        for rank, peer in self._peers:
            if peer.lost() and peer.counter() < self._number:
                raise self._break(f"lost rank {rank}")

    def _leave(self) -> None:
        self._segment.words[GONE] = 1
        for rank, _ in self._peers:
            self._segment.wake(rank)

    def cut_short(self, delivered_to: Collection[int], then: Callable[[], None]) -> None:
        self._delivered_to, self._then = delivered_to, then

    def barrier(self) -> None:
        self._meet()

    def all_gather(self, out: Buffer, part: Buffer) -> None:
        out, part = flat(out), flat(part)
        rows = out.reshape(self.size, -1)
        for low, high in pieces(part.shape[0], STAGE // part.itemsize):
            for rank, theirs in enumerate(self._meet(part[low:high])):
                rows[rank, low:high] = theirs.view(part.dtype)

    def broadcast(self, buffer: Buffer, root: int) -> None:
        buffer = flat(buffer)
        for low, high in pieces(buffer.shape[0], STAGE // buffer.itemsize):
            found = self._meet(*([buffer[low:high]] if self.rank == root else []))
            if self.rank != root:
                buffer[low:high] = found[root].view(buffer.dtype)

    def all_to_all(self, out: Buffer, out_counts: Sequence[int], buffer: Buffer, counts: Sequence[int]) -> None:
        out, buffer = flat(out), flat(buffer)
        at = 0
        for count, theirs in zip(out_counts, self._meet(np.array(counts, np.int64), buffer), strict=True):
            start = int(theirs[:8 * self.rank].view(np.int64).sum())
            out[at:at + count] = theirs[8 * self.size:].view(buffer.dtype)[start:start + count]
            at += count

    def all_reduce(self, buffer: Buffer) -> None:
        self._sum(flat(buffer), flat(buffer))

    def summed(self, x: Buffer) -> np.ndarray:
        """What `all_reduce` gives, in a new array."""
        x = flat(x)
        out = np.empty_like(x)
        self._sum(x, out)
        return out

    def _sum(self, x: np.ndarray, out: np.ndarray) -> None:
        """`out` may be `x`. Two members read as much, and meet once less, where each adds up all that does not lie in
        its segment already."""
        if self.size == 1:
            out[:] = x
        elif x.shape[0] <= LITTLE or (self.size == 2 and self._segment.offset(x) is None):
            for low, high in pieces(x.shape[0], STAGE // x.itemsize):
                first, *rest = (theirs.view(x.dtype) for theirs in self._meet(x[low:high]))
                total = out[low:high]
                for i, part in enumerate(rest):
                    np.add(total if i else first, part, out=total)
        else:
            in_rank_order = [(0, right) for right in range(1, self.size)]
            self._reduce([x], in_rank_order, [1] * self.size, equal_cuts(x.shape[0], 16, self.size), range(self.size),
                         out)

    def reduce_tree(self, sums: Sums, num_shards: int, out: Buffer, numel: int, block: int, scratch: Scratch) -> Buffer:
        """By reading the peers' sums in place, as all that follows."""
        return self._reduce_tree(sums, num_shards, equal_cuts(numel, block, self.size), range(self.size), out)

    def reduce_held(self, sums: Sums, num_shards: int, out: Buffer, cuts: Sequence[int], twin: bool,
                    scratch: Scratch) -> Buffer:
        ranks = [self.rank, (self.rank - 1) % self.size] if twin and self.size > 1 else [self.rank]
        return self._reduce_tree(sums, num_shards, cuts, ranks, out)

    def _reduce_tree(self, sums: Sums, num_shards: int, cuts: Sequence[int], ranks: Sequence[int],
                     out: Buffer) -> Buffer:
        num_terms = [len(nodes) for nodes in checked_nodes(self, sums, num_shards)]
        self._reduce([flat(buffer) for _, buffer in sums], tree_program(self.size, num_shards), num_terms, cuts, ranks,
                     flat(out))
        return out

    def _reduce(self, mine: Sequence[np.ndarray], program: Sequence[tuple[int, int]], num_terms: Sequence[int],
                cuts: Sequence[int],
                ranks: Sequence[int], out: np.ndarray) -> None:
        """Each member adds up its slice (cuts[rank]..cuts[rank + 1]) of everybody's terms, then copies the slices of
        `ranks`, in this order."""
        numel, dtype = cuts[-1], out.dtype
        placed = [self._placed(index, term[:numel]) for index, term in enumerate(mine)]
        found = self._meet(np.array([self._segment.offset(term) for term in placed], np.int64))
        low, high = cuts[self.rank], cuts[self.rank + 1]
        terms = [self._views[rank][at:at + numel * dtype.itemsize].view(dtype)[low:high]
                 for rank in range(self.size) for at in found[rank].view(np.int64).tolist()]
        if len(terms) != sum(num_terms):
            raise self._break("does not agree on what is summed")
        result = self._keep(("result", dtype), high - low, dtype)
        add_up(terms, program, result, self._spare)
        # Whoever comes to this meeting has read everybody's terms; whoever comes to the next call's first has copied
        # the results.
        results = self._meet(np.array([self._segment.offset(result)], np.int64))
        used = 0
        for rank in ranks:
            start, size = int(results[rank].view(np.int64)[0]), cuts[rank + 1] - cuts[rank]
            out[used:used + size] = self._views[rank][start:start + size * dtype.itemsize].view(dtype)
            used += size

    def _placed(self, index: int, term: np.ndarray) -> np.ndarray:
        """`term` inside this member's segment: itself, or a copy."""
        if self._segment.offset(term) is not None:
            return term
        copy = self._keep(("term", index, term.dtype), term.shape[0], term.dtype)
        copy[:] = term
        return copy

    def _keep(self, key: Any, size: int, dtype: np.dtype) -> np.ndarray:
        if key not in self._kept or self._kept[key].shape[0] < size:
            self._kept[key] = self._segment.allocate(size, dtype)
        return self._kept[key][:size]

    def _form_at(self, key: str, ranks: Sequence[int]) -> SharedGroup:
        return self._join(self._store, self._key + key, ranks.index(self.rank), len(ranks), self._aborted,
                          self._timeout_s)


def flat(buffer: Buffer) -> np.ndarray:
    return np.asarray(buffer).reshape(-1)


def pieces(length: int, most: int) -> list[tuple[int, int]]:
    """At least one, so that an empty call is a meeting too."""
    return [(low, min(low + most, length)) for low in range(0, max(length, 1), most)]


def equal_cuts(numel: int, block: int, size: int) -> list[int]:
    """Equal parts in whole blocks."""
    part = part_size(numel, block, size)
    return [min(numel, rank * part) for rank in range(size + 1)]


@lru_cache(maxsize=64)
def tree_program(size: int, num_shards: int) -> list[tuple[int, int]]:
    """The additions that sum all ranks' nodes along the tree: term `left` += term `right`, terms in rank order."""
    program = []

    def add(left: int, right: int) -> int:
        program.append((left, right))
        return left

    fold([(node, index) for index, node in enumerate(node for nodes in all_nodes(size, num_shards) for node in nodes)],
         num_shards, add)
    return program


def add_up(terms: Sequence[np.ndarray], program: Sequence[tuple[int, int]], out: np.ndarray,
           spare: dict[Any, np.ndarray]) -> None:
    """`out` = the sum of all terms by `program`, which ends in term 0. The terms are only read; `spare` is kept from
    call to call."""
    if not program:
        out[:] = terms[0]
    for low, high in pieces(out.shape[0], PIECE):
        values = [term[low:high] for term in terms]
        for left, right in program:
            if left and (left, out.dtype) not in spare:
                spare[left, out.dtype] = np.empty(PIECE, out.dtype)
            into = spare[left, out.dtype][:high - low] if left else out[low:high]
            values[left] = np.add(values[left], values[right], out=into)
