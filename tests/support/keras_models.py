"""A user's own Keras model and data set, by which the in-process runs train."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np


class Pairs:
    """Row i is (x, y), drawn from i."""

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        values = np.random.default_rng(index).standard_normal(7).astype(np.float32)
        return values[:6], values[6:]


def net(width: int = 8) -> Any:
    """Batch norm and dropout."""
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(width), keras.layers.BatchNormalization(),
                              keras.layers.ReLU(), keras.layers.Dropout(0.2), keras.layers.Dense(1)])
    model.compile(loss="mse", metrics=["mae"])
    return model


class Nests(Pairs):
    """The same rows, nested."""

    def __getitem__(self, index: int) -> Any:
        x, y = super().__getitem__(index)
        return {"in": [x, {"number": index}], "out": (y, y.astype(np.complex64))}


class Nested(keras.Sequential):
    def batch_loss(self, batch: Any) -> Any:
        x, y = batch["in"][0], batch["out"][0]
        return self.compute_loss(x=x, y=y, y_pred=self(x, training=True))


def nested(width: int = 8) -> Any:
    """`net` that reads nested rows."""
    plain = net(width)
    model = Nested(plain.layers)
    model.build((None, 6))
    model.compile(loss="mse")
    return model
