"""Your own torch module, data set and starting weights, trained elastically. Run it: python examples/own_model.py"""

import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from elastic import Trainer
from elastic.recipe import parse

HERE = Path(__file__).resolve().parent


class Spirals:
    """A map-style data set: a length, and items by index. Three arms of a spiral, to be told apart."""

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


class Net(torch.nn.Module):
    """A module with a `loss`: a mean over the batch (or a sum and a weight). `metrics` is for evaluation, and optional.
    """

    def __init__(self, width: int = 64):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(2, width), torch.nn.BatchNorm1d(width), torch.nn.ReLU(),
                                          torch.nn.Linear(width, 3))

    def loss(self, batch):
        return torch.nn.functional.cross_entropy(self.layers(batch["point"]), batch["label"])

    def metrics(self, batch):
        right = (self.layers(batch["point"]).argmax(1) == batch["label"]).sum()
        return {"loss": (self.loss(batch) * len(batch["label"]), len(batch["label"])),
                "accuracy": (right, len(batch["label"]))}


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))  # workers import this file by its name
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/own_model")
    folder.mkdir(parents=True)
    save_file({"layers.3.weight": torch.zeros(3, 64)}, folder / "start.safetensors")
    result = Trainer(parse({
        "run": {"name": "own", "epochs": 5, "eval_every": 50},
        "model": {"kind": "own_model:Net", "width": 64, "init": str(folder / "start.safetensors")},
        "data": {"kind": "own_model:Spirals", "options": {"size": 3000}, "batch_size": 60},
        "optimizer": {"lr": 1e-2}}), folder / "run").fit(on_eval=lambda line: print("step", line["step"], line["eval"]))
    print(result.status, result.summary["eval"])
