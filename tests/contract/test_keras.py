"""Users' own Keras models on the TensorFlow backend: Keras' own gradients and statistics, and nothing counted twice."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from elastic.errors import UserError
from elastic.evaluation import measure
from tests.support.frameworks import assert_close, load
from tests.support.models import rig_of

pytest.importorskip("tensorflow", reason="tensorflow is not installed")
backend = load("tensorflow", "backend")
backend.start(1)

import keras  # noqa: E402  (the backend says first which framework Keras runs on)
import tensorflow as tf  # noqa: E402


def net(dropout: float = 0.0, **changes: Any) -> Any:
    model = keras.Sequential([
        keras.Input((4,)), keras.layers.Dense(5, activation="relu", kernel_regularizer=keras.regularizers.L2(0.01)),
        keras.layers.BatchNormalization(), keras.layers.Dropout(dropout), keras.layers.Dense(2, name="last")])
    model.compile(**{"loss": "mse", "metrics": ["mae"]} | changes)
    return model


def made(make: Any = net, seed: int = 1, **keys: Any) -> Any:
    return backend.construct(make, keys, seed)


def batch(rows: int = 6) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(0)
    return rng.standard_normal((rows, 4)).astype(np.float32), rng.standard_normal((rows, 2))


def keras_gradients(model: Any) -> tuple[float, dict[str, np.ndarray]]:
    """The loss and the slopes by Keras' own stateful call, named by hand."""
    x, y = (tf.constant(a, tf.float32) for a in batch())
    with tf.GradientTape() as tape:
        loss = model.compute_loss(x=x, y=y, y_pred=model(x, training=True))
    names = ["dense.kernel", "dense.bias", "batch_normalization.gamma", "batch_normalization.beta", "last.kernel", "last.bias"]
    slopes = tape.gradient(loss, [v.value for v in model.trainable_variables])
    return float(loss), {name: np.asarray(slope) for name, slope in zip(names, slopes, strict=True)}


def test_gradients_are_keras_own() -> None:
    rig = rig_of("tensorflow", made())
    loss, wanted = keras_gradients(made())
    flat, result = rig.gradient(batch())
    assert result.weight == 6.0
    assert result.loss_sum == pytest.approx(6 * loss, rel=1e-6)
    found = rig.by_name(flat)
    assert set(found) == set(wanted)
    for name, slope in wanted.items():
        assert_close(found[name], 6 * slope, 5e-5, name)


def test_statistics_come_back_and_a_redone_step_counts_once() -> None:
    plain, mine = made(), made()
    rig = rig_of("tensorflow", mine)
    before = {name: value.copy() for name, value in rig.state.items()}
    (one, first), (two, again) = rig.gradient(batch()), rig.gradient(batch())
    keras_gradients(plain)
    assert np.array_equal(one, two)
    wanted = {f"batch_normalization.{name}": getattr(plain.layers[1], name).numpy() for name in ("moving_mean", "moving_variance")}
    assert set(first.buffers) == set(wanted)
    for name, value in wanted.items():
        assert_close(first.buffers[name], value, 1e-6, name)
        assert not np.array_equal(first.buffers[name], before[name])
        assert np.array_equal(first.buffers[name], again.buffers[name]) and np.array_equal(rig.state[name], before[name])
    assert not mine.layers[1].moving_mean.numpy().any(), "the user's own model is not written to"


def test_metrics_are_keras_own_in_inference_mode() -> None:
    plain = made()
    rig = rig_of("tensorflow", made())
    wanted = plain.evaluate(*batch(), verbose=0, return_dict=True)
    for _ in range(2):  # a metric's state starts anew each time
        tally = rig.backend.tally()
        total, weight = measure(rig.backend, tally, batch())["loss"]
        found = {"loss": total / weight, **tally.figures(tally.counts, {})}
        assert found == pytest.approx(wanted, rel=1e-5)


