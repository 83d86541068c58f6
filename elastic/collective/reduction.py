"""How gradients are reduced: sums along the canonical tree over logical shards, the same bits whoever owns which shard.

A node is (low, high): the sum of leaves low..high-1. It splits at the largest power of two below its length, so every
aligned power-of-two range of leaves is a node; its sum is left child + right child, in this order. A leaf's value is
0 + gradient: never a negative zero. That is why a leaf may be added straight into its complete left sibling's buffer:
x + (0 + g) and x + g have the same bits.

A member owns a contiguous run of leaves. It adds them up to the run's maximal subtrees; the group moves these, not
leaves.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

from elastic.collective.group import Buffer, CollectiveGroup, Sums
from elastic.mesh import shards_of

Node = tuple[int, int]

# elements reduced at a time: bounds the receive buffers; over gloo 64 MB take 1.6 times as long in one go
CHUNK = 4 * 1024 * 1024


def split(node: Node) -> int:
    """Where a node's right child starts."""
    low, high = node
    return low + (1 << ((high - low - 1).bit_length() - 1))


@lru_cache(maxsize=64)
def parents(num_shards: int) -> dict[tuple[Node, Node], Node]:
    """(left child, right child) -> node, for the tree over `num_shards` leaves."""
    found: dict[tuple[Node, Node], Node] = {}
    todo = [(0, num_shards)]
    while todo:
        node = todo.pop()
        if node[1] - node[0] > 1:
            middle = split(node)
            children = (node[0], middle), (middle, node[1])
            found[children] = node
            todo.extend(children)
    return found


def maximal_subtrees(run: range, num_shards: int) -> list[Node]:
    """The largest nodes that cover exactly the leaves of `run`, in order: at most 2 log2(len(run)), 1 for a whole
    subtree."""
    if not run:
        return []
    found: list[Node] = []
    todo = [(0, num_shards)]
    while todo:
        node = todo.pop()
        if run.start <= node[0] and node[1] <= run.stop:
            found.append(node)
        elif node[0] < run.stop and run.start < node[1]:
            middle = split(node)
            todo += [(middle, node[1]), (node[0], middle)]
    return found


def fold(nodes: Sequence[tuple[Node, Any]], num_shards: int, add: Callable[[Any, Any], Any]) -> list[tuple[Node, Any]]:
    """Adds neighbours that are siblings, as far as it goes. `nodes` are disjoint, in order; `add(left, right)` -> the
    sum."""
    tree = parents(num_shards)
    stack: list[tuple[Node, Any]] = []
    for item in nodes:
        stack.append(item)
        while len(stack) > 1 and (stack[-2][0], stack[-1][0]) in tree:
            (right_node, right), (left_node, left) = stack.pop(), stack.pop()
            stack.append((tree[left_node, right_node], add(left, right)))
    return stack


def tree_sum(values: Sequence[float]) -> float:
    """The sum of one value a leaf, along the tree over all of them."""
    if not values:
        raise ValueError("a tree needs at least one leaf.")
    leaves = [((i, i + 1), 0.0 + value) for i, value in enumerate(values)]
    return fold(leaves, len(leaves), operator.add)[0][1]


class SubtreeSums:
    """Adds up one member's run of shards, in order, with as few buffers as the tree allows.

    `begin(shard)` gives the buffer to which the shard's gradient must be added, each element once; `end(shard)`
    follows. A run of n shards keeps at most log2(n) + 1 buffers while it lies on one subtree, and twice that where it
    straddles. With `apart` every shard has a buffer of its own, to which may be added several times: (tree + g0) + g1
    has other bits than tree + (g0 + g1).
    """

    def __init__(self, run: range, num_shards: int, take: Callable[[], Buffer], give: Callable[[Buffer], None],
                 apart: bool = False):
        self._apart = apart
        self._run, self._num_shards, self._tree = run, num_shards, parents(num_shards)
        self._take, self._give = take, give
        self._stack: list[tuple[Node, Buffer]] = []
        self._next, self._open = run.start, False

    def begin(self, shard: int) -> Buffer:
        if self._open or shard != self._next or shard not in self._run:
            raise ValueError(f"shard {shard} is out of order; shard {self._next} of {self._run} is next.")
        self._open = True
        if self._apart or not self._stack or (self._stack[-1][0], (shard, shard + 1)) not in self._tree:
            self._stack.append(((shard, shard), self._take()))  # an empty node: its leaf is open
        return self._stack[-1][1]

    def end(self, shard: int) -> None:
        if not self._open or shard != self._next:
            raise ValueError(f"shard {shard} was not begun.")
        self._open, self._next = False, shard + 1
        node, buffer = self._stack.pop()
        leaf = (shard, shard + 1)
        self._stack.append((leaf if node[0] == node[1] else self._tree[node, leaf], buffer))
        self._stack = fold(self._stack, self._num_shards, self._merge)

    def _merge(self, left: Buffer, right: Buffer) -> Buffer:
        left += right
        self._give(right)
        return left

    def nodes(self) -> list[tuple[Node, Buffer]]:
        """The run's maximal subtrees and their sums, in order, once every shard has ended."""
        if self._open or self._next != self._run.stop:
            raise ValueError(f"shard {self._next} of {self._run} is not done.")
        return list(self._stack)


