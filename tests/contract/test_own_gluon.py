"""What only users' Gluon blocks have: one loss a row, shapes that are deferred, and kernels with weights in an order of their own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from elastic.errors import UserError
from tests.support.frameworks import door
from tests.support.models import rig_of

backend = door("mxnet")

from tests.support.own_gluon import Net, batch, computing, gluon, mx  # noqa: E402  (it needs MXNet)


class PerRow(Net):
    def loss(self, batch: Any) -> Any:
        return gluon.loss.L2Loss()(self(batch[0]), batch[1])

    def metrics(self, batch: Any) -> Any:
        return {}


def test_one_loss_a_row() -> None:
    x, y = batch()["x"], batch()["y"].astype(np.float32)
    with computing(1, False):
        each = gluon.loss.L2Loss()(Net()(mx.nd.array(x)), mx.nd.array(y)).asnumpy()
    rig = rig_of("mxnet", PerRow())
    assert rig.backend.metrics((x, y)) == {"loss": (pytest.approx(float(each.sum()), rel=1e-6), 6.0)}
    assert rig.gradient((x, y))[1].weight == 6.0


class Convolved(Net):
    """Layers whose kernels keep their weights in an order of their own where they predict."""

    def __init__(self) -> None:
        super().__init__()
        with self.name_scope():
            self.image = gluon.nn.Conv2D(32, 3, in_channels=16)
        with computing(1, False):
            self.image.initialize()

    def loss(self, batch: Any) -> Any:
        return self.image(batch["image"]).square().mean() + super().loss(batch)


def test_a_convolution_leaves_its_weights_in_place() -> None:
    given = {**batch(), "image": np.random.default_rng(1).standard_normal((6, 16, 8, 8)).astype(np.float32)}
    rig = rig_of("mxnet", Convolved())
    param, (one, _) = rig.param.copy(), rig.gradient(given)
    first, second = rig.backend.metrics(given), rig.backend.metrics(given)
    assert first == second and np.array_equal(rig.param, param)
    assert np.array_equal(rig.gradient(given)[0], one)


class Lazy(Net):
    def __init__(self) -> None:
        super().__init__()
        self.first = gluon.nn.Dense(4)
        self.first.initialize()


class Growing(Net):
    def loss(self, batch: Any) -> Any:
        self.more = gluon.nn.Dense(1, in_units=4)
        self.more.initialize()
        return super().loss(batch)


class Reshaping(Net):
    def loss(self, batch: Any) -> Any:
        found = super().loss(batch)
        self.first.weight._data = [mx.nd.zeros((5, 4))]
        return found


def wide() -> dict[str, np.ndarray]:
    return {"x": np.ones((6, 5), np.float32), "y": np.ones((6, 4))}


@pytest.mark.parametrize(("make", "words", "feed"), [
    (Lazy, "first.weight of Lazy has no values", batch), (Growing, "makes parameters while it runs", batch),
    (Reshaping, "first.weight another shape", batch), (Net, "Net cannot be called", wide)])
def test_blocks_that_cannot_be_trained_are_named(make: Any, words: str, feed: Any) -> None:
    with pytest.raises(UserError, match=words) as told:
        rig_of("mxnet", make()).gradient(feed())
    assert "\n" not in str(told.value)


def test_a_model_of_another_framework_is_named() -> None:
    with pytest.raises(UserError, match="no Gluon block"):
        backend.adapt(object())