def test_names_and_values_do_not_depend_on_what_the_process_built_before() -> None:
    first = rig_of("tensorflow", made())
    made(seed=5)
    second = rig_of("tensorflow", made())
    assert list(first.backend.parameters) == list(second.backend.parameters)
    assert np.array_equal(first.param, second.param)
    assert not np.array_equal(first.param, rig_of("tensorflow", made(seed=5)).param)


def test_dropout_follows_the_seed() -> None:
    rig, twin = (rig_of("tensorflow", made(dropout=0.5)) for _ in range(2))
    one, same, other = rig.gradient(batch(), 1)[0], twin.gradient(batch(), 1)[0], rig.gradient(batch(), 2**64 - 1)[0]
    assert np.array_equal(one, same) and not np.array_equal(one, other)
    assert rig.backend.compilations() == 1


def test_no_rows_count_for_nothing() -> None:
    rig = rig_of("tensorflow", made())
    flat, result = rig.gradient(tuple(a[:0] for a in batch()))
    assert (result.loss_sum, result.weight, flat.any()) == (0.0, 0.0, False)
    assert all(np.array_equal(result.buffers[name], value) for name, value in rig.state.items())


class Own(keras.Model):
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
        return {"near": (tf.reduce_sum(tf.cast(tf.abs(self(batch["x"]) - batch["y"]) < 1, tf.float32)), 2.0 * batch["x"].shape[0])}


def test_a_loss_of_its_own_over_columns() -> None:
    rig = rig_of("tensorflow", made(Own))
    data = dict(zip("xy", batch()))
    flat, result = rig.gradient(data)
    kernel, bias = (rig.layout.views(rig.param)[f"dense.{name}"] for name in ("kernel", "bias"))
    error = data["x"] @ kernel + bias - data["y"]
    assert (result.weight, result.loss_sum) == (12.0, pytest.approx(np.square(error).sum(), rel=1e-5))
    assert_close(rig.by_name(flat)["dense.kernel"], 2 * data["x"].T @ error, 1e-5)
    found = rig.backend.metrics(data)
    assert found["near"] == ((np.abs(error) < 1).sum(), 12.0)


class Growing(Own):
    def call(self, x: Any) -> Any:
        if len(self.weights) < 3:
            self.more = self.add_weight(shape=(2,), name="more")
        return self.line(x) * self.more


class Late(Own):
    """A layer that is first built when it is called."""

    def build(self, shape: Any) -> None:
        self.late = keras.layers.Dense(2)
        super().build(shape)

    def call(self, x: Any) -> Any:
        return self.late(self.line(x))


class Reshaping(Own):
    """Gives a parameter another shape once it is called."""

    def call(self, x: Any) -> Any:
        self.line.kernel.assign(np.zeros((3, 3), np.float32))
        return self.line(x)


class Vector(Own):
    def batch_loss(self, batch: Any) -> Any:
        return self(batch["x"])


@pytest.mark.parametrize(("make", "words"), [
    (lambda: keras.Sequential([keras.layers.Dense(2)]), "is not built"), (lambda: net(loss=None), "has no loss"),
    (lambda: object(), "no Keras model"), (Late, "makes parameters while it runs"),
    (Growing, r"Growing cannot be called \(ValueError: You cannot add new elements of state[^\n]*\)"), (Vector, "shape"),
    (Reshaping, r"^model.kind: Reshaping cannot be called \(ValueError: [^\n]*shape[^\n]*\)"),
    (lambda: net(loss=keras.losses.MeanSquaredError(reduction="sum")), "reduction = 'sum'")])
def test_models_that_cannot_be_trained_are_named(make: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        rig = rig_of("tensorflow", made(make))
        feed = dict(zip("xy", batch())) if isinstance(rig.backend._model._model, Own) else batch()
        rig.backend.metrics(feed)
        rig.gradient(feed)


def test_columns_for_a_compiled_model_are_refused() -> None:
    with pytest.raises(UserError, match="batch_loss"):
        rig_of("tensorflow", made()).gradient(dict(zip("xy", batch())))
