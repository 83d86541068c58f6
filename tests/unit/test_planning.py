"""The plan command and `mesh = "auto"`: layouts shown, what does not fit the model or the memory, constants kept."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from elastic import cli, workload
from elastic.mesh import Mesh
from elastic.planning import calibration, costs
from elastic.planning.calibration import Constants
from elastic.planning.plan import Plan, Size, cluster_of, parts, settle
from elastic.planning.profile import Counted
from elastic.planning.search import forecasts
from elastic.planning.tables import sentences, too_large
from elastic.recipe import Recipe, dumps, load_recipe, loads
from elastic.state.state import State
from elastic.worker.build import place_on
from elastic.workload import Workload, laid, lay_out
from tests.support.inprocess import module_recipe

RECIPE = """[model]
kind = "nlp.gpt"
layers = 2
heads = 4
width = 32
context = 8
[data]
format = "text"
path = "{}"
batch_size = 32
[backend]
name = "reference"
[elastic]
max_workers = 4
logical_shards = 4
"""


@pytest.fixture
def file(tmp_path: Path, plays: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "r.toml").write_text(RECIPE.format(plays))
    return tmp_path / "r.toml"


def plan_of(recipe: Recipe, size: Size, flops_s: float = 1e9) -> Plan:
    return Plan.make(recipe, Workload.open(recipe, workload.prepare(recipe)), cluster_of(recipe, size), flops_s)


def test_every_legal_mesh_is_there(file: Path) -> None:
    """Two layers between an embedding and a head are four pieces; four heads divide by one, two and four."""
    found = plan_of(load_recipe(file), Size(1, 4)).found
    shapes = {(one.mesh.pipeline, one.mesh.tensor) for one in found}
    assert shapes == {(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (1, 4)}
    assert {one.mesh.data for one in found if one.mesh.replica_size == 1} == {1, 2, 4}


def test_memory_is_that_of_the_state_on_a_coordinate(file: Path) -> None:
    """Parameters and slots of the worker that holds most, counted in its arrays."""
    recipe = load_recipe(file)
    opened = Workload.open(recipe, workload.prepare(recipe))
    plan = plan_of(recipe, Size(1, 4))
    for one in plan.found:
        layout = laid(recipe, opened, replace(one.mesh, data=1))
        held = []
        for rank in range(layout.mesh.world_size):
            state: State = place_on(recipe, opened, layout.mesh, layout.mesh.coordinate(rank)).state
            held.append((state.param.nbytes, sum(slot.nbytes for slot in state.slots.values())))
        stages = [costs.stage_memory(plan.asked.task, one.candidate, stage, 0) for stage in range(layout.mesh.pipeline)]
        memory = max(stages, key=lambda each: each.parameters)
        assert (memory.parameters, memory.optimizer) == max(held)


@pytest.mark.parametrize("twin", ["true", "false"])
def test_memory_of_a_sharded_optimizer_is_that_of_its_slots(twin: str, file: Path) -> None:
    """Of a model of several blocks, on every number of replicas that the plan knows."""
    recipe = load_recipe(file, ["model.width=128", "model.layers=4", "optimizer.sharded=true",
                                f"optimizer.twin={twin}"])
    opened = Workload.open(recipe, workload.prepare(recipe))
    plan = plan_of(recipe, Size(1, 4))
    seen = set()
    for one in plan.found:
        layout = laid(recipe, opened, replace(one.mesh, data=1))
        for stage in range(layout.mesh.pipeline):
            held = []
            for coordinate in (layout.mesh.coordinate(rank) for rank in range(layout.mesh.world_size)):
                state = place_on(recipe, opened, layout.mesh, coordinate).state
                assert state.is_sharded
                for rank in range(one.mesh.data if coordinate.pipeline == stage else 0):
                    state.own_as(rank, one.mesh.data)
                    held.append(sum(slot.nbytes for slot in state.slots.values()))
            planned = costs.stage_memory(plan.asked.task, one.candidate, stage, 0).optimizer
            assert planned == max(held)
            seen.add(planned)
    assert len(seen) > 3


def test_what_fits_nowhere_is_one_sentence_with_a_remedy(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = load_recipe(file)
    plan = plan_of(recipe, Size(1, 2))
    least = min(one.memory.total for one in plan.found)
    cluster = replace(plan.cluster, memory=least - 1000)
    words = too_large(forecasts(plan.asked, cluster, plan.work), cluster,
                      replace(plan, cluster=cluster).variants(workload.prepare(recipe)))
    assert "1.0 KB more than it has; " in words and "set model.recompute = true" in words
    assert cli.run(["plan", str(file), "--memory-gb", "0.00001", "--tflops", "1", "--nodes", "1"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("elastic: A worker needs ") and error.count("\n") == 1


def test_a_layout_shown(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["plan", str(file), "--show-layout", "--mesh", "data=2,tensor=2"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    up = next(line for line in lines if line[:1] == ["h0.mlp.up.weight"])
    assert " ".join(up[1:]) == "d_model 32, d_ff 128 d_ff: tensor 8.2 KB 0"  # 32 x 128 floats, half of them
    moved = next(line for line in lines if line[1:2] == ["tensor.all_reduce"])
    rows, width = 8 * 8, 32
    # embedding, both layers twice and back, into the head; the loss's three numbers
    each = 4 * (rows * width * (1 + 2 * 2 * 2 + 1) + rows * 3)
    assert moved[2] == str(2 * (1 + 8 + 1 + 2)) and " ".join(moved[3:]) == f"{2 * each / 1000:.1f} KB"


@pytest.mark.parametrize(("options", "says"), [
    (["--set", "mesh.tensor=3", "--set", "elastic.max_workers=3"], "mesh.tensor = 3 does not divide"),
    (["--set", "mesh.layout.position=tensor", "--set", "mesh.tensor=2"],
     'mesh.layout.position = "tensor" is no split that the model can make'),
    (["--set", "mesh.layout.heads=expert", "--set", "mesh.expert=2"],
     'mesh.layout.heads = "expert" is no split that the model can make'),
    (["--set", "model.experts=2", "--set", "model.capacity=inf"],
     "model.capacity = inf must be a finite number above 0."),
    (["--set", "model.experts=2", "--set", "model.balance=nan"],
     "model.balance = nan must be a finite number of at least 0."),
    (["--set", "mesh.expert=2"], "mesh.expert = 2 splits nothing"),
    (["--set", "mesh.pipeline=8", "--set", "elastic.max_workers=8"], "needs 8 pieces, and the model has 4"),
    (["--set", "model.experts=3", "--set", "mesh.expert=2"], "mesh.expert = 2 does not divide"),
])
def test_a_mesh_that_the_model_does_not_fit(file: Path, options: list[str], says: str,
                                            capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["train", "--check"], ["train"], ["plan"]):
        assert cli.run([command[0], str(file), *command[1:], *options]) == 2
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved", "zb-h1"])
def test_every_schedule_is_checked_for_memory(file: Path, schedule: str) -> None:
    assert cli.run(["train", str(file), "--check", "--set", "mesh.pipeline=2", "--set",
                    f"mesh.schedule={schedule}"]) == 0


@pytest.mark.parametrize("text", ["data", "data=0", "rows=2", "data=2,data=2", "tensor=two"])
def test_a_mesh_that_is_none(file: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["plan", str(file), "--show-layout", "--mesh", text]) == 2
    assert f'--mesh "{text}" is not of the form data=2,tensor=2' in capsys.readouterr().err


@pytest.mark.parametrize(("least", "most"), [(1, 3), (2, 4), (3, 3)])
def test_auto_keeps_to_whole_replicas(least: int, most: int, file: Path) -> None:
    recipe = load_recipe(file, ["mesh=auto", f"elastic.min_workers={least}", f"elastic.max_workers={most}"])
    info = workload.prepare(recipe)
    settled, _ = settle(recipe, info, Workload.open(recipe, info))
    assert loads(dumps(settled)) == settled
    assert all(n <= settled.mesh.replica_size or n % settled.mesh.replica_size == 0 for n in (least, most))


@pytest.mark.parametrize(("options", "says"), [
    (["--show-layout", "--mesh", "data=5"], "--mesh data=5 is more replicas than elastic.logical_shards = 4 feed; "
                                            "write data=4 or less."),
    (["--mesh", "data=2"], "--mesh data=2 says which layout is to be shown; add --show-layout"),
    (["--tflops", "inf"], "Invalid value for '--tflops'"),
])
def test_numbers_that_no_plan_can_take(file: Path, options: list[str], says: str,
                                       capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["plan", str(file), *options]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


@pytest.mark.parametrize(("room", "says"),
                         [(1, "; 0% of a step"), (2, " (4 logical shards let 2 replicas be 2.00 times as fast as one)")])
def test_the_bound_that_is_told_is_that_of_replicas(file: Path, room: int, says: str) -> None:
    plan = plan_of(load_recipe(file), Size(1, room, intra_gbps=1e6), 1e6)
    words = next(sentences(plan.recipe, plan.asked, replace(plan.cluster, latency_s=0.0), plan.found))
    assert says in words and ("logical shards" in words) == (room > 1)


def test_auto_becomes_numbers(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = load_recipe(file, ["mesh=auto"])
    info = workload.prepare(recipe)
    opened = Workload.open(recipe, info)
    settled, why = settle(recipe, info, opened)
    mesh = settled.mesh
    assert why.startswith('mesh = "auto" is ') and not mesh.auto and 4 % mesh.replica_size == 0 and loads(dumps(settled)) == settled
    assert cli.run(["train", str(file), "--set", "mesh=auto", "--check"]) == 0
    assert 'mesh = "auto" is ' in capsys.readouterr().out


def test_constants_are_kept_by_run_and_number_of_workers(file: Path) -> None:
    recipe = load_recipe(file)
    found = Constants(4, 0.010, 0.020, 1e9, 4e9, 5e-5, 1e9, 2e-3, 5e8, 2e9)
    calibration.keep(recipe, found)
    assert calibration.known(recipe, 4) == found and calibration.known(recipe, 2) is None
    cluster = cluster_of(recipe, Size(0, 4))
    assert cluster.latency_s == 5e-5 and cluster.cores == found.cores <= 2.0
    mesh = Mesh(4)
    assert costs.link(cluster, mesh, "data") == pytest.approx(1e9), "measured while all four were at work"
    assert costs.link(cluster, mesh, "data", cluster.reduction) == pytest.approx(2e9)
    calibration.cache_file().write_text("{not json")
    assert calibration.known(recipe, 4) is None


def test_a_calibration_between_real_processes(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["plan", str(file), "--gpus-per-node", "2", "--calibrate"]) == 0
    out = capsys.readouterr().out
    assert "shared memory: " in out and "gloo: " in out and "Gflop/s each" in out
    found = calibration.known(load_recipe(file), 2)
    assert found is not None and min(found.alone_s, found.flops_s, found.shared_bytes_s, found.gloo_latency_s,
                                     found.reduction_bytes_s) > 0
    assert cli.run(["plan", str(file), "--nodes", "2", "--calibrate"]) == 2
    assert "--calibrate measures this machine" in capsys.readouterr().err
    assert cli.run(["plan", str(file), "--gpus-per-node", "63", "--calibrate"]) == 2
    assert "give --gpus-per-node 62" in capsys.readouterr().err


def test_counted_work_is_the_operations(file: Path) -> None:
    recipe = load_recipe(file)
    plan = plan_of(recipe, Size(1, 4), 1e9)
    for one in plan.found:
        parts, slow = one.candidate.depths, Counted(plan.asked.model, plan.work.batch, 5e8)
        layout = lay_out(recipe, plan.asked.model, replace(one.mesh, data=1), plan.asked.balance)
        again = slow.depths(layout, 8 // one.mesh.expert // one.candidate.micro_batches)
        assert [2 * part.forward_s for part in parts] == pytest.approx([part.forward_s for part in again])


def test_a_users_own_module_is_planned() -> None:
    """Nobody counts its operations; its parameters are known."""
    pytest.importorskip("torch", reason="torch is not installed")
    recipe = module_recipe("Small", 2)
    opened = Workload.open(recipe, {})
    plan = Plan.make(recipe, opened, cluster_of(recipe, Size(1, 2)))
    shown = Console(width=200, file=StringIO())
    for part in parts(recipe, {}, opened, Size(1, 2), 0.0, layout=True):
        shown.print(part)
    text = shown.file.getvalue()  # type: ignore[attr-defined]
    assert all(name in text for name in plan.asked.model.parameters) and "data.reduction" in text
    cluster = replace(plan.cluster, memory=1.0)
    assert "more than it has; give workers more memory" in too_large(plan.found, cluster,
                                                                     replace(plan, cluster=cluster).variants({}))
