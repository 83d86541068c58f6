"""Three epochs of a table on real processes, through kills, resizing, a kill -9 of everything and a resumption."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil

from elastic.checkpoint.manager import split
from elastic.driver.inference import check_checkpoint
from elastic.observe.jsonl import read_lines
from elastic.observe.verify import verify
from elastic.recipe import dumps
from tests.support.checkpoints import load
from tests.support.tables import counting, rows, write

ROOT = Path(__file__).resolve().parents[2]
ELASTIC = [sys.executable, "-m", "elastic.cli"]
SIZE, EPOCHS, BATCH = 7_001, 3, 64
STEPS = -(-SIZE * EPOCHS // BATCH)
LIMIT_S = 180.0


def kill_everything(process: psutil.Process) -> None:
    family = [process, *process.children(recursive=True)]
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(family, timeout=10)


def test_each_row_is_fed_once_an_epoch_on_a_cluster(tmp_path: Path) -> None:
    table = write(tmp_path / "table.parquet", rows(SIZE), 777)
    recipe = counting(table, SIZE, BATCH, run={"epochs": EPOCHS},
                      data={"columns": ["id"], "ledger": True, "shuffle_by": "blocks"},
                      elastic={"min_workers": 2, "max_workers": 3, "logical_shards": 4},
                      checkpoint={"every_steps": 50, "keep": 20})
    (tmp_path / "recipe.toml").write_text(dumps(recipe))
    environment, run = {**os.environ, "PYTHONPATH": str(ROOT),
                        "XDG_CACHE_HOME": str(tmp_path / "cache")}, tmp_path / "run"
    chaos = [word for fault in ("kill:1@30/vote", "scale:2@60", "kill:0@90/reduction", "scale:3@110")
             for word in ("--chaos", fault)]
    with open(tmp_path / "log", "w") as log:
        first = subprocess.Popen([*ELASTIC, "train", "recipe.toml", "--run-dir", str(run), *chaos], cwd=tmp_path,
                                 env=environment, stdout=log,
                                 stderr=log)
        end = time.monotonic() + LIMIT_S
        while len(read_lines(run / "metrics.jsonl")) < 160:
            assert first.poll() is None and time.monotonic() < end, (tmp_path / "log").read_text()
            time.sleep(0.02)
        kill_everything(psutil.Process(first.pid))
        first.wait()
    before = max(line["step"] for line in read_lines(run / "metrics.jsonl"))
    assert 160 <= before < STEPS
    done = subprocess.run([*ELASTIC, "resume", str(run), "--chaos", "kill:1@250"], cwd=tmp_path, env=environment,
                          capture_output=True, text=True,
                          timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr + done.stdout
    verdict = verify(run, check_checkpoint)
    assert not verdict.problems
    assert f"ledger: {EPOCHS * SIZE} positions, each fed once; {EPOCHS} whole epochs, every sample of each exactly once" in verdict.facts
    events = read_lines(run / "events.jsonl")
    assert len([e for e in events if e["event"] == "rewound"]) == 1
    assert len([e for e in events if e["event"] == "worker_lost"]) >= 3 and json.loads((run / "summary.json").read_text())["status"] == "done"
    counts = load(*split(run / "checkpoints" / f"step-{STEPS:08d}"))[0]["parameter/fed"]
    last = SIZE * EPOCHS - (STEPS - 1) * BATCH
    assert np.isclose(counts, EPOCHS - 1 + BATCH / last).sum() == last and (counts == EPOCHS).sum() == SIZE - last
