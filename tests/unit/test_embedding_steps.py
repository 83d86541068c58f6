"""Steps of embedding tables on a few members, without a controller: rows against what was drawn, and the same bits however many own them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest

from elastic.checkpoint.state_hash import digests_of
from elastic.errors import GroupBroken, NonFiniteLoss, UserError
from elastic.messages import Buckets, Generation
from elastic.tables.buckets import buckets_of
from elastic.tables.features import Tables
from elastic.tables.held import HeldTables
from elastic.tables.rows import Rows
from elastic.tables.spec import RowUpdate, TableSpec
from tests.support.table_members import FEATURES, SHARDS, STEPS, Log, Member, draws, first_buckets, stored, tables_of
from tests.support.threads import together

SIZES = (1, 2, 3, 5)


class Lacking(Log):
    """One that cannot give one batch."""

    def __init__(self, features: Any, lacking: tuple[int, int]):
        super().__init__(features)
        self.lacking = lacking

    def __call__(self, step: int, shard: int) -> dict[str, Any]:
        if (step, shard) == self.lacking:
            raise UserError("no batch")
        return super().__call__(step, shard)


def train_all(size: int, tables: Tables, **options: Any) -> list[Member]:
    members = [Member(tables, **options) for _ in range(size)]
    generation = Generation(1, tuple(f"w{r}" for r in range(size)), "", "local", 0, mesh=(size, 1, 1, 1),
                            buckets=first_buckets(size, tables))
    assert together(size, lambda rank, group: members[rank].train(group, generation), 60.0) == ["done"] * size
    return members


def appearances(table: str) -> Counter[int]:
    """How often each id was drawn in all steps, fillers not; what a mean gives each of its ids is a share."""
    found: Counter[int] = Counter()
    for step in range(1, STEPS + 1):
        for shard in range(SHARDS):
            for feature in FEATURES:
                if feature.table == table:
                    bags = draws(step, shard, feature)
                    for at, (low, high) in enumerate(zip(bags.offsets, bags.offsets[1:])):
                        if not bags.is_filler[at]:
                            found.update(bags.ids[low:high].tolist())
    return found


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("twin", [True, False])
@pytest.mark.parametrize("look_ahead", [0, 2])
def test_every_row_counts_its_appearances(size: int, twin: bool, look_ahead: int) -> None:
    members = train_all(size, tables_of(twin=twin, look_ahead=look_ahead))
    users = stored(members, "users")
    assert {id: np.frombuffer(row[0], np.float32).tolist() for id, row in users.items()} == {
        id: [float(count)] * 2 for id, count in appearances("users").items()}
    assert {id: row[2] for id, row in stored(members, "ads").items()} == appearances("ads")


@pytest.mark.parametrize("options", [
    {"optimizer": "adam", "init": "normal:0.1", "update": RowUpdate(0.05, weight_decay=0.01)},
    {"optimizer": "rowwise_adagrad", "init": "uniform:0.1", "update": RowUpdate(0.1), "admit": 2, "ttl_steps": 3},
    {"optimizer": "adagrad", "init": "normal:0.1", "update": RowUpdate(0.1), "max_rows": 32}])
def test_the_same_bits_whoever_owns_the_rows(options: dict[str, Any]) -> None:
    tables, clipped = tables_of(**options), {"clip_norm": 0.5, "schedule": "cosine"}
    one = train_all(1, tables, bent=True, optimizer=clipped, eval_every=2)
    wanted, lines = {table: stored(one, table) for table in ("ads", "users")}, losses(one)
    assert all(wanted.values()) and len(lines) == STEPS + 3
    for size, look_ahead in product(SIZES[1:], (0, 2)):
        members = train_all(size, replace(tables, look_ahead=look_ahead), bent=True, optimizer=clipped, eval_every=2)
        assert {table: stored(members, table) for table in wanted} == wanted
        assert losses(members) == lines


def losses(members: list[Member]) -> list[Any]:
    return [line.fields.get("loss", line.fields.get("eval")) for line in members[0].posted if line.file == "metrics"]


def test_a_twin_holds_what_the_owner_has() -> None:
    members = train_all(3, tables_of("adam", "normal:0.1", RowUpdate(0.05)), bent=True)
    owned = {bucket: member for member in members for bucket in member.tables.owned}
    for member in members:
        assert member.tables.twins and not set(member.tables.twins) & set(member.tables.owned)
        assert (digests_of(member.tables, member.tables.twins) == np.concatenate(
            [digests_of(owned[bucket].tables, [bucket]) for bucket in member.tables.twins], axis=1)).all()


def test_what_comes_takes_the_place_of_what_lies_here() -> None:
    """A spare may still hold rows of a past that was given up."""
    tables = tables_of()
    members = train_all(2, tables)
    bucket, spec = members[0].tables.owned[0], tables.specs[0]
    held = members[1].tables
    assert bucket in held.twins
    for member in members:
        member.training.plan = replace(member.training.plan, num_steps=STEPS + 1)
    gone = np.setdiff1d(np.arange(100, 1000), members[0].tables.stores["ads"].export(bucket).ids)
    held.stores["ads"].load(rows_of(spec, gone, bucket))
    last = first_buckets(2, tables)
    twins = tuple(-1 if number == bucket else rank for number, rank in enumerate(last.twins))
    generation = Generation(2, ("w0", "w1"), "", "local", STEPS, mesh=(2, 1, 1, 1),
                            buckets=Buckets(last.owners, twins, ((bucket, 0, 1),), last.owners, last.twins))
    assert together(2, lambda rank, group: members[rank].train(group, generation), 60.0) == ["done"] * 2
    assert (digests_of(held, [bucket]) == digests_of(members[0].tables, [bucket])).all()


@pytest.mark.parametrize("size", [1, 2])
def test_a_slope_that_is_no_number_ends_the_step_for_all(size: int) -> None:
    tables = tables_of()
    members = [Member(tables) for _ in range(size)]
    for member in members:
        gradients = member.place.backend.gradients

        def bad(batch: Any, seed: int, into: Any, gradients: Any = gradients) -> Any:
            result = gradients(batch, seed, into)
            if (batch["step"], batch["shard"]) == (3, 1):
                result.slopes["ad"][:] = np.nan
            return result

        member.place.backend.gradients = bad
    generation = Generation(1, tuple(f"w{r}" for r in range(size)), "", "local", 0, mesh=(size, 1, 1, 1),
                            buckets=first_buckets(size, tables))
    lowest = min(id for bags in [draws(3, 1, FEATURES[0])] for at, (low, high) in enumerate(
        zip(bags.offsets, bags.offsets[1:])) if not bags.is_filler[at] for id in bags.ids[low:high].tolist())

    def body(rank: int, group: Any) -> str:
        with pytest.raises(NonFiniteLoss) as error:
            members[rank].train(group, generation)
        return str(error.value)

    sentences = set(together(size, body, 60.0))
    assert len(sentences) == 1 and f"table ads: the gradient of id {lowest} is not finite at step 3" in sentences.pop()
    assert all(member.place.state.committed == 2 for member in members)
    assert max(row[3] for row in stored(members, "ads").values()) == 2


@pytest.mark.parametrize("broken", [0, 1])
def test_a_batch_that_cannot_be_had_costs_no_step_before_its_own(broken: int) -> None:
    """It is asked for two steps early."""
    tables = tables_of()
    members = [Member(tables) for _ in range(2)]
    members[broken].training.load_batch = Lacking(FEATURES, (4, 2 * broken))
    generation = Generation(1, ("w0", "w1"), "", "local", 0, mesh=(2, 1, 1, 1), buckets=first_buckets(2, tables))

    def body(rank: int, group: Any) -> None:
        with pytest.raises(UserError if rank == broken else GroupBroken, match="no batch" if rank == broken else "the group"):
            members[rank].train(group, generation)

    together(2, body, 60.0)
    assert [member.place.state.committed for member in members] == [3, 3]
    assert max(row[3] for row in stored(members, "ads").values()) == 3


def test_rows_that_come_share_the_memory_of_all_tables() -> None:
    """Rows of either table alone have room, and both together do not."""
    names, most = ("ads", "users"), 1 << 10
    specs = tuple(TableSpec(name, 2048, "sgd", num_buckets=2) for name in names)
    ids = np.arange(most)
    for table, room in (("ads", True), ("users", True), ("", False)):
        held = HeldTables(Tables(specs, (), {}, memory_bytes=12 << 20))
        held.begin((0, 1), ())
        parts = [rows_of(spec, ids if table in ("", spec.name) else ids[:0], bucket) for bucket in (0, 1) for spec in specs]
        if room:
            held.load(parts)
            assert held.stores[table].nbytes > 8 << 20
        else:
            with pytest.raises(UserError, match="table users needs .* embedding.memory_gb leaves it"):
                held.load(parts)


def rows_of(spec: TableSpec, ids: np.ndarray, bucket: int) -> Rows:
    mine = ids[buckets_of(spec, ids) == bucket]
    numbers = np.ones(mine.size, np.int32)
    return Rows(mine, np.zeros((mine.size, spec.width), np.float32), np.zeros((mine.size, 0), np.float32), numbers, numbers,
                mine[:0], numbers[:0], numbers[:0])
