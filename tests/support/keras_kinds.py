"""Users' Keras models of many kinds, by which in-process runs train: those that `fit` and the platform train alike, and those to be refused."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import layers, ops

ROWS = 36


class Rows:
    """(x, y), drawn once."""

    draws = False
    kind = "pair"

    def __init__(self, kind: str = "pair"):
        draw = np.random.default_rng(0)
        self.kind = kind
        self.x, self.y = (draw.standard_normal((ROWS, n)).astype(np.float32) for n in (4, 1))
        self.ids = draw.integers(0, 9, (ROWS, 5))
        self.near, self.weight = (self.y > 0).astype(np.float32), draw.uniform(0.5, 2.0, ROWS).astype(np.float32)

    def __len__(self) -> int:
        return ROWS

    def columns(self) -> tuple[Any, ...]:
        return {"pair": (self.x, self.y), "weighted": (self.x, self.y, self.weight), "ids": (self.ids, self.y),
                "near": (self.x, self.near),
                "near weighted": (self.x, self.near, self.weight), "two": (self.x, {"line": self.y, "side": self.near}),
                "x": (self.x,), "steps": (self.ids % 4, np.repeat(self.y[:, :, None], 5, 1)),
                "weighted steps": (self.ids % 4, np.repeat(self.y[:, :, None], 5, 1), self.weight[:, None]
                                   + self.ids)}[self.kind]

    def __getitem__(self, index: int) -> Any:
        return keras.tree.map_structure(lambda column: column[index], self.columns())


def net(loss: Any = "mse", metrics: Any = None, first: Any = None, last: Any = None, between: tuple[Any, ...] = (),
        **compiled: Any) -> Any:
    model = keras.Sequential([keras.Input((4,)), layers.Dense(5, activation="tanh", **(first or {})), *between,
                              layers.Dense(1, **(last or {}))])
    model.compile(loss=loss, metrics=metrics, **compiled)
    return model


def constrained() -> Any:
    return net(first={"kernel_constraint": keras.constraints.NonNeg()},
               last={"kernel_constraint": keras.constraints.MaxNorm(0.5)})


def centred() -> Any:
    """A constraint of the user's own."""
    return net(first={"bias_constraint": lambda bias: bias - ops.mean(bias)}, last={"kernel_constraint": "unit_norm"})


def regularized() -> Any:
    return net(first={"kernel_regularizer": "l2", "bias_regularizer": "l1",
                      "activity_regularizer": keras.regularizers.L2(0.1)})


def normed() -> Any:
    return net(between=(layers.BatchNormalization(momentum=0.8), layers.LayerNormalization()))


def group_normed() -> Any:
    return net(between=(layers.Reshape((5, 1)), layers.GroupNormalization(1, center=False), layers.Flatten()))


def frozen() -> Any:
    model = net(first={"kernel_regularizer": "l2"}, between=(layers.BatchNormalization(),))
    model.layers[0].trainable = model.layers[1].trainable = False
    model.compile(loss="mse")
    return model


def nested() -> Any:
    """One part of another model, of which the kernel alone is frozen."""
    part = keras.Sequential([keras.Input((4,)), layers.Dense(5, activation="tanh")])
    part.layers[0]._kernel.trainable = False
    model = keras.Sequential([keras.Input((4,)), part, layers.Dense(1)])
    model.compile(loss=keras.losses.Huber(reduction="mean"))
    return model


def two_heads() -> Any:
    x = keras.Input((4,))
    body = layers.Dense(5, activation="tanh")(x)
    model = keras.Model(x, {"line": layers.Dense(1, name="line")(body),
                            "side": layers.Dense(1, name="side", activation="sigmoid")(body)})
    model.compile(loss={"line": "mae", "side": "binary_crossentropy"}, loss_weights={"line": 0.3, "side": 2.0},
                  metrics={"line": ["mse"]})
    return model


