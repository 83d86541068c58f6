"""Same bits (P1) on every framework: one, two, three workers and kills end in one state; and the losses are the reference's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.frameworks import load
from tests.support.inprocess import Result, fit, gpt_recipe, module_recipe

STEPS = 12
FRAMEWORKS = ["torch", "tensorflow", "mxnet"]
DISTURBED = ("kill:1@3/vote", "kill:0@5/update", "scale:2@7", "kill:1@9/reduction")


def run(name: str, text: Path, folder: Path, workers: int, chaos: tuple[str, ...] = (), **changes: Any) -> Result:
    recipe = gpt_recipe(text, STEPS, backend={"name": name}, elastic={"max_workers": workers},
                        optimizer={"clip_norm": 1.0}, **changes)
    return fit(folder, recipe, chaos)


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_one_state_whatever_happens(name: str, text: Path, tmp_path: Path) -> None:
    load(name, "backend")

    def trained(workers: int, chaos: tuple[str, ...] = (), **model: Any) -> Result:
        return run(name, text, tmp_path / f"{workers}{len(chaos)}{len(model)}", workers, chaos,
                   model={"dropout": 0.1, **model})

    one, disturbed = trained(1), trained(3, DISTURBED)
    one.assert_sound(STEPS)
    assert len(disturbed.named("worker_lost")) >= 2
    # layers computed again: another graph in TensorFlow, whose last bits are its own, and the same there
    again = trained(2, recompute=True)
    assert again.sha == (trained(1, recompute=True) if name == "tensorflow" else one).sha
    for result in (trained(3), disturbed):
        result.assert_sound(STEPS)
        assert result.sha == one.sha
        assert [line.get("loss") for line in result.metrics] == [line.get("loss") for line in one.metrics]


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_the_losses_are_the_reference_s(name: str, text: Path, tmp_path: Path) -> None:
    load(name, "backend")
    found, wanted = (run(framework, text, tmp_path / framework, 1, model={"bias": True})
                     for framework in (name, "reference"))
    losses = [[line["loss"] for line in result.metrics if "loss" in line] for result in (found, wanted)]
    assert len(losses[0]) == STEPS and losses[1][-1] < losses[1][0] - 0.3
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
    assert found.sha != wanted.sha


def test_the_rate_is_meant_for_a_batch(text: Path, tmp_path: Path) -> None:
    """Half the rate for half the batch is the rate."""
    plain, scaled, other = (
        fit(tmp_path / str(i), gpt_recipe(text, 3, backend={"name": "reference"}, optimizer=options,
                                          elastic={"max_workers": 1}))
        for i, options in enumerate(({"lr": 0.01}, {"lr": 0.005, "base_batch": 8}, {"lr": 0.005, "base_batch": 16})))
    assert scaled.sha == plain.sha != other.sha


@pytest.mark.backends("tensorflow")
def test_a_keras_model_with_batch_norm_and_dropout(tmp_path: Path) -> None:
    load("tensorflow", "backend")

    def trained(workers: int, chaos: tuple[str, ...] = ()) -> Result:
        module = "tests.support.keras_models"
        recipe = module_recipe("net", STEPS, run={"eval_every": 6}, model={"kind": f"{module}:net", "width": 4},
                               backend={"name": "tensorflow"},
                               data={"kind": f"{module}:Pairs", "eval_fraction": 0.2}, elastic={"max_workers": workers})
        return fit(tmp_path / f"{workers}{len(chaos)}", recipe, chaos)

    one, three = trained(1), trained(3, DISTURBED[:2])
    for result in (one, three):
        result.assert_sound(STEPS)
        assert np.abs(result.arrays()["buffer/batch_normalization.moving_mean"]).max() > 1e-3
    assert three.sha == one.sha
    assert set(one.metrics[-1]["eval"]) == {"loss", "mae"}


@pytest.mark.backends("mxnet")
def test_a_gluon_block_with_batch_norm_and_dropout(tmp_path: Path) -> None:
    load("mxnet", "backend")

    def trained(workers: int, chaos: tuple[str, ...] = ()) -> Result:
        module = "tests.support.gluon_models"
        recipe = module_recipe("Net", STEPS, run={"eval_every": 6}, model={"kind": f"{module}:Net", "width": 4},
                               backend={"name": "mxnet"},
                               data={"kind": f"{module}:Pairs", "eval_fraction": 0.2}, elastic={"max_workers": workers})
        return fit(tmp_path / f"{workers}{len(chaos)}", recipe, chaos)

    one, three = trained(1), trained(3, DISTURBED[:2])
    for result in (one, three):
        result.assert_sound(STEPS)
        assert np.abs(result.arrays()["buffer/1.running_mean"]).max() > 1e-3
    assert three.sha == one.sha
    assert set(one.metrics[-1]["eval"]) == {"loss", "mae"}
