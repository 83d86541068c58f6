"""Who sits where: whoever holds a coordinate's state keeps it, the rest is filled in, a tensor group's members from one node where they can."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from heapq import heapify, heappop, heappush

from elastic.controller.recovery import Whole
from elastic.messages import Axes

Key = tuple[int, int, int]


def assign(candidates: Sequence[str], mesh: Axes, whole: Whole | None, nodes: Mapping[str, str]) -> tuple[str, ...]:
    """Who sits where, in rank order: whoever holds a coordinate keeps it, the rest is filled in the order of
    `candidates`.

    Where workers of one node can make up a tensor group, they do.
    """
    data, degrees = mesh[0], mesh[1:]
    columns: list[list[str]] = [[] for _ in range(math.prod(degrees))]
    fillers: Iterable[str] = candidates
    if whole and whole.degrees == degrees:
        for worker in candidates:
            place = whole.coordinates.get(worker, -1)
            if place >= 0 and len(columns[place]) < data:
                columns[place].append(worker)
        seated = {worker for column in columns for worker in column}
        fillers = [w for w in candidates if w not in seated]
    elif whole and math.prod(mesh) >= math.prod(whole.degrees):
        there = set(candidates)
        first = dict.fromkeys(w for w in whole.copy() if w in there)
        fillers = [*first, *(w for w in candidates if w not in first)][:math.prod(mesh)]
    tensor = degrees[1]
    lines = [columns[low:low + tensor] for low in range(0, len(columns), tensor)]
    fill(lines, data, fillers, nodes)
    rows = [side_by_side(line, nodes) for line in lines]
    return tuple(worker for replica in range(data) for line in rows for worker in line[replica])


def fill(lines: Sequence[list[list[str]]], data: int, fillers: Iterable[str], nodes: Mapping[str, str]) -> None:
    """Brings every column of the tensor axes `lines` to a length of `data`."""
    idle: dict[str | None, deque[tuple[int, str]]] = {}  # by node, in their order
    for index, worker in enumerate(fillers):
        node = nodes.get(worker) if len(lines[0]) > 1 else None  # who shares a node with nobody takes the next one
        idle.setdefault(node, deque()).append((index, worker))
    seats = [Seats(line, idle, nodes) for line in lines]
    for replica in range(data):
        for line, seat in zip(lines, seats):
            for place, column in enumerate(line):
                if len(column) == replica:
                    column.append(seat.take(place))


class Seats:
    """The places of one tensor axis that are still empty. Which of the fillers to take into a column: one whose node has a
    place to fill beside the others of its tensor groups, then one whose node has more fillers, then the first.

    What a filler is worth is the same for all of a node. Each column keeps its nodes in a heap; an entry that is out of
    date is put right when it comes up, and one that has become worth more is entered anew at once.
    """

    def __init__(self, line: Sequence[Sequence[str]], idle: Mapping[str | None, deque[tuple[int, str]]],
                 nodes: Mapping[str, str]):
        self.idle, self.counts = idle, [Counter(nodes.get(w) for w in column) for column in line]
        self.heaps: dict[int, list[tuple[Key, str | None]]] = {}

    def worth(self, place: int, node: str | None) -> Key:
        """The least is the best."""
        beside = max(count[node] for count in self.counts)
        return self.counts[place][node] - beside, -min(len(self.idle[node]), len(self.counts)), self.idle[node][0][0]

    def take(self, place: int) -> str:
        heap = self.heaps.get(place)
        if heap is None:
            heap = self.heaps[place] = [(self.worth(place, node), node) for node, there in self.idle.items() if there]
            heapify(heap)
        while True:
            was, node = heappop(heap)
            if not self.idle[node]:
                continue
            if (now := self.worth(place, node)) == was:
                break
            heappush(heap, (now, node))
        _, worker = self.idle[node].popleft()
        self.counts[place][node] += 1
        for other in self.heaps if self.idle[node] else ():
            heappush(self.heaps[other], (self.worth(other, node), node))
        return worker


def side_by_side(line: Sequence[Sequence[str]], nodes: Mapping[str, str]) -> list[tuple[str, ...]]:
    """The columns of a tensor axis as its groups, one for each replica; those that lie on one node come first."""
    if len(line) == 1:
        return [(worker,) for worker in line[0]]
    waiting: list[dict[str | None, deque[str]]] = [{} for _ in line]  # of each column, by node
    for column, by_node in zip(line, waiting):
        for worker in column:
            by_node.setdefault(nodes.get(worker), deque()).append(worker)
    together, seated = [], set[str]()
    for first in line[0]:
        node = nodes.get(first)
        if all(by_node.get(node) for by_node in waiting):
            together.append((first, *(by_node[node].popleft() for by_node in waiting[1:])))
            seated.update(together[-1])
    left = [[w for w in column if w not in seated] for column in line]
    order = {node: i for i, node in enumerate(dict.fromkeys(nodes.get(w) for column in left for w in column))}
    return together + list(zip(*(sorted(column, key=lambda w: order[nodes.get(w)]) for column in left), strict=True))


def gaps(nodes: Iterable[str], tensor: int) -> tuple[str, ...]:
    """Nodes on which workers are missing for a tensor group, once for each; those that miss the fewest first. `nodes`:
    one for each worker."""
    missing = {node: -count % tensor for node, count in Counter(nodes).items() if node}
    return tuple(node for node in sorted(missing, key=lambda n: missing[n]) for _ in range(missing[node]))
