"""What the trainer finds out before a worker starts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from elastic.errors import RecipeError, UserError
from elastic.recipe import Recipe, dumps
from elastic.trainer import Trainer
from tests.numerics.inprocess import fit, gpt_recipe, module_recipe

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


def began(run_dir: Path, recipe: Recipe) -> Path:
    run_dir.mkdir()
    (run_dir / "recipe.toml").write_text(dumps(recipe))
    return run_dir


@pytest.mark.parametrize("change", ["run.seed=1", "model.width=7", "model.freeze=[\"*.bias\"]", "model.kind=tests.numerics.modules:Net",
                                    "data.batch_size=32", "data.shuffle=false", "data.eval_fraction=0.5", "data.options={size = 50}",
                                    "data.kind=tests.numerics.modules:Augmented", "elastic.logical_shards=4", "optimizer.name=sgd"])
def test_a_resumed_run_stays_the_run_it_was(change: str, tmp_path: Path) -> None:
    run_dir, key = began(tmp_path / "run", module_recipe("Small", 4)), change.partition("=")[0]
    with pytest.raises(RecipeError, match=f"^{key} = .* is not what this run began with, .*; leave it as it was") as caught:
        Trainer.resume(run_dir, [change])
    assert str(caught.value).count(". ") == 0


def test_a_resumed_run_may_be_longer_and_on_other_machines(tmp_path: Path) -> None:
    run_dir = began(tmp_path / "run", module_recipe("Small", 4, elastic={"logical_shards": 8}))
    changes = ["run.steps=9", "run.name=again", "elastic.max_workers=8", "elastic.reduction=fast", "optimizer.lr=0.1", "backend.threads=2",
               "checkpoint.keep=9", "run.eval_every=5"]
    recipe = Trainer.resume(run_dir, changes).recipe
    assert (recipe.run.steps, recipe.elastic.max_workers, recipe.optimizer.lr, recipe.backend.threads) == (9, 8, 0.1, 2)


def test_a_resumed_run_finds_its_data_elsewhere_but_takes_no_other(plays: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run_dir = tmp_path / "run"
    fit(run_dir, gpt_recipe(plays, 2, elastic={"max_workers": 1})).assert_sound(2)
    moved = plays.rename(tmp_path / "moved.txt")
    assert Trainer.resume(run_dir, [f"data.path={moved}"]).check()["num_tokens"] > 0
    moved.write_text(moved.read_text().replace("not", "nor"))
    with pytest.raises(RecipeError, match="data.path = .*moved.txt.* holds other data than this run began with"):
        Trainer.resume(run_dir, [f"data.path={moved}"]).check()
