"""Your own Keras model over embedding tables that grow with the data. Run it: python examples/own_tables_keras.py"""

import sys
from pathlib import Path

import keras

from elastic import Trainer
from elastic.recipe import parse


class Net(keras.Model):
    """What was looked up is in batch["rows"], by column: (rows, width), pooled where the column holds lists. It has a
    gradient like any input; the rows themselves are the platform's, on whichever worker has them."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.hidden, self.out = keras.layers.Dense(32, activation="relu"), keras.layers.Dense(1)
        self.build((None, 3 * width + 1))

    def build(self, shape):
        self.hidden.build(shape)
        self.out.build((None, 32))
        self.built = True

    def call(self, batch):
        user, item, history = (batch["rows"][name] for name in ("user", "item", "history"))
        price = keras.ops.expand_dims(batch["price"], 1)
        return self.out(self.hidden(keras.ops.concatenate([user * item, item * history, item, price], 1)))[:, 0]

    def batch_loss(self, batch):
        click = keras.ops.cast(batch["click"], "float32")
        return keras.ops.mean(keras.ops.binary_crossentropy(click, self(batch), from_logits=True))

    def batch_metrics(self, batch):
        right = keras.ops.equal(self(batch) > 0, keras.ops.cast(batch["click"], "bool"))
        rows = keras.ops.shape(batch["click"])[0]
        return {"accuracy": (keras.ops.sum(keras.ops.cast(right, "float32")), rows)}


RECIPE = {
    "run": {"name": "own_tables", "epochs": 1, "eval_every": 50},
    "model": {"kind": "own_tables_keras:Net", "width": 16},
    "backend": {"name": "tensorflow"},
    "data": {"format": "parquet", "path": "made:recommender.click_log?rows=200000&users=20000&items=5000",
             "columns": ["click", "price"], "batch_size": 1024},
    "tables": {"users": {"columns": ["user"], "width": 16, "lr": 0.2},
               "items": {"columns": ["item", "history"], "width": 16, "lr": 0.2, "pooling": "mean"}},
    "optimizer": {"lr": 3e-3}}

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))  # workers import this file by its name
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/own_tables_keras")
    result = Trainer(parse(RECIPE), folder).fit(on_eval=lambda line: print("step", line["step"], line["eval"]))
    print(result.status, result.summary["eval"])
