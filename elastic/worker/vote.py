"""The vote on a step: one all-gather of a few scalars over all members. One that completes is the step's commit."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from elastic.errors import NonFiniteLoss
from elastic.messages import GO, Ballot
from elastic.state.flat_layout import BLOCK
from elastic.worker.context import StepContext
from elastic.worker.gradients import Shards
from elastic.worker.sharded_step import block_norms
from elastic.worker.training import Training

FEW = 5  # sample positions that a sentence lists


@dataclass
class Vote:
    """What a member has to say of a step, or all together. What only one of them is to say is 0 with the others, so that sums are what counts."""

    losses: np.ndarray  # (num_shards,) float64
    weights: np.ndarray  # (num_shards,)
    squared_norm: float = 0.0
    busy: bool = False
    stop: int = GO
    fed: np.ndarray = field(default_factory=lambda: np.zeros(0))  # (num_shards,) digests of what shards were fed, with a ledger

    def pack(self) -> np.ndarray:
        """As it travels, float64."""
        return np.concatenate([self.fed, self.losses, self.weights, [self.squared_norm, self.busy, self.stop]])

    @classmethod
    def of_all(cls, rows: np.ndarray, num_shards: int) -> Vote:
        """Of all members' packed votes, (members, length): busy if one is, and the largest stop."""
        total, fed = rows.sum(axis=0), rows.shape[1] - 2 * num_shards - 3
        digests, losses, weights, (norm, busy, _) = np.split(total, [fed, fed + num_shards, fed + 2 * num_shards])
        return cls(losses, weights, float(norm), bool(busy), int(rows[:, -1].max()), digests)


def vote(context: StepContext, shards: Shards) -> Ballot:
    """`NonFiniteLoss`, or RunFailed for what was not fed as the ledger has it, on all members alike."""
    step, ledger = context.step, context.training.ledger
    mine = Vote(shards.losses, shards.weights, squared_norm(context), context.member.is_busy(), context.control.stop_request())
    if ledger:
        mine.fed = ledger.digests(step) * (context.groups.replica.rank == 0)
    found = Vote.of_all(context.gather("vote", mine.pack()), context.plan.num_shards)
    if ledger:
        ledger.check(step, found.fed)
    ballot = Ballot(step, tuple(found.losses.tolist()), tuple(found.weights.tolist()), found.stop, found.busy, found.squared_norm)
    check_finite(context.training, ballot)
    return ballot


def squared_norm(context: StepContext) -> float:
    """Of the reduced gradients that this member counts, block by block, if the recipe clips; replica 0 says it."""
    state, gradient, rank = context.state, context.held.gradient, context.groups.data.rank
    if not context.plan.optimizer["clip_norm"] > 0 or (rank and not state.num_blocks):
        return 0.0
    assert gradient is not None
    if state.is_sharded:
        norms = block_norms(context, state, gradient)
        found = [norms[low // BLOCK:high // BLOCK] for low, high in state.layout.counted]
    else:
        found = [context.backend.squared_norms(gradient[low:high], BLOCK) for low, high in state.layout.counted]
    return 0.0 if rank else float(sum(sum(norms.tolist()) for norms in found))


def check_finite(training: Training, ballot: Ballot) -> None:
    if not sum(ballot.weights) > 0:
        raise NonFiniteLoss(f"The weights of step {ballot.step} sum to {sum(ballot.weights)}; a model's loss must give a weight above 0: leave out "
                            "rows of which nothing counts.")
    for shard, loss in enumerate(ballot.losses):
        if not math.isfinite(loss):
            positions = training.positions(ballot.step, shard).tolist()
            some = ", ".join(map(str, positions[:FEW])) + (f" and {len(positions) - FEW} more" if len(positions) > FEW else "")
            raise NonFiniteLoss(f"The loss is {loss} at step {ballot.step}, logical shard {shard}, sample positions {some}; "
                                "lower optimizer.lr, set optimizer.clip_norm or mend these samples.")
    if not math.isfinite(ballot.squared_norm):
        raise NonFiniteLoss(f"The gradient's norm is {ballot.squared_norm} at step {ballot.step}; lower optimizer.lr or mend the data.")
