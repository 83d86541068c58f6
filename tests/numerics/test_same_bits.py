"""Same bits (P1) and nothing lost (P2) on threads: whatever happens to the workers, the run ends in the same state."""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.inprocess import MODULES, Result, Run, fit, gpt_recipe, module_recipe
from tests.support.sampling import sample

torch = pytest.importorskip("torch", reason="torch is not installed")

STEPS = 24
PHASES = ("forward", "backward", "reduction", "vote", "update", "checkpoint")


@pytest.fixture(scope="module")
def undisturbed(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """The oracle: one worker, nothing happens."""
    result = fit(tmp_path_factory.mktemp("one") / "run", gpt_recipe(text, STEPS, elastic={"max_workers": 1}))
    result.assert_sound(STEPS)
    assert result.summary["recoveries"] == 0
    return result


def assert_same(result: Result, oracle: Result) -> None:
    result.assert_sound(STEPS)
    assert result.sha == oracle.sha
    assert result.summary["parameters_sha256"] == oracle.summary["parameters_sha256"]
    for found, wanted in zip(result.metrics, oracle.metrics, strict=True):
        assert [found.get(key) for key in ("step", "loss", "samples", "tokens", "eval")] == [
            wanted.get(key) for key in ("step", "loss", "samples", "tokens", "eval")]


@pytest.mark.parametrize("workers", [2, 3, 4])
def test_any_number_of_workers(workers: int, text: Path, undisturbed: Result, tmp_path: Path) -> None:
    result = fit(tmp_path, gpt_recipe(text, STEPS, elastic={"max_workers": workers, "min_workers": workers}))
    assert_same(result, undisturbed)
    assert result.summary["world_sizes"] == [workers]


@pytest.mark.parametrize(("phase", "rank"), sample(list(product(PHASES, (0, 2))), 4))
def test_a_kill_in_each_phase(phase: str, rank: int, text: Path, undisturbed: Result, tmp_path: Path) -> None:
    result = fit(tmp_path, gpt_recipe(text, STEPS), [f"kill:{rank}@8/{phase}"])
    assert_same(result, undisturbed)
    assert [e["rank"] for e in result.named("worker_lost")] == [rank]
    assert result.named("recovered")[0]["steps_lost"] == 0
    assert result.summary["world_sizes"][0] == 4


@pytest.mark.parametrize("chaos", [
    ["kill:1@8/reduction", "kill:2@8/reduction"],
    ["kill:0@8/vote", "kill:3@8/update"],
    ["kill:0@8/update", "kill:1@8/update", "kill:2@8/update"],
    ["kill:0@8/vote", "kill:2@8/heal"],
    ["kill:1@8/backward", "kill:0@9/heal", "kill:1@9/forward"],
    ["kill:0@1/forward"],
    [f"kill:0@{STEPS}/update", f"kill:1@{STEPS}/vote"],
    ["kill:3@5/vote", "kill:2@6/vote", "kill:1@7/vote", "kill:0@8/vote", "kill:0@9/vote"],
], ids=" ".join)
def test_several_kills(chaos: list[str], text: Path, undisturbed: Result, tmp_path: Path) -> None:
    result = fit(tmp_path, gpt_recipe(text, STEPS), chaos)
    assert_same(result, undisturbed)
    assert len(result.named("worker_lost")) in range(1, len(chaos) + 1)


def test_scaling_with_spares_2_4_1_3(text: Path, undisturbed: Result, tmp_path: Path) -> None:
    recipe = gpt_recipe(text, STEPS, elastic={"spares": 3})
    result = fit(tmp_path, recipe, ["scale:2@1", "scale:4@7", "scale:1@13", "scale:3@19"])
    assert_same(result, undisturbed)
    assert result.summary["world_sizes"][-4:] == [2, 4, 1, 3]
    assert result.named("recovered") == []


def test_a_kill_while_a_joiner_is_healed(text: Path, undisturbed: Result, tmp_path: Path) -> None:
    recipe = gpt_recipe(text, STEPS, elastic={"spares": 2})
    for rank in (0, 1, 3):
        result = fit(tmp_path / str(rank), recipe, ["scale:2@4", "scale:4@8", f"kill:{rank}@8/heal"])
        assert_same(result, undisturbed)
        assert len(result.named("worker_lost")) == 1


def test_stopped_and_continued(text: Path, undisturbed: Result, tmp_path: Path) -> None:
    result = fit(tmp_path, gpt_recipe(text, STEPS, elastic={"hang_timeout_s": 1.0}), ["stop:1@8/vote", "cont:1@14"])
    assert_same(result, undisturbed)
    stopped = result.named("chaos")[0]["worker"]
    assert [e["worker"] for e in result.named("hang")] == [stopped]
    assert [e["worker"] for e in result.named("worker_lost")] == [stopped]
    assert result.run.fleet.fenced == [stopped]


def test_every_copy_gone_goes_back_to_the_checkpoint(text: Path, undisturbed: Result, tmp_path: Path) -> None:
    # a save waits for the one before: it is soon on disk
    run = Run(tmp_path, gpt_recipe(text, STEPS, checkpoint={"every_steps": 2}))
    fell: list[tuple[int, int]] = []

    def all_fall(step: int) -> None:
        if step > run.controller.checkpoints.newest > 0 and not fell:
            fell.append((step, run.controller.checkpoints.newest))
            for worker in run.controller.state.group:
                run.controller.give_up_on(worker, "killed")

    run.run_log.on_step = all_fall
    result = run.fit()
    result.assert_sound(STEPS, steps_lost=fell[0][0] - fell[0][1])
    assert [(e["from"], e["to"]) for e in result.named("rewound")] == fell
    assert result.sha == undisturbed.sha


def test_fast_reduction_gives_up_the_bits(text: Path, tmp_path: Path) -> None:
    shas = set()
    for workers in (1, 2, 3, 4):
        recipe = gpt_recipe(text, STEPS, elastic={"max_workers": workers, "min_workers": workers, "reduction": "fast"})
        result = fit(tmp_path / str(workers), recipe)
        result.assert_sound(STEPS)
        shas.add(result.sha)
    assert len(shas) >= 2


DISTURBED = ["kill:1@5/vote", "kill:0@9/update", "scale:3@13", "kill:2@17/reduction"]


@pytest.mark.parametrize("changes", [
    {"backend": {"name": "reference"}},
    {"optimizer": {"clip_norm": 0.1}},
    {"optimizer": {"name": "sgd", "lr": 0.1, "clip_norm": 0.5}},
    {"model": {"dropout": 0.3}},
    {"model": {"freeze": ["wte"]}},
], ids=str)
def test_other_backends_models_and_optimizers(changes: dict[str, Any], text: Path, undisturbed: Result,
                                              tmp_path: Path) -> None:
    one = fit(tmp_path / "one", gpt_recipe(text, STEPS, **{**changes, "elastic": {"max_workers": 1}}))
    many = fit(tmp_path / "many", gpt_recipe(text, STEPS, **changes), DISTURBED)
    assert_same(many, one)
    assert one.sha != undisturbed.sha


def test_a_module_with_batch_norm_and_dropout(tmp_path: Path) -> None:
    one = fit(tmp_path / "one", module_recipe("Net", STEPS, elastic={"max_workers": 1}))
    many = fit(tmp_path / "many", module_recipe("Net", STEPS), DISTURBED)
    assert_same(many, one)
    arrays = many.arrays()
    assert arrays["buffer/norm.num_batches_tracked"] == STEPS  # one a step: the mean over its shards
    assert np.array_equal(arrays["buffer/mask"], [0.0, -math.inf])
    assert np.abs(arrays["buffer/norm.running_mean"]).max() > 1e-3


def fed(arrays: dict[str, Any]) -> list[float]:
    return arrays["parameter/fed"].tolist()


@pytest.mark.parametrize("chaos", [[], DISTURBED, ["kill:0@3/vote", "scale:1@6", "scale:4@10", "kill:3@14/update"]],
                         ids=["undisturbed", "kills", "resizes"])
def test_every_sample_is_fed_once_an_epoch(chaos: list[str], tmp_path: Path) -> None:
    size, batch, epochs = 96, 16, 4
    recipe = module_recipe("Counter", None, {"size": size}, run={"epochs": epochs}, model={"size": size},
                           data={"batch_size": batch},
                           optimizer={"name": "sgd", "lr": float(batch), "momentum": 0.0},
                           checkpoint={"every_steps": size // batch, "keep": 9})
    result = fit(tmp_path, recipe, chaos)
    result.assert_sound(epochs * size // batch)
    assert fed(result.arrays()) == [epochs] * size


def test_epochs_that_end_within_a_step(tmp_path: Path) -> None:
    size, batch, epochs = 100, 16, 3  # 300 rows in 19 steps; the last one has 12
    recipe = module_recipe("Counter", None, {"size": size}, run={"epochs": epochs}, model={"size": size},
                           data={"batch_size": batch},
                           optimizer={"name": "sgd", "lr": float(batch), "momentum": 0.0},
                           checkpoint={"every_steps": 18})
    result = fit(tmp_path, recipe, DISTURBED)
    result.assert_sound(19)
    extra = np.array(fed(result.arrays())) - epochs
    assert np.count_nonzero(extra) == 12 and np.allclose(extra[extra != 0], batch / 12 - 1)
    assert [m["samples"] for m in result.metrics][-2:] == [16, 12]


def test_a_data_set_that_augments_its_rows_at_random(tmp_path: Path) -> None:
    """Loaded ahead in a thread of its own, while a module with dropout draws in another."""
    def run(name: str, workers: int, seed: int = 0) -> Result:
        recipe = module_recipe("Net", STEPS, {"size": 40}, run={"seed": seed, "eval_every": 8},
                               elastic={"max_workers": workers},
                               data={"kind": f"{MODULES}:Augmented", "eval_fraction": 0.2})
        return fit(tmp_path / name, recipe)

    one = run("one", 1)
    for again in (run("again", 1), run("three", 3)):
        assert_same(again, one)
    assert run("other", 1, seed=1).sha != one.sha
