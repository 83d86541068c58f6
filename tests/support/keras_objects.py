"""More kinds of users' Keras models beside those of `keras_kinds`: what objects, weights, evaluations and numbers of rows may be like."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf
from keras import layers, ops

from tests.support import keras_kinds
from tests.support.keras_kinds import *  # noqa: F403  (a recipe finds all kinds here)
from tests.support.keras_kinds import OwnLoss, Rows, built, net


class Listed(OwnLoss):
    """A penalty over a list of its variables that it takes where it is made; one layer under two names, called twice.
    """

    def __init__(self) -> None:
        super().__init__()
        self.again = self.b
        for layer, width in ((self.a, 4), (self.b, 5)):
            layer.build((None, width))
        self.penalised = [self.a.kernel, self.b.kernel]

    def call(self, x: Any) -> Any:
        return self.b(self.a(x)) + 0.5 * self.again(self.a(2 * x))

    def compute_loss(self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None) -> Any:
        return ops.mean(ops.square(y - y_pred)) + 0.1 * sum(ops.sum(ops.square(kernel)) for kernel in self.penalised)


def listed() -> Any:
    return built(Listed())


@tf.custom_gradient
def squared(x: Any) -> Any:
    return x * x, lambda slope: 2 * x * slope


class Sloped(Listed):
    """A gradient of its own, which is linear; the slope by the input is in the loss."""

    def call(self, x: Any) -> Any:
        return self.b(squared(self.a(x)))

    def compute_loss(self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            u = self.b(self.a(x))
        return ops.mean(ops.square(y - y_pred)) + 0.1 * ops.mean(ops.square(tape.gradient(u, x)))


def sloped() -> Any:
    return built(Sloped())


LARGE = 2.0 ** 30  # in float32 a half beside it is lost
NUMBERS = ("bool", "uint8", "int64", "bfloat16", "float16", "float64")


class Counted(layers.Layer):
    """Weights of many kinds that move with every batch, one of them named as Keras names its generators."""

    def build(self, shape: Any) -> None:
        self.kept = [self.add_weight(shape=(2,),
                                     initializer=keras.initializers.Constant(LARGE if kind == "float64" else 0),
                                     dtype=kind,
                                     trainable=False, autocast=False, name=kind) for kind in NUMBERS]
        self.scale = self.add_weight(shape=(), initializer="ones", trainable=False, name="seed_generator_state")

    def call(self, x: Any, training: bool = False) -> Any:
        if training:
            for kept in self.kept:
                kept.assign(ops.logical_not(kept) if kept.dtype == "bool" else kept
                            + ops.cast(0.5 if "float" in kept.dtype else 3, kept.dtype))
            self.scale.assign(self.scale * 0.9)
        return x * self.scale + 0.01 * ops.cast(self.kept[-1][0] - LARGE, "float32")


def counted() -> Any:
    return net(between=(Counted(),))


class Pops(OwnLoss):
    """Takes the target out of the batch."""

    def batch_loss(self, batch: Any) -> Any:
        y = batch.pop("y")
        return ops.mean(ops.square(self(batch["x"]) - y))

    def batch_metrics(self, batch: Any) -> Any:
        y = batch.pop("y")
        return {"mae": (ops.sum(ops.abs(self(batch["x"]) - y)), float(y.shape[0]))}


def pops() -> Any:
    return built(Pops())


class Named(Rows):
    """The same rows as a dict."""

    def __getitem__(self, index: int) -> Any:
        return dict(zip("xy", super().__getitem__(index), strict=True))


ALIKE = {**keras_kinds.ALIKE, "listed": "pair", "sloped": "pair", "counted": "pair"}


# What is refused.

class Held(Listed):
    """Keeps what is inside of a variable, which no scope replaces."""

    def __init__(self) -> None:
        super().__init__()
        self.penalised = [self.a.kernel.value]


def held() -> Any:
    return built(Held())


class Recomputed(Listed):
    """Its activations are computed again in the backward pass, by a function that no scope's tensors are handed to."""

    def call(self, x: Any) -> Any:
        return self.b(keras.remat(self.a)(x))


def recomputed() -> Any:
    return built(Recomputed())


class Together(OwnLoss):
    """Cannot take any number of rows, each in its own way."""

    def __init__(self, how: str):
        super().__init__()
        self.how = how

    def batch_loss(self, batch: Any) -> Any:
        return ops.mean(ops.square(getattr(self, self.how)(self(batch["x"]) - batch["y"])))

    def pairs(self, off: Any) -> Any:
        return ops.reshape(off, (2, -1))

    def best(self, off: Any) -> Any:
        return tf.math.top_k(off[:, 0], 3).values

    def fixed(self, off: Any) -> Any:
        return ops.reshape(off, (4, 1) if off.shape[0] < 32 else (32, 1))


def together(how: str) -> Any:
    return built(Together(how))
