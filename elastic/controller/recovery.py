"""The rule of recovery, as pure functions: which state counts, who sits where, and where everybody starts.

If any survivor saw a vote complete, its step counts for all; whoever holds that step's gradients applies them, whoever
does not is healed by one that holds the same coordinate. If none did, all redo the step from untouched state. The state
is there as long as every coordinate of one mesh has a holder.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from elastic.boxes import union
from elastic.controller.bucket_holders import applied, has_all
from elastic.controller.policy import Degrees
from elastic.messages import Axes, Ballot, Generation, Holder, Standing
from elastic.state.ownership import lacking, owned

ALL = 1 << 62  # more blocks than there are


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
        return self.columns.get(coordinate, [])

    @cached_property
    def columns(self) -> dict[int, list[str]]:
        found: dict[int, list[str]] = {}
        for worker in sorted(self.coordinates, key=lambda w: w not in self.exact):
            found.setdefault(self.coordinates[worker], []).append(worker)
        return found

    def copy(self) -> list[str]:
        """One holder of each coordinate, in order."""
        return [self.column(coordinate)[0] for coordinate in range(math.prod(self.degrees))]

    @cached_property
    def keepers(self) -> list[Keepers]:
        """By coordinate."""
        return [Keepers(self.column(coordinate), self.reports) for coordinate in range(math.prod(self.degrees))]

    @cached_property
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
        found = []
        for rank, place in itertools.product(range(data), range(math.prod(whole.degrees))):
            if not (worker := whole.keepers[place].of(rank, data)):
                break
            found.append(worker)
        else:
            if has_all(whole.reports[w] for w in found):
                return tuple(found)
    return ()


class Keepers:
    """Who keeps which blocks of a coordinate's state: of `column`, whose reports these are, in that order."""

    def __init__(self, column: Sequence[str], reports: Mapping[str, Standing]):
        self.column, self.blocks = column, max((reports[w].blocks for w in column), default=0)
        # owners, then twins too: their ranges in order, and how far those before reach
        self.ranges: list[tuple[list[tuple[int, int, int]], list[int]]] = []
        for count in (1, 2):  # what lies behind is on its way
            ranges = sorted((low, high, number) for number, worker in enumerate(column)
                            for low, high in union(reports[worker].held[:count] if reports[worker].blocks else [(0, ALL)]))
            self.ranges.append((ranges, list(itertools.accumulate((high for _, high, _ in ranges), max))))

    def of(self, rank: int, data: int) -> str:
        """Who keeps what owner `rank` of `data` owns, itself rather than a twin; "" if nobody does."""
        low, high = owned(rank, data, self.blocks)
        if low == high:
            return next(iter(self.column), "")
        for ranges, reach in self.ranges:
            found, at = len(self.column), bisect_right(ranges, low, key=lambda one: one[0]) - 1
            while at >= 0 and reach[at] >= high:
                found = min(found, ranges[at][2] if ranges[at][1] >= high else found)
                at -= 1
            if found < len(self.column):
                return self.column[found]
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
