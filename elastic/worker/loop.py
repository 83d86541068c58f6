"""One generation's training, from where its members meet to where they part. Runs on any group, with Ray or without.

A step: every member adds up the gradients of its logical shards along the canonical tree; the group reduces the sums; all vote;
a vote that completes is the commit, and each member applies what it holds. Nothing is changed before the commit, so
a step that is cut off can be redone from untouched state, by whoever is left.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from elastic.chaos import Injector
from elastic.collective.group import CollectiveGroup
from elastic.collective.reduction import reduce, tree_sum
from elastic.errors import NonFiniteLoss
from elastic.mesh import shards_of
from elastic.messages import STOP_AND_SAVE, Ballot, Generation, Line, Save
from elastic.model.backend import SLOTS, Backend, Buffer, Tally, UpdateRule
from elastic.parallel.groups import Links
from elastic.parallel.layout import Portion
from elastic.parallel.pipeline import Pipeline
from elastic.state.flat_layout import BLOCK
from elastic.state.state import State
from elastic.worker.evaluation import evaluate
from elastic.worker.gradients import Buffers, Found, add_up_shards, sum_shared
from elastic.worker.loop_control import Control
from elastic.worker.lr_schedule import learning_rate
from elastic.worker.sharded_step import block_norms, bring, reduce_own, share
from elastic.worker.watch import Watch

MAX_LINES = 50_000  # that a manifest carries; those before are on the disk itself long since
FEW = 5  # sample positions that a sentence lists


@dataclass(frozen=True)
class Plan:
    """What to train, as plain numbers; the same on every worker and in every generation."""

    num_steps: int
    num_shards: int
    seed: int
    exact: bool
    optimizer: Mapping[str, Any]  # the keys of `[optimizer]`, the rates scaled to the batch
    eval_every: int = 0
    checkpoint_every: int = 0
    skip_busy: bool = False  # a checkpoint that is due while one is being written is left out
    micro_batches: int = 1  # of a logical shard
    best: str = ""  # the figure by which a checkpoint is kept, as "eval.loss"


class Loader(Protocol):
    """Batches by (step, shard). `expect` names those that come next, so that they can be loaded ahead."""

    def __call__(self, step: int, shard: int) -> Mapping[str, Any]: ...

    def expect(self, keys: Iterable[tuple[int, int]]) -> None: ...

    def close(self) -> None: ...


@dataclass
class Work:
    """What a worker trains with. It outlives generations; `gradient` is what it holds between a reduction and its commit."""

    plan: Plan
    backend: Backend
    state: State
    load_batch: Loader
    positions: Callable[[int, int], np.ndarray]
    eval_batches: Sequence[Callable[[], Mapping[str, Any]]]
    control: Control
    post: Callable[[Any], None]
    save: Callable[[Save, Mapping[str, float]], None]  # with the last evaluation
    unit: str = ""
    portion: Portion | None = None  # of the model, on this worker's seat
    pipeline: Pipeline | None = None  # where the mesh has one
    settle: Callable[[Generation, CollectiveGroup], None] = lambda generation, group: None  # on the seat that the generation gives it
    restore: Callable[[Generation, CollectiveGroup], None] = lambda generation, group: None  # from `generation.load`, a checkpoint
    ready: Callable[[Generation, CollectiveGroup], None] = lambda generation, group: None  # the state is there
    is_busy: Callable[[], bool] = lambda: False  # a checkpoint is still being written
    watch: Watch | None = None  # over what a user's own model trains
    links: Links | None = None
    gradient: Buffer | None = None
    holds: int = -1
    ballot: Ballot | None = None
    evaluation: dict[str, float] = field(default_factory=dict)
    unwritten: deque[dict[str, Any]] = field(default_factory=deque)
    unsaved: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=MAX_LINES))  # since the newest checkpoint known to be committed
    ledger: Any = None  # `elastic.data.ledger.Ledger`, where the recipe asks for one
    is_own: bool = False  # model or data set is the user's: what fails in computing a shard is their code
    fills: bool = True  # a batch that lacks samples has rows of weight 0 in their place
    apart: bool = False  # a shard's gradients are added in several goes
    sums: bool = False  # a step's loss is the sum of its shards', not their mean
    tally: Callable[[], Tally | None] = lambda: None  # a new one for every evaluation


def train(work: Work, generation: Generation, group: CollectiveGroup, injector: Injector) -> str:
    """Trains until the run is "done" or a vote says that the group has "stopped". Raises `GroupBroken` if a peer is gone."""
    links = begin(work, generation, group, injector)
    buffers = Buffers(work, links.data)
    run = shards_of(links.data.rank, links.data.size, work.plan.num_shards)
    work.load_batch.expect((step, shard) for step in range(work.state.committed + 1, work.plan.num_steps + 1) for shard in run)
    after(work, generation, links, injector, evaluated=generation.evaluated, checkpointed=generation.checkpointed)
    while work.state.committed < work.plan.num_steps:
        started, step = time.perf_counter(), work.state.committed + 1
        with untouched(work, step, whole=is_saved(work.plan, step)):
            found = add_up_shards(work, links, buffers, step, injector)
        work.gradient, work.holds = reduce_sums(work, links, buffers, found.sums, step, injector), step
        ballot = vote(work, links, step, found, injector)
        injector.at(step, "update")
        commit(work, ballot)
        try:
            share(work, links, buffers, step, injector)
        finally:  # the step counts, whoever falls from here on
            record(work, generation, group, ballot, time.perf_counter() - started)
        after(work, generation, links, injector, busy=ballot.busy)
        if ballot.stop and step < work.plan.num_steps:
            if ballot.stop == STOP_AND_SAVE:
                checkpoint(work, generation, group, injector, wait=True)
            return "stopped"
    if work.state.committed > generation.checkpointed:
        checkpoint(work, generation, group, injector, wait=True)
    return "done"


def link(work: Work, generation: Generation, group: CollectiveGroup) -> Links:
    """This worker's groups, and the axes to the model's kernels."""
    control = work.control
    links = Links(group, generation.shape, work.portion, lambda: control.collective(control.step, control.phase))
    work.links = links
    if work.portion is not None:
        work.backend.connect(links.dims(work.portion.layout.dims))
    return links


def checkpoint(work: Work, generation: Generation, group: CollectiveGroup, injector: Injector, wait: bool) -> None:
    """Every member writes its own share."""
    step = work.state.committed
    work.control.at(step, "checkpoint")
    work.save(Save(generation.number, step, group.rank, group.size, wait, injector.disk(step)), work.evaluation)


def begin(work: Work, generation: Generation, group: CollectiveGroup, injector: Injector) -> Links:
    """Brings every member to `generation.committed`: a vote that some saw complete is applied, those without state are healed.

    Where nobody has any state, all load a checkpoint together.
    """
    if work.state.committed == generation.committed - 1 and work.holds == generation.committed and generation.ballot:
        commit(work, generation.ballot)  # its line came with the word of whoever saw the vote
    work.gradient, work.holds = None, -1
    work.settle(generation, group)
    if generation.load not in ("", "recipe"):
        work.restore(generation, group)
    links = link(work, generation, group)
    if work.state.is_sharded and not generation.load:
        bring(work, work.state, generation, links, injector)
    else:
        heal(work, generation, group, injector)
    work.ready(generation, group)
    return links


def heal(work: Work, generation: Generation, group: CollectiveGroup, injector: Injector) -> None:
    """A source sends its state to the members of its seat that have none; the others go on to the first collective and wait there."""
    if generation.healers:
        injector.at(generation.committed + 1, "heal")
    for source, healed in generation.healers:
        taking_part = [source, *healed]
        if group.rank not in taking_part:
            continue
        started = time.perf_counter()
        with work.control.collective(generation.committed, "heal"):
            moved = work.state.heal(group.subgroup(taking_part), 0, generation.committed)
        if group.rank == source:
            work.post(Line(generation.number, "events", {
                "event": "healed", "step": generation.committed, "from": generation.members[source],
                "to": [generation.members[r] for r in healed], "bytes": moved, "seconds": time.perf_counter() - started}))


def reduce_sums(work: Work, links: Links, buffers: Buffers, sums: Any, step: int, injector: Injector) -> Buffer:
    """Over the replicas along the tree; then over the members of this replica that hold the same parameters and found other parts."""
    group = injector.cut(links.data, step, "reduction")
    with work.control.collective(step, "reduction"):
        if work.state.is_sharded:
            return reduce_own(work, work.state, links, group, buffers, sums)
        if work.plan.exact:
            gradient = reduce(group, sums.nodes(), work.plan.num_shards, buffers.out, buffers.numel, BLOCK, buffers.scratch)
        else:
            gradient = sums.buffer
            group.all_reduce(gradient)
    sum_shared(links, work.state.layout, gradient)
    return gradient


def vote(work: Work, links: Links, step: int, found: Found, injector: Injector) -> Ballot:
    """One all-gather of a few scalars over all members. Each part of a shard's loss is said by one of them; the others hold zeros there."""
    group = injector.cut(links.world, step, "vote")
    shards = work.plan.num_shards
    part = np.zeros(2 * shards + 3)
    for shard, loss in found.losses.items():
        part[shard], part[shards + shard] = loss, found.weights[shard]
    part[-3:] = squared_norm(work, links), work.is_busy(), work.control.stop_request()
    fed = work.ledger.digests(step) * (links.replica.rank == 0) if work.ledger else np.zeros(0)
    part = np.concatenate([fed, part])
    out = np.empty(group.size * len(part))
    with work.control.collective(step, "vote"):
        group.all_gather(out, part)
    rows = out.reshape(group.size, -1)
    if work.ledger:
        work.ledger.check(step, rows[:, :len(fed)].sum(axis=0))
    rows = rows[:, len(fed):]
    total = rows[:, :-2].sum(axis=0)
    ballot = Ballot(step, tuple(total[:shards].tolist()), tuple(total[shards:-1].tolist()), int(rows[:, -1].max()), bool(rows[:, -2].any()),
                    float(total[-1]))
    check_finite(work, ballot)
    work.ballot = ballot
    return ballot


