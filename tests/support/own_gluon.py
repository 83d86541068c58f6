"""Users' own Gluon blocks, and what a loop in Gluon alone makes of them."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.support.frameworks import load

computing = load("mxnet", "backend").computing

import mxnet as mx  # noqa: E402  (after its backend, which sets what MXNet reads when it loads)
from mxnet import autograd, gluon  # noqa: E402


class Net(gluon.HybridBlock):
    """Batch norm, dropout, two layers that may share their weights."""

    def __init__(self, dropout: float = 0.0, tied: bool = False, hybrid: bool = False):
        super().__init__()
        with self.name_scope():
            self.first = gluon.nn.Dense(4, in_units=4)
            self.second = gluon.nn.Dense(4, in_units=4, params=self.first.params if tied else None)
            self.norm, self.drop = gluon.nn.BatchNorm(in_channels=4), gluon.nn.Dropout(dropout)
        with computing(1, False):
            mx.random.seed(3)
            self.initialize(mx.init.Normal(0.5))
        if hybrid:
            self.hybridize(static_alloc=True)

    def hybrid_forward(self, F: Any, x: Any) -> Any:
        return self.second(F.relu(self.drop(self.norm(self.first(x)))))

    def loss(self, batch: Any) -> Any:
        return (self(batch["x"]) - batch["y"]).square().mean()

    def metrics(self, batch: Any) -> Any:
        return {"error": ((self(batch["x"]) - batch["y"]).abs().sum(), batch["x"].shape[0] * 4)}


class Sums(Net):
    def loss(self, batch: Any) -> Any:
        return super().loss(batch) * 24, 12


FORMS: tuple[dict[str, Any], ...] = ({}, {"tied": True}, {"hybrid": True}, {"tied": True, "hybrid": True})
WEIGHTS = {"loss": 6.0, "error": 24.0}


def batch(rows: int = 6) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {"x": rng.standard_normal((rows, 4)).astype(np.float32), "y": rng.standard_normal((rows, 4))}


def arrays() -> dict[str, Any]:
    return {name: mx.nd.array(value, dtype="float32") for name, value in batch().items()}


def plainly(net: Net, times: float = 1.0) -> tuple[float, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(mean loss, gradients of `times` loss, statistics afterwards) by name."""
    with computing(1, False):
        with autograd.record():
            loss = Net.loss(net, arrays())
        loss.backward(mx.nd.full((1,), times))
        named: dict[str, Any] = {}
        for name, parameter in net._collect_params_with_prefix().items():
            if all(parameter is not other for other in named.values()):
                named[name] = parameter
        return (float(loss.asscalar()), {n: p.grad().asnumpy() for n, p in named.items() if p.grad_req != "null"},
                {n: p.data().asnumpy() for n, p in named.items() if p.grad_req == "null"})


def evaluated(net: Net) -> dict[str, float]:
    with computing(1, False):
        total, weight = net.metrics(arrays())["error"]
        return {"loss": float(net.loss(arrays()).asscalar()), "error": float(total.asscalar()) / weight}


def sums_batch() -> Any:
    return batch()


def plain_sums(net: Net) -> tuple[float, float, dict[str, np.ndarray]]:
    """(sum, weight, gradients of the sum) by name."""
    loss, slopes, _ = plainly(net, 24.0)
    return 24 * loss, 12.0, slopes


def draw() -> Any:
    """The process's own generators."""
    random.seed(5)
    np.random.seed(5)
    return lambda: (random.random(), np.random.rand())


class Empty(gluon.Block):
    def loss(self, batch: Any) -> Any:
        return batch["x"].sum()


class Vector(Net):
    def loss(self, batch: Any) -> Any:
        return self(batch["x"])


class Detached(Net):
    def loss(self, batch: Any) -> Any:
        return self(batch["x"]).detach().mean()


def doubled() -> Any:
    net = Net()
    net.cast("float64")
    return net


REFUSED: dict[str, tuple[Callable[[], Any], str, Callable[[], Any]]] = {
    "no loss": (lambda: gluon.nn.Dense(1), "loss", batch), "no parameters": (Empty, "no parameters", batch),
    "float64": (doubled, "must be float32", batch),
    "a vector": (Vector, "shape", batch), "detached": (Detached, "trainable", batch)}
