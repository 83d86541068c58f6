"""Your own Gluon block over embedding tables that grow with the data. Run it: python examples/own_tables_gluon.py"""

import sys
from pathlib import Path

import numpy as np

if "bool" not in vars(np):
    np.bool = np.bool_  # MXNet 1.9.1 still uses this name
from mxnet import gluon, nd

from elastic import Trainer
from elastic.recipe import parse


class Net(gluon.nn.Block):
    """What was looked up is in batch["rows"], by column: (rows, width), pooled where the column holds lists. It has a
    gradient like any input; the rows themselves are the platform's, on whichever worker has them."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.layers = gluon.nn.HybridSequential()
        self.layers.add(gluon.nn.Dense(32, activation="relu", in_units=3 * width + 1), gluon.nn.Dense(1, in_units=32))
        self.layers.initialize()
        self.layers.hybridize()

    def forward(self, batch):
        user, item, history = (batch["rows"][name] for name in ("user", "item", "history"))
        return self.layers(nd.concat(user * item, item * history, item, batch["price"].expand_dims(1), dim=1))[:, 0]

    def loss(self, batch):
        return gluon.loss.SigmoidBinaryCrossEntropyLoss()(self(batch), batch["click"].astype("float32"))

    def metrics(self, batch):
        right = (self(batch) > 0) == batch["click"].astype("float32")
        return {"accuracy": (right.sum(), len(batch["click"]))}


RECIPE = {
    "run": {"name": "own_tables", "epochs": 1, "eval_every": 50},
    "model": {"kind": "own_tables_gluon:Net", "width": 16},
    "backend": {"name": "mxnet"},
    "data": {"format": "parquet", "path": "made:recommender.click_log?rows=200000&users=20000&items=5000",
             "columns": ["click", "price"], "batch_size": 1024},
    "tables": {"users": {"columns": ["user"], "width": 16, "lr": 0.2},
               "items": {"columns": ["item", "history"], "width": 16, "lr": 0.2, "pooling": "mean"}},
    "optimizer": {"lr": 3e-3}}

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))  # workers import this file by its name
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/own_tables_gluon")
    result = Trainer(parse(RECIPE), folder).fit(on_eval=lambda line: print("step", line["step"], line["eval"]))
    print(result.status, result.summary["eval"])
