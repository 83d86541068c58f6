"""Your own Keras model over embedding tables whose rows lie on the workers. Run it: python examples/own_tables_keras.py"""

import sys
from pathlib import Path

import keras
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tensorflow as tf

from elastic import Trainer
from elastic.recipe import parse

HERE = Path(__file__).resolve().parent


def write_ratings(path: Path, size: int = 40_000, users: int = 400, items: int = 150):
    """Who likes what, by ids of any size: people and things have places in a plane, and like what lies their way."""
    draw = np.random.default_rng(0)
    names, places = draw.integers(0, 2**40, users + items), draw.normal(size=(users + items, 2))
    user, item = draw.integers(0, users, size), users + draw.integers(0, items, size)
    score = (places[user] * places[item]).sum(1) + draw.normal(0, 0.1, size)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"user": names[user], "item": names[item], "likes": (score > 0).astype(np.float32)}), path)


class Net(keras.Model):
    """`batch["rows"]` has what each column looks up, (rows, width) under its name; gradients go through it to the
    tables. A model over tables has its loss in `batch_loss`; `batch_metrics` is for evaluation, and optional."""

    def __init__(self, width: int = 8, hidden: int = 32):
        super().__init__()
        self.stack = keras.Sequential([keras.layers.Dense(hidden, activation="relu"), keras.layers.Dense(1)])
        self({"user": tf.zeros((1, width)), "item": tf.zeros((1, width))})  # so that all its weights are there

    def call(self, rows):
        user, item = rows["user"], rows["item"]
        return self.stack(tf.concat([user, item, user * item], 1))[:, 0]

    def batch_loss(self, batch):
        return keras.losses.binary_crossentropy(batch["likes"], self(batch["rows"]), from_logits=True)

    def batch_metrics(self, batch):
        right = (self(batch["rows"]) > 0) == (batch["likes"] > 0.5)
        return {"accuracy": (tf.reduce_sum(tf.cast(right, tf.float32)), batch["likes"].shape[0])}


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))  # workers import this file by its name
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/own_tables_keras")
    write_ratings(folder / "ratings.parquet")
    result = Trainer(parse({
        "run": {"name": "own_tables", "epochs": 4, "eval_every": 100},
        "model": {"kind": "own_tables_keras:Net", "width": 8},
        "backend": {"name": "tensorflow"},
        "data": {"format": "parquet", "path": [str(folder / "ratings.parquet")], "eval_fraction": 0.1,
                 "batch_size": 200},
        "tables": {"users": {"columns": ["user"], "width": 8, "lr": 0.1},
                   "items": {"columns": ["item"], "width": 8, "lr": 0.1}},
        "optimizer": {"lr": 1e-2}}), folder / "run").fit(on_eval=lambda line: print("step", line["step"], line["eval"]))
    print(result.status, result.summary["eval"])
