"""The embedding tables of a step: rows are looked up at their owners, sums of slopes go back to them, and a commit updates them.

A member's logical shards ask together: for each table the distinct ids of all its shards. Each shard's slopes are
summed by id, a leaf of the canonical tree; the owner of a bucket, and its twin, fold the subtrees of all members in the
tree's order. Nothing of a table changes before the commit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from elastic.checkpoint.state_hash import DIGEST, TableDigests, digests_of, gathered
from elastic.collective.reduction import Node, fold
from elastic.errors import RunFailed, UserError
from elastic.messages import Ballot
from elastic.model.backend import Batch
from elastic.model.user_code import users
from elastic.tables.bags import Bags, Summed, not_finite
from elastic.tables.buckets import buckets_of
from elastic.tables.features import BAGS, answered
from elastic.tables.held import HeldTables
from elastic.tables.spec import TableSpec
from elastic.tables.wire import exchange
from elastic.worker.context import StepContext
from elastic.worker.lr_schedule import learning_rate
from elastic.worker.training import Member

WORDS = 3  # of a vote before its norms: a bad table's number and one more, and its id's upper and lower half


class TableStep:
    """A member's logical shards in one step: their batches with what they look up, and the sums of the slopes that come
    back."""

    def __init__(self, context: StepContext):
        self.context, self.tables = context, held_by(context)
        self.nodes: dict[str, list[tuple[Node, Summed]]] = {spec.name: [] for spec in self.tables.specs}
        context.fire("rows")
        batches = []
        for shard in context.run:
            context.at("rows", shard)
            with users(context.training.is_own):
                batches.append(context.training.load_batch(context.step, shard))
        self.bags: dict[int, Mapping[str, Bags]] = {shard: batch[BAGS] for shard, batch in zip(context.run, batches)}
        self.batches = dict(zip(context.run, with_rows(context, batches)))

    def take(self, shard: int) -> Batch:
        """A shard's batch, once."""
        return self.batches.pop(shard)

    def add(self, shard: int, slopes: Mapping[str, np.ndarray]) -> None:
        """A shard's leaf; they come in order."""
        bags, kernels = self.bags.pop(shard), self.tables.kernels
        if lacking := sorted(bags.keys() - slopes.keys()):
            raise UserError(f'backend.name = "{self.context.backend.name}" gives no slopes of what {lacking[0]} has '
                            "looked up; write another.")
        for spec in self.tables.specs:
            leaf = Summed.none(spec.width)
            for feature in self.tables.tables.by_table[spec.name]:
                leaf = kernels.merge(leaf, kernels.deduplicate(spec, bags[feature.name], slopes[feature.name]))
            nodes = self.nodes[spec.name]
            nodes.append(((shard, shard + 1), leaf))
            nodes[:] = fold(nodes, self.context.plan.num_shards, kernels.merge)


def held_by(context: StepContext) -> HeldTables:
    assert context.tables is not None
    return context.tables


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


def with_rows(context: StepContext, batches: Sequence[Batch]) -> Sequence[Batch]:
    """Batches with what they look up in place of their bags. All members call it together, with any number of batches.
    """
    tables, group = held_by(context), context.groups.data
    if group.size == 1:
        with context.waiting("rows", group):
            return [tables.look_up(batch) for batch in batches]
    all_bags = [batch[BAGS] for batch in batches]
    wanted = [wanted_of(context, spec, all_bags) for spec in tables.specs]
    with context.waiting("rows", group) as cut:
        asked = exchange(cut, list(zip(*(one.parts() for one in wanted))))
    with context.waiting("rows", group):
        answers = exchange(group, [[tables.stores[spec.name].read(ids) for spec, ids in zip(tables.specs, part)]
                                   for part in asked])
    found: list[dict[str, np.ndarray]] = [{} for _ in batches]
    for number, one in enumerate(wanted):
        rows = np.concatenate([answer[number] for answer in answers])
        for (place, feature), index in one.index.items():
            found[place][feature] = tables.kernels.pool(rows, index, all_bags[place][feature])
    return [answered(batch, one) for batch, one in zip(batches, found)]


def wanted_of(context: StepContext, spec: TableSpec, all_bags: Sequence[Mapping[str, Bags]]) -> Wanted:
    tables = held_by(context)
    features = [feature.name for feature in tables.tables.by_table[spec.name]]
    keys = [(place, name) for place in range(len(all_bags)) for name in features]
    parts = [all_bags[place][name] for place, name in keys]
    for bags in parts:
        bags.check(spec)
    ids, stands = tables.kernels.distinct(np.concatenate([np.empty(0, np.int64), *(bags.ids for bags in parts)]))
    owners = context.owners[buckets_of(spec, ids)]
    order = np.argsort(owners, kind="stable")
    places = np.empty_like(order)
    places[order] = np.arange(order.size)
    index = np.split(places[stands], np.cumsum([bags.ids.size for bags in parts])[:-1]) if parts else []
    return Wanted(ids[order], np.bincount(owners, minlength=context.groups.data.size), dict(zip(keys, index)))


