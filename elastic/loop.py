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
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from elastic.backend import SLOTS, Backend, Buffer, Tally, UpdateRule
from elastic.chaos import Injector
from elastic.collective.group import CollectiveGroup
from elastic.collective.reduction import Scratch, SubtreeSums, out_size, reduce, tree_sum
from elastic.control import Control
from elastic.errors import NonFiniteLoss
from elastic.evaluation import figures, measure
from elastic.mesh import shards_of
from elastic.messages import STOP_AND_SAVE, Ballot, Generation, Line, Save
from elastic.schedule import learning_rate
from elastic.state import BLOCK, State


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
    restore: Callable[[Generation, CollectiveGroup], None] = lambda generation, group: None  # from `generation.load`, a checkpoint
    is_busy: Callable[[], bool] = lambda: False  # a checkpoint is still being written
    gradient: Buffer | None = None
    holds: int = -1
    ballot: Ballot | None = None
    evaluation: dict[str, float] = field(default_factory=dict)
    unwritten: deque[dict[str, Any]] = field(default_factory=deque)
    ledger: Any = None  # `elastic.data.ledger.Ledger`, where the recipe asks for one
    tally: Callable[[], Tally | None] = lambda: None  # a new one for every evaluation


def train(work: Work, generation: Generation, group: CollectiveGroup, injector: Injector) -> str:
    """Trains until the run is "done" or a vote says that the group has "stopped". Raises `GroupBroken` if a peer is gone."""
    begin(work, generation, group, injector)
    buffers = Buffers(work, group)
    run = shards_of(group.rank, group.size, work.plan.num_shards)
    work.load_batch.expect((step, shard) for step in range(work.state.committed + 1, work.plan.num_steps + 1) for shard in run)
    after(work, generation, group, injector, evaluated=generation.evaluated, checkpointed=generation.checkpointed)
    while work.state.committed < work.plan.num_steps:
        started, step = time.perf_counter(), work.state.committed + 1
        sums, losses, weights = add_up_shards(work, group, buffers, step, injector)
        work.gradient, work.holds = reduce_sums(work, group, buffers, sums, step, injector), step
        ballot = vote(work, group, step, losses, weights, injector)
        injector.at(step, "update")
        commit(work, ballot)
        record(work, generation, group, ballot, time.perf_counter() - started)
        after(work, generation, group, injector, busy=ballot.busy)
        if ballot.stop and step < work.plan.num_steps:
            if ballot.stop == STOP_AND_SAVE:
                checkpoint(work, generation, group, injector, wait=True)
            return "stopped"
    if work.state.committed > generation.checkpointed:
        checkpoint(work, generation, group, injector, wait=True)
    return "done"


def checkpoint(work: Work, generation: Generation, group: CollectiveGroup, injector: Injector, wait: bool) -> None:
    """Every member writes its own share."""
    step = work.state.committed
    work.control.at(step, "checkpoint")
    work.save(Save(generation.number, step, group.rank, group.size, wait, injector.disk(step)), work.evaluation)


def begin(work: Work, generation: Generation, group: CollectiveGroup, injector: Injector) -> None:
    """Brings every member to `generation.committed`: a vote that some saw complete is applied, those without state are healed.

    Where nobody has any state, all load a checkpoint together.
    """
    if work.state.committed == generation.committed - 1 and work.holds == generation.committed and generation.ballot:
        commit(work, generation.ballot)  # its line came with the word of whoever saw the vote
    work.gradient, work.holds = None, -1
    if generation.load not in ("", "recipe"):
        work.restore(generation, group)
    if generation.healers:
        heal(work, generation, group, injector)


def heal(work: Work, generation: Generation, group: CollectiveGroup, injector: Injector) -> None:
    """Each source sends its state to the members of its seat that have none; the others go on to the first collective and wait there."""
    injector.at(generation.committed + 1, "heal")
    for source, healed in generation.healers:
        if group.rank not in (source, *healed):
            continue
        started = time.perf_counter()
        with work.control.collective(generation.committed, "heal"):
            moved = work.state.heal(group.subgroup([source, *healed]), 0, generation.committed)
        if group.rank == source:
            work.post(Line(generation.number, "events", {
                "event": "healed", "step": generation.committed, "from": generation.members[source],
                "to": [generation.members[r] for r in healed], "bytes": moved, "seconds": time.perf_counter() - started}))


