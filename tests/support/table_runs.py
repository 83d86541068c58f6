"""Logs of clicks on disk, recipes whose embedding tables train on them, and a replay of what rows must be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from elastic.checkpoint.manager import open_tables, read_manifest, split
from elastic.observe.ledger_files import FOLDER, files, pieces
from elastic.recipe import Recipe, parse
from elastic.tables.buckets import buckets_of
from elastic.tables.rows import Rows
from elastic.tables.spec import SWEEPS, TableSpec
from tests.support.inprocess import MODULES, merged

BUCKETS = 16
LIMITS: tuple[dict[str, Any], ...] = ({}, {"admit": 2, "ttl_steps": 4})  # in half of all schedules ids wait to be admitted, and are evicted


def click_log(file: Path, size: int = 480, seed: int = 0) -> Path:
    """Users and lists of goods by Zipf's law; who clicks depends on both."""
    luck = np.random.default_rng(seed)
    users = luck.zipf(1.3, size) % 500
    goods = [(luck.zipf(1.3, luck.integers(0, 5)) % 300).tolist() for _ in range(size)]
    odd = np.array([sum(good % 2 for good in each) > len(each) / 2 for each in goods])
    clicks = ((users % 3 == 0) ^ odd ^ (luck.random(size) < 0.1)).astype(np.int64)
    pq.write_table(pa.table({"click": clicks, "age": luck.standard_normal(size).astype(np.float32),
                             "user": users.astype(np.int64), "goods": pa.array(goods, pa.list_(pa.int64())),
                             "city": [f"city {user % 17}" for user in users]}), file, row_group_size=100)
    return file


def clicks_recipe(log: Path, backend: str, **changes: Mapping[str, Any]) -> Recipe:
    """A DLRM of tables that grow, admit and evict; L = 10, 24 steps."""
    base = {"run": {"steps": 24, "eval_every": 10}, "model": {"kind": "recommender.dlrm"},
            "data": {"format": "parquet", "path": [str(log)], "label": "click", "numeric": ["age"], "batch_size": 20,
                     "eval_fraction": 0.1, "embedding_dim": 8},
            "tables": {"users": {"columns": ["user"]}, "places": {"columns": ["city"], "optimizer": "adagrad"},
                       "goods": {"columns": ["goods"], "optimizer": "adam", "pooling": "mean", "admit": 2,
                                 "ttl_steps": 10}},
            "embedding": {"buckets": BUCKETS}, "backend": {"name": backend},
            "elastic": {"max_workers": 3, "logical_shards": 10, "hang_timeout_s": 5.0},
            "checkpoint": {"every_steps": 8, "full_every": 2}, "optimizer": {"lr": 0.02, "clip_norm": 1.0}}
    return parse(merged(base, changes))


def counting_recipe(log: Path, limits: Mapping[str, Any], **changes: Mapping[str, Any]) -> Recipe:
    """Each update of a row counts its appearances: plain SGD of rate 1 on slopes of -1, from zeros."""
    table = {"optimizer": "sgd", "lr": 16.0, "init": "zeros", "width": 2, **limits}
    base = {"run": {"steps": 24, "eval_every": 0}, "model": {"kind": f"{MODULES}:Appearances"},
            "data": {"format": "parquet", "path": [str(log)], "columns": ["age"], "batch_size": 16,
                     "eval_fraction": 0.0, "ledger": True},
            "tables": {"users": {"columns": ["user"], **table}, "goods": {"columns": ["goods"], **table}},
            "embedding": {"buckets": BUCKETS}, "optimizer": {"name": "sgd", "lr": 16.0, "momentum": 0.0},
            "elastic": {"max_workers": 4, "logical_shards": 8, "hang_timeout_s": 5.0},
            "checkpoint": {"every_steps": 5, "full_every": 3}}
    return parse(merged(base, changes))


def stored(run_dir: Path, step: int) -> dict[str, dict[int, Rows]]:
    """The tables of a checkpoint, by name and bucket."""
    store, name = split(run_dir / "checkpoints" / f"step-{step:08d}")
    reader = open_tables(store, name, read_manifest(store, name))
    return {table: dict(reader.rows(table)) for table in reader.specs()}


def by_id(buckets: Mapping[int, Rows]) -> dict[int, tuple[list[float], int, int]]:
    """(values, count, last) of every stored id."""
    return {id: (values, count, last) for rows in buckets.values()
            for id, values, count, last in zip(rows.ids.tolist(), rows.values.tolist(), rows.counts.tolist(),
                                               rows.lasts.tolist())}


def fed(run_dir: Path) -> dict[int, list[int]]:
    """By step, the samples that the ledger says were fed."""
    found: dict[int, list[int]] = {}
    for file in files(run_dir / FOLDER):
        for batch, _ in pieces(file):
            for step, sample in zip(batch["step"].tolist(), batch["sample"].tolist()):
                found.setdefault(step, []).append(sample)
    return found


def counted(spec: TableSpec, draws: Mapping[int, Iterable[int]]) -> dict[int, tuple[list[float], int, int]]:
    """What `by_id` must give after these draws, step by step: a dictionary, and the rules in words of one line each."""
    count, last, value = Counter[int](), dict[int, int](), dict[int, float]()
    for step in sorted(draws):
        for id, times in Counter(draws[step]).items():
            count[id] += times
            last[id] = step
            if id in value:
                value[id] += times
            elif count[id] >= spec.admit:  # what an id that waits is given is dropped; without a limit none waits
                value[id] = float(times) if not spec.admit else 0.0
        every = max(1, spec.ttl_steps // SWEEPS)
        for id in list(count) if spec.ttl_steps else ():
            bucket = int(buckets_of(spec, np.array([id], np.int64))[0])
            if step - last[id] > spec.ttl_steps and (step + bucket) % every == 0:
                del count[id], last[id]
                value.pop(id, None)
    return {id: ([number] * spec.width, count[id], last[id]) for id, number in value.items()}


def assert_counted(run_dir: Path, log: Path, limits: Mapping[str, Any], steps: int) -> None:
    """Every stored row of a counting run against the ledger."""
    samples, columns = fed(run_dir), pq.read_table(log).to_pydict()
    store, name = split(run_dir / "checkpoints" / f"step-{steps:08d}")
    specs = open_tables(store, name, read_manifest(store, name)).specs()
    for table, rows in stored(run_dir, steps).items():
        draws = {step: [id for at in chosen for id in (columns["goods"][at] if table == "goods"
                                                       else [columns["user"][at]])]
                 for step, chosen in samples.items()}
        assert by_id(rows) == counted(replace(specs[table], **limits), draws)
