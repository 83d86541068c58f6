"""A small file of clicks and a recipe that trains on it."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np

from elastic.recipe import Recipe, parse
from tests.support.inprocess import merged


def clicks(file: Path, size: int = 350) -> Path:
    random = np.random.default_rng(0)
    with open(file, "w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["click", "user", "item", "price"])
        for _ in range(size):
            user, item, price = random.integers(0, 20), random.integers(0, 30), random.normal()
            writer.writerow([int(random.random() < 1 / (1 + np.exp(-(user % 3 - item % 2 + price)))), f"u{user}",
                             f"i{item}", f"{price:.3f}"])
    return file


def clicks_recipe(file: Path, **changes: Any) -> Recipe:
    base = {"run": {"epochs": 1, "eval_every": 5}, "model": {"kind": "recommender.dlrm", "bottom": [8], "top": [8]},
            "data": {"format": "csv", "path": str(file), "label": "click", "categorical": ["user", "item"],
                     "numeric": ["price"],
                     "embedding_dim": 4, "batch_size": 32, "buckets": {"item": 16}, "group": "user", "top": 2},
            "elastic": {"max_workers": 3, "logical_shards": 8, "hang_timeout_s": 5.0}, "checkpoint": {"every_steps": 8},
            "optimizer": {"name": "adam", "lr": 1e-2}}
    return parse(merged(base, changes))
