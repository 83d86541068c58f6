"""Tables of checkpoints as the command shows, exports and verifies them, against what the members hold."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from pyarrow import parquet

from elastic import cli
from elastic.checkpoint.hashing import hashes
from elastic.checkpoint.manager import read_manifest
from elastic.checkpoint.state_hash import hashes_of, in_order
from elastic.driver.replay import verify_run
from elastic.tables.rows import Rows, digests
from elastic.tables.spec import TableSpec
from tests.support.checkpoints import values
from tests.support.ended import make_run
from tests.support.held_tables import SPECS, Crew, Saving


@pytest.fixture
def saving(tmp_path: Path) -> Saving:
    """Two checkpoints of three members, the second an increment on the first."""
    crew = Crew("reference", 3)
    saving = Saving(str(tmp_path / "checkpoints"), crew)
    for _ in range(2):
        crew.train(6)
        found = saving.save()
        assert found is not None and not found.error
    return saving


def rows_of(saving: Saving, table: str) -> list[Rows]:
    return [rows for (name, _), rows in sorted(saving.crew.rows().items()) if name == table]


def said(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """First column and the rest of each line."""
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    return {line[0]: line[1].strip() for line in lines if len(line) == 2}


def test_a_table_is_counted(saving: Saving, capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_of(saving, "ads")
    stored, waiting = sum(r.ids.size for r in rows), sum(r.waiting_ids.size for r in rows)
    lasts = np.concatenate([ages for r in rows for ages in (r.lasts, r.waiting_lasts)])
    assert stored and waiting
    assert cli.run(["inspect", saving.location, "--table", "ads"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    state = hashlib.sha256(b'["table/ads", 5, 16]\n' + b"".join(bytes.fromhex(digests(r)[1]) for r in rows))
    for words in (f"rows {stored} ", f"waiting {waiting} ids", "width 5", "optimizer adam, 10 numbers a row", "ids any",
                  f"({sum(r.nbytes for r in rows)} bytes)", f"last updates steps {lasts.min()} to {lasts.max()}",
                  "made of step-00000006, step-00000012", f"sha256 of all {state.hexdigest()}", "buckets 16"):
        assert words in out, words
    assert cli.run(["inspect", saving.location, "--table", "users"]) == 0
    assert "ids 0 to 299" in " ".join(capsys.readouterr().out.split())


def test_one_id_is_shown(saving: Saving, capsys: pytest.CaptureFixture[str]) -> None:
    rows = next(r for r in rows_of(saving, "ads") if r.ids.size and r.waiting_ids.size)
    assert cli.run(["inspect", saving.location, "--table", "ads", "--id", str(rows.ids[0])]) == 0
    found = said(capsys)
    assert found["state"] == "stored" and found["count"] == str(rows.counts[0])
    assert found["last"] == f"update  step {rows.lasts[0]}"
    assert np.array(found["vector"].split(), np.float32).tobytes() == rows.values[0].tobytes()
    assert np.array(found["slots"].split(), np.float32).tobytes() == rows.slots[0].tobytes()
    assert cli.run(["inspect", saving.location, "--table", "ads", "--id", str(rows.waiting_ids[0])]) == 0
    found = said(capsys)
    assert found["state"] == "waiting to be admitted" and "vector" not in found
    assert cli.run(["inspect", saving.location, "--table", "ads", "--id", "-77"]) == 0
    assert "not stored" in said(capsys)["state"]


@pytest.mark.parametrize(("options", "words"), [
    ("--id 3", "--id 3 is an id of an embedding table; name that with --table."),
    ("--table ads --diff x", "leave --diff out"), ("--table none", "no embedding table of this name; it has ads, users."),
    ("--table users --id 300", "table users: id 300 is not in its vocabulary, 0 to 299"),
    ("--table ads --id 9223372036854775808", "not in the range of 64-bit integers")])
def test_a_mistake_is_one_sentence(options: str, words: str, saving: Saving, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["inspect", saving.location, *options.split()]) == 2
    assert words in capsys.readouterr().err


def test_a_checkpoint_is_shown_with_its_tables_and_hashes(saving: Saving, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = read_manifest(saving.checkpoints.store, "step-00000012")
    arrays = ((name, values(12)[name]) for name in in_order(values(0)))
    wanted = hashes_of(arrays, manifest.cursor, saving.crew.digests())
    assert hashes(saving.checkpoints.store, "step-00000012", manifest) == wanted
    assert cli.run(["inspect", saving.location]) == 0
    found = said(capsys)
    assert (found["parameters_sha256"], found["state_sha256"], found["tables"]) == (*wanted, "ads, users")
    entry = manifest.tables[0]
    line = next(words for words in found.items() if words[0] == entry.name)[1].split()
    assert line == [str(entry.bytes), entry.table, str(len(entry.buckets)), "step-00000006", entry.hash]


def test_what_is_wrong_is_shown(saving: Saving, capsys: pytest.CaptureFixture[str]) -> None:
    older, newer = (sorted((Path(saving.location) / f"step-{step:08d}").glob("*.arrow"))[0] for step in (6, 12))
    path, content = str(newer.parent), older.read_bytes()
    older.unlink()
    assert cli.run(["inspect", path]) == 3
    out = capsys.readouterr().out
    assert f"builds on step-00000006, which is not whole: step-00000006/{older.name} is missing" in " ".join(out.split())
    broken = bytearray(content)
    broken[2000] ^= 1
    older.write_bytes(bytes(broken))
    assert cli.run(["inspect", path]) == 3
    assert "does not have the hash" in capsys.readouterr().out
    newer.write_bytes(newer.read_bytes()[:-1])
    assert cli.run(["inspect", path]) == 3
    assert cli.run(["inspect", path, "--table", "ads"]) == 2


def test_what_differs_is_counted(saving: Saving, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = (str(Path(saving.location) / f"step-{step:08d}") for step in (6, 12))
    assert cli.run(["inspect", a, "--diff", b]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    crew = Crew("reference", 1)
    crew.train(6)
    for spec in SPECS:
        now, then = dict[int, list[bytes]](), dict[int, list[bytes]]()
        for rows, into in ((rows_of(saving, spec.name), now), (rows_of_crew(crew, spec), then)):
            for r in rows:
                for ids, *columns in (r.arrays[:5], r.arrays[5:]):
                    into |= {id: [c[n].tobytes() for c in columns] for n, id in enumerate(ids.tolist())}
        different = sum(now.get(id) != then.get(id) for id in {*now, *then})
        line = next(line for line in lines if line and line[0] == f"table/{spec.name}")
        assert line[1:3] == [str(len({*now, *then})), str(different)] and 0 < float(line[3]) < 10
    assert cli.run(["inspect", a, "--diff", a]) == 0
    assert "0 arrays differ, 10 arrays the same to the bit" in capsys.readouterr().out


def rows_of_crew(crew: Crew, spec: TableSpec) -> list[Rows]:
    return [rows for (name, _), rows in crew.rows().items() if name == spec.name]


def test_tables_go_out_as_parquet(saving: Saving, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                  monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elastic.checkpoint.export_tables.GROUP_BYTES", 100)
    out = tmp_path / "rows"
    assert cli.run(["export", saving.location, "--format", "parquet", "--out", str(out)]) == 0
    assert f"2 tables of step 12 written to {out}" in capsys.readouterr().out
    assert sorted(p.name for p in out.iterdir()) == ["ads.parquet", "users.parquet"]
    for spec in SPECS:
        assert parquet.ParquetFile(out / f"{spec.name}.parquet").num_row_groups > 1
        found = parquet.read_table(out / f"{spec.name}.parquet").to_pydict()
        wanted = {id: value.tolist() for r in rows_of(saving, spec.name) for id, value in zip(r.ids.tolist(), r.values)}
        assert len(found["id"]) == len(wanted) and dict(zip(found["id"], found["vector"])) == wanted
    assert cli.run(["export", saving.location, "--format", "parquet", "--out", str(out)]) == 2
    assert "exists already" in capsys.readouterr().err


def test_a_damaged_one_is_not_exported_but_the_one_before(saving: Saving, tmp_path: Path,
                                                          capsys: pytest.CaptureFixture[str]) -> None:
    newest = sorted((Path(saving.location) / "step-00000012").glob("*users*"))[-1]
    content = bytearray(newest.read_bytes())
    entry = next(e for e in read_manifest(saving.checkpoints.store, "step-00000012").tables if e.name == newest.name)
    content[entry.offsets[-1] + entry.sizes[-1] - 1] ^= 1
    newest.write_bytes(bytes(content))
    out = tmp_path / "rows"
    assert cli.run(["export", str(newest.parent), "--format", "parquet", "--out", str(out)]) == 2
    assert "does not have the hash" in capsys.readouterr().err and not list(tmp_path.glob("rows*"))
    assert cli.run(["export", saving.location, "--format", "parquet", "--out", str(out)]) == 0
    assert "2 tables of step 6 written" in capsys.readouterr().out


def test_verify_compares_the_last_checkpoint_with_the_summary(tmp_path: Path) -> None:
    crew = Crew("reference", 2)
    saving = Saving(str(tmp_path / "place"), crew)
    run_dir = make_run(tmp_path, saving.location)
    crew.train(1)
    saving.save()
    manifest = read_manifest(saving.checkpoints.store, "step-00000001")
    parameters, state = hashes(saving.checkpoints.store, "step-00000001", manifest)
    summary = {"status": "done", "steps": 1, "final_loss": 1.0, "eval": {}, "steps_lost": 0, "recoveries": 0,
               "world_sizes": [1], "parameters_sha256": parameters, "state_sha256": state}
    (run_dir / "summary.json").write_text(json.dumps(summary))
    verdict = verify_run(run_dir)
    assert not verdict.problems and "step-00000001 has the hashes of summary.json" in verdict.facts
    (run_dir / "summary.json").write_text(json.dumps(summary | {"state_sha256": "0" * 64}))
    assert verify_run(run_dir).problems == [
        f"step-00000001: its files have the state_sha256 {state}, and summary.json says {'0' * 64}"]
    file = next((Path(saving.location) / "step-00000001").glob("*.arrow"))
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    (problem,) = verify_run(run_dir).problems
    assert file.name in problem and "hash" in problem
