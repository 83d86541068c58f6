"""The rule of recovery, as pure functions: which state counts, who sits where, and where everybody starts.

If any survivor saw a vote complete, its step counts for all; whoever holds that step's gradients applies them, whoever
does not is healed by one that holds the same coordinate. If none did, all redo the step from untouched state. The state
is there as long as every coordinate of one mesh has a holder.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from elastic.boxes import without
from elastic.controller.bucket_holders import applied, has_all
from elastic.controller.policy import Degrees
from elastic.messages import Axes, Ballot, Generation, Holder, Standing
from elastic.state.ownership import lacking, owned


@dataclass(frozen=True)
class Whole:
    """One state of which every part is there. `coordinates`: who holds which (a rank within a replica)."""

    step: int
    degrees: Degrees
    coordinates: Mapping[str, int]
    exact: frozenset[str]  # those that are at `step` already; the others have its gradients
    ballot: Ballot | None = None
    reports: Mapping[str, Standing] = field(default_factory=dict)

    def column(self, coordinate: int) -> list[str]:
        """Who holds a coordinate, those that are at the step already first."""
        return sorted((w for w, s in self.coordinates.items() if s == coordinate), key=lambda w: w not in self.exact)

    def copy(self) -> list[str]:
        """One holder of each coordinate, in order."""
        return [self.column(coordinate)[0] for coordinate in range(math.prod(self.degrees))]

    @property
    def is_shared_out(self) -> bool:
        """Whether a coordinate's holders each have the optimizer's state of some blocks only."""
        return any(self.reports[w].blocks for w in self.coordinates)

    def is_in(self, members: Iterable[str]) -> bool:
        """Whether these members have all of it among them."""
        here = set(members)
        return all(suffices(self.reports[w] for w in self.column(coordinate) if w in here)
                   for coordinate in range(math.prod(self.degrees)))

    def is_torn(self, worker: str) -> bool:
        """Whether, when all have applied what they hold, it still lacks parameters that others keep."""
        report = self.reports[worker]
        return (report.torn or worker not in self.exact) and not suffices([replace(report, buckets=0, owned="", twins="")])


def suffices(holders: Iterable[Standing]) -> bool:
    """Whether these holders of one coordinate have all of it among them."""
    reports = list(holders)
    return (bool(reports) and has_all(reports)
            and not (reports[0].blocks and lacking([report.held for report in reports], reports[0].blocks)))


def writers(whole: Whole, owners: int, most: int) -> tuple[str, ...]:
    """Who writes down which part of a state, in rank order: one of each coordinate where all keep all of it, else for
    each of its
    `owners`, of `most` at most, whoever is left of owner and twin. () if parts of it are nowhere.
    """
    if not whole.is_shared_out and any(whole.reports[w].buckets for w in whole.coordinates):  # whoever has rows
        return tuple(whole.column(0)) if whole.is_in(whole.coordinates) else ()
    for data in (owners, *range(1, most + 1)) if whole.is_shared_out else (1,):
        found = [writer(whole, place, rank, data) for rank in range(data) for place in range(math.prod(whole.degrees))]
        if all(found) and has_all(whole.reports[w] for w in found):
            return tuple(found)
    return ()


def writer(whole: Whole, place: int, rank: int, data: int) -> str:
    """Who keeps, of a coordinate's state, what owner `rank` of `data` owns, itself rather than a twin; "" if nobody
    does."""
    for count in (1, 2):  # what lies behind is on its way
        for worker in whole.column(place):
            report = whole.reports[worker]
            if not report.blocks or not without([owned(rank, data, report.blocks)], report.held[:count]):
                return worker
    return ""


def covers(coordinates: Iterable[int], degrees: Degrees) -> bool:
    """Whether all of a replica's coordinates are among these."""
    return set(coordinates) >= set(range(math.prod(degrees)))


def find_whole(reports: Mapping[str, Standing], group: Iterable[str], preferred: Degrees = (1, 1, 1)) -> Whole | None:
    """The state that counts: of the furthest step that any of `group` committed, if its parts are all there, in the
    group or beside it.

    Where it is there in two meshes (members fell while it moved), the preferred one's is taken.
    """
    mine = [reports[w] for w in group if w in reports]
    step = max((s.committed for s in mine), default=-1)
    if step < 0:
        return None
    ballot = next((s.ballot for s in mine if s.ballot and s.ballot.step == step), None)
    exact = frozenset(w for w, s in reports.items() if s.committed == step)
    held: dict[Degrees, dict[str, int]] = {}
    after = {worker: report if worker in exact else applied(report) for worker, report in reports.items()}
    for worker, report in reports.items():
        applies = ballot is not None and report.committed == step - 1 and report.holds == step
        if report.coordinate >= 0 and (worker in exact or applies):
            held.setdefault(report.mesh[1:], {})[worker] = report.coordinate
    wholes = [Whole(step, degrees, coordinates, exact, ballot, after) for degrees, coordinates in held.items()]
    found = {whole.degrees: whole for whole in wholes if whole.is_in(reports)}
    return found.get(preferred) or max(found.values(), key=lambda whole: len(whole.coordinates), default=None)


