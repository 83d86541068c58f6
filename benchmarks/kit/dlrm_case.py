"""A DLRM over embedding tables: its model, its log, and the rows that all who train it start from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import nn

from elastic.data.loader import Batch, load_batch
from elastic.recipe import Recipe, parse
from elastic.tables.spec import TableSpec
from elastic.tables.starts import key_of, starting_rows
from elastic.workload import Workload, prepare

DENSE, HIDDEN = 13, 64
LR, ROWS_LR, EPS = 0.1, 0.05, 1e-8
WORKERS = 2
MOST_STEPS = 100_000  # more than any contest takes
PIECE = 1 << 17  # rows that are made at a time


@dataclass(frozen=True)
class Case:
    """`rows` in all tables together, of which each column has one; a batch is of all workers."""

    rows: int = 10_000_000
    tables: int = 8
    width: int = 32
    batch: int = 4096
    skew: float = 1.05
    batches: int = 48  # different ones; then they come again

    @property
    def names(self) -> list[str]:
        return [f"c{number}" for number in range(self.tables)]

    @property
    def vocabulary(self) -> int:
        return self.rows // self.tables

    def write(self, file: Path) -> None:
        """Ids by Zipf's law, scattered over each table."""
        luck, size = np.random.default_rng(0), self.batch * self.batches
        shares = np.cumsum(np.arange(1, self.vocabulary + 1, dtype=np.float64) ** -self.skew)
        columns: dict[str, Any] = {}
        for name in self.names:
            ranks = np.searchsorted(shares, luck.random(size) * shares[-1]).clip(max=self.vocabulary - 1)
            columns[name] = luck.permutation(self.vocabulary)[ranks]
        numbers = luck.standard_normal((size, DENSE)).astype(np.float32)
        columns["x"] = pa.FixedSizeListArray.from_arrays(pa.array(numbers.reshape(-1)), DENSE)
        columns["y"] = ((numbers[:, 0] + sum((columns[name] % 2) - 0.5 for name in self.names)) > 0).astype(np.float32)
        pq.write_table(pa.table(columns), file, row_group_size=self.batch)

    def recipe(self, log: str, **embedding: Any) -> Recipe:
        """One logical shard a worker."""
        return parse({
            "run": {"steps": MOST_STEPS, "seed": 0, "eval_every": 0},
            "model": {"kind": "benchmarks.kit.dlrm_case:Net", "tables": self.tables, "width": self.width}, "backend": {"device": "cpu"},
            "data": {"format": "parquet", "path": log, "columns": ["x", "y"], "batch_size": self.batch, "shuffle": False,
                     "eval_fraction": 0.0},
            "tables": {name: {"columns": [name], "width": self.width, "optimizer": "adagrad", "lr": ROWS_LR} for name in self.names},
            "embedding": {"twin": False, **embedding}, "elastic": {"max_workers": WORKERS, "logical_shards": WORKERS},
            "optimizer": {"name": "sgd", "lr": LR, "momentum": 0.0, "eps": EPS}, "checkpoint": {"every_steps": 0}})


class Net(nn.Module):
    """Vectors and a bottom layer's, the products of each two of them, and two layers on top. The same start every time."""

    def __init__(self, tables: int = 8, width: int = 32):
        super().__init__()
        self.names = [f"c{number}" for number in range(tables)]
        self.bottom = nn.Sequential(nn.Linear(DENSE, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, width))
        pairs = (tables + 1) * tables // 2
        self.top = nn.Sequential(nn.Linear(width + pairs, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1))
        self.left, self.right = torch.triu_indices(tables + 1, tables + 1, 1)
        luck = torch.Generator().manual_seed(1)
        for parameter in self.parameters():
            nn.init.normal_(parameter, 0.0, 1 / max(1, parameter.shape[-1]) ** 0.5, luck)

    def forward(self, numbers: torch.Tensor, rows: Sequence[torch.Tensor]) -> torch.Tensor:
        bottom = self.bottom(numbers)
        vectors = torch.stack([bottom, *rows], 1)
        products = torch.bmm(vectors, vectors.transpose(1, 2))[:, self.left, self.right]
        return self.top(torch.cat([bottom, products], 1))[:, 0]

    def loss(self, batch: Any) -> torch.Tensor:
        return loss_of(self(batch["x"], [batch["rows"][name] for name in self.names]), batch["y"])


def loss_of(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return nn.functional.binary_cross_entropy_with_logits(scores, labels.reshape(-1))


def opened(recipe: Recipe) -> Workload:
    return Workload.open(recipe, prepare(recipe))


def batches(case: Case, workload: Workload, shard: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """What the platform feeds a shard, step by step: numbers, labels, and (tables, rows) ids."""
    found = []
    for step in range(1, case.batches + 1):
        batch: Batch = load_batch(workload.training, workload.sampler, step, shard)
        ids = np.stack([batch["bags"][name].ids for name in case.names])
        numbers, labels = (torch.from_numpy(np.array(batch[name])) for name in ("x", "y"))
        found.append((numbers, labels, torch.from_numpy(ids)))
    return found


def starts(case: Case, specs: Sequence[TableSpec]) -> Iterator[tuple[TableSpec, np.ndarray, np.ndarray]]:
    """(table, ids, their rows), a piece at a time: all that there are."""
    for spec in specs:
        for low in range(0, case.vocabulary, PIECE):
            ids = np.arange(low, min(low + PIECE, case.vocabulary), dtype=np.int64)
            yield spec, ids, starting_rows(key_of(spec.seed, spec.name), spec.init, ids, spec.width)


def fill(weights: Mapping[str, torch.Tensor], case: Case, specs: Sequence[TableSpec]) -> None:
    """Whole tables, by name, in place."""
    with torch.no_grad():
        for spec, ids, rows in starts(case, specs):
            if spec.name in weights:
                weights[spec.name][int(ids[0]):int(ids[-1]) + 1] = torch.from_numpy(rows)
