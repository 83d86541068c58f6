"""Predictions against what really happens: bytes sent by a counting group, bytes held by a worker; step times and the choice, by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elastic import cli
from elastic.collective.local import Hub, LocalGroup
from elastic.collective.reduction import Scratch, SubtreeSums, reduce
from elastic.mesh import Mesh, shards_of
from elastic.model.shape_ops import Move
from elastic.parallel.schedules import build
from elastic.parallel.simulator import Costs, simulate
from elastic.planning import candidates as meshes
from elastic.planning import costs
from elastic.planning.costs import Candidate, Cluster, Part, StageState, Task
from elastic.planning.memory import question
from elastic.planning.search import Forecast, choose, enough_shards, forecast, ranked, verdict
from elastic.recipe import parse
from elastic.worker.context import Buffers
from elastic.worker.training import Placement
from elastic.workload import create_backend, open_model, open_state
from tests.support.threads import together

TASK = Task(num_shards=8, shard_rows=8, num_slots=2, update_s=0.001 / 900_000)
ONE = Cluster(nodes=1, workers_per_node=8, intra=1e9, inter=1e8, latency_s=1e-4, memory=1e9)
HELD = StageState(900_000, 900_000, 900_000)
PASS = Part(forward_s=0.003, backward_s=0.007, kept_bytes=1_000_000, out_bytes=40_000)


def on(workers: int, cluster: Cluster = ONE, task: Task = TASK) -> Forecast:
    """The data axis alone."""
    return forecast(task, cluster, Candidate(Mesh(workers), 1, (PASS,), (HELD,)))


def forecasts(cluster: Cluster) -> list[Forecast]:
    return [on(workers, cluster) for workers in (1, 2, 3, 4, 8)]


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
    numel, block = 120 * 64, 64

    def member(rank: int, local: LocalGroup) -> int:
        group = Counting(local)
        run = shards_of(group.rank, workers, 8)
        sums = SubtreeSums(run, 8, lambda: np.zeros(numel, np.float32), lambda buffer: None)
        for shard in run:
            sums.begin(shard)[:] += shard
            sums.end(shard)
        out = np.zeros(numel, np.float32)
        reduce(group, sums.nodes(), 8, out, numel, block, Scratch(lambda size: np.zeros(size, np.float32)))  # type: ignore[arg-type]
        return group.sent

    assert max(together(workers, member)) == costs.sent_bytes(TASK, workers, numel)


@pytest.mark.parametrize("workers", [1, 2, 3, 5])
def test_the_bytes_that_a_worker_really_holds(workers: int) -> None:
    recipe = parse({"model": {"kind": "nlp.gpt", "width": 192},
                    "data": {"format": "text", "path": "x", "batch_size": 8},
                    "elastic": {"max_workers": 5, "logical_shards": 8}, "backend": {"name": "reference"}}, locate=False)
    model = open_model(recipe, {"vocab_size": 60})
    backend, taken = create_backend(recipe, model), []
    state = open_state(recipe, backend)
    buffers = Buffers(Placement(backend, state), Hub().form(1, 0, workers))
    sums = SubtreeSums(shards_of(0, workers, 8), 8, buffers.take, buffers.give)
    for shard in shards_of(0, workers, 8):
        sums.begin(shard)
        sums.end(shard)
    taken = [state.param, *state.slots.values(), *buffers._all, *([] if buffers.out is None else [buffers.out])]
    share = sum(array.nbytes for array in state.arrays().values()) / workers
    held = sum(buffer.nbytes for buffer in taken) + share
    asked = question(recipe, model)
    layout = meshes.lay(model, Mesh(1), asked.rules, None)
    found = costs.memory(asked.task, Candidate(Mesh(workers), 1, (Part(0, 0, 0),),
                                               meshes.holdings(layout, model, asked.rules)))
    assert abs(found.total / held - 1) < 0.05


def test_a_forecast_by_hand() -> None:
    four = on(4)
    assert four.bound == 4.0
    # as a ring: each run is a whole subtree
    assert costs.sent_bytes(TASK, 4, 900_000) == pytest.approx(2 * 3 / 4 * 3_600_000)
    assert four.step_s == pytest.approx(2 * 0.010 + 3 * 3e-4 + 5_400_000 / 1e9 + 0.001)
    far = replace(ONE, nodes=4, workers_per_node=2)
    assert on(4, far).seconds.reduction == pytest.approx(9e-4 + 5_400_000 / 5e7), "two share a link"
    assert on(4, replace(far, far_latency_s=2e-4)).seconds.reduction == pytest.approx(18e-4 + 5_400_000 / 5e7)
    shared = on(4, replace(ONE, cores=2)).seconds
    assert shared.compute + shared.cores == pytest.approx(0.040), "four workers on two cores"
    assert costs.sent_bytes(replace(TASK, is_exact=False), 3, 900_000) == pytest.approx(2 * 2 / 3 * 3_600_000)


@pytest.mark.parametrize(("schedule", "chunks"), [("1f1b", 1), ("gpipe", 1), ("zb-h1", 1), ("interleaved", 2)])
def test_a_pipelines_step_is_the_simulators(schedule: Any, chunks: int) -> None:
    """Unequal stages; all of it adds up to the schedule's own time."""
    depths = tuple(Part(0.001 * (1 + depth % 2), 0.002, 1_000_000, 0, 1_000_000) for depth in range(2 * chunks))
    candidate = Candidate(Mesh(2, pipeline=2), 4, depths, (HELD, HELD), schedule, chunks)
    found = costs.step(replace(TASK, update_s=0.0), ONE, candidate)
    forward, half = (0.001 * chunks, 0.002 * chunks), (0.001 * chunks,) * 2
    times = 4 if schedule == "interleaved" else 1  # else one schedule runs over all four shards of a replica
    whole = simulate(build(schedule, 2, 16 // times, chunks), Costs(forward, half, half, 1e-4 + 1e-3)).seconds
    assert found.compute + found.bubble + found.messages == pytest.approx(times * whole)
    assert found.compute == pytest.approx(4 * 4 * 0.004 * chunks) and found.bubble > 0 and found.messages > 0


def test_tensor_traffic_by_hand() -> None:
    """An all-reduce of four: two calls below it, three quarters of its bytes each; on one node, and where the line
    crosses two."""
    moves = (Move("tensor.all_reduce", 1_000_000, True), Move("tensor.all_reduce", 2_000_000, False),
             Move("tensor.all_gather", 100_000, True))
    candidate = Candidate(Mesh(2, tensor=4), 1, (replace(PASS, moves=moves),), (HELD,))
    assert costs.step(TASK, ONE, candidate).tensor == pytest.approx(4 * (5 * 3e-4 + (1.5 * 3_000_000 + 300_000) / 1e9))
    crossing = replace(ONE, nodes=4, workers_per_node=2)
    assert costs.step(TASK, crossing, candidate).tensor == pytest.approx(4 * (5 * 3e-4 + (1.5 * 3_000_000 + 300_000) / 5e7))
    assert forecast(TASK, crossing, candidate).far == ("tensor", "data")


def test_a_worker_waits_without_a_core() -> None:
    """Two stages of which one is at work at a time need but one core: with one micro-batch nothing is lost on it."""
    candidate = Candidate(Mesh(8, pipeline=2), 1, (PASS, PASS), (HELD, HELD))
    assert costs.step(TASK, replace(ONE, workers_per_node=2, nodes=8, cores=1), candidate).cores == pytest.approx(0.0)
    full = replace(candidate, mesh=Mesh(1, pipeline=2), micro_batches=8)
    free, crowded = costs.step(TASK, replace(ONE, cores=2), full), costs.step(TASK, replace(ONE, cores=1), full)
    assert crowded.compute + crowded.bubble + crowded.messages + crowded.cores == pytest.approx(8 * 8 * 2 * 0.010)
    assert free.cores == 0.0


def test_activations_in_flight() -> None:
    """GPipe keeps all micro-batches of all shards, 1F1B as many as there are stages to come; what came in is held with
    each."""
    for schedule, first in (("gpipe", 32), ("1f1b", 2)):
        candidate = Candidate(Mesh(1, pipeline=2), 4, (PASS, replace(PASS, kept_bytes=0)), (HELD, HELD), schedule)  # type: ignore[arg-type]
        assert costs.memory(TASK, candidate).activations == first * 1_000_000
    last = Candidate(Mesh(1, pipeline=2), 4, (replace(PASS, kept_bytes=0), PASS), (HELD, HELD))
    assert costs.memory(TASK, last).activations == 1_040_000


def test_a_sharded_optimizers_share() -> None:
    """Of 16 blocks of 65,536 floats in two slots: all, a quarter, or with a twin half."""
    held = replace(HELD, trainable=16 * 65_536)
    whole, shared = (costs.memory(replace(TASK, is_sharded=sharded), Candidate(Mesh(4), 1, (PASS,), (held,)))
                     for sharded in (False, True))
    twin = costs.memory(replace(TASK, is_sharded=True, has_twin=True), Candidate(Mesh(4), 1, (PASS,), (held,)))
    assert (whole.optimizer, shared.optimizer, twin.optimizer) == (8_388_608, 2_097_152, 4_194_304)
    tasks = [replace(TASK, is_sharded=True, has_twin=twin) for twin in (False, True)]
    each = 0.001 / 900_000 * 65_536
    assert [costs.step(task, ONE, Candidate(Mesh(4), 1, (PASS,), (held,))).update
            for task in tasks] == pytest.approx([4 * each, 8 * each])


def test_the_choice_and_the_reasons() -> None:
    slow = replace(ONE, nodes=8, workers_per_node=1, inter=1e9, latency_s=4e-3)
    found = forecasts(slow)
    best = choose(found, slow)
    assert best is not None and best.workers == min(found, key=lambda one: one.step_s).workers == 4
    words = {one.workers: verdict(one, best, slow) for one in found}
    assert words[4] == "recommended" and words[8].endswith("times slower: the sum of gradients over slow links")
    assert words[1].endswith("times slower: fewer workers compute, or less evenly") and ranked(found, best, slow)[0] is best
    crowded = replace(ONE, cores=2)
    best = choose(forecasts(crowded), crowded)
    assert best is not None and best.workers == 2
    assert verdict(on(4, crowded), best, crowded).endswith("it shares the cores")
    tight = replace(ONE, memory=on(8).memory.total)
    best = choose(forecasts(tight), tight)
    assert best is not None and best.workers == 8 and verdict(on(1, tight), best, tight).endswith("MB too much")
    assert [one.workers for one in ranked(forecasts(tight), best, tight)][0] == 8
    assert choose(forecasts(ONE), replace(ONE, memory=1e6)) is None


def test_shards_that_feed_all() -> None:
    assert enough_shards(64, 16) == 16 and enough_shards(48, 16) == 16 and enough_shards(60, 16) == 0


def test_the_command(tmp_path: Path, plays: Path, monkeypatch: pytest.MonkeyPatch,
                     capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    text = f'[model]\nkind = "nlp.gpt"\nlayers = 1\nheads = 2\nwidth = 16\ncontext = 8\n[data]\nformat = "text"\npath = "{plays}"\nbatch_size = 8\n'
    (tmp_path / "r.toml").write_text(text + '[backend]\nname = "reference"\n[elastic]\nmax_workers = 4\n')
    assert cli.run(["plan", str(tmp_path / "r.toml")]) == 0
    out = capsys.readouterr().out
    assert "recommended" in out and "elastic.max_workers = " in out and "8 logical shards" in out
    assert cli.run(["plan", str(tmp_path / "r.toml"), "--nodes", "4", "--gpus-per-node", "4", "--tflops", "1"]) == 0
    assert "16 workers have room here and 8 shards feed only as many replicas: data.batch_size = 8 has no more equal parts; write a multiple of 16." \
        in capsys.readouterr().out
    assert cli.run(["plan", str(tmp_path / "r.toml"), "--memory-gb", "0.000001"]) == 2
    assert "more than it has; " in capsys.readouterr().err
