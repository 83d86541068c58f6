"""`tests.support.lookups.Lookups` in plain MXNet, and users' own Gluon blocks that read what was looked up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tests.support.frameworks import load
from tests.support.lookups import HIDDEN, READ, WIDTH

computing = load("mxnet", "backend").computing

import mxnet as mx  # noqa: E402  (after its backend, which sets what MXNet reads when it loads)
from mxnet import autograd, gluon  # noqa: E402


def score_of(F: Any, user: Any, history: Any, weight: Any, bias: Any, out: Any) -> Any:
    attended = F.softmax(F.batch_dot(history, F.expand_dims(user, 2)), axis=1)
    mixed = F.sum(F.broadcast_mul(attended, history), axis=1)
    hidden = F.tanh(F.broadcast_add(F.dot(mixed, weight), F.reshape(bias, (1, -1))))
    return F.sum(F.dot(hidden, out) * user, axis=1)


def loss_of(score: Any, batch: Mapping[str, Any]) -> Any:
    return ((score - batch["label"]).square() * batch["row_weight"]).sum()


def plainly(params: Mapping[str, np.ndarray], batch: Mapping[str, Any]) -> tuple[float, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The loss sum, its gradient with respect to the parameters, and that with respect to the rows that are read."""
    with computing(1, False):
        weights = {name: mx.nd.array(value) for name, value in params.items()}
        rows = {feature: mx.nd.array(batch["rows"][feature]) for feature in READ}
        for leaf in (*weights.values(), *rows.values()):
            leaf.attach_grad()
        with autograd.record():
            loss = loss_of(score_of(mx.nd, **rows, **weights), {name: mx.nd.array(batch[name])
                                                                 for name in ("label", "row_weight")})
        loss.backward()
        found = [{name: leaf.grad.asnumpy() for name, leaf in leaves.items()} for leaves in (weights, rows)]
        return float(loss.asnumpy()[0]), found[0], found[1]


class Net(gluon.HybridBlock):
    """`takes`: its loss takes the rows out of the batch that it is given."""

    def __init__(self, takes: bool = False, hybrid: bool = False):
        super().__init__()
        self.weight = self.params.get("weight", shape=(WIDTH, HIDDEN))
        self.bias = self.params.get("bias", shape=(HIDDEN,), init="zeros")
        self.out = self.params.get("out", shape=(HIDDEN, WIDTH))
        self.takes = takes
        with computing(1, mx.util.is_np_shape()):
            self.initialize()
        if hybrid:
            self.hybridize(static_alloc=True, static_shape=True)

    def hybrid_forward(self, F: Any, user: Any, history: Any, weight: Any, bias: Any, out: Any) -> Any:
        return score_of(F, user, history, weight, bias, out)

    def rows_of(self, batch: Any) -> Any:
        rows = batch.pop("rows") if self.takes else batch["rows"]
        return {feature: rows.pop(feature) if self.takes else rows[feature] for feature in READ}

    def loss(self, batch: Any) -> Any:
        rows = self.rows_of(batch)
        return loss_of(self(rows["user"], rows["history"]), batch), batch["row_weight"].sum()

    def metrics(self, batch: Any) -> Any:
        return {"size": (batch["rows"]["user"].square().sum(), batch["row_weight"].sum())}


class NumPy(Net):
    """On MXNet's NumPy arrays."""

    def __init__(self) -> None:
        with mx.util.np_shape(True), mx.util.np_array(True):
            super().__init__(hybrid=True)

    def hybrid_forward(self, F: Any, user: Any, history: Any, weight: Any, bias: Any, out: Any) -> Any:
        attended = F.npx.softmax(F.npx.batch_dot(history, F.np.expand_dims(user, 2)), axis=1)
        mixed = F.np.sum(attended * history, axis=1)
        return F.np.sum(F.np.dot(F.np.tanh(F.np.dot(mixed, weight) + bias), out) * user, axis=1)

    def loss(self, batch: Any) -> Any:
        score = self(batch["rows"]["user"], batch["rows"]["history"])
        return (mx.np.square(score - batch["label"]) * batch["row_weight"]).sum(), batch["row_weight"].sum()


class Clip(autograd.Function):
    def forward(self, x: Any) -> Any:
        return x.copy()

    def backward(self, slope: Any) -> Any:
        return slope.clip(-0.1, 0.1)


class Clipped(Net):
    """Clips the gradient of rows."""

    def rows_of(self, batch: Any) -> Any:
        found = super().rows_of(batch)
        return {**found, "user": Clip()(found["user"])}
