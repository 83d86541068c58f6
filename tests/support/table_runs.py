"""Whole runs in one process whose tables are made by hand: controller, workers, checkpoints are real, the data door is not."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from elastic.data.dataset import Dataset
from elastic.data.sampler import Sampler
from elastic.recipe import Recipe, parse
from elastic.tables.bags import Bags
from elastic.tables.features import Tables
from elastic.workload import Workload
from tests.support.inprocess import merged
from tests.support.table_members import FEATURES, Backend

ROWS, STEPS, SHARDS = 96, 16, 8


class Draws(Dataset):
    """Samples that each look up a few ids in every feature."""

    num_samples = ROWS

    def __init__(self, features: Any = FEATURES):
        self.features = features

    def ids(self, feature: str, index: int) -> list[int]:
        luck = np.random.default_rng([index, *feature.encode()])
        return [int(id) % 200 for id in luck.zipf(1.3, luck.integers(0, 4))]

    def batch(self, indices: np.ndarray, epochs: np.ndarray) -> dict[str, Any]:
        bags = {}
        for feature in self.features:
            lists = [self.ids(feature.name, int(index)) for index in indices]
            offsets = np.cumsum([0, *map(len, lists)]).astype(np.int64)
            bags[feature.name] = Bags(np.array(sum(lists, []), np.int64), offsets, None, feature.pooling,
                                      feature.length, np.zeros(len(lists), bool))
        return {"shard": int(indices[0]), "bags": bags}


class Deciding(Backend):
    """Each of the batch's rows weighs the same, and all of a step's come to 1."""

    def gradients(self, batch: Any, seed: int, into: Any) -> Any:
        return super().gradients(batch, seed, into)


def table_recipe(steps: int = STEPS, **changes: Any) -> Recipe:
    base = {"run": {"steps": steps, "eval_every": 5}, "model": {"kind": "recommender.dlrm"},
            "data": {"format": "parquet", "path": ["none"], "label": "y", "numeric": ["x"], "batch_size": 16},
            "backend": {"name": "reference"},
            "elastic": {"max_workers": 3, "logical_shards": SHARDS, "hang_timeout_s": 5.0},
            "checkpoint": {"every_steps": 6}, "optimizer": {"name": "sgd", "lr": 1.0, "momentum": 0.0}}
    from elastic.recipe.load import parse as _parse
    return _parse(merged(base, changes), locate=False)


def patch(monkeypatch: pytest.MonkeyPatch, tables: Tables, bent: bool = False) -> None:
    """From now on every run of a recipe trains these tables."""
    def opened(recipe: Recipe, info: Any) -> Workload:
        data = Draws(tables.features)
        sampler = Sampler(ROWS, recipe.data.batch_size, recipe.elastic.logical_shards, recipe.run.seed, True, None,
                          recipe.run.steps, None)
        return Workload(None, data, None, sampler, "", tables=tables)

    def backend(recipe: Recipe, model: Any) -> Any:
        found = Backend()
        found.bent = bent
        return found

    monkeypatch.setattr("elastic.workload.Workload.open", opened)
    monkeypatch.setattr("elastic.workload.prepare", lambda recipe: {})
    monkeypatch.setattr("elastic.worker.build.create_backend", backend)
    monkeypatch.setattr("elastic.worker.worker.warm_up", lambda training, place: None)
