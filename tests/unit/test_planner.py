"""Predictions against what really happens: bytes sent by a counting group, bytes held by a worker; and the choice, by hand."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elastic import cli
from elastic.collective.local import Hub, LocalGroup
from elastic.collective.reduction import Scratch, SubtreeSums, reduce
from elastic.gradients import Buffers
from elastic.mesh import shards_of
from elastic.parallel.planner import (
    Cluster,
    Task,
    choose,
    enough_shards,
    forecast,
    forecasts,
    sent_bytes,
    state_bytes,
    verdict,
)
from elastic.preview import task_of
from elastic.recipe import parse
from elastic.workload import create_backend, open_model, open_state

TASK = Task(parameters=900_000, trainable=900_000, gradient=900_000, num_slots=2, num_shards=8, is_exact=True, kept_bytes=1_000_000, shard_s=0.010,
            update_s=0.001)
ONE = Cluster(nodes=1, workers_per_node=8, intra=1e9, inter=1e8, latency_s=1e-4, memory=1e9)


class Counting:
    """A group that counts the bytes its member sends to others."""

    def __init__(self, group: LocalGroup):
        self.group, self.rank, self.size, self.sent = group, group.rank, group.size, 0

    def all_to_all(self, out: Any, out_counts: Any, buffer: Any, counts: Any) -> None:
        self.sent += 4 * (sum(counts) - counts[self.rank])
        self.group.all_to_all(out, out_counts, buffer, counts)

    def all_gather(self, out: Any, part: Any) -> None:
        self.sent += part.nbytes * (self.size - 1)
        self.group.all_gather(out, part)


@pytest.mark.parametrize("workers", [2, 3, 4, 5, 8])
def test_the_bytes_of_a_real_exchange(workers: int) -> None:
    numel, block, hub = 120 * 64, 64, Hub()
    groups = [Counting(hub.form(1, rank, workers)) for rank in range(workers)]

    def member(group: Counting) -> None:
        run = shards_of(group.rank, workers, 8)
        sums = SubtreeSums(run, 8, lambda: np.zeros(numel, np.float32), lambda buffer: None)
        for shard in run:
            sums.begin(shard)[:] += shard
            sums.end(shard)
        out = np.zeros(numel, np.float32)
        reduce(group, sums.nodes(), 8, out, numel, block, Scratch(lambda size: np.zeros(size, np.float32)))  # type: ignore[arg-type]

    threads = [threading.Thread(target=member, args=(group,)) for group in groups]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert max(group.sent for group in groups) == sent_bytes(replace(TASK, gradient=numel), workers)


@pytest.mark.parametrize("workers", [1, 2, 3, 5])
def test_the_bytes_that_a_worker_really_holds(workers: int) -> None:
    recipe = parse({"model": {"kind": "nlp.gpt", "width": 192}, "data": {"format": "text", "path": "x", "batch_size": 8},
                    "elastic": {"max_workers": 5, "logical_shards": 8}, "backend": {"name": "reference"}}, locate=False)
    model = open_model(recipe, {"vocab_size": 60})
    backend, taken = create_backend(recipe, model), []
    state = open_state(recipe, backend)
    buffers = Buffers(type("Work", (), {"state": state, "backend": backend}), Hub().form(1, 0, workers))  # type: ignore[arg-type]
    sums = SubtreeSums(shards_of(0, workers, 8), 8, buffers.take, buffers.give)
    for shard in shards_of(0, workers, 8):
        sums.begin(shard)
        sums.end(shard)
    taken = [state.param, *state.slots.values(), *buffers._all, *([] if buffers.out is None else [buffers.out])]
    share = sum(array.nbytes for array in state.arrays().values()) / workers
    held = sum(buffer.nbytes for buffer in taken) + share
    assert abs(state_bytes(task_of(recipe, model), workers) / held - 1) < 0.05


def test_a_forecast_by_hand() -> None:
    four = forecast(TASK, ONE, 4)
    assert (four.rounds, four.bound) == (2, 4.0)
    assert four.sent_bytes == pytest.approx(2 * 3 / 4 * 3_600_000)  # as a ring: each run is a whole subtree
    assert four.step_s == pytest.approx(2 * 0.010 + 3 * 3e-4 + 5_400_000 / 1e9 + 0.001)
    assert four.speedup == pytest.approx((8 * 0.010 + 0.001) / four.step_s)
    assert forecast(TASK, replace(ONE, nodes=4, workers_per_node=2), 4).exchange_s == pytest.approx(9e-4 + 5_400_000 / 5e7), "two share a link"
    assert forecast(TASK, replace(ONE, cores=2), 4).compute_s == pytest.approx(0.040), "four workers on two cores"
    assert sent_bytes(replace(TASK, is_exact=False), 3) == pytest.approx(2 * 2 / 3 * 3_600_000)


def test_only_numbers_of_workers_that_take_fewer_rounds() -> None:
    assert [one.workers for one in forecasts(TASK, ONE)] == [1, 2, 3, 4, 8]


def test_the_choice_and_the_reasons() -> None:
    slow = replace(ONE, nodes=8, workers_per_node=1, inter=1e9, latency_s=4e-3)
    found = forecasts(TASK, slow)
    best = choose(found, slow)
    assert best is not None and best.workers == min(found, key=lambda one: one.step_s).workers == 4
    words = {one.workers: verdict(one, best, slow) for one in found}
    assert words[4] == "recommended" and words[8] == "no faster than 4: the exchange takes what it saves" and words[1].endswith("times slower")
    crowded = replace(ONE, cores=2)
    best = choose(forecasts(TASK, crowded), crowded)
    assert best is not None and best.workers == 2
    assert verdict(forecast(TASK, crowded, 4), best, crowded) == "no faster than 2: it shares the cores"
    tight = replace(ONE, memory=forecast(TASK, ONE, 8).memory_bytes)
    best = choose(forecasts(TASK, tight), tight)
    assert best is not None and best.workers == 8 and verdict(forecast(TASK, tight, 1), best, tight).endswith("GB too much")
    assert choose(forecasts(TASK, replace(ONE, memory=1e6)), ONE.__class__(**{**vars(ONE), "memory": 1e6})) is None


def test_shards_that_feed_all() -> None:
    assert enough_shards(64, 16) == 16 and enough_shards(48, 16) == 16 and enough_shards(60, 16) == 0


def test_the_command(tmp_path: Path, plays: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    text = f'[model]\nkind = "nlp.gpt"\nlayers = 1\nheads = 2\nwidth = 16\ncontext = 8\n[data]\nformat = "text"\npath = "{plays}"\nbatch_size = 8\n'
    (tmp_path / "r.toml").write_text(text + '[backend]\nname = "reference"\n[elastic]\nmax_workers = 4\n')
    assert cli.run(["plan", str(tmp_path / "r.toml")]) == 0
    out = capsys.readouterr().out
    assert "recommended" in out and "elastic.max_workers = " in out and "8 logical shards" in out
    assert cli.run(["plan", str(tmp_path / "r.toml"), "--nodes", "4", "--gpus-per-node", "4", "--tflops", "1"]) == 0
    assert "16 workers have room here and 8 shards feed only as many: data.batch_size = 8 has no more equal parts; write a multiple of 16." \
        in capsys.readouterr().out
    assert cli.run(["plan", str(tmp_path / "r.toml"), "--memory-gb", "0.000001"]) == 2
    assert "more than it has; give it more memory" in capsys.readouterr().err


