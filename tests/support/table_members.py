"""Members that train embedding tables by hand: a backend of a few lines, a log of draws, no recipe and no controller."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from elastic.chaos import Injector
from elastic.messages import Buckets, Generation, Save
from elastic.model.backend import ShardResult
from elastic.state.state import State
from elastic.tables.bags import Bags
from elastic.tables.buckets import Holders, holders
from elastic.tables.features import Feature, Tables
from elastic.tables.moving import Moving, roles_of
from elastic.tables.spec import RowUpdate, TableSpec
from elastic.worker import training as module
from elastic.worker.loop import begin, train
from elastic.worker.loop_control import Control
from elastic.worker.training import Placement, Plan, Training
from tests.support import numbers
from tests.support.rules import OPTIMIZER

SHARDS, STEPS, BUCKETS = 4, 6, 16
COUNTING = RowUpdate(1.0)  # plain SGD of rate 1 on slopes of -1: each appearance adds 1
FEATURES = (Feature("ad", "ads"), Feature("seen", "ads", "mean"), Feature("user", "users", "none", 3))


def tables_of(optimizer: str = "sgd", init: str = "zeros", update: RowUpdate = COUNTING, twin: bool = True,
              kernels: str = "reference", features: Sequence[Feature] = FEATURES, look_ahead: int = 2,
              **changes: Any) -> Tables:
    names = {"ads": 4, "users": 2}
    specs = tuple(TableSpec(**{"name": name, "width": width, "optimizer": optimizer, "init": init, "seed": 3,
                               "num_buckets": BUCKETS, **changes}) for name, width in names.items())
    return Tables(specs, tuple(features), dict.fromkeys(names, update), twin, kernels=kernels,
                  look_ahead=look_ahead)


def draws(step: int, shard: int, feature: Feature, rows: int = 5, vocabulary: int = 60) -> Bags:
    """What a feature looks up in a shard: a pure function of these."""
    luck = np.random.default_rng([step, shard, *feature.name.encode()])
    lengths = luck.integers(0, 4, rows)
    ids = luck.zipf(1.3, lengths.sum()).astype(np.int64) % vocabulary
    filler = luck.random(rows) < 0.2
    return Bags(ids, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), None, feature.pooling, feature.length,
                filler)


class Log:
    """Batches of draws."""

    def __init__(self, features: Sequence[Feature]):
        self.features = features

    def __call__(self, step: int, shard: int) -> dict[str, Any]:
        return {"step": step, "shard": shard, "bags": {f.name: draws(step, shard, f) for f in self.features}}

    def expect(self, keys: Iterable[tuple[int, int]]) -> None:
        """Nothing is loaded ahead."""

    def close(self) -> None:
        """Nor is there anything to end."""


class Backend(numbers.Backend):
    """loss = minus the sum of all that was looked up; or, `bent`, slopes that depend on it, so that every bit of what
    came before counts."""

    name = "counting"
    bent = False

    def gradients(self, batch: Any, seed: int, into: Any) -> ShardResult:
        rows: Mapping[str, np.ndarray] = batch["rows"]
        into["w"][0] += 1
        slopes = {name: -np.ones_like(values) for name, values in rows.items()}
        if self.bent:
            slopes = {name: np.sin(values * np.float32(3) + np.float32(batch["shard"] + 1))
                      for name, values in rows.items()}
        loss = -sum(float(values.astype(np.float64).sum()) for values in rows.values())
        return ShardResult(loss, 1 / SHARDS, {}, slopes)

    def metrics(self, batch: Any) -> dict[str, tuple[float, float]]:
        return {"loss": (sum(float(v.astype(np.float64).sum()) for v in batch["rows"].values()), 1.0)}


class Member(module.Member):
    """One without a worker, with everything that it posts and saves."""

    def __init__(self, tables: Tables, bent: bool = False, optimizer: Mapping[str, Any] | None = None, **plan: Any):
        self.posted: list[Any] = []
        self.saved: list[int] = []
        backend = Backend()
        backend.bent = bent
        state = State(backend, "sgd")
        state.start(0)
        log = Log(tables.features)
        training = Training(Plan(**{"num_steps": STEPS, "num_shards": SHARDS, "seed": 5, "exact": True,
                                    "optimizer": {**OPTIMIZER, **(optimizer or {})}, **plan}), log,
                            lambda step, shard: np.array([(step - 1) * SHARDS + shard]),
                            [lambda: log(99, 0), lambda: log(99, 1), lambda: log(99, 2)], tables=tables)
        super().__init__(training, Placement(backend, state), Control(), self.posted.append)

    def save(self, order: Save) -> None:
        self.saved.append(order.step)

    def train(self, group: Any, generation: Generation, injector: Injector | None = None) -> str:
        self.control.enter(generation.number)
        self.control.attach(group)
        if self.tables and not self.tables.held:
            assert generation.buckets
            if generation.committed == 0:
                self.tables.begin(*roles_of(group.rank, Moving(generation.buckets, 0).first), 0)
        silent = Injector((), group.rank, lambda spec: None, lambda fault: None, lambda fault, g: g)
        return train(begin(self, generation, group, injector or silent))


def first_buckets(size: int, tables: Tables) -> Buckets:
    return numbered(holders([f"w{r}" for r in range(size)], tables.num_buckets, tables.twin))


def numbered(found: Holders) -> Buckets:
    owners, twins = (tuple(int(name[1:]) if name else -1 for name in names) for names in (found.owners, found.twins))
    return Buckets(owners, twins)


def stored(members: Sequence[Member], table: str) -> dict[int, tuple[bytes, bytes, int, int]]:
    """All rows of a table, by id, each from its owner: values, slots, count and last step."""
    found = {}
    for member in members:
        assert member.tables
        for bucket in member.tables.owned:
            rows = member.tables.stores[table].export(bucket)
            for at, id in enumerate(rows.ids.tolist()):
                assert id not in found
                found[id] = (rows.values[at].tobytes(), rows.slots[at].tobytes(), int(rows.counts[at]),
                             int(rows.lasts[at]))
    return found
