"""Your own torch module over embedding tables that grow with the data. Run it: python examples/own_tables_torch.py"""

import sys
from pathlib import Path

import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from elastic import Trainer
from elastic.recipe import parse


class Net(torch.nn.Module):
    """What was looked up is in batch["rows"], by column: (rows, width), pooled where the column holds lists. It has a
    gradient like any input; the rows themselves are the platform's, on whichever worker has them."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(3 * width + 1, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))

    def forward(self, batch):
        user, item, history = (batch["rows"][name] for name in ("user", "item", "history"))
        return self.layers(torch.cat([user * item, item * history, item, batch["price"][:, None]], 1))[:, 0]

    def loss(self, batch):
        return binary_cross_entropy_with_logits(self(batch), batch["click"].float())

    def metrics(self, batch):
        rows = len(batch["click"])
        right = ((self(batch) > 0) == batch["click"].bool()).sum()
        return {"loss": (self.loss(batch) * rows, rows), "accuracy": (right, rows)}


RECIPE = {
    "run": {"name": "own_tables", "epochs": 1, "eval_every": 50},
    "model": {"kind": "own_tables_torch:Net", "width": 16},
    "data": {"format": "parquet", "path": "made:recommender.click_log?rows=200000&users=20000&items=5000",
             "columns": ["click", "price"], "batch_size": 1024},
    "tables": {"users": {"columns": ["user"], "width": 16, "lr": 0.2},
               "items": {"columns": ["item", "history"], "width": 16, "lr": 0.2, "pooling": "mean"}},
    "optimizer": {"lr": 3e-3}}

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))  # workers import this file by its name
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/own_tables_torch")
    result = Trainer(parse(RECIPE), folder).fit(on_eval=lambda line: print("step", line["step"], line["eval"]))
    print(result.status, result.summary["eval"])
