"""One generation's training, from where its members meet to where they part. Runs on any group, with Ray or without.

A step: every member adds up the gradients of its logical shards along the canonical tree; the group reduces the sums;
all vote; a vote that completes is the commit, and each member applies what it holds. Nothing is changed before the
commit, so a step that is cut off can be redone from untouched state, by whoever is left.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from elastic.chaos import Injector
from elastic.collective.group import CollectiveGroup
from elastic.messages import STOP_AND_SAVE, Ballot, Generation, Save
from elastic.model.backend import SLOTS, Buffer, UpdateRule
from elastic.state.flat_layout import BLOCK
from elastic.worker.bucket_moves import begin_moves, move_buckets
from elastic.worker.context import StepContext
from elastic.worker.embedding import commit_rows, push
from elastic.worker.evaluation import evaluate
from elastic.worker.gradients import Shards, add_up_shards, sum_shared
from elastic.worker.heal import heal
from elastic.worker.look_ahead import LookAhead
from elastic.worker.lr_schedule import learning_rate
from elastic.worker.sharded_step import reduce_own, share
from elastic.worker.training import Member
from elastic.worker.vote import vote


def train(context: StepContext) -> str:
    """Trains until the run is "done" or a vote says that the group has "stopped". Raises `GroupBroken` if a peer is
    gone."""
    with context.look_ahead or nullcontext():
        return take_steps(context)


def take_steps(context: StepContext) -> str:
    member, plan, state, held = context.member, context.plan, context.state, context.held
    do_what_is_due(context, evaluated=context.generation.evaluated, checkpointed=context.generation.checkpointed)
    while state.committed < plan.num_steps:
        started, context.step = time.perf_counter(), state.committed + 1
        move_buckets(context)
        with context.untouched(whole=plan.is_saved(context.step)):
            shards = add_up_shards(context)
        pushed = push(context, shards.tables) if shards.tables else None
        gradient = reduce_sums(context, shards)
        if pushed:
            pushed()
        held.gradient, held.step = gradient, context.step
        held.ballot = ballot = vote(context, shards)
        context.fire("update")
        apply_update(member, ballot, context.look_ahead.committed if context.look_ahead else None)
        try:
            share(context)
        finally:  # the step counts, whoever falls from here on
            record(context, ballot, time.perf_counter() - started)
        do_what_is_due(context, busy=ballot.busy)
        if ballot.stop and context.step < plan.num_steps:
            if ballot.stop == STOP_AND_SAVE:
                checkpoint(context, wait=True)
            return "stopped"
    if state.committed > context.generation.checkpointed:
        checkpoint(context, wait=True)
    return "done"


def begin(member: Member, generation: Generation, group: CollectiveGroup, injector: Injector) -> StepContext:
    """Brings every member to `generation.committed`: a vote that some saw complete is applied, those without state are
    healed.

    Where nobody has any state, all load a checkpoint together.
    """
    held = member.held
    if member.place.state.committed == generation.committed - 1 and held.step == generation.committed and generation.ballot:
        held.ballot = generation.ballot  # others may fall before they have applied it
        apply_update(member, generation.ballot)  # its line came with the report of whoever saw the vote
    member.drop()
    member.settle(generation, group)
    context = StepContext(member, generation, group, injector)
    if context.tables and not generation.load and context.state.committed != generation.committed:
        context.tables.begin((), (), generation.committed)  # its rows are of another step
    # batches come while it is healed; the loader outlives this generation's context
    steps, run = range(generation.committed + 1, context.plan.num_steps + 1), context.run
    context.training.load_batch.expect((step, shard) for step in steps for shard in run)
    heal(context)
    if context.tables and not generation.load:
        begin_moves(context)
    if context.tables and context.tables.tables.look_ahead and group.size > 1:
        context.look_ahead = LookAhead(context)
    return context


def reduce_sums(context: StepContext, shards: Shards) -> Buffer:
    """Over the replicas along the tree; then over the members of this replica that hold the same parameters and found
    other parts."""
    buffers, state, gradient = context.buffers, context.state, shards.plain
    with context.waiting("reduction", context.groups.data) as group:
        if state.is_sharded and group.size > 1:
            return reduce_own(context, state, group, shards)
        if shards.sums:
            gradient = group.reduce_tree(shards.sums.nodes(), context.plan.num_shards, buffers.out, buffers.numel,
                                         BLOCK, buffers.scratch)
        else:
            group.all_reduce(gradient)
    sum_shared(context.groups, state.layout, gradient)
    return gradient


def apply_update(member: Member, ballot: Ballot, rows_committed: Callable[[], None] | None = None) -> None:
    """Applies the reduced gradients that this member holds. The state is torn (-1) until all of it is done."""
    plan, state, gradient = member.training.plan, member.place.state, member.held.gradient
    options, layout = plan.optimizer, state.layout
    assert gradient is not None
    weight = ballot.weight
    scale = 1.0 if member.place.habits.sums else 1.0 / weight
    if options["clip_norm"] > 0:
        norm = math.sqrt(ballot.squared_norm) * scale
        scale *= min(1.0, options["clip_norm"] / max(norm, 1e-30))
    lr = learning_rate(ballot.step, plan.num_steps, options)
    state.committed = -1
    commit_rows(member, ballot, scale)
    if rows_committed:
        rows_committed()
    decays = options["weight_decay"] if isinstance(options["weight_decay"], dict) else {"*": options["weight_decay"]}
    for pattern, begins, ends in layout.decays:
        decay = decays.get(pattern, 0.0)
        for low, high, at in state.holding.store.runs(begins, ends):
            rule = UpdateRule(options["name"], lr, decay, scale, ballot.step, options["beta1"], options["beta2"],
                              options["eps"],
                              options["momentum"])
            slots = {name: state.slots[name][at:at + high - low] for name in SLOTS[rule.name]}
            member.place.backend.update(rule, state.param[low:high], gradient[at:at + high - low], slots, BLOCK)
    state.apply_statistics(gradient, weight)
    state.average(options["ema"], ballot.step)
    state.committed, state.torn = ballot.step, not state.holding.has_all


def record(context: StepContext, ballot: Ballot, step_s: float) -> None:
    """The line of a committed step."""
    training, generation, weight = context.training, context.generation, ballot.weight
    context.member.steps_s.append(step_s)
    loss = ballot.loss / (1.0 if context.place.habits.sums else weight)
    samples = sum(int((training.positions(ballot.step, s) >= 0).sum()) for s in range(context.plan.num_shards))
    fields: dict[str, Any] = {"step": ballot.step, "loss": loss, "time": time.time(), "step_s": step_s,
                              "world_size": len(generation.members),
                              "generation": generation.number, "samples": samples}
    if training.unit:
        fields[training.unit] = int(weight)
    if training.ledger:
        fields["ledger"] = training.ledger.line(ballot.step)
    context.member.write_down(generation, context.group.rank, fields)


def do_what_is_due(context: StepContext, evaluated: int = 0, checkpointed: int = 0, busy: bool = False) -> None:
    """At the committed step: evaluation, then a checkpoint beside the training. `busy` must be the same for all."""
    step, plan, member, rank = context.state.committed, context.plan, context.member, context.group.rank
    if step <= 0:
        return
    last = step == plan.num_steps
    if context.training.eval_batches and step > evaluated and (last
                                                               or (plan.eval_every and step % plan.eval_every == 0)):
        rows_idle(context)
        with context.state.averaged(context.groups.data), context.untouched(whole=True):
            member.evaluation = evaluate(context)
        member.write_down(context.generation, rank, {"step": step, "eval": member.evaluation})
    if plan.is_saved(step) and step > checkpointed and not last:
        if not (busy and plan.skip_busy):
            checkpoint(context, wait=False)
        elif rank == 0:
            member.event(context.generation, "checkpoint_skipped", step=step)
        context.fire("checkpoint")


def rows_idle(context: StepContext) -> None:
    """Returns when the rows of tables are this thread's alone."""
    if context.look_ahead:
        context.look_ahead.idle()


def checkpoint(context: StepContext, wait: bool) -> None:
    """Every member writes its own share."""
    context.at("checkpoint")
    rows_idle(context)
    context.member.save(Save(context.generation.number, context.step, context.group.rank, context.group.size, wait,
                             context.injector.disk(context.step)))
