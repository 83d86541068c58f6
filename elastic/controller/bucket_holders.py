"""Who holds which bucket of the embedding tables in the next generation, and what is copied for that. Pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from elastic.messages import Buckets, Generation, Ready, Standing
from elastic.tables.buckets import Holders, from_bits, holders, moves


def with_buckets(generation: Generation, ready: Ready, reports: Mapping[str, Standing],
                 staying: Sequence[str] = (), at_once: bool = False) -> Generation:
    """The generation with its holders, where the run has tables: whoever has the rows, and who is to have them, by the
    fewest moves. A bucket of which nothing is copied has its holders from the start.

    `reports`: of the members whose state counts; none where all load a checkpoint. `staying`: those of the members that
    are to hold anything (all, where it is empty): the others hand over, `at_once` where they have no time.
    """
    if not ready.buckets:
        return generation
    members = generation.members
    there = {w: reports[w] for w in members if w in reports} if generation.committed >= 0 else {}
    before = holders_now(there, ready.buckets) if there else None
    after = holders(staying or members, ready.buckets, ready.twin, before)
    rank = {w: r for r, w in enumerate(members)} | {"": -1}
    last = tuple(rank[w] for w in after.owners), tuple(rank[w] for w in after.twins)
    moved = tuple((move.bucket, rank[move.source], rank[move.to]) for move in moves(before, after)) if before else ()
    if not before or not moved:
        return replace(generation, buckets=Buckets(*last))
    owners, twins, copied = list(last[0]), list(last[1]), {bucket for bucket, _, _ in moved}
    for bucket in copied:
        owners[bucket] = rank[before.owners[bucket]]
        twins[bucket] = rank[before.twins[bucket]] if ready.twin else -1
    return replace(generation, buckets=Buckets(tuple(owners), tuple(twins), moved, *last, at_once))


def holders_now(reports: Mapping[str, Standing], num_buckets: int) -> Holders:
    """Of each bucket the first that says it owns it and the first other that has it; without an owner a twin is one.
    """
    found: list[list[str]] = [[] for _ in range(num_buckets)]
    for bits in ({w: r.owned for w, r in reports.items()}, {w: r.twins for w, r in reports.items()}):
        for worker, text in bits.items():
            for bucket in from_bits(text):
                if worker not in found[bucket]:
                    found[bucket].append(worker)
    return Holders(tuple(having[0] if having else "" for having in found),
                   tuple(having[1] if len(having) > 1 else "" for having in found))


def applied(report: Standing) -> Standing:
    """What it will report once it has applied the step that it holds: rows that got no sums of it are gone then."""
    owned, twins, stale = (int(bits or "0", 16) for bits in (report.owned, report.twins, report.stale))
    size = len(report.owned)
    return replace(report, owned=f"{owned & ~stale:0{size}x}", twins=f"{twins & ~stale:0{size}x}", stale="") if stale else report


def has_all(reports: Iterable[Standing]) -> bool:
    """Whether these have every bucket among them."""
    size, held = 0, 0
    for report in reports:
        size = max(size, report.buckets)
        held |= int(report.owned or "0", 16) | int(report.twins or "0", 16)
    return held == (1 << size) - 1
