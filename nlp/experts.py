"""A mixture of experts in place of a transformer layer's MLP: every token goes through `top` of them (Fedus et al. 2022, Switch; Lepikhin et
al. 2021, GShard). Experts may be split over workers, each of which has tokens of its own and sends them to the experts'
owners.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from elastic.model.layers import Layers

Array = Any


@dataclass(frozen=True)
class Experts(Layers):
    """Layers of which some have NAME.moe.gate, moe.up and moe.down in place of NAME.mlp. "expert" and "d_ff_expert" may
    be split.

    An expert takes ceil(capacity * tokens * top / experts) of a worker's tokens; what does not fit passes by on the
    residual. First choices come first. `weights` (rows,), 0 for filler rows, which are sent but do not count for the
    balance; None: no balance.
    """

    top: int = 1
    capacity: float = 1.25
    balance: float = 0.0
    weights: Array | None = None

    def mlp(self, p: Mapping[str, Array], x: Array, h: str) -> Array:
        return self.mixture(p, x, h) if f"{h}.moe.gate.weight" in p else super().mlp(p, x, h)

    def mixture(self, p: Mapping[str, Array], x: Array, h: str) -> Array:
        ops, (rows, time, width) = self.ops, x.shape
        tokens = ops.reshape(x, (rows * time, width))
        odds = ops.softmax(ops.contract("nd,de->ne", tokens, p[f"{h}.moe.gate.weight"]))
        num = odds.shape[-1]
        chosen = ops.top_k(odds, self.top)
        hot = ops.one_hot(chosen, num)
        gates = ops.sum(ops.multiply(hot, ops.reshape(odds, (rows * time, 1, num))), (2,))
        if self.top > 1:
            gates = ops.divide(gates, ops.sum(gates, (1,), keep=True))
        places, sources = ops.queue(chosen, num, math.ceil(self.capacity * rows * time * self.top / num))

        # what stands in a place that is empty, and what comes of a token without a place
        nothing = ops.constant(np.zeros((1, width)))
        sent = ops.gather(ops.concatenate((tokens, nothing), 0), sources)
        found = ops.gather(ops.concatenate((self.through(p, sent, h), nothing), 0), places)
        mixed = ops.sum(ops.multiply(found, ops.reshape(gates, (rows * time, self.top, 1))), (1,))
        out = self.drop(ops.reshape(mixed, x.shape), f"{h}.mlp")
        if self.balance and self.weights is not None:
            out = ops.attach(out, self.penalty(odds, hot, time))
        return out

    def through(self, p: Mapping[str, Array], sent: Array, h: str) -> Array:
        """(experts * places, d_model), each run of places through its own expert, wherever that is."""
        ops, up, parts = self.ops, p[f"{h}.moe.up.weight"], self.ops.degree("expert")
        own, width = up.shape[0], up.shape[1]
        places = sent.shape[0] // (parts * own)
        came = ops.exchange(ops.reshape(sent, (parts, own, places, width)), "expert")
        mine = ops.reshape(ops.transpose(came, (1, 0, 2, 3)), (own, parts * places, width))
        hidden = ops.gelu(ops.contract("ecd,edf->ecf", ops.enter(mine, "d_ff_expert"), up))
        made = ops.leave(ops.contract("ecf,efd->ecd", hidden, p[f"{h}.moe.down.weight"]), "d_ff_expert")
        back = ops.transpose(ops.reshape(made, (own, parts, places, width)), (1, 0, 2, 3))
        return ops.reshape(ops.exchange(back, "expert"), (parts * own * places, width))

    def penalty(self, odds: Array, hot: Array, time: int) -> Array:
        """balance * experts * sum over experts of f P, times the tokens; f is the share of first choices, P the mean
        odds, both of the tokens of all workers of the axis. Fedus et al. 2022, equations 4 to 6.
        """
        ops, (tokens, _, num) = self.ops, hot.shape
        weights = ops.multiply(ops.reshape(self.weights, (-1, 1)), ops.constant(np.ones((1, time))))
        weights = ops.reshape(weights, (tokens, 1))
        first = ops.reshape(ops.narrow(hot, 1, 0, 1), (tokens, num))
        sums = [ops.sum(ops.multiply(each, weights), (0,)) for each in (first, odds)]
        total = ops.leave(ops.concatenate((*sums, ops.sum(weights, (0,))), 0), "expert")
        taken, likely, count = (ops.narrow(total, 0, start, length)
                                for start, length in ((0, num), (num, num), (2 * num, 1)))
        least = ops.add(ops.relu(ops.subtract(count, 1.0)), 1.0)  # of nothing but filler rows nothing is divided
        return ops.sum(ops.multiply(ops.divide(ops.multiply(taken, likely), least), self.balance * num))