class OwnLoss(keras.Model):
    """compute_loss of its own, without `training` in its call or its loss; dropout that nobody switches on."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.drop, self.b = layers.Dense(5, activation="tanh"), layers.Dropout(0.5), layers.Dense(1)

    def call(self, x: Any) -> Any:
        return self.b(self.drop(self.a(x)))

    def compute_loss(self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None) -> Any:
        return ops.mean(ops.log(ops.cosh(y - y_pred))) + 0.1 * ops.mean(ops.square(self.a.kernel))


def own_compute_loss() -> Any:
    return built(OwnLoss())


def built(model: Any, **compiled: Any) -> Any:
    model(np.zeros((2, 4), np.float32))
    model.compile(**compiled)
    return model


class Penalty(layers.Layer):
    def __init__(self, reduce: Any):
        super().__init__()
        self.reduce = reduce

    def call(self, x: Any) -> Any:
        self.add_loss(0.1 * self.reduce(ops.square(x)))
        return x


def penalized() -> Any:
    return net(between=(Penalty(ops.mean),))


def recurrent() -> Any:
    model = keras.Sequential([keras.Input((5,), dtype="int64"), layers.Embedding(9, 4), layers.LSTM(3),
                              layers.Dense(1)])
    model.compile(loss="mse")
    return model


class Averaging(layers.Layer):
    """Keeps an average of its inputs, and a count, in weights of its own."""

    def build(self, shape: Any) -> None:
        self.mean = self.add_weight(shape=(shape[-1],), initializer="zeros", trainable=False, name="mean")
        self.calls = self.add_weight(shape=(), initializer="zeros", dtype="int32", trainable=False, name="calls")

    def call(self, x: Any, training: bool = False) -> Any:
        if training:
            self.mean.assign(0.9 * self.mean + 0.1 * ops.mean(x, axis=0))
            self.calls.assign_add(1)
        return x - self.mean


def averaging() -> Any:
    return net(between=(Averaging(),))


class Teacher(keras.Model):
    """Trained towards a moving average of itself, whose weights are frozen and written in the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.line, self.slow = layers.Dense(1), layers.Dense(1, trainable=False)

    def call(self, x: Any, training: bool = False) -> Any:
        out = self.line(x) + 0.5 * self.slow(x)
        if training:
            self.slow.kernel.assign(0.9 * self.slow.kernel + 0.1 * self.line.kernel)
        return out


def teacher() -> Any:
    return built(Teacher(), loss="mse")


def dropped() -> Any:
    """Draws: a hash over workers, and no figures to compare with."""
    return net(between=(layers.Dropout(0.4), layers.GaussianNoise(0.1), layers.BatchNormalization()))


ALIKE = {"constrained": "pair", "centred": "pair", "regularized": "pair", "normed": "pair", "group_normed": "pair",
         "frozen": "pair",
         "nested": "pair", "two_heads": "two", "own_compute_loss": "pair", "penalized": "pair", "recurrent": "ids",
         "averaging": "pair",
         "teacher": "pair", "net": "weighted"}


# Metrics.

def many_metrics() -> Any:
    return net("binary_crossentropy", last={"activation": "sigmoid"},
                metrics=["accuracy", keras.metrics.AUC(name="area"), keras.metrics.RootMeanSquaredError(),
                         keras.metrics.Precision(),
                         keras.metrics.F1Score(threshold=0.5), keras.metrics.R2Score(),
                         keras.metrics.MeanIoU(2, name="overlap")],
                weighted_metrics=["mse", keras.metrics.SensitivityAtSpecificity(0.5)])


class Largest(keras.metrics.Metric):
    """No sum."""

    def __init__(self) -> None:
        super().__init__(name="largest")
        self.most = self.add_weight(shape=(), initializer="zeros", name="most")

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        self.most.assign(ops.maximum(self.most, ops.max(ops.abs(y_true - y_pred))))

    def result(self) -> Any:
        return self.most


# What shards make only by other weights than their rows, or not at all.

def summed() -> Any:
    return net(keras.losses.MeanSquaredError(reduction="sum"), loss_weights=0.1)


def summed_heads() -> Any:
    model = two_heads()
    losses = {"line": keras.losses.MeanAbsoluteError(reduction="sum"),
              "side": keras.losses.BinaryCrossentropy(reduction="sum")}
    model.compile(loss=losses, loss_weights={"line": 0.03, "side": 0.2})
    return model


def mixed_heads() -> Any:
    model = two_heads()
    model.compile(loss={"line": keras.losses.MeanAbsoluteError(reduction="sum"), "side": "binary_crossentropy"},
                  loss_weights=[0.03, 1.0])
    return model


def summed_and_regularized() -> Any:
    return net(keras.losses.MeanSquaredError(reduction="sum"), loss_weights=0.1,
               first={"kernel_regularizer": keras.regularizers.L2(1e-6)})


def weighted_mean() -> Any:
    return net(keras.losses.MeanSquaredError(reduction="mean_with_sample_weight"), first={"kernel_regularizer": "l2"})


