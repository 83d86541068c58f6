"""Your own Gluon block and data set, trained elastically. Run it: python examples/gluon_block.py"""

import sys
from pathlib import Path

import numpy as np

if "bool" not in vars(np):
    np.bool = np.bool_  # MXNet 1.9.1 still uses this name
from mxnet import gluon

from elastic import Trainer
from elastic.recipe import parse


class Spirals:
    """A map-style data set: three arms of a spiral, to be told apart."""

    def __init__(self, size: int = 3000):
        draw = np.random.default_rng(0)
        self.label = draw.integers(0, 3, size)
        radius = draw.random(size)
        angle = 4 * radius + self.label * 2 * np.pi / 3 + draw.normal(0, 0.1, size)
        self.point = np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).astype(np.float32)

    def __len__(self):
        return len(self.label)

    def __getitem__(self, index):
        return {"point": self.point[index], "label": self.label[index]}


class Net(gluon.nn.HybridSequential):
    """A block with a `loss`: a mean, one value a row, or a sum and a weight. `metrics` is for evaluation, and optional.
    """

    def __init__(self, width: int = 64):
        super().__init__()
        self.add(gluon.nn.Dense(width, in_units=2), gluon.nn.BatchNorm(in_channels=width), gluon.nn.Activation("relu"),
                 gluon.nn.Dense(3, in_units=width))
        self.initialize()
        self.hybridize()

    def loss(self, batch):
        return gluon.loss.SoftmaxCrossEntropyLoss()(self(batch["point"]), batch["label"])

    def metrics(self, batch):
        right = self(batch["point"]).argmax(1).astype("int64") == batch["label"]
        return {"accuracy": (right.sum(), len(batch["label"]))}


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))  # workers import this file by its name
    result = Trainer(parse({
        "run": {"name": "gluon", "epochs": 8, "eval_every": 50}, "model": {"kind": "gluon_block:Net", "width": 64},
        "backend": {"name": "mxnet"}, "data": {"kind": "gluon_block:Spirals", "options": {"size": 3000},
                                               "batch_size": 100},
        "optimizer": {"lr": 1e-2}}), Path(sys.argv[1] if len(sys.argv) > 1 else "runs/gluon_block")).fit(
            on_eval=lambda line: print("step", line["step"], line["eval"]))
    print(result.status, result.summary["eval"])
