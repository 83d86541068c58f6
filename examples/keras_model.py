"""Your own Keras model and data set, trained elastically. Run it: python examples/keras_model.py"""

import sys
from pathlib import Path

import keras
import numpy as np

from elastic import Trainer
from elastic.recipe import parse

HERE = Path(__file__).resolve().parent


class Spirals:
    """A map-style data set of (x, y): three arms of a spiral, to be told apart."""

    def __init__(self, size: int = 3000):
        draw = np.random.default_rng(0)
        self.label = draw.integers(0, 3, size)
        radius = draw.random(size)
        angle = 4 * radius + self.label * 2 * np.pi / 3 + draw.normal(0, 0.1, size)
        self.point = np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).astype(np.float32)

    def __len__(self):
        return len(self.label)

    def __getitem__(self, index):
        return self.point[index], self.label[index]


def net(width: int = 64):
    """A built model, compiled with its loss and its metrics. The optimizer is the recipe's."""
    model = keras.Sequential([
        keras.Input((2,)), keras.layers.Dense(width), keras.layers.BatchNormalization(momentum=0.9),
        keras.layers.ReLU(), keras.layers.Dense(3)])
    model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    return model


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))  # workers import this file by its name
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/keras_model")
    result = Trainer(parse({
        "run": {"name": "keras", "epochs": 8, "eval_every": 50},
        "model": {"kind": "keras_model:net", "width": 64},
        "backend": {"name": "tensorflow"},
        "data": {"kind": "keras_model:Spirals", "options": {"size": 3000}, "batch_size": 100},
        "optimizer": {"lr": 1e-2}}), folder).fit(on_eval=lambda line: print("step", line["step"], line["eval"]))
    print(result.status, result.summary["eval"])
