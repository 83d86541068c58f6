"""What only users' Keras models have: metrics of compile(), layers that are built late, and one program for all seeds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from elastic.errors import UserError
from tests.support.frameworks import door
from tests.support.models import Rig, rig_of

backend = door("tensorflow")

from tests.support.own_keras import Net, Sums, batch, keras, statistics, sums_batch  # noqa: E402  (it needs TensorFlow)


def rig(make: Callable[..., Any] = Net, seed: int = 1, **keys: Any) -> Rig:
    return rig_of("tensorflow", backend.construct(make, keys, seed))


def test_the_model_itself_is_not_written_to() -> None:
    model = Net()
    rig_of("tensorflow", model).gradient(batch())
    assert not statistics(model)["batch_normalization.moving_mean"].any()


def test_another_seed_starts_with_other_values_and_runs_the_same_program() -> None:
    mine = rig(dropout=0.5)
    assert not np.array_equal(mine.param, rig(seed=5, dropout=0.5).param)
    for seed in (1, 2, 2**64 - 1):
        mine.gradient(batch(), seed)
    assert mine.backend.compilations() == 1


def test_metrics_of_its_own_over_columns() -> None:
    mine, (x, y) = rig(Sums), batch()
    kernel, bias = (mine.layout.views(mine.param)[f"dense.{name}"] for name in ("kernel", "bias"))
    assert mine.backend.metrics(sums_batch())["near"] == ((np.abs(x @ kernel + bias - y) < 1).sum(), 12.0)


class Growing(Sums):
    def call(self, x: Any) -> Any:
        if len(self.weights) < 3:
            self.more = self.add_weight(shape=(2,), name="more")
        return self.line(x) * self.more


class Late(Sums):
    """A layer that is first built when it is called."""

    def build(self, shape: Any) -> None:
        self.late = keras.layers.Dense(2)
        super().build(shape)

    def call(self, x: Any) -> Any:
        return self.late(self.line(x))


class Reshaping(Sums):
    """Gives a parameter another shape once it is called."""

    def call(self, x: Any) -> Any:
        self.line.kernel.assign(np.zeros((3, 3), np.float32))
        return self.line(x)


@pytest.mark.parametrize(("make", "words", "feed"), [
    (lambda: keras.Sequential([keras.layers.Dense(2)]), "is not built", batch),
    (lambda: object(), "no Keras model", batch),
    (lambda: Net(loss=keras.losses.MeanSquaredError(reduction=None)), "reduction = None", batch),
    (Late, "makes parameters while it runs", sums_batch),
    (Growing, r"Growing cannot be called \(ValueError: You cannot add new elements of state[^\n]*\)", sums_batch),
    (Reshaping, r"^model.kind: Reshaping cannot be called \(ValueError: [^\n]*shape[^\n]*\)", sums_batch),
    (Net, "batch_loss", sums_batch)])
def test_models_that_cannot_be_trained_are_named(make: Any, words: str, feed: Any) -> None:
    with pytest.raises(UserError, match=words):
        rig(make).backend.metrics(feed())
    with pytest.raises(UserError, match=words):
        mine = rig(make)
        mine.gradient(feed())
        mine.backend.metrics(feed())
