"""Members that hold embedding tables and train them without a model, a loop or a group; and their checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np

from elastic.checkpoint.manager import open_tables, read_manifest, split
from elastic.checkpoint.manifest import Manifest, folder_of
from elastic.checkpoint.state_hash import TableDigests, gathered, owned_digests
from elastic.collective.solo import SoloGroup
from elastic.controller.checkpoints import Checkpoints, Outcome
from elastic.errors import GroupBroken
from elastic.messages import Part, Save
from elastic.storage.remote import join
from elastic.tables.bags import Summed
from elastic.tables.buckets import Holders, buckets_of, holders
from elastic.tables.features import Tables
from elastic.tables.held import HeldTables
from elastic.tables.rows import Rows
from elastic.tables.spec import RowUpdate, TableSpec
from elastic.worker.saver import Saver
from tests.support.checkpoints import CHUNK, Arrays, blank, values
from tests.support.threads import together

SPECS = (TableSpec("ads", 5, "adam", num_buckets=16, admit=3, max_rows=320, ttl_steps=30, seed=3),
         TableSpec("users", 3, "rowwise_adagrad", num_buckets=16, vocabulary=300, seed=3, max_rows=160))
UPDATE = RowUpdate(0.1)


def tables(kernels: str, specs: Sequence[TableSpec] = SPECS, twin: bool = False) -> Tables:
    return Tables(tuple(specs), (), {spec.name: UPDATE for spec in specs}, twin, 0, kernels)


class Crew:
    """`size` members of one run, whose tables at step k depend on nothing but k."""

    def __init__(self, kernels: str, size: int, twin: bool = False, specs: Sequence[TableSpec] = SPECS):
        self.tables = tables(kernels, specs, twin)
        self.step, self.members = 0, list[HeldTables]()
        self.holders: Holders | None = None
        self.form(size)

    def form(self, size: int) -> None:
        """Another number of members: who stays keeps what it has, and what is new to a member comes from its owner."""
        names = [f"w{n}" for n in range(size)]
        self.holders = holders(names, self.tables.num_buckets, self.tables.twin, self.holders)
        before, rows = [set(held.held) for held in self.members], self.rows()
        self.members = [*self.members[:size], *(HeldTables(self.tables) for _ in range(size - len(self.members)))]
        for number, (name, held) in enumerate(zip(names, self.members)):
            owned, all_of_it = self.holders.owned(name), self.holders.held(name)
            held.take(all_of_it)
            for (table, bucket), found in rows.items():
                if bucket in all_of_it and (number >= len(before) or bucket not in before[number]):
                    held.stores[table].load(found)
            held.owned, held.twins = tuple(owned), tuple(sorted({*all_of_it} - {*owned}))
            held.committed = self.step
            held.keep(held.owned, held.twins)

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.step += 1
            for spec in self.tables.specs:
                sums = draw(spec, self.step)
                for held in self.members:
                    commit(held, spec, self.step, sums)
            for held in self.members:
                held.committed = self.step

    def digests(self) -> list[TableDigests]:
        return gathered(self.tables.specs, sum(owned_digests(held) for held in self.members))  # type: ignore[arg-type]

    def rows(self) -> dict[tuple[str, int], Rows]:
        return {(spec.name, bucket): held.stores[spec.name].export(bucket) for held in self.members
                for spec in self.tables.specs for bucket in held.owned}


def draw(spec: TableSpec, step: int) -> Summed:
    luck = np.random.default_rng([step, spec.width])
    most = spec.vocabulary or 100 * step + 1
    ids = np.unique(np.minimum(luck.zipf(1.3, 60), most).astype(np.int64) - 1)
    fresh = luck.integers(0, most, 20)
    ids = np.unique(np.concatenate([ids, fresh]))
    return Summed(ids, luck.standard_normal((ids.size, spec.width)).astype(np.float32),
                  luck.integers(1, 3, ids.size).astype(np.int32))


def commit(held: HeldTables, spec: TableSpec, step: int, sums: Summed) -> None:
    mine = np.isin(buckets_of(spec, sums.ids), held.held)
    store = held.stores[spec.name]
    prepared = store.prepare(step, Summed(sums.ids[mine], sums.sums[mine], sums.counts[mine]))
    store.commit(UPDATE)
    held.removed.note(step, spec.name, prepared.evicted)


def saver(location: str, held: HeldTables | None, full_every: int = 4, worker: str = "w0", post: Any = None) -> Saver:
    head = Manifest(0, 0, 0, 7, "recipe", chunk_bytes=CHUNK, extra={"run": "a-run"})
    return Saver(worker, location, head, 12, post or (lambda part: None), tables=held, full_every=full_every)


class Saving:
    """The savers of a crew, and their controller."""

    def __init__(self, location: str, crew: Crew, full_every: int = 4, keep: int = 100):
        self.location, self.crew, self.full_every = location, crew, full_every
        self.checkpoints = Checkpoints(location, keep, "")
        self.parts: list[Part] = []
        self.savers: list[Saver] = []
        self.form()

    def form(self) -> None:
        """Who stays goes on."""
        size, full_every = len(self.crew.members), self.full_every
        self.savers = [*self.savers[:size], *(saver(self.location, self.crew.members[n], full_every, f"w{n}",
                                                    self.parts.append) for n in range(len(self.savers), size))]

    def restore(self, step: int) -> None:
        """All go back to a checkpoint."""
        for one in self.savers:
            ended = one.restore(join(self.location, folder_of(step)), blank(values(0)), SoloGroup(),  # type: ignore[arg-type]
                                lambda window: nullcontext())
            assert ended[0].step == step
        self.crew.step = step

    def save(self, generation: int = 1, wait: bool = False, faults: Sequence[str] = ()) -> Outcome | None:
        """A checkpoint of where the crew is; what the controller says of it."""
        step, size, found = self.crew.step, len(self.savers), None
        state: Any = Arrays(values(step), step)
        for rank, one in enumerate(self.savers):
            one.save(state, Save(generation, step, rank, size, wait, faults[rank] if faults else ""), {})
        for one in self.savers:
            one.join()
        while self.parts:
            found = self.checkpoints.take(self.parts.pop(0), step) or found
        return found


def restore(path: str, kernels: str, size: int, twin: bool = False) -> tuple[Crew, list[Any]]:
    """A new crew that has loaded a checkpoint together, and of each member (manifest, bytes read), or what was raised."""
    crew = Crew(kernels, size, twin)
    states: list[Any] = [blank(values(0)) for _ in range(size)]

    def body(rank: int, group: Any) -> Any:
        try:
            return saver("/nowhere", crew.members[rank]).restore(path, states[rank], SoloGroup() if size == 1 else group,
                                                                 lambda window: nullcontext())
        except Exception as error:
            group.abort()
            return error

    found = together(size, body)
    crew.step = crew.members[0].committed
    return crew, found


def assert_same_rows(found: dict[tuple[str, int], Rows], wanted: dict[tuple[str, int], Rows]) -> None:
    assert found.keys() == wanted.keys()
    for key, rows in wanted.items():
        for one, other in zip(found[key].arrays, rows.arrays):
            assert (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes()), key


def assert_no_error(found: Sequence[Any]) -> None:
    assert not [one for one in found if isinstance(one, Exception) and not isinstance(one, GroupBroken)], found


def written(path: str) -> dict[tuple[str, int], Rows]:
    """All rows of a checkpoint, read without a store."""
    store, name = split(path)
    reader = open_tables(store, name, read_manifest(store, name))
    return {(table, bucket): rows for table in reader.specs() for bucket, rows in reader.rows(table)}
