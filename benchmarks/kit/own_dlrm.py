"""Ours on the DLRM of the timings: the engine's own loop over embedding tables, without the controller, in one of a contestant's processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks.kit.dlrm_case import WORKERS, Case, opened, starts
from benchmarks.kit.own_mesh import take_turns
from benchmarks.kit.turns import Turns
from elastic.messages import Buckets
from elastic.tables.buckets import buckets_of, holders
from elastic.tables.moving import Moving, roles_of
from elastic.tables.row_store import RowKernels
from elastic.tables.rows import Rows
from elastic.worker.build import build_training, place_on
from elastic.worker.rehearsal import warm_up
from elastic.worker.training import Member
from elastic.workload import mesh_of


class Undeduplicated:
    """Kernels that ask for every id as often as it stands in a batch."""

    def __init__(self, kernels: RowKernels):
        self._kernels = kernels

    def distinct(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return ids, np.arange(ids.size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernels, name)


def take_part(rank: int, turns: Turns, case: Case, log: str, address: str, transport: str, *, distinct: bool = True,
              kernels: str = "numba", embedding: Mapping[str, Any]) -> None:
    recipe = case.recipe(log, **embedding)
    workload, mesh = opened(recipe), replace(mesh_of(recipe), data=WORKERS)
    training, place = build_training(recipe, workload), place_on(recipe, workload, mesh, mesh.coordinate(rank))
    assert training.tables is not None
    training.tables = replace(training.tables, kernels=kernels)
    warm_up(training, place)
    place.state.start(recipe.run.seed)
    names = [f"worker-{number}" for number in range(WORKERS)]
    held = holders(names, training.tables.num_buckets, training.tables.twin)
    ranks = {name: number for number, name in enumerate(names)} | {"": -1}
    buckets = Buckets(tuple(ranks[name] for name in held.owners), tuple(ranks[name] for name in held.twins))

    def ready(member: Member) -> None:
        tables = member.tables
        assert tables is not None
        tables.begin(*roles_of(rank, Moving(buckets, 0).first), 0)
        here = np.isin(np.arange(tables.tables.num_buckets), tables.held)
        for spec, ids, rows in starts(case, tables.specs):
            mine = here[buckets_of(spec, ids)]
            tables.stores[spec.name].load(rows_of(ids[mine], rows[mine], spec.num_slots))
        if not distinct:
            tables.kernels = Undeduplicated(tables.kernels)

    take_turns(rank, turns, training, place, address, transport, size=WORKERS, ready=ready, buckets=buckets, mesh=(0, 1, 1, 1))


def rows_of(ids: np.ndarray, values: np.ndarray, num_slots: int) -> Rows:
    """Rows that each appeared once, at the start."""
    none = np.empty(0, np.int32)
    return Rows(ids, values, np.zeros((ids.size, num_slots), np.float32), np.ones(ids.size, np.int32), np.zeros(ids.size, np.int32),
                none.astype(np.int64), none, none)