def squared_norm(work: Work, links: Links) -> float:
    """Of the reduced gradients that this member counts, block by block, if the recipe clips; replica 0 says it."""
    state, gradient = work.state, work.gradient
    if not work.plan.optimizer["clip_norm"] > 0 or (links.data.rank and not state.num_blocks):
        return 0.0
    assert gradient is not None
    if state.is_sharded:
        with work.control.collective(work.holds, "vote"):
            norms = block_norms(work, state, links)
        found = [norms[low // BLOCK:high // BLOCK] for low, high in state.layout.counted]
    else:
        found = [work.backend.squared_norms(gradient[low:high], BLOCK) for low, high in state.layout.counted]
    return 0.0 if links.data.rank else float(sum(sum(norms.tolist()) for norms in found))


def check_finite(work: Work, ballot: Ballot) -> None:
    if not sum(ballot.weights) > 0:
        raise NonFiniteLoss(f"The weights of step {ballot.step} sum to {sum(ballot.weights)}; a model's loss must give a weight above 0: leave out "
                            "rows of which nothing counts.")
    for shard, loss in enumerate(ballot.losses):
        if not math.isfinite(loss):
            positions = work.positions(ballot.step, shard).tolist()
            some = ", ".join(map(str, positions[:FEW])) + (f" and {len(positions) - FEW} more" if len(positions) > FEW else "")
            raise NonFiniteLoss(f"The loss is {loss} at step {ballot.step}, logical shard {shard}, sample positions {some}; "
                                "lower optimizer.lr, set optimizer.clip_norm or mend these samples.")
    if not math.isfinite(ballot.squared_norm):
        raise NonFiniteLoss(f"The gradient's norm is {ballot.squared_norm} at step {ballot.step}; lower optimizer.lr or mend the data.")


def commit(work: Work, ballot: Ballot) -> None:
    """Applies the reduced gradients that this member holds. The state is torn (-1) until all of it is done."""
    plan, state, gradient = work.plan, work.state, work.gradient
    options, layout = plan.optimizer, state.layout
    assert gradient is not None
    weight = tree_sum(ballot.weights)
    scale = 1.0 if work.sums else 1.0 / weight
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
            work.backend.update(rule, state.param[low:high], gradient[at:at + high - low], slots, BLOCK)
    state.apply_statistics(gradient, weight)
    state.average(options["ema"], ballot.step)
    state.committed, state.torn = ballot.step, not state.keeps_all


def untouched(work: Work, step: int, whole: bool) -> AbstractContextManager[None]:
    """Inside, users' code computes."""
    return work.watch.over(work.state.param, step, whole) if work.watch else nullcontext()


def is_saved(plan: Plan, step: int) -> bool:
    return step == plan.num_steps or (plan.checkpoint_every > 0 and step % plan.checkpoint_every == 0)


def record(work: Work, generation: Generation, group: CollectiveGroup, ballot: Ballot, step_s: float) -> None:
    """The line of a committed step."""
    weight = tree_sum(ballot.weights)
    samples = sum(int((work.positions(ballot.step, s) >= 0).sum()) for s in range(work.plan.num_shards))
    fields = {"step": ballot.step, "loss": tree_sum(ballot.losses) / (1.0 if work.sums else weight), "time": time.time(), "step_s": step_s,
              "world_size": len(generation.members), "generation": generation.number, "samples": samples}
    if work.unit:
        fields[work.unit] = int(weight)
    if work.ledger:
        fields["ledger"] = work.ledger.line(ballot.step)
    write_down(work, generation, group, fields)


def write_down(work: Work, generation: Generation, group: CollectiveGroup, fields: dict[str, Any]) -> None:
    """Rank 0 sends a line for metrics.jsonl; every member keeps it until it is known to be on disk."""
    keep_lines(work.unwritten, work.control.written, fields["step"])
    work.unwritten.append(fields)
    work.unsaved.append(fields)
    if group.rank == 0:
        repeats = work.control.repeat.is_set()
        if repeats:  # else what is asked for just now would be forgotten
            work.control.repeat.clear()
        for one in work.unwritten if repeats else (fields,):
            work.post(Line(generation.number, "metrics", one))


def keep_lines(lines: deque[dict[str, Any]], there: int, last: int) -> None:
    """Those of the steps after `there`, whose evaluation may be missing too, up to `last`: a run may have gone back."""
    while lines and lines[0]["step"] + ("eval" in lines[0]) <= there:
        lines.popleft()
    while lines and lines[-1]["step"] > last:
        lines.pop()


def after(work: Work, generation: Generation, links: Links, injector: Injector, evaluated: int = 0,
          checkpointed: int = 0, busy: bool = False) -> None:
    """Whatever is due at the committed step: evaluation, then a checkpoint beside the training. `busy` must be the same for all."""
    step, plan = work.state.committed, work.plan
    if step <= 0:
        return
    last = step == plan.num_steps
    if work.eval_batches and step > evaluated and (last or (plan.eval_every and step % plan.eval_every == 0)):
        with work.state.averaged(links.data), untouched(work, step, whole=True):
            work.evaluation = evaluate(work, links, step)
        write_down(work, generation, links.world, {"step": step, "eval": work.evaluation})
    if is_saved(plan, step) and step > checkpointed and not last:
        if not (busy and plan.skip_busy):
            checkpoint(work, generation, links.world, injector, wait=False)
        elif links.world.rank == 0:
            work.post(Line(generation.number, "events", {"event": "checkpoint_skipped", "step": step}))
        injector.at(step, "checkpoint")
