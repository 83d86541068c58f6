"""One generation's training, from where its members meet to where they part. Runs on any group, with Ray or without.

A step: every member adds up the gradients of its logical shards along the canonical tree; the group reduces the sums; all vote;
a vote that completes is the commit, and each member applies what it holds. Nothing is changed before the commit, so
a step that is cut off can be redone from untouched state, by whoever is left.
"""

from __future__ import annotations

import math
import time
from typing import Any

from elastic.chaos import Injector
from elastic.collective.group import CollectiveGroup
from elastic.collective.reduction import tree_sum
from elastic.mesh import shards_of
from elastic.messages import STOP_AND_SAVE, Ballot, Generation, Save
from elastic.model.backend import SLOTS, Buffer, UpdateRule
from elastic.state.flat_layout import BLOCK
from elastic.worker.context import StepContext
from elastic.worker.evaluation import evaluate
from elastic.worker.gradients import add_up_shards, sum_shared
from elastic.worker.lr_schedule import learning_rate
from elastic.worker.member import Member
from elastic.worker.sharded_step import bring, reduce_own, share
from elastic.worker.vote import vote


def train(context: StepContext) -> str:
    """Trains until the run is "done" or a vote says that the group has "stopped". Raises `GroupBroken` if a peer is gone."""
    member, plan, state, held = context.member, context.plan, context.state, context.held
    expect_batches(context)
    do_what_is_due(context, evaluated=context.generation.evaluated, checkpointed=context.generation.checkpointed)
    while state.committed < plan.num_steps:
        started, context.step = time.perf_counter(), state.committed + 1
        with context.untouched(whole=plan.is_saved(context.step)):
            shards = add_up_shards(context)
        held.gradient, held.step = reduce_sums(context, shards.sums), context.step
        held.ballot = ballot = vote(context, shards)
        context.fire("update")
        commit(member, ballot)
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
    """Brings every member to `generation.committed`: a vote that some saw complete is applied, those without state are healed.

    Where nobody has any state, all load a checkpoint together.
    """
    held = member.held
    if member.place.state.committed == generation.committed - 1 and held.step == generation.committed and generation.ballot:
        commit(member, generation.ballot)  # its line came with the report of whoever saw the vote
    held.drop()
    member.settle(generation, group)
    if generation.load not in ("", "recipe"):
        member.restore(generation, group)
    context = StepContext(member, generation, group, injector)
    if context.state.is_sharded and not generation.load:
        bring(context, context.state)
    else:
        heal(context)
    member.ready(group)
    return context


def heal(context: StepContext) -> None:
    """A source sends its state to the members of its coordinate that have none; the others go on to the first collective and wait there."""
    generation, group = context.generation, context.group
    if generation.healers:
        context.injector.at(generation.committed + 1, "heal")
    for source, healed in generation.healers:
        taking_part = [source, *healed]
        if group.rank not in taking_part:
            continue
        started = time.perf_counter()
        with context.waiting("heal"):
            moved = context.state.heal(group.subgroup(taking_part), 0, generation.committed)
        if group.rank == source:
            context.member.event(generation, "healed", **{
                "from": generation.members[source], "to": [generation.members[r] for r in healed], "bytes": moved,
                "seconds": time.perf_counter() - started})


def expect_batches(context: StepContext) -> None:
    """This member's shards of all steps that are left, to be loaded ahead."""
    data, plan, first = context.links.data, context.plan, context.state.committed + 1
    run = shards_of(data.rank, data.size, plan.num_shards)
    context.training.load_batch.expect((step, shard) for step in range(first, plan.num_steps + 1) for shard in run)


def reduce_sums(context: StepContext, sums: Any) -> Buffer:
    """Over the replicas along the tree; then over the members of this replica that hold the same parameters and found other parts."""
    plan, buffers, state = context.plan, context.buffers, context.state
    with context.waiting("reduction", context.links.data) as group:
        if state.is_sharded:
            return reduce_own(context, state, group, sums)
        if plan.exact:
            gradient = group.reduce_tree(sums.nodes(), plan.num_shards, buffers.out, buffers.numel, BLOCK, buffers.scratch)
        else:
            gradient = sums.buffer
            group.all_reduce(gradient)
    sum_shared(context.links, state.layout, gradient)
    return gradient


def commit(member: Member, ballot: Ballot) -> None:
    """Applies the reduced gradients that this member holds. The state is torn (-1) until all of it is done."""
    plan, state, gradient = member.training.plan, member.place.state, member.held.gradient
    options, layout = plan.optimizer, state.layout
    assert gradient is not None
    weight = tree_sum(ballot.weights)
    scale = 1.0 if member.place.habits.sums else 1.0 / weight
    if options["clip_norm"] > 0:
        norm = math.sqrt(ballot.squared_norm) * scale
        scale *= min(1.0, options["clip_norm"] / max(norm, 1e-30))
    lr = learning_rate(ballot.step, plan.num_steps, options)
    state.committed = -1
    decays = options["weight_decay"] if isinstance(options["weight_decay"], dict) else {"*": options["weight_decay"]}
    for pattern, begins, ends in layout.decays:
        decay = decays.get(pattern, 0.0)
        for low, high, at in state.runs(begins, ends):
            rule = UpdateRule(options["name"], lr, decay, scale, ballot.step, options["beta1"], options["beta2"], options["eps"],
                              options["momentum"])
            slots = {name: state.slots[name][at:at + high - low] for name in SLOTS[rule.name]}
            member.place.backend.update(rule, state.param[low:high], gradient[at:at + high - low], slots, BLOCK)
    state.apply_statistics(gradient, weight)
    state.average(options["ema"], ballot.step)
    state.committed, state.torn = ballot.step, not state.keeps_all


def record(context: StepContext, ballot: Ballot, step_s: float) -> None:
    """The line of a committed step."""
    training, generation, weight = context.training, context.generation, tree_sum(ballot.weights)
    loss = tree_sum(ballot.losses) / (1.0 if context.place.habits.sums else weight)
    samples = sum(int((training.positions(ballot.step, s) >= 0).sum()) for s in range(context.plan.num_shards))
    fields: dict[str, Any] = {"step": ballot.step, "loss": loss, "time": time.time(), "step_s": step_s, "world_size": len(generation.members),
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
    if context.training.eval_batches and step > evaluated and (last or (plan.eval_every and step % plan.eval_every == 0)):
        with context.state.averaged(context.links.data), context.untouched(whole=True):
            member.evaluation = evaluate(context)
        member.write_down(context.generation, rank, {"step": step, "eval": member.evaluation})
    if plan.is_saved(step) and step > checkpointed and not last:
        if not (busy and plan.skip_busy):
            checkpoint(context, wait=False)
        elif rank == 0:
            member.event(context.generation, "checkpoint_skipped", step=step)
        context.fire("checkpoint")


def checkpoint(context: StepContext, wait: bool) -> None:
    """Every member writes its own share."""
    context.at("checkpoint")
    context.member.save(Save(context.generation.number, context.step, context.group.rank, context.group.size, wait,
                             context.injector.disk(context.step)))
