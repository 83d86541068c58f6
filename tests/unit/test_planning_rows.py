"""What rows of embedding tables take of their owners, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from elastic.mesh import Mesh
from elastic.planning.costs import Candidate, Part, StageState, Task, memory, owned_bytes
from elastic.planning.rows import bounded_bytes, lines, row_bytes
from elastic.tables.features import Feature, Tables
from elastic.tables.spec import RowUpdate, TableSpec

SPECS = (TableSpec("few", 8, "adam", num_buckets=4, vocabulary=1000), TableSpec("grows", 32, num_buckets=4),
         TableSpec("kept", 4, "sgd", num_buckets=4, max_rows=500_000))


def tables(twin: bool) -> Tables:
    return Tables(SPECS, tuple(Feature(spec.name, spec.name) for spec in SPECS), {spec.name: RowUpdate(0.1) for spec in SPECS}, twin)


def test_a_row_is_its_head_its_values_its_slots_and_its_index() -> None:
    assert [row_bytes(spec) for spec in SPECS] == [16 + 4 * 24 + 17, 16 + 4 * 33 + 17, 16 + 4 * 4 + 17]
    assert bounded_bytes(tables(True)) == 1000 * 129 + 500_000 * 49 and bounded_bytes(None) == 0


@pytest.mark.parametrize(("owners", "has_twin", "share"), [(1, True, 1.0), (1, False, 1.0), (2, True, 1.0), (2, False, 0.5), (4, True, 0.5)])
def test_an_owner_holds_its_own_and_anothers(owners: int, has_twin: bool, share: float) -> None:
    assert owned_bytes(1000, owners, has_twin) == 1000 * share
    task = Task(8, 4, 2, row_bytes=1e6, has_row_twin=has_twin)
    candidate = Candidate(Mesh(owners), 1, (Part(0.0, 0.0, 0),), (StageState(0, 0, 0),))
    assert memory(task, candidate).tables == 1e6 * share


def test_a_line_for_every_table() -> None:
    assert list(lines(tables(True), 1, 4)) == [
        "table few: a row of width 8 takes 129 bytes, and as many again with its twin; at most 1000 rows, 129.0 KB an owner of 1, "
        "64.5 KB an owner of 4.",
        "table grows: a row of width 32 takes 165 bytes, and as many again with its twin; it grows as ids appear: 1 GB on each of "
        "4 owners holds 12.1 million.",
        "table kept: a row of width 4 takes 49 bytes, and as many again with its twin; at most 500000 rows, 24.5 MB an owner of 1, "
        "12.2 MB an owner of 4."]
    assert "grows as ids appear: 1 GB on each of 2 owners holds 12.1 million." in list(lines(tables(False), 2, 2))[1]
    assert list(lines(None, 1, 2)) == []


def test_lines_and_costs_know_of_the_disk() -> None:
    tiered = replace(tables(False), memory_bytes=20_000_000, disk_path="/scratch")
    assert list(lines(tiered, 1, 2)) == [
        "table few: a row of width 8 takes 129 bytes; at most 1000 rows, 129.0 KB an owner of 1, 64.5 KB an owner of 2.",
        "table grows: a row of width 32 takes 165 bytes, 132 of them in memory or on disk; it grows as ids appear: 1 GB of memory, "
        "for the index, on each of 2 owners holds 60.6 million.",
        "table kept: a row of width 4 takes 49 bytes, 16 of them in memory or on disk; at most 500000 rows, 20.0 MB in memory and "
        "4.5 MB on disk for an owner of 1, 12.2 MB an owner of 2.",
        "tables: 20.0 MB of a worker's memory for rows and index, the longest unused rows beyond it in /scratch."]
    candidate = Candidate(Mesh(2), 1, (Part(0.0, 0.0, 0),), (StageState(0, 0, 0),))
    assert memory(Task(8, 4, 2, row_bytes=1e6, row_memory=3e5), candidate).tables == 3e5
