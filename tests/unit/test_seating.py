"""Who sits where and what moves to whom, in one pass, against rules that look at everybody each time."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence

from elastic.boxes import Range, without
from elastic.controller.recovery import Whole, writers
from elastic.controller.seating import assign
from elastic.messages import Axes, Standing
from elastic.state.ownership import Transfer, held, moves, owned


def filled(candidates: Sequence[str], mesh: Axes, nodes: dict[str, str]) -> list[list[list[str]]]:
    """The columns of each tensor axis: into each in turn the first of those whose node has most beside it."""
    tensor, fillers = mesh[2], list(candidates)
    lines: list[list[list[str]]] = [[[] for _ in range(tensor)] for _ in range(mesh[1] * mesh[3])]
    for replica in range(mesh[0]):
        for line in lines:
            for column in line:
                assert len(column) == replica
                counts = [Counter(nodes[w] for w in other) for other in line]
                idle = Counter(nodes[w] for w in fillers)

                def worth(w: str, column: list[str] = column, counts: list[Counter[str]] = counts,
                          idle: Counter[str] = idle) -> tuple[int, int]:
                    here = sum(nodes[other] == nodes[w] for other in column)
                    return max(count[nodes[w]] for count in counts) - here, min(idle[nodes[w]], tensor)

                best = max(map(worth, fillers))
                chosen = next(w for w in fillers if worth(w) == best) if tensor > 1 else fillers[0]
                fillers.remove(chosen)
                column.append(chosen)
    return lines


def test_places_are_filled_as_by_looking_at_everybody() -> None:
    draw = random.Random(3)
    for _ in range(300):
        mesh: Axes = (draw.randint(1, 4), draw.choice((1, 2)), draw.choice((1, 2, 4)), draw.choice((1, 2)))
        names = [f"w{number}" for number in range(math.prod(mesh) + draw.randint(0, 5))]
        nodes = {name: f"node-{draw.randrange(draw.choice((1, 3, 9)))}" for name in names}
        members = assign(names, mesh, None, nodes)
        for number, line in enumerate(filled(names, mesh, nodes)):
            size, low = math.prod(mesh[1:]), number * mesh[2]
            found = [[members[replica * size + low + place] for replica in range(mesh[0])] for place in range(mesh[2])]
            assert [sorted(column) for column in found] == [sorted(column) for column in line]


def ranges(draw: random.Random, most: int, length: int) -> list[Range]:
    return [(low, draw.randint(low, length)) for low in (draw.randint(0, length) for _ in range(draw.randint(0, most)))]


def test_what_is_left_of_ranges_is_what_is_left_of_their_places() -> None:
    draw = random.Random(5)
    for _ in range(2000):
        some, others = ranges(draw, 6, 30), ranges(draw, 6, 30)
        places, left = [{at for low, high in given for at in range(low, high)} for given in (some, others)], without(some, others)
        assert {at for low, high in left for at in range(low, high)} == places[0] - places[1]
        assert left == sorted(left) and all(a < b for a, b in left) and all(b < c for (_, b), (c, _) in zip(left, left[1:]))


def naive(have: Sequence[Sequence[Range]], want: Sequence[Sequence[Range]], grain: int) -> list[Transfer]:
    """Stretch by stretch, piece by piece: whoever has it and has sent least."""
    edges = sorted({edge for given in (*have, *want) for one in given for edge in one})
    sent, found = [0] * len(have), list[Transfer]()
    for begin, end in zip(edges, edges[1:]):
        has, wants = ([any(low <= begin < high for low, high in given) for given in side] for side in (have, want))
        for to in range(len(want)):
            for low in range(begin, end, grain) if wants[to] and not has[to] else ():
                source = min((rank for rank in range(len(have)) if has[rank]), key=lambda rank: (sent[rank], rank))
                found.append(Transfer(source, to, low, min(end, low + grain)))
                sent[source] += found[-1].size
    return found


def test_moves_are_those_of_looking_at_everybody_for_each_piece() -> None:
    draw = random.Random(7)
    for _ in range(500):
        size, length = draw.randint(1, 6), draw.choice((6, 40))
        have, want = ([ranges(draw, 2, length) for _ in range(size)] for _ in range(2))
        have[draw.randrange(size)] = [(0, length)]
        grain = draw.randint(1, 5)
        assert moves(have, want, grain) == naive(have, want, grain)


def test_whoever_keeps_what_an_owner_had_writes_it() -> None:
    """Of a state shared out in any way, the first in line whose own ranges have it, else the first who has it with a twin's."""
    draw, written = random.Random(11), 0
    for _ in range(500):
        data, size, blocks = draw.randint(1, 5), draw.choice((1, 2)), draw.choice((1, 4, 20))
        twin, reports = draw.random() < 0.7, dict[str, Standing]()
        for rank in range(data * size):
            if draw.random() < 0.85:
                reports[f"w{rank}"] = Standing(f"w{rank}", 1, "broken", 5, mesh=(0, 1, size, 1), coordinate=rank % size,
                                               held=held(rank // size, data, blocks, twin), blocks=blocks)
        if not reports:
            continue
        exact = frozenset(w for w in reports if draw.random() < 0.6)
        whole = Whole(5, (1, size, 1), {w: r.coordinate for w, r in reports.items()}, exact, None, reports)
        wanted: list[str] = []
        for rank in range(data):
            for place in range(size):
                line = sorted((w for w, r in reports.items() if r.coordinate == place), key=lambda w: w not in exact)
                own = set(range(*owned(rank, data, blocks)))
                has = [[own <= {at for low, high in reports[w].held[:count] for at in range(low, high)} for w in line]
                       for count in (1, 2)]
                wanted += [next((w for given in has for w, found in zip(line, given) if found), "")]
        found = writers(whole, data, 0)
        assert found == (tuple(wanted) if all(wanted) else ())
        written += bool(found)
    assert written > 100
