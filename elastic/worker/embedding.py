"""The embedding tables of a step: rows are looked up at their owners, sums of slopes go back to them, and a commit updates them.

A member's logical shards ask together: for each table the distinct ids of all its shards. Each shard's slopes are
summed by id, a leaf of the canonical tree; the owner of a bucket, and its twin, fold the subtrees of all members in the
tree's order. Nothing of a table changes before the commit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial, reduce

import numpy as np

from elastic.checkpoint.state_hash import DIGEST, TableDigests, digests_of, gathered
from elastic.collective.group import CollectiveGroup
from elastic.collective.reduction import Node, fold
from elastic.errors import RunFailed, UserError
from elastic.messages import Ballot
from elastic.model.backend import Batch
from elastic.tables.bags import Bags, Summed, not_finite
from elastic.tables.buckets import buckets_of
from elastic.tables.spec import TableSpec
from elastic.tables.wire import exchange
from elastic.worker.context import StepContext
from elastic.worker.lookups import Lookups, held_by, loaded, with_rows
from elastic.worker.lr_schedule import learning_rate
from elastic.worker.own_figures import OwnFigures
from elastic.worker.training import Member

WORDS = 3  # of a vote before its norms: a bad table's number and one more, and its id's upper and lower half


class TableStep:
    """A member's logical shards in one step: their batches with what they look up, and the sums of the slopes that come
    back."""

    def __init__(self, context: StepContext):
        self.context, self.tables = context, held_by(context)
        self.nodes: dict[str, list[tuple[Node, Summed]]] = {spec.name: [] for spec in self.tables.specs}
        context.fire("rows")
        if context.look_ahead:
            found, batches = context.look_ahead.take()
        else:
            found = Lookups(loaded(context, context.step))
            batches = with_rows(context, found.batches)
        self.bags: dict[int, Mapping[str, Bags]] = dict(zip(context.run, found.bags))
        self.batches = dict(zip(context.run, batches))

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
            found = [kernels.deduplicate(spec, bags[feature.name], slopes[feature.name])
                     for feature in self.tables.tables.by_table[spec.name]]
            nodes = self.nodes[spec.name]
            nodes.append(((shard, shard + 1), reduce(kernels.merge, found)))
            nodes[:] = fold(nodes, self.context.plan.num_shards, kernels.merge)


def push(context: StepContext, step: TableStep) -> Callable[[], None]:
    """The sums of all members go to those who hold the rows; what it gives waits until they are there, ready for the
    commit."""
    context.fire("push")
    if context.look_ahead:
        return context.look_ahead.beside("push", partial(exchange_sums, context, step))

    def finish() -> None:
        with context.waiting("push", context.groups.data) as group:
            exchange_sums(context, step, group)

    return finish


def exchange_sums(context: StepContext, step: TableStep, group: CollectiveGroup) -> None:
    tables = held_by(context)
    parts: list[list[np.ndarray]] = [[] for _ in range(group.size)]
    for spec in tables.specs:
        for part, nodes in zip(parts, by_holder(context, spec, step.nodes.pop(spec.name))):
            part += [np.array([node for node, _ in nodes], np.int64).reshape(-1, 2)]
            part += [array for _, one in nodes for array in (one.ids, one.sums, one.counts)]
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
    owners, twins = context.holders_at(context.step)
    for rank in range(size):
        chosen = [np.flatnonzero((owners[b] == rank) | (twins[b] == rank)) for b in buckets]
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
        own = own_buckets(context)
        norms = [own.of(context.groups.data.rank, tables.stores[spec.name].squared_norms()) for spec in tables.specs]
    return np.concatenate([words, *norms])


def counted_words(context: StepContext, rows: np.ndarray) -> float:
    """The squared norm in all members' parts, (members, length), added in the order of tables and buckets.
    NonFiniteLoss where a sum is not finite."""
    tables = held_by(context)
    bad = min(((int(number) - 1, (int(high) << 32) + int(low)) for number, high, low in rows[:, :WORDS] if number),
              default=None)
    if bad:
        raise not_finite(tables.specs[bad[0]], bad[1], context.step)
    if rows.shape[1] == WORDS:
        return 0.0
    own = own_buckets(context)
    return float(sum(norm for one in np.split(rows[:, WORDS:], len(tables.specs), axis=1)
                     for norm in own.together(one).tolist()))


def own_buckets(context: StepContext) -> OwnFigures:
    """Which buckets are whose at this step."""
    return OwnFigures(context.holders_at(context.step)[0], context.groups.data.size)


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
