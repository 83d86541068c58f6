"""The ledger: what a worker may not get away with, what a crash may leave on disk, and what the proof finds in an altered one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from elastic.controller.run_log import RunLog
from elastic.data import Sampler
from elastic.data.ledger import Ledger, NotedLoader, digest
from elastic.data.order import Mixture, Rows
from elastic.errors import RunFailed
from elastic.observe.jsonl import read_lines
from elastic.observe.ledger_files import FOLDER, LedgerFiles, files, pieces, prove

SIZE, BATCH, SHARDS, EPOCHS = 21, 8, 4, 2


def sampler(**changes: Any) -> Sampler:
    return Sampler(**{"num_samples": SIZE, "batch_size": BATCH, "logical_shards": SHARDS, "seed": 1, "shuffle": True,
                      "epochs": EPOCHS} | changes)


def metrics(of: Sampler) -> list[dict[str, Any]]:
    ledger = Ledger(of)
    return [{"step": step, "loss": 1.0, "time": float(step), "step_s": 1.0, "world_size": 1, "generation": 1
             + step // 4,
             "samples": sum(int((of.positions(step, shard) >= 0).sum()) for shard in range(of.logical_shards)),
             "ledger": ledger.line(step)}
            for step in range(1, of.num_steps + 1)]


def kept(run_dir: Path) -> list[tuple[int, int, int, int, int]]:
    return [row for file in files(run_dir / FOLDER) for batch, _ in pieces(file)
            for row in zip(*(batch[name].tolist() for name in batch))]


def written(run_dir: Path, of: Sampler, steps: int = 1000) -> list[dict[str, Any]]:
    run_log = RunLog(run_dir)
    for line in metrics(of)[:steps]:
        run_log.metric(line["generation"], line)
    run_log.close()
    return read_lines(run_dir / "metrics.jsonl")


class Numbers:
    fills = False
    order = None
    num_samples = SIZE

    def batch(self, indices: np.ndarray, epochs: np.ndarray) -> dict[str, np.ndarray]:
        return {"id": indices}


def test_what_workers_fed_is_what_the_positions_name() -> None:
    """Three workers, each with its own shards; their digests add up, as in a vote."""
    of = sampler()
    for step in range(1, of.num_steps + 1):
        total = np.zeros(SHARDS)
        for shards in ([0], [1, 2], [3]):
            ledger = Ledger(of)
            load = NotedLoader(Numbers(), of, ledger)
            load.expect((step, shard) for shard in shards)
            for shard in shards:
                assert load(step, shard)["id"].tolist() == [i for i in of.locate(of.positions(step, shard))[1].tolist()
                                                            if i >= 0]
            load.close()
            total += ledger.digests(step)
        Ledger(of).check(step, total)
        assert (total > 0).all()
        for shard in range(SHARDS):
            # nobody, two, another sample
            for wrong in (0.0, 2 * total[shard], digest(step, shard, np.array([0]), np.array([3]))):
                with pytest.raises(RunFailed, match=f"Logical shard {shard} of step {step} was fed other samples"):
                    Ledger(of).check(step, np.where(np.arange(SHARDS) == shard, wrong, total))


def test_what_was_fed_in_a_broken_generation_does_not_count() -> None:
    ledger = Ledger(sampler())
    load = NotedLoader(Numbers(), sampler(), ledger)
    load(1, 0)
    load(1, 1)
    assert np.count_nonzero(ledger.digests(1)) == 2 and not ledger.digests(2).any()
    load.expect([])
    assert not ledger.digests(1).any()


def test_rows_on_disk_are_the_samplers_and_the_lines_know_nothing_of_them(tmp_path: Path) -> None:
    lines = written(tmp_path, sampler())
    rows = kept(tmp_path)
    assert [row[2] for row in rows] == list(range(EPOCHS * SIZE))
    assert [row[0] for row in rows] == [1 + p // BATCH for p in range(EPOCHS * SIZE)]
    assert [row[1] for row in rows] == [p % BATCH // 2 for p in range(EPOCHS * SIZE)]
    epochs, samples = sampler().locate(np.arange(EPOCHS * SIZE))
    assert [row[3:] for row in rows] == list(zip(epochs.tolist(), samples.tolist()))
    assert all("ledger" not in line for line in lines)
    assert [file.name for file in files(tmp_path / FOLDER)] == ["g000001-step-00000001.arrow",
                                                                "g000002-step-00000004.arrow"]
    assert pa.ipc.open_stream(str(files(tmp_path / FOLDER)[0])).read_all().column_names == ["step", "logical_shard", "position", "epoch", "sample"]
    problems, facts = prove(tmp_path, lines)
    assert not problems and facts == ["ledger: 42 positions, each fed once; 2 whole epochs, every sample of each "
                                      "exactly once"]


def test_a_run_without_a_ledger_has_none(tmp_path: Path) -> None:
    run_log = RunLog(tmp_path)
    run_log.metric(1, {key: value for key, value in metrics(sampler())[0].items() if key != "ledger"})
    run_log.close()
    assert not (tmp_path / FOLDER).exists()


@pytest.mark.parametrize("step", range(7))
def test_it_is_cut_back_with_the_metrics(step: int, tmp_path: Path) -> None:
    of = sampler()
    written(tmp_path, of)
    run_log = RunLog(tmp_path, written=step)
    run_log.metrics.cut_back(step)
    assert [row[2] for row in kept(tmp_path)] == list(range(min(step * BATCH, EPOCHS * SIZE)))
    for line in metrics(of)[step:]:
        run_log.metric(9, {**line, "generation": 9})
    run_log.cut_back(max(step, 5))
    run_log.metric(9, {**metrics(of)[5], "generation": 10})
    run_log.close()
    assert not prove(tmp_path, read_lines(tmp_path / "metrics.jsonl"))[0]


def test_a_tail_torn_at_any_byte_is_cut(tmp_path: Path) -> None:
    """As a controller that is killed while it writes leaves it; its successor knows how many steps are in
    metrics.jsonl."""
    of = sampler()
    written(tmp_path, of, steps=3)
    file, = files(tmp_path / FOLDER)
    whole = file.read_bytes()
    *_, (_, second), (_, third) = [(batch["step"][0], end) for batch, end in pieces(file)]
    for size in [*range(40), *range(second, third), third]:
        file.write_bytes(whole[:size])
        steps = len(list(pieces(file)))
        assert steps == (3 if size == third else 2 if size >= second else 0)
        LedgerFiles(tmp_path, 2).close()
        assert not file.exists() if not steps else file.read_bytes() == whole[:second]
        file.write_bytes(whole)


def altered(run_dir: Path, change: Any) -> None:
    """The first file again, its rows changed by `change`."""
    file = files(run_dir / FOLDER)[0]
    table = pa.ipc.open_stream(str(file)).read_all()
    columns = change({name: table[name].to_numpy().copy() for name in table.column_names})
    again = pa.table({name: pa.array(columns[name]).cast(table.schema.field(name).type) for name in columns})
    again = again.replace_schema_metadata(table.schema.metadata)
    with open(file, "wb") as sink:
        sink.write(again.schema.serialize())
        for step in np.unique(columns["step"]).tolist():
            sink.write(again.filter(pa.array(columns["step"] == step)).combine_chunks().to_batches()[0].serialize())


def put(name: str, row: int, value: int) -> Any:
    def change(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        columns[name][row] = value
        return columns

    return change


@pytest.mark.parametrize(("change", "says"), [
    (lambda columns: columns, ""),
    (lambda columns: {name: np.delete(column, 5) for name, column in columns.items()},
     "step 1 has 7 samples, metrics.jsonl says 8"),
    (lambda columns: {name: np.delete(column, np.arange(8, 16)) for name, column in columns.items()},
     "step 3 where step 2 should be"),
    (lambda columns: {name: np.insert(column, 3, column[3]) for name, column in columns.items()},
     "is fed a second time in epoch 0, at step 1"),
    (put("position", 9, 3), "step 2 does not feed the positions 8 to 15, each once"),
    (put("sample", 2, SIZE), "step 1 feeds a sample that the data does not have"),
    (put("epoch", 2, 1), "epoch 0 lacks 1 of 21 samples"),
    (put("logical_shard", 0, 3), "step 1 has its logical shards out of order"),
])
def test_the_proof_finds_what_was_altered(change: Any, says: str, tmp_path: Path) -> None:
    lines = written(tmp_path, sampler())
    altered(tmp_path, change)
    problems, _ = prove(tmp_path, lines)
    assert any(says in problem for problem in problems) if says else not problems


def test_a_missing_file_is_missed(tmp_path: Path) -> None:
    lines = written(tmp_path, sampler())
    files(tmp_path / FOLDER)[1].unlink()
    problems, _ = prove(tmp_path, lines)
    assert problems[0] == "ledger: it ends at step 3, metrics.jsonl at step 6"
    files(tmp_path / FOLDER)[0].unlink()
    assert prove(tmp_path, lines)[0] == ["ledger: there is none, but the recipe asks for one"]


def test_sources_of_a_mixture_are_proved_one_by_one(tmp_path: Path) -> None:
    order = Mixture([Rows(3000, 1, True), Rows(50, 2, True)], (3, 1), 5)
    of = Sampler(3050, 512, 4, 0, True, steps=30, order=order)
    lines = written(tmp_path, of)
    problems, facts = prove(tmp_path, lines)
    assert not problems
    rows = np.array(kept(tmp_path))
    for low, high in ((0, 3000), (3000, 3050)):
        mine = rows[(rows[:, 4] >= low) & (rows[:, 4] < high)]
        pairs = {tuple(pair) for pair in mine[:, 3:].tolist()}
        assert len(pairs) == len(mine)
    assert "15360 positions" in facts[0]