class Scratch:
    """Receive buffers kept from step to step, for `chunk` elements at a time. They are a group's own: throw them away
    with it when it breaks."""

    def __init__(self, allocate: Callable[[int], Buffer], chunk: int = CHUNK):
        self._allocate, self.chunk = allocate, chunk
        self._buffer: Buffer | None = None

    def get(self, size: int) -> Buffer:
        if self._buffer is None or self._buffer.shape[0] < size:
            self._buffer = None
            self._buffer = self._allocate(size)
        return self._buffer[:size]


def part_size(length: int, block: int, size: int) -> int:
    """Elements of each of `size` equal parts, in whole blocks, that cover `length` elements."""
    return -(-length // (block * size)) * block


def out_size(numel: int, block: int, size: int) -> int:
    """Elements that `out` of `reduce` needs: `numel` and slack for `size` equal parts in whole blocks."""
    return part_size(numel, block, size) * size


def reduce(group: CollectiveGroup, sums: Sums, num_shards: int, out: Buffer, numel: int, block: int,
           scratch: Scratch) -> Buffer:
    """The sum over all shards along the canonical tree; every member gets the same bits, whatever the group's size.
    Callers ask for
    `group.reduce_tree`, which may have a faster way.

    `sums` is what `SubtreeSums.nodes` gave for this member's `shards_of`. Returns a buffer whose first `numel` elements
    are the sum: `out` (of `out_size(numel, block, group.size)` elements or more), or a buffer of `sums` in a group of
    one. After `GroupBroken`, neither `out` nor `scratch` nor a buffer of `sums` may be used again.
    """
    if group.size == 1:
        return sums[0][1]
    owned = checked_nodes(group, sums, num_shards)
    stride = max(1, scratch.chunk // (block * group.size)) * block * group.size
    for start in range(0, numel, stride):
        part = part_size(min(stride, numel - start), block, group.size)
        ends = [min(numel, start + rank * part) for rank in range(group.size + 1)]
        mine = exchange_and_add(group, sums, owned, num_shards, list(zip(ends, ends[1:])), scratch, part)
        group.all_gather(out[start:start + part * group.size], mine)
    return out


@lru_cache(maxsize=64)
def all_nodes(size: int, num_shards: int) -> list[list[Node]]:
    """Every rank's maximal subtrees."""
    return [maximal_subtrees(shards_of(rank, size, num_shards), num_shards) for rank in range(size)]


def checked_nodes(group: CollectiveGroup, sums: Sums, num_shards: int) -> list[list[Node]]:
    """`all_nodes`, once this rank is seen to have the sums of its own."""
    owned = all_nodes(group.size, num_shards)
    if owned[group.rank] != [node for node, _ in sums]:
        raise ValueError(f"rank {group.rank} of {group.size} has the sums {[n for n, _ in sums]}, not "
                         f"{owned[group.rank]}.")
    return owned


def exchange_and_add(group: CollectiveGroup, sums: Sums, owned: Sequence[Sequence[Node]], num_shards: int,
                     spans: Sequence[tuple[int, int]], scratch: Scratch, room: int = 0) -> Buffer:
    """This member's of everybody's `spans`, summed along the tree; with `room`, that many elements, zeros past the
    span."""
    lengths = [high - low for low, high in spans]
    mine, total = lengths[group.rank], sum(lengths)
    room = room or mine
    # then nothing is packed: they go straight from the sums' own buffers
    adjoin = all(one[1] == after[0] for one, after in zip(spans, spans[1:]))
    received = scratch.get(room + mine * sum(len(nodes) for nodes in owned) + (0 if adjoin else total))
    packed = received[received.shape[0] - total:]
    pieces: list[tuple[Node, Buffer]] = []
    used = 0
    for index in range(max(len(nodes) for nodes in owned)):
        senders = [rank for rank in range(group.size) if index < len(owned[rank])]
        sent = received[:0]
        if index < len(sums):
            sent = sums[index][1][spans[0][0]:spans[-1][1]] if adjoin else gather(packed, sums[index][1], spans)
        out_counts = [mine if rank in senders else 0 for rank in range(group.size)]
        group.all_to_all(received[used:used + sum(out_counts)], out_counts, sent, lengths if index < len(sums)
                         else [0] * group.size)
        for rank in senders:
            pieces.append((owned[rank][index], received[used:used + mine]))
            used += mine
    pieces.sort(key=lambda piece: piece[0])
    fold(pieces, num_shards, operator.iadd)  # into the first piece, which lies where `received` starts
    received[mine:room] = 0
    return received[:room]


def gather(out: Buffer, buffer: Buffer, spans: Sequence[tuple[int, int]]) -> Buffer:
    """`out`, filled with the spans of `buffer` one behind the other."""
    at = 0
    for low, high in spans:
        out[at:at + high - low] = buffer[low:high]
        at += high - low
    return out


# Sums of which every member gets its own range alone, and the gathering of what members made of theirs. `cuts` says
# whose is what: member r owns elements cuts[r]..cuts[r+1]-1. With a twin it also gets the range of the member before
# it, from that member once it is summed: 1 / (2 (size - 1)) more than an all-reduce moves. Bits are those of `reduce`.


def ranges(cuts: Sequence[int], size: int, chunk: int) -> Iterator[list[tuple[int, int]]]:
    """A part of everybody's range at a time."""
    stride = max(1, chunk // size)
    longest = max(high - low for low, high in zip(cuts, cuts[1:]))
    for begin in range(0, longest, stride):
        yield [(min(high, low + begin), min(high, low + begin + stride)) for low, high in zip(cuts, cuts[1:])]


def reduce_held(group: CollectiveGroup, sums: Sums, num_shards: int, out: Buffer, cuts: Sequence[int], twin: bool,
                scratch: Scratch) -> Buffer:
    """The sum over all shards along the canonical tree, of this member's range and behind it of the one whose twin it
    is.

    `sums` and what may be used after `GroupBroken` are as for `reduction.reduce`. Returns `out`, or in a group of one a
    buffer of `sums`.
    """
    if group.size == 1:
        return sums[0][1]
    owned = checked_nodes(group, sums, num_shards)
    own, before, after = cuts[group.rank + 1] - cuts[group.rank], (group.rank - 1) % group.size, (group.rank + 1) % group.size
    done, doubled = 0, own
    for spans in ranges(cuts, group.size, scratch.chunk):
        lengths = [high - low for low, high in spans]
        mine = lengths[group.rank]
        part = out[done:done + mine]
        part[:] = exchange_and_add(group, sums, owned, num_shards, spans, scratch)
        if twin:
            theirs = lengths[before]
            group.all_to_all(out[doubled:doubled + theirs], alone(before, theirs, group.size), part,
                             alone(after, mine, group.size))
            doubled += theirs
        done += mine
    return out


def alone(rank: int, count: int, size: int) -> list[int]:
    """All for one."""
    return [count if r == rank else 0 for r in range(size)]


def gather_owned(group: CollectiveGroup, buffer: Buffer, cuts: Sequence[int], scratch: Scratch) -> None:
    """Everybody's range of `buffer` becomes its owner's. What was received is copied in piece by piece: after
    `GroupBroken` the others' ranges are of no one time, this member's own and `scratch` apart.
    """
    if group.size == 1:
        return
    for spans in ranges(cuts, group.size, scratch.chunk):
        most = max(high - low for low, high in spans)
        low, high = spans[group.rank]
        space = scratch.get(most * (group.size + 1))
        mine, out = space[:most], space[most:most * (group.size + 1)]
        mine[:high - low] = buffer[low:high]
        group.all_gather(out, mine)
        for rank, (low, high) in enumerate(spans):
            if rank != group.rank:
                buffer[low:high] = out[rank * most:rank * most + high - low]
