"""A user's own Gluon block and data set, by which the in-process runs train."""

from __future__ import annotations

from typing import Any

import numpy as np
from mxnet import gluon


class Pairs:
    """Row i is (x, y), drawn from i."""

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        values = np.random.default_rng(index).standard_normal(7).astype(np.float32)
        return values[:6], values[6:]


class Net(gluon.nn.HybridSequential):
    """Batch norm and dropout."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.add(gluon.nn.Dense(width, in_units=6), gluon.nn.BatchNorm(in_channels=width), gluon.nn.Activation("relu"),
                 gluon.nn.Dropout(0.2), gluon.nn.Dense(1, in_units=width))
        self.initialize()
        self.hybridize()

    def loss(self, batch: Any) -> Any:
        return gluon.loss.L2Loss()(self(batch[0]), batch[1])

    def metrics(self, batch: Any) -> Any:
        return {"mae": ((self(batch[0]) - batch[1]).abs().sum(), len(batch[0]))}


class Nests(Pairs):
    """The same rows, nested."""

    def __getitem__(self, index: int) -> Any:
        x, y = super().__getitem__(index)
        return {"in": [x, {"number": index}], "out": (y, np.float16(1))}


class NestedNet(Net):
    """`Net` that reads nested rows."""

    def loss(self, batch: Any) -> Any:
        return super().loss((batch["in"][0], batch["out"][0]))
