"""Users' own Keras models, and what Keras' own stateful calls make of them."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.support.frameworks import load

load("tensorflow", "backend").start(1)

import keras  # noqa: E402  (the backend says first which framework Keras runs on)
import tensorflow as tf  # noqa: E402


def Net(dropout: float = 0.0, tied: bool = False, **changes: Any) -> Any:
    """Batch norm, dropout, a penalty; `tied` calls its first layer twice."""
    x = keras.Input((4,))
    first = keras.layers.Dense(4, activation="relu", kernel_regularizer=keras.regularizers.L2(0.01))
    y = keras.layers.Dropout(dropout)(keras.layers.BatchNormalization()(first(x)))
    model = keras.Model(x, keras.layers.Dense(2, name="last")(first(y) if tied else y))
    model.compile(**{"loss": "mse", "metrics": ["mae"]} | changes)
    return model


class Sums(keras.Model):
    """A loss of its own over a batch of columns."""

    def __init__(self) -> None:
        super().__init__()
        self.line = keras.layers.Dense(2)
        self.build((None, 4))

    def build(self, shape: Any) -> None:
        self.line.build(shape)
        self.built = True

    def call(self, x: Any) -> Any:
        return self.line(x)

    def batch_loss(self, batch: Any) -> Any:
        return tf.reduce_sum(tf.square(self(batch["x"]) - batch["y"])), 2.0 * batch["x"].shape[0]

    def batch_metrics(self, batch: Any) -> Any:
        return {"near": (tf.reduce_sum(tf.cast(tf.abs(self(batch["x"]) - batch["y"]) < 1, tf.float32)),
                         2.0 * batch["x"].shape[0])}


FORMS: tuple[dict[str, Any], ...] = ({}, {"tied": True})
WEIGHTS = {"loss": 6.0, "mae": 6.0}


def batch(rows: int = 6) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(0)
    return rng.standard_normal((rows, 4)).astype(np.float32), rng.standard_normal((rows, 2))


def plainly(net: Any) -> tuple[float, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(mean loss, its gradients, statistics afterwards), named by hand."""
    x, y = (tf.constant(a, tf.float32) for a in batch())
    with tf.GradientTape() as tape:
        loss = net.compute_loss(x=x, y=y, y_pred=net(x, training=True))
    names = ["dense.kernel", "dense.bias", "batch_normalization.gamma", "batch_normalization.beta", "last.kernel",
             "last.bias"]
    slopes = tape.gradient(loss, [v.value for v in net.trainable_variables])
    return float(loss), {name: np.asarray(slope) for name, slope in zip(names, slopes, strict=True)}, statistics(net)


def statistics(net: Any) -> dict[str, np.ndarray]:
    (norm,) = (layer for layer in net.layers if isinstance(layer, keras.layers.BatchNormalization))
    return {f"batch_normalization.{name}": getattr(norm, name).numpy() for name in ("moving_mean", "moving_variance")}


def evaluated(net: Any) -> dict[str, float]:
    return net.evaluate(*batch(), verbose=0, return_dict=True)


def sums_batch() -> Any:
    return dict(zip("xy", batch()))


def plain_sums(net: Any) -> tuple[float, float, dict[str, np.ndarray]]:
    """(sum, weight, gradients of the sum) by hand."""
    x, y = batch()
    error = x @ net.line.kernel.numpy() + net.line.bias.numpy() - y
    return np.square(error).sum(), 12.0, {"dense.kernel": 2 * x.T @ error, "dense.bias": 2 * error.sum(0)}


def draw() -> Any:
    """The process's own generators."""
    random.seed(5)
    np.random.seed(5)
    return lambda: (random.random(), np.random.rand())


def idle() -> Any:
    model = keras.Sequential([keras.Input((4,)), keras.layers.ReLU()])
    model.compile(loss="mse")
    return model


def doubled() -> Any:
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, dtype="float64")])
    model.compile(loss="mse")
    return model


class Vector(Sums):
    def batch_loss(self, batch: Any) -> Any:
        return self(batch["x"])


class Detached(Sums):
    def batch_loss(self, batch: Any) -> Any:
        return tf.stop_gradient(tf.reduce_sum(self(batch["x"])))


def unasked() -> Any:
    """Compiled without a loss, and without a penalty that could be one."""
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    model.compile()
    return model


REFUSED: dict[str, tuple[Callable[[], Any], str, Callable[[], Any]]] = {
    "no loss": (unasked, "No loss to compute", batch), "no parameters": (idle, "no parameters", batch),
    "float64": (doubled, "must be float32", batch),
    "a vector": (Vector, "shape", sums_batch), "detached": (Detached, "trainable", sums_batch)}