def added() -> Any:
    """No loss but what a layer adds."""
    return net(None, between=(Penalty(ops.mean),))


def masked(loss: Any = "mse", between: tuple[Any, ...] = ()) -> Any:
    model = keras.Sequential([keras.Input((5,), dtype="int64"),
                              layers.Embedding(9, 4, mask_zero=True, embeddings_regularizer="l2"),
                              layers.LSTM(3, return_sequences=True), *between, layers.Dense(1)])
    model.compile(loss=loss)
    return model


def masked_weighted() -> Any:
    return masked(keras.losses.MeanSquaredError(reduction="mean_with_sample_weight"))


def masked_sum() -> Any:
    model = keras.Sequential([keras.Input((5,), dtype="int64"), layers.Embedding(9, 4, mask_zero=True),
                              layers.LSTM(3, return_sequences=True),
                              layers.Dense(1)])
    model.compile(loss=keras.losses.MeanSquaredError(reduction="sum"), loss_weights=0.02)
    return model


def masked_and_penalized() -> Any:
    return masked(between=(layers.ActivityRegularization(l2=0.1),))


PUT_TOGETHER = {"summed": "weighted", "summed_heads": "two", "weighted_mean": "weighted", "added": "x",
                "masked": "weighted steps",
                "masked_weighted": "weighted steps", "masked_sum": "steps"}
ONE_SHARD = {"spread": "pair", "summing_penalty": "pair", "mixed_heads": "two", "summed_and_regularized": "pair",
             "masked_and_penalized": "steps"}


def spread() -> Any:
    """A loss over the rows of a batch together."""
    return net(lambda y, p: ops.std(y - p))


def summing_penalty() -> Any:
    return net(between=(Penalty(ops.sum),))


class Stepping(OwnLoss):
    def train_step(self, data: Any) -> Any:
        raise AssertionError("this is how I want to be trained")


def stepping() -> Any:
    return built(Stepping())


class Measuring(OwnLoss):
    test_step = Stepping.train_step


def measuring() -> Any:
    return built(Measuring())


def lossless() -> Any:
    return net(None)


def unreduced() -> Any:
    return net(keras.losses.MeanSquaredError(reduction=None))


def spectral() -> Any:
    """Keras writes the normed weights into the kernel."""
    model = keras.Sequential([keras.Input((4,)), layers.SpectralNormalization(layers.Dense(3)), layers.Dense(1)])
    model.compile(loss="mse")
    return model


def largest() -> Any:
    return net(metrics=[Largest()])


def half() -> Any:
    with_policy = {"dtype": "mixed_float16"}
    return net(first=with_policy)


class Odd(layers.Layer):
    """One of the things that a layer should not do, by name."""

    def __init__(self, what: str):
        super().__init__()
        self.what, self.count, self.seen, self.plain, self.is_armed = what, 0, [], tf.Variable(0.0, name="my_counter"), False

    def call(self, x: Any) -> Any:
        return getattr(self, "do_" + self.what)(x) if self.is_armed else x

    def do_counter(self, x: Any) -> Any:
        self.count += 1
        return x

    def do_listing(self, x: Any) -> Any:
        self.seen.append(0)
        return x

    def do_variable(self, x: Any) -> Any:
        self.plain.assign_add(1.0)
        return x

    def do_generator(self, x: Any) -> Any:
        return x + keras.random.normal(ops.shape(x), seed=GENERATOR)

    def do_stateful(self, x: Any) -> Any:
        return x + STATEFUL.normal((5,))

    def do_clipped(self, x: Any) -> Any:
        return clipped(x)

    def do_broken(self, x: Any) -> Any:
        raise ValueError("so many cats")

    def do_gather(self, x: Any) -> Any:
        return tf.gather(x, tf.cast(tf.reduce_sum(x) * 0.0, tf.int32) + 77, axis=1)[:, None] * x

    def do_thawing(self, x: Any) -> Any:
        self.owner.layers[0].trainable = False
        return x


GENERATOR = keras.random.SeedGenerator(3)
STATEFUL = tf.random.Generator.from_seed(3)


@tf.custom_gradient
def clipped(x: Any) -> Any:
    return x, lambda slope: tf.clip_by_value(slope, -1e-3, 1e-3)


def odd(what: str = "counter") -> Any:
    layer = Odd(what)
    model = net(between=(layer,))
    layer.is_armed = True
    object.__setattr__(layer, "owner", model)  # Keras would take it for a part
    return model
