"""The oracle of own Keras models: Keras by itself, over whole batches or over the same logical shards one after another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tests.support.frameworks import load

STEPS, BATCH, LR = 20, 12, 0.05


class AdamW:
    """Loshchilov and Hutter 2019, algorithm 2, in float64: Keras' own adds epsilon at another place."""

    def build(self, variables: Any) -> None:
        self.moments = [np.zeros((2, *v.shape)) for v in variables]
        self.step = 0

    def apply(self, slopes: Any, variables: Any) -> None:
        self.step += 1
        for moments, slope, variable in zip(self.moments, slopes, variables, strict=True):
            for moment, beta, value in zip(moments, (0.9, 0.95), (slope, np.square(slope, dtype=np.float64)),
                                           strict=True):
                moment *= beta
                moment += (1 - beta) * value
            mean, square = (moment / (1 - beta ** self.step) for moment, beta in zip(moments, (0.9, 0.95), strict=True))
            value = variable.numpy() * (1 - LR * 0.1) - LR * mean / (np.sqrt(square) + 1e-3)
            variable.assign(value.astype(np.float32))
            if variable.constraint is not None:
                variable.assign(variable.constraint(variable))


class Plain:
    """Keras by itself: its own optimizer, over whole batches or over the same logical shards one after another."""

    def __init__(self, factory: Any, columns: Any, rule: str):
        import keras

        self.keras, self.columns = keras, columns
        self.model = load("tensorflow", "backend").framework.construct(factory, {}, 0)
        self.model.optimizer = keras.optimizers.SGD(LR, momentum=0.9) if rule == "sgd" else AdamW()
        self.model.optimizer.build(self.model.trainable_variables)

    def rows(self, low: int, high: int) -> Any:
        return self.keras.tree.map_structure(lambda column: column[low:high], self.columns)

    def fit(self, steps: int = STEPS) -> Plain:
        for step in range(steps):
            low = step * BATCH % len(self.keras.tree.flatten(self.columns)[0])
            self.model.train_on_batch(*self.rows(low, low + BATCH))
        return self

    def shards(self, shards: int, steps: int = STEPS) -> Plain:
        model, size = self.model, BATCH // shards
        kept = [v for v in model.weights if all(v is not t for t in model.trainable_weights)]
        for step in range(steps):
            first = step * BATCH % len(self.keras.tree.flatten(self.columns)[0])
            before = [v.numpy() for v in kept]
            found = [self.shard(self.rows(low, low + size), kept, before) for low in range(first, first + BATCH, size)]
            for i, variable in enumerate(kept):
                variable.assign((before[i].astype(np.float64)
                                 + np.mean([changes[i] for _, changes in found], axis=0)).astype(before[i].dtype))
            slopes = [np.mean([grads[i] for grads, _ in found], axis=0) for i in range(len(model.trainable_weights))]
            model.optimizer.apply(slopes, model.trainable_weights)
        return self

    def shard(self, batch: Any, kept: Any, before: Any) -> Any:
        import tensorflow as tf

        for variable, value in zip(kept, before, strict=True):
            variable.assign(value)
        x, y, weight = (*batch, None)[:3]
        batch = self.keras.tree.map_structure(tf.constant, (x, y))
        with tf.GradientTape() as tape:
            y_pred = self.model(batch[0], training=True) if self.model._call_has_training_arg else self.model(batch[0])
            loss = self.model._compute_loss(batch[0], batch[1], y_pred, weight)
        slopes = tape.gradient(loss, [v.value for v in self.model.trainable_weights])
        return [np.asarray(tf.convert_to_tensor(slope)) for slope in slopes], [
            v.numpy().astype(np.float64) - b.astype(np.float64) for v, b in zip(kept, before, strict=True)]

    def named(self) -> dict[str, Any]:
        found: dict[str, Any] = load("tensorflow", "adapter").named_variables(self.model, self.model.weights)
        return found

    def arrays(self) -> dict[str, np.ndarray]:
        return {name: variable.numpy() for name, variable in self.named().items()}

    def take(self, arrays: Mapping[str, np.ndarray]) -> None:
        """A run's parameters and buffers, in place of its own."""
        for name, variable in self.named().items():
            variable.assign(arrays[f"parameter/{name}" if f"parameter/{name}" in arrays else f"buffer/{name}"])
