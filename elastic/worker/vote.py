"""The vote on a step: one all-gather of a few scalars over all members. One that completes is the step's commit."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from elastic.collective.reduction import tree_sum
from elastic.errors import NonFiniteLoss
from elastic.messages import Ballot
from elastic.state.flat_layout import BLOCK
from elastic.worker.context import StepContext
from elastic.worker.embedding import ballot_words, counted_words
from elastic.worker.gradients import Shards
from elastic.worker.own_figures import OwnFigures
from elastic.worker.sharded_step import block_norms
from elastic.worker.training import Training

LAST = 3  # of a vote, behind the logical shards' figures: a squared norm, whether it is busy, its stop request
FEW = 5  # sample positions that a sentence lists


def vote(context: StepContext, shards: Shards) -> Ballot:
    """`NonFiniteLoss`, or RunFailed for what was not fed as the ledger has it, on all members alike.

    A member speaks of its own replica's logical shards. What only one of a replica is to say is 0 with the others, so
    that sums are what counts.
    """
    step, ledger, own = context.step, context.training.ledger, context.own_shards
    figures: list[np.ndarray] = [shards.losses, shards.weights]
    if ledger:
        figures.append(ledger.digests(step) * (context.groups.replica.rank == 0))
    words = ballot_words(context) if context.tables else np.zeros(0)
    mine = packed(own, context.groups.data.rank, figures, squared_norm(context), context.member.is_busy(),
                  context.control.stop_request())
    rows = context.gather("vote", np.concatenate([words, mine]))
    (losses, weights, *fed), norm, busy, stop = counted(own, rows[:, len(words):])
    if ledger:
        ledger.check(step, fed[0])
    losses, weights = losses.tolist(), weights.tolist()
    check_finite(context.training, step, losses, weights, norm)
    if context.tables:
        norm += counted_words(context, rows[:, :len(words)])
    return Ballot(step, tree_sum(losses), tree_sum(weights), stop, busy, norm)


def packed(own: OwnFigures, replica: int, figures: Sequence[np.ndarray], squared_norm: float, busy: bool,
           stop: int) -> np.ndarray:
    """One member's vote as it travels, float64. `figures`: each of all logical shards."""
    return np.concatenate([*(own.of(replica, one) for one in figures), [squared_norm, busy, stop]])


def counted(own: OwnFigures, rows: np.ndarray) -> tuple[list[np.ndarray], float, bool, int]:
    """All members' votes, (members, length): the figures of all logical shards, the squared norm, whether one is busy,
    and the largest stop."""
    norm, busy, _ = rows[:, -LAST:].sum(axis=0).tolist()
    said = np.split(rows[:, :-LAST], range(own.length, rows.shape[1] - LAST, own.length), axis=1)
    return [own.together(one) for one in said], norm, bool(busy), int(rows[:, -1].max())


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


def check_finite(training: Training, step: int, losses: Sequence[float], weights: Sequence[float], norm: float) -> None:
    if not sum(weights) > 0:
        raise NonFiniteLoss(f"The weights of step {step} sum to {sum(weights)}; a model's loss must give "
                            "a weight above 0: leave out rows of which nothing counts.")
    for shard, loss in enumerate(losses):
        if not math.isfinite(loss):
            positions = training.positions(step, shard).tolist()
            some = ", ".join(map(str, positions[:FEW])) + (f" and {len(positions) - FEW} more" if len(positions) > FEW
                                                           else "")
            raise NonFiniteLoss(f"The loss is {loss} at step {step}, logical shard {shard}, sample positions "
                                f"{some}; lower optimizer.lr, set optimizer.clip_norm or mend these samples.")
    if not math.isfinite(norm):
        raise NonFiniteLoss(f"The gradient's norm is {norm} at step {step}; lower optimizer.lr or mend the data.")