class Buffers:
    """One generation's communication buffers. A broken group's are never used again: a stopped peer may still write to them."""

    def __init__(self, work: Work, group: CollectiveGroup):
        allocate = getattr(group, "allocate", work.backend.allocate)
        self.layout = work.state.layout
        self.numel = self.layout.gradient
        self.out = allocate(out_size(self.numel, BLOCK, group.size)) if group.size > 1 else None
        self.scratch = Scratch(work.backend.allocate)
        self._allocate = allocate
        self._all: list[Buffer] = []
        self._free: list[Buffer] = []

    def reset(self) -> None:
        self._free = list(self._all)

    def take(self) -> Buffer:
        """A zeroed buffer for gradients."""
        if not self._free:
            self._all.append(self._allocate(self.numel))
            return self._all[-1]
        buffer = self._free.pop()
        buffer[:] = 0
        return buffer

    def give(self, buffer: Buffer) -> None:
        self._free.append(buffer)


def add_up_shards(work: Work, group: CollectiveGroup, buffers: Buffers, step: int, injector: Injector) -> tuple[Any, dict, dict]:
    """The gradients of this member's shards, added along the tree; each shard's loss sum and weight."""
    run = shards_of(group.rank, group.size, work.plan.num_shards)
    buffers.reset()
    sums: Any = SubtreeSums(run, work.plan.num_shards, buffers.take, buffers.give) if work.plan.exact else PlainSum(buffers.take)
    losses, weights = {}, {}
    for shard in run:
        work.control.at(step, "forward", shard)
        injector.at(step, "forward")
        buffer = sums.begin(shard)
        result = work.backend.gradients(work.load_batch(step, shard), shard_seed(work.plan.seed, step, shard),
                                        buffers.layout.views(buffer, buffers.layout.trainable_names))
        if result.buffers:
            work.state.add_statistics(buffer, result.buffers, result.weight)
        if work.plan.exact:
            sums.end(shard)
        losses[shard], weights[shard] = result.loss_sum, result.weight
        injector.at(step, "backward")
    return sums, losses, weights


class PlainSum:
    """For `reduction = "fast"`: all shards of a member in one buffer, in its own order."""

    def __init__(self, take: Callable[[], Buffer]):
        self.buffer = take()

    def begin(self, shard: int) -> Buffer:
        return self.buffer