def push(context: StepContext, step: TableStep) -> None:
    """The sums of all members at those who hold the rows, ready for the commit."""
    tables, size = held_by(context), context.groups.data.size
    context.fire("push")
    parts: list[list[np.ndarray]] = [[] for _ in range(size)]
    for spec in tables.specs:
        for part, nodes in zip(parts, by_holder(context, spec, step.nodes.pop(spec.name))):
            part += [np.array([node for node, _ in nodes], np.int64).reshape(-1, 2)]
            part += [array for _, one in nodes for array in (one.ids, one.sums, one.counts)]
    with context.waiting("push", context.groups.data) as group:
        received = [iter(part) for part in exchange(group, parts)]
    sums = {}
    for spec in tables.specs:
        nodes = [node for part in received for node in nodes_of(next(part), part)]
        (_, sums[spec.name]), = fold(sorted(nodes, key=lambda item: item[0]), context.plan.num_shards,
                                     tables.kernels.merge)
    tables.prepare(context.step, sums)


def by_holder(context: StepContext, spec: TableSpec,
              nodes: Sequence[tuple[Node, Summed]]) -> Iterable[list[tuple[Node, Summed]]]:
    """By rank, of each node what that member owns or keeps as a twin."""
    size = context.groups.data.size
    if size == 1:
        yield list(nodes)
        return
    buckets = [buckets_of(spec, one.ids) for _, one in nodes]
    for rank in range(size):
        chosen = [np.flatnonzero((context.owners[b] == rank) | (context.twins[b] == rank)) for b in buckets]
        yield [(node, Summed(one.ids[at], one.sums[at], one.counts[at]))
               for (node, one), at in zip(nodes, chosen)]


def nodes_of(bounds: np.ndarray, arrays: Iterable[np.ndarray]) -> list[tuple[Node, Summed]]:
    """As `push` sends them: the nodes, and of each its ids, sums and counts."""
    rest = iter(arrays)
    return [((low, high), Summed(next(rest), next(rest), next(rest))) for low, high in bounds.tolist()]


def ballot_words(context: StepContext) -> np.ndarray:
    """A member's part of the vote, float64: the first id whose sum is not finite, and, where the recipe clips, the
    squared norm of each bucket that it owns, table by table."""
    tables = held_by(context)
    bad = [(number, id) for number, spec in enumerate(tables.specs)
           if (id := tables.prepared[spec.name].bad) is not None]
    words = [bad[0][0] + 1, *divmod(bad[0][1], 1 << 32)] if bad else [0, 0, 0]
    norms = [np.zeros(0)]
    if context.plan.optimizer["clip_norm"] > 0:
        owned = np.zeros(tables.tables.num_buckets, bool)
        owned[list(tables.owned)] = True
        norms = [np.where(owned, tables.stores[spec.name].squared_norms(), 0.0) for spec in tables.specs]
    return np.concatenate([words, *norms])


def counted_words(context: StepContext, rows: np.ndarray) -> float:
    """The squared norm in all members' parts, (members, length), added in the order of tables and buckets.
    NonFiniteLoss where a sum is not finite."""
    tables = held_by(context)
    bad = min(((int(number) - 1, (int(high) << 32) + int(low)) for number, high, low in rows[:, :WORDS] if number),
              default=None)
    if bad:
        raise not_finite(tables.specs[bad[0]], bad[1], context.step)
    return float(sum(rows[:, WORDS:].sum(axis=0).tolist()))


def commit_rows(member: Member, ballot: Ballot, scale: float) -> None:
    """Carries out what was prepared. A table's rate follows the schedule of the optimizer's."""
    tables, options = member.tables, member.training.plan.optimizer
    if tables is None:
        return
    lr = learning_rate(ballot.step, member.training.plan.num_steps, options)
    share = lr / options["lr"] if options["lr"] > 0 else 1.0
    tables.commit(ballot.step, {name: replace(update, lr=update.lr * share, scale=scale)
                                for name, update in tables.tables.updates.items()})


def table_digests(context: StepContext) -> list[TableDigests]:
    """Of all tables, every bucket's from its owner. RunFailed where a twin's are others."""
    tables, group = held_by(context), context.groups.data
    mine = [np.array(tables.owned, np.int64), digests_of(tables, tables.owned),
            np.array(tables.twins, np.int64), digests_of(tables, tables.twins)]
    with context.waiting("hashes", group):
        parts = exchange(group, [mine] * group.size)
    found = np.zeros((len(tables.specs), tables.tables.num_buckets, 2, DIGEST), np.uint8)
    for owned, digests, _, _ in parts:
        found[:, owned] = digests
    for _, _, twins, digests in parts:
        wrong = (found[:, twins] != digests).any((2, 3))
        if wrong.any():
            table, bucket = (int(at[0]) for at in np.nonzero(wrong))
            raise RunFailed(f"table {tables.specs[table].name}: the owner of bucket {twins[bucket]} and its twin hold "
                            f"different rows after step {context.step}; resume the run from its newest checkpoint.")
    return gathered(tables.specs, found)
