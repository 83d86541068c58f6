"""What a member's batches look up, and the rows that come for it: each member asks the owners, and they answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from elastic.errors import GroupBroken
from elastic.model.backend import Batch
from elastic.model.user_code import users
from elastic.tables.bags import Bags
from elastic.tables.buckets import buckets_of
from elastic.tables.features import BAGS, answered
from elastic.tables.held import HeldTables
from elastic.tables.spec import TableSpec
from elastic.tables.wire import exchange
from elastic.worker.context import StepContext

NO_IDS = np.empty(0, np.int64)


@dataclass(frozen=True)
class Wanted:
    """The distinct ids of one table that some batches look up, sorted by the rank of their owners, and for each batch
    and feature where its ids stand among them."""

    ids: np.ndarray
    counts: np.ndarray  # by rank
    index: Mapping[tuple[int, str], np.ndarray]

    def parts(self) -> list[np.ndarray]:
        """What each rank is asked for."""
        return np.split(self.ids, np.cumsum(self.counts)[:-1])


@dataclass
class Lookups:
    """Some batches and what they look up, table by table; then what each rank looks up here in the same step (`asked`),
    and the rows that have come, in the order of `Wanted.ids`. `error`: what loading them has raised."""

    batches: Sequence[Batch] = ()
    wanted: Sequence[Wanted] = ()
    asked: Sequence[Sequence[np.ndarray]] = ()
    rows: list[np.ndarray] = field(default_factory=list)
    error: Exception | None = None

    @property
    def bags(self) -> list[Mapping[str, Bags]]:
        return [batch[BAGS] for batch in self.batches]

    def requests(self) -> list[tuple[np.ndarray, ...]]:
        """By rank: what it is asked for, table by table."""
        return list(zip(*(one.parts() for one in self.wanted)))

    def changed(self, table: int, rank: int, at: np.ndarray, rows: np.ndarray) -> None:
        """The rows that a rank has sent anew, by their places among those that it was asked for."""
        first = int(self.wanted[table].counts[:rank].sum())
        self.rows[table][first + at] = rows


def held_by(context: StepContext) -> HeldTables:
    assert context.tables is not None
    return context.tables


def loaded(context: StepContext, step: int) -> list[Batch]:
    """The batches of this member's logical shards."""
    found = []
    for shard in context.run if step <= context.plan.num_steps else ():
        context.at("rows", shard)
        with users(context.training.is_own):
            found.append(context.training.load_batch(step, shard))
    return found


def lookups_of(context: StepContext, batches: Sequence[Batch], owners: np.ndarray) -> Lookups:
    """UserError for what cannot be looked up. `owners`: by bucket, the rank that will answer."""
    bags = [batch[BAGS] for batch in batches]
    return Lookups(batches, [wanted_of(context, spec, bags, owners) for spec in held_by(context).specs])


def loaded_early(context: StepContext, step: int, owners: np.ndarray) -> Lookups:
    """Of a step to come. What is wrong with it is raised when that step has come: those before it count."""
    try:
        return lookups_of(context, loaded(context, step), owners)
    except GroupBroken:
        raise
    except Exception as error:
        found = lookups_of(context, [], owners)
        found.error = error
        return found


def with_rows(context: StepContext, batches: Sequence[Batch]) -> Sequence[Batch]:
    """Batches with what they look up in place of their bags. All members call it together, with any number of batches.
    """
    tables, group = held_by(context), context.groups.data
    if group.size == 1:
        with context.waiting("rows", group):
            return [tables.look_up(batch) for batch in batches]
    found = lookups_of(context, batches, context.holders_at(context.step)[0])
    with context.waiting("rows", group) as cut:
        found.asked = exchange(cut, found.requests())
    with context.waiting("rows", group):
        found.rows = joined(exchange(group, answers(tables, found.asked)))
    return filled(tables, found)


def answers(tables: HeldTables, asked: Sequence[Sequence[np.ndarray]]) -> list[list[np.ndarray]]:
    """By rank: the rows that it has asked for, table by table."""
    return [[tables.stores[spec.name].read(ids) for spec, ids in zip(tables.specs, part)] for part in asked]


def joined(received: Sequence[Sequence[np.ndarray]]) -> list[np.ndarray]:
    """Table by table, the rows from all ranks."""
    return [np.concatenate(parts) for parts in zip(*received)]


def filled(tables: HeldTables, found: Lookups) -> list[Batch]:
    rows: list[dict[str, np.ndarray]] = [{} for _ in found.batches]
    for one, values in zip(found.wanted, found.rows):
        for (place, feature), index in one.index.items():
            rows[place][feature] = tables.kernels.pool(values, index, found.batches[place][BAGS][feature])
    return [answered(batch, one) for batch, one in zip(found.batches, rows)]


def wanted_of(context: StepContext, spec: TableSpec, all_bags: Sequence[Mapping[str, Bags]],
              by_bucket: np.ndarray) -> Wanted:
    tables = held_by(context)
    features = [feature.name for feature in tables.tables.by_table[spec.name]]
    keys = [(place, name) for place in range(len(all_bags)) for name in features]
    parts = [all_bags[place][name] for place, name in keys]
    for bags in parts:
        bags.check(spec)
    ids, stands = tables.kernels.distinct(np.concatenate([NO_IDS, *(bags.ids for bags in parts)]))
    owners = by_bucket[buckets_of(spec, ids)]
    order = np.argsort(owners, kind="stable")
    places = np.empty_like(order)
    places[order] = np.arange(order.size)
    index = np.split(places[stands], np.cumsum([bags.ids.size for bags in parts])[:-1]) if parts else []
    return Wanted(ids[order], np.bincount(owners, minlength=context.groups.data.size), dict(zip(keys, index)))