def assign(candidates: Sequence[str], mesh: Axes, whole: Whole | None, nodes: Mapping[str, str]) -> tuple[str, ...]:
    """Who sits where, in rank order: whoever holds a coordinate keeps it, the rest is filled in the order of
    `candidates`.

    Where workers of one node can make up a tensor group, they do.
    """
    data, degrees = mesh[0], mesh[1:]
    columns: list[list[str]] = [[] for _ in range(math.prod(degrees))]
    fillers = list(candidates)
    if whole and whole.degrees == degrees:
        for worker in candidates:
            place = whole.coordinates.get(worker, -1)
            if place >= 0 and len(columns[place]) < data:
                columns[place].append(worker)
                fillers.remove(worker)
    elif whole and math.prod(mesh) >= math.prod(whole.degrees):
        first = [w for w in whole.copy() if w in candidates]
        fillers = [*first, *(w for w in candidates if w not in first)][:math.prod(mesh)]
    tensor = degrees[1]
    lines = [columns[low:low + tensor] for low in range(0, len(columns), tensor)]
    for replica in range(data):
        for line in lines:
            for column in line:
                if len(column) == replica:
                    column.append(fillers.pop(nearest(fillers, column, line, nodes)))
    rows = [side_by_side(line, nodes) for line in lines]
    return tuple(worker for replica in range(data) for line in rows for worker in line[replica])


def nearest(fillers: Sequence[str], column: Sequence[str], line: Sequence[Sequence[str]],
            nodes: Mapping[str, str]) -> int:
    """Which of the fillers to take into a column: one whose node has a place to fill beside the others of its tensor
    groups."""
    if len(line) == 1:
        return 0
    here, there = Counter(nodes.get(w) for w in column), [Counter(nodes.get(w) for w in other) for other in line]
    idle = Counter(nodes.get(w) for w in fillers)

    def gain(index: int) -> tuple[int, int, int]:
        node = nodes.get(fillers[index])
        return max(other[node] for other in there) - here[node], min(idle[node], len(line)), -index

    return max(range(len(fillers)), key=gain)


def side_by_side(line: Sequence[Sequence[str]], nodes: Mapping[str, str]) -> list[tuple[str, ...]]:
    """The columns of a tensor axis as its groups, one for each replica; those that lie on one node come first."""
    if len(line) == 1:
        return [(worker,) for worker in line[0]]
    left, together = [list(column) for column in line], []
    for first in line[0]:
        match = [next((w for w in column if nodes.get(w) == nodes.get(first)), None) for column in left]
        if None not in match and first in left[0]:
            match[0] = first
            together.append(tuple(w for w in match if w is not None))
            for column, worker in zip(left, together[-1], strict=True):
                column.remove(worker)
    order = {node: i for i, node in enumerate(dict.fromkeys(nodes.get(w) for column in left for w in column))}
    return together + list(zip(*(sorted(column, key=lambda w: order[nodes.get(w)]) for column in left), strict=True))


def gaps(nodes: Iterable[str], tensor: int) -> tuple[str, ...]:
    """Nodes on which workers are missing for a tensor group, once for each; those that miss the fewest first. `nodes`:
    one for each worker."""
    missing = {node: -count % tensor for node, count in Counter(nodes).items() if node}
    return tuple(node for node in sorted(missing, key=lambda n: missing[n]) for _ in range(missing[node]))


def rejoin(number: int, members: tuple[str, ...], endpoint: str, mesh: Axes, whole: Whole | None) -> Generation:
    """Where everybody starts: at the furthest committed step, with its vote for those who hold its gradients, and state
    for the rest."""
    held = [whole.coordinates.get(w, -1) if whole else -1 for w in members]
    if whole is None or not whole.is_in(members) or (whole.is_shared_out and whole.degrees != mesh[1:]):
        # all copies of a part are gone, or it cannot move: the carrier fills in the newest checkpoint
        return Generation(number, members, endpoint, "", committed=-1, mesh=mesh)
    if whole.degrees != mesh[1:]:
        resharded = tuple(Holder(rank, (0, *whole.degrees), place) for rank, place in enumerate(held))
        return Generation(number, members, endpoint, "", whole.step, whole.ballot, mesh=mesh, resharded=resharded)
    size, healers, has = math.prod(whole.degrees), [], [place == r % math.prod(whole.degrees)
                                                        for r, place in enumerate(held)]
    for place in range(size):
        ranks = range(place, len(members), size)
        source = min((r for r in ranks if held[r] == place), key=lambda r: (members[r] not in whole.exact, r))
        healed = tuple(r for r in ranks if held[r] != place)
        if healed:
            healers.append((source, healed))
    generation = Generation(number, members, endpoint, "", whole.step, whole.ballot, tuple(healers), mesh=mesh)
    if not whole.is_shared_out:
        return generation
    return replace(generation, held=tuple(whole.reports[w].held if has[r] else () for r, w in enumerate(members)),
                   torn=tuple(r for r, w in enumerate(members) if has[r] and whole.is_torn(w)))
