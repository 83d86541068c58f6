"""The vote on a step: one all-gather of a few scalars over all members. One that completes is the step's commit."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from elastic.errors import NonFiniteLoss
from elastic.messages import Ballot
from elastic.state.flat_layout import BLOCK
from elastic.worker.context import StepContext
from elastic.worker.embedding import ballot_words, counted_words
from elastic.worker.gradients import Shards
from elastic.worker.sharded_step import block_norms
from elastic.worker.training import Training

FEW = 5  # sample positions that a sentence lists


def vote(context: StepContext, shards: Shards) -> Ballot:
    """`NonFiniteLoss`, or RunFailed for what was not fed as the ledger has it, on all members alike.

    What only one member is to say is 0 with the others, so that sums are what counts.
    """
    step, ledger = context.step, context.training.ledger
    fed = ledger.digests(step) * (context.groups.replica.rank == 0) if ledger else np.zeros(0)
    words = ballot_words(context) if context.tables else np.zeros(0)
    mine = packed(shards.losses, shards.weights, fed, squared_norm(context), context.member.is_busy(),
                  context.control.stop_request())
    rows = context.gather("vote", np.concatenate([words, mine]))
    ballot, digests = counted(step, rows[:, len(words):], context.plan.num_shards)
    if ledger:
        ledger.check(step, digests)
    check_finite(context.training, ballot)
    if context.tables:
        norm = counted_words(context, rows[:, :len(words)])
        ballot = replace(ballot, squared_norm=ballot.squared_norm + norm)
    return ballot


def packed(losses: np.ndarray, weights: np.ndarray, fed: np.ndarray, squared_norm: float, busy: bool,
           stop: int) -> np.ndarray:
    """One member's vote as it travels, float64. `fed`: (num_shards,) digests of what shards were fed, with a ledger;
    else (0,)."""
    return np.concatenate([fed, losses, weights, [squared_norm, busy, stop]])


def counted(step: int, rows: np.ndarray, num_shards: int) -> tuple[Ballot, np.ndarray]:
    """All members' votes, (members, length), and the digests in them: busy if one is, and the largest stop."""
    fed = rows.shape[1] - 2 * num_shards - 3
    digests, losses, weights, (norm, busy, _) = np.split(rows.sum(axis=0),
                                                         [fed, fed + num_shards, fed + 2 * num_shards])
    return Ballot(step, tuple(losses.tolist()), tuple(weights.tolist()), int(rows[:, -1].max()), bool(busy),
                  float(norm)), digests


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
        raise NonFiniteLoss(f"The weights of step {ballot.step} sum to {sum(ballot.weights)}; a model's loss must give "
                            "a weight above 0: leave out rows of which nothing counts.")
    for shard, loss in enumerate(ballot.losses):
        if not math.isfinite(loss):
            positions = training.positions(ballot.step, shard).tolist()
            some = ", ".join(map(str, positions[:FEW])) + (f" and {len(positions) - FEW} more" if len(positions) > FEW
                                                           else "")
            raise NonFiniteLoss(f"The loss is {loss} at step {ballot.step}, logical shard {shard}, sample positions "
                                f"{some}; lower optimizer.lr, set optimizer.clip_norm or mend these samples.")
    if not math.isfinite(ballot.squared_norm):
        raise NonFiniteLoss(f"The gradient's norm is {ballot.squared_norm} at step {ballot.step}; lower optimizer.lr "
                            "or mend the data.")
