"""`tests.support.lookups.Lookups` in plain TensorFlow, and users' own Keras models that read what was looked up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tests.support.frameworks import load
from tests.support.lookups import HIDDEN, READ, WIDTH

load("tensorflow", "backend").start(1)

import keras  # noqa: E402  (the backend says first which framework Keras runs on)
import tensorflow as tf  # noqa: E402


def loss_of(params: Mapping[str, Any], rows: Mapping[str, Any], batch: Mapping[str, Any]) -> Any:
    user, history = rows["user"], rows["history"]
    attended = tf.nn.softmax(tf.einsum("rd,rtd->rt", user, history))
    mixed = tf.einsum("rt,rtd->rd", attended, history)
    score = tf.reduce_sum((tf.tanh(mixed @ params["weight"] + params["bias"]) @ params["out"]) * user, 1)
    return tf.reduce_sum(tf.square(score - batch["label"]) * batch["row_weight"])


def plainly(params: Mapping[str, np.ndarray], batch: Mapping[str, Any]) -> tuple[float, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The loss sum, its gradient with respect to the parameters, and that with respect to the rows that are read."""
    weights = {name: tf.Variable(value) for name, value in params.items()}
    rows = {feature: tf.Variable(batch["rows"][feature]) for feature in READ}
    with tf.GradientTape() as tape:
        loss = loss_of(weights, rows, batch)
    found = [{name: np.asarray(tf.convert_to_tensor(slope)) for name, slope in part.items()}
             for part in tape.gradient(loss, [weights, rows])]
    return float(loss), found[0], found[1]


class Net(keras.Model):
    """`takes`: its loss takes the rows out of the batch that it is given."""

    def __init__(self, takes: bool = False):
        super().__init__()
        shapes = {"weight": (WIDTH, HIDDEN), "bias": (HIDDEN,), "out": (HIDDEN, WIDTH)}
        self.arrays = {name: self.add_weight(shape=shape, name=name) for name, shape in shapes.items()}
        self.takes = takes
        self.built = True

    def rows_of(self, batch: Any) -> Any:
        rows = batch.pop("rows") if self.takes else batch["rows"]
        return {feature: rows.pop(feature) if self.takes else rows[feature] for feature in READ}

    def batch_loss(self, batch: Any) -> Any:
        return loss_of(self.arrays, self.rows_of(batch), batch), tf.reduce_sum(batch["row_weight"])

    def batch_metrics(self, batch: Any) -> Any:
        return {"size": (tf.reduce_sum(tf.square(batch["rows"]["user"])), tf.reduce_sum(batch["row_weight"]))}


@tf.custom_gradient
def clipped(x: Any) -> Any:
    return tf.identity(x), lambda slope: tf.clip_by_value(slope, -0.1, 0.1)


class Clipped(Net):
    """Clips the gradient of rows."""

    def rows_of(self, batch: Any) -> Any:
        found = super().rows_of(batch)
        return {**found, "user": clipped(found["user"])}
