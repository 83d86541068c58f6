"""What the trainer finds out before a worker starts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from elastic.errors import RecipeError, UserError
from elastic.trainer import Trainer
from tests.numerics.inprocess import module_recipe

pytest.importorskip("torch", reason="torch is not installed")


def small(**model: Any) -> Trainer:
    return Trainer(module_recipe("Small", 4, model=model))


@pytest.mark.parametrize(("changes", "words"), [
    ({"model": {"freeze": ["first.*"]}}, "model.freeze = 'first.*' matches no parameter; names look like line.weight, line.bias"),
    ({"model": {"freeze": ["*"]}}, "model.freeze leaves no parameter"),
    ({"optimizer": {"no_decay": ["*.bais"]}}, "optimizer.no_decay = '*.bais' matches no parameter"),
])
def test_patterns_are_held_against_a_users_own_module(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Trainer(module_recipe("Small", 4, **changes)).check()
    assert words in str(caught.value)


@pytest.mark.parametrize(("weights", "words"), [
    ({"line.weight": (1, 7)}, "line.weight of shape (1, 7), the model has shape (1, 6)"),
    ({"row.weight": (1, 6)}, "row.weight of shape (1, 6), the model has no such parameter, but line.weight"),
    ({}, "none.safetensors' cannot be read"),
])
def test_starting_weights_are_held_against_the_model(weights: dict[str, Any], words: str, tmp_path: Path) -> None:
    file = tmp_path / "none.safetensors"
    save_file({name: np.zeros(shape, np.float32) for name, shape in weights.items()}, file)
    trainer = small(init=str(file))
    if not weights:
        file.unlink()
    with pytest.raises(RecipeError) as caught:
        trainer.check()
    assert words in str(caught.value)


def test_weights_that_fit_are_sound(tmp_path: Path) -> None:
    save_file({"line.weight": np.zeros((1, 6), np.float32)}, tmp_path / "w.safetensors")
    trainer = small(init=str(tmp_path / "w.safetensors"), freeze=["*.bias"])
    assert trainer.check() == {} and trainer.num_steps == 4


def test_this_machine_s_gpu_matters_only_to_workers_of_this_machine() -> None:
    if os.path.exists("/dev/nvidia0"):
        pytest.skip("this machine has a GPU")
    recipe = module_recipe("Small", 4, backend={"device": "cuda"})
    with pytest.raises(UserError, match="this machine has none"):
        Trainer(recipe).check()
    assert Trainer(recipe, address="auto").check() == {}