def shard_seed(seed: int, step: int, shard: int) -> int:
    """A counter-based seed for whatever is random in one shard of one step."""
    return int(np.random.SeedSequence([seed, step, shard]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def reduce_sums(work: Work, group: CollectiveGroup, buffers: Buffers, sums: Any, step: int, injector: Injector) -> Buffer:
    group = injector.cut(group, step, "reduction")
    with work.control.collective(step, "reduction"):
        if work.plan.exact:
            return reduce(group, sums.nodes(), work.plan.num_shards, buffers.out, buffers.numel, BLOCK, buffers.scratch)
        group.all_reduce(sums.buffer)
        return sums.buffer


def vote(work: Work, group: CollectiveGroup, step: int, losses: Mapping[int, float], weights: Mapping[int, float],
         injector: Injector) -> Ballot:
    """One all-gather of a few scalars. Every shard is in exactly one member's part; the others hold zeros there."""
    group = injector.cut(group, step, "vote")
    shards = work.plan.num_shards
    part = np.zeros(2 * shards + 2)
    for shard, loss in losses.items():
        part[shard], part[shards + shard] = loss, weights[shard]
    part[-2], part[-1] = work.is_busy(), work.control.stop_request()
    fed = work.ledger.digests(step) if work.ledger else np.zeros(0)
    part = np.concatenate([fed, part])
    out = np.empty(group.size * len(part))
    with work.control.collective(step, "vote"):
        group.all_gather(out, part)
    rows = out.reshape(group.size, -1)
    if work.ledger:
        work.ledger.check(step, rows[:, :len(fed)].sum(axis=0))
    rows = rows[:, len(fed):]
    total = rows[:, :2 * shards].sum(axis=0)
    ballot = Ballot(step, tuple(total[:shards].tolist()), tuple(total[shards:].tolist()), int(rows[:, -1].max()), bool(rows[:, -2].any()))
    check_finite(work, ballot)
    work.ballot = ballot
    return ballot


def check_finite(work: Work, ballot: Ballot) -> None:
    if not sum(ballot.weights) > 0:
        raise NonFiniteLoss(f"The weights of step {ballot.step} sum to {sum(ballot.weights)}; a model's loss must give a weight above 0.")
    for shard, loss in enumerate(ballot.losses):
        if not math.isfinite(loss):
            positions = ", ".join(str(p) for p in work.positions(ballot.step, shard).tolist())
            raise NonFiniteLoss(f"The loss is {loss} at step {ballot.step}, logical shard {shard}, sample positions {positions}; "
                                "lower optimizer.lr, set optimizer.clip_norm or mend these samples.")


def commit(work: Work, ballot: Ballot) -> None:
    """Applies the reduced gradients that this member holds. The state is torn (-1) until all of it is done."""
    plan, state, gradient = work.plan, work.state, work.gradient
    options, layout = plan.optimizer, state.layout
    assert gradient is not None
    weight = tree_sum(ballot.weights)
    scale = 1.0 / weight
    if options["clip_norm"] > 0:
        norm = math.sqrt(float(sum(work.backend.squared_norms(gradient[:layout.trainable], BLOCK).tolist()))) * scale
        if not math.isfinite(norm):
            raise NonFiniteLoss(f"The gradient's norm is {norm} at step {ballot.step}; lower optimizer.lr or mend the data.")
        scale *= min(1.0, options["clip_norm"] / max(norm, 1e-30))
    lr = learning_rate(ballot.step, plan.num_steps, options)
    state.committed = -1
    for low, high, decay in ((0, layout.decay, options["weight_decay"]), (layout.decay, layout.trainable, 0.0)):
        if low < high:
            rule = UpdateRule(options["name"], lr, decay, scale, ballot.step, options["beta1"], options["beta2"], options["eps"],
                              options["momentum"])
            slots = {name: state.slots[name][low:high] for name in SLOTS[rule.name]}
            work.backend.update(rule, state.param[low:high], gradient[low:high], slots, BLOCK)
    state.apply_statistics(gradient, weight)
    state.average(options["ema"], ballot.step)
    state.committed = ballot.step


def record(work: Work, generation: Generation, group: CollectiveGroup, ballot: Ballot, step_s: float) -> None:
    """The line of a committed step."""
    weight = tree_sum(ballot.weights)
    samples = sum(int((work.positions(ballot.step, s) >= 0).sum()) for s in range(work.plan.num_shards))
    fields = {"step": ballot.step, "loss": tree_sum(ballot.losses) / weight, "time": time.time(), "step_s": step_s,
              "world_size": len(generation.members), "generation": generation.number, "samples": samples}
    if work.unit:
        fields[work.unit] = int(weight)
    if work.ledger:
        fields["ledger"] = work.ledger.line(ballot.step)
    write_down(work, generation, group, fields)


def write_down(work: Work, generation: Generation, group: CollectiveGroup, fields: dict[str, Any]) -> None:
    """Rank 0 sends a line for metrics.jsonl; every member keeps it until it is known to be on disk."""
    written = work.control.written
    while work.unwritten and work.unwritten[0]["step"] + ("eval" in work.unwritten[0]) <= written:
        work.unwritten.popleft()
    work.unwritten.append(fields)
    if group.rank == 0:
        work.post(Line(generation.number, "metrics", fields))


def after(work: Work, generation: Generation, group: CollectiveGroup, injector: Injector, evaluated: int = 0,
          checkpointed: int = 0, busy: bool = False) -> None:
    """Whatever is due at the committed step: evaluation, then a checkpoint beside the training. `busy` must be the same for all."""
    step, plan = work.state.committed, work.plan
    if step <= 0:
        return
    last = step == plan.num_steps
    if work.eval_batches and step > evaluated and (last or (plan.eval_every and step % plan.eval_every == 0)):
        with work.state.averaged():
            work.evaluation = evaluate(work, group, step)
        write_down(work, generation, group, {"step": step, "eval": work.evaluation})
    if plan.checkpoint_every and step > checkpointed and step % plan.checkpoint_every == 0 and not last:
        if not (busy and plan.skip_busy):
            checkpoint(work, generation, group, injector, wait=False)
        elif group.rank == 0:
            work.post(Line(generation.number, "events", {"event": "checkpoint_skipped", "step": step}))
        injector.at(step, "checkpoint")


def evaluate(work: Work, group: CollectiveGroup, step: int) -> dict[str, float]:
    """The mean of every metric over the evaluation set. A batch is computed whole by one member: the split changes no bit."""
    batches, tally = work.eval_batches, work.tally()
    parts: dict[str, np.ndarray] = {}
    for index in range(group.rank, len(batches), group.size):
        work.control.at(step, "evaluate", index)
        for name, pair in measure(work.backend, tally, batches[index]()).items():
            parts.setdefault(name, np.zeros((len(batches), 2)))[index] = pair
    names = sorted(parts or measure(work.backend, work.tally(), batches[0]()))  # a member without a batch still has to know the names
    tables = [parts.get(name, np.zeros((len(batches), 2))).reshape(-1) for name in names]
    mine = np.concatenate([*tables, tally.counts if tally else np.zeros(0)])
    out = np.empty(group.size * len(mine))
    with work.control.collective(step, "evaluate"):
        group.all_gather(out, mine)
    sums = out.reshape(group.size, -1).sum(axis=0)
    counted = 2 * len(names) * len(batches)
    return figures(dict(zip(names, sums[:counted].reshape(len(names), len(batches), 2), strict=True)), tally, sums[counted:])
