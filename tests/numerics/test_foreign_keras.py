"""Keras models that people bring, against `fit` and against Keras over the same logical shards; equal over workers and a kill, or refused."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest

from elastic.errors import UserError
from elastic.recipe import Recipe
from elastic.workload import Workload, check_items, check_model, open_model
from tests.support.frameworks import assert_close, load
from tests.support.inprocess import Result, fit, module_recipe
from tests.support.plain_keras import BATCH, LR, Plain
from tests.support.sampling import sample

HERE, STEPS = "tests.support.foreign_keras", 4
RULES = {"sgd": {"name": "sgd", "momentum": 0.9, "weight_decay": 0.0},
         "adamw": {"name": "adamw", "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "eps": 1e-3}}
EQUAL = {"reviews": "Reviews", "offers": "Offers", "vae": "Vectors", "pictures": "Pictures"}
DATA = {**EQUAL, "tagged": "Tags"}
BY_ROWS = ["reviews", "vae", "pictures"]  # a batch norm's rows are its shard's
DRAWING = {"vae": {"noise": 1.0}, "pictures": {"noise": True}}


@pytest.fixture(scope="module", params=["tensorflow"])
def foreign(request: pytest.FixtureRequest) -> Any:
    load(request.param, "backend").start(1)
    return importlib.import_module(HERE)


def recipe(model: str, data: str, workers: int = 1, rule: str = "sgd", shards: int = 2, **options: Any) -> Recipe:
    return module_recipe(
        "", STEPS, model={"kind": f"{HERE}:{model}", **options}, backend={"name": "tensorflow"},
        optimizer={"lr": LR, **RULES[rule]},
        data={"kind": f"{HERE}:{data}", "batch_size": BATCH, "shuffle": False}, checkpoint={"every_steps": 0},
        elastic={"max_workers": workers, "logical_shards": shards})


def alone(foreign: Any, model: str, rule: str) -> Plain:
    import keras
    import numpy as np

    rows = getattr(foreign, DATA[model])()
    return Plain(getattr(foreign, model), keras.tree.map_structure(lambda *x: np.stack(x),
                                                                   *(rows[i] for i in range(len(rows)))), rule)


def assert_same(found: Result, wanted: dict[str, Any], tolerance: float) -> None:
    found.assert_sound(STEPS)
    arrays = {name.partition("/")[2]: value for name, value in found.arrays().items()
              if name.startswith(("parameter/", "buffer/"))}
    wanted = {name: value for name, value in wanted.items() if "seed_generator" not in name}
    assert set(arrays) == set(wanted)
    for name, value in wanted.items():
        assert_close(arrays[name], value, tolerance, name)


@pytest.mark.parametrize("model", sample(list(EQUAL), 2))
def test_it_trains_as_in_keras_alone(foreign: Any, model: str, tmp_path: Path) -> None:
    one = fit(tmp_path / "1", recipe(model, EQUAL[model]))
    assert_same(one, alone(foreign, model, "sgd").shards(2, STEPS).arrays(), 1e-6)
    whole = one if model in BY_ROWS else fit(tmp_path / "whole", recipe(model, EQUAL[model], shards=1))
    assert_same(whole, alone(foreign, model, "sgd").fit(STEPS).arrays(), 2e-6)
    if model not in DRAWING:  # whose one hash is looked at below, with all that draws
        assert_survives(one, fit(tmp_path / "2", recipe(model, EQUAL[model], 2), ("kill:1@2/vote",)))


def assert_survives(one: Result, two: Result) -> None:
    two.assert_sound(STEPS)
    assert one.sha == two.sha and two.named("worker_lost")


def test_words_that_are_masked_count_as_in_fit(foreign: Any, tmp_path: Path) -> None:
    """The shards have other numbers of them."""
    one = fit(tmp_path / "1", recipe("tagged", "Tags"))
    assert_same(one, alone(foreign, "tagged", "sgd").fit(STEPS).arrays(), 1e-5)
    assert_survives(one, fit(tmp_path / "2", recipe("tagged", "Tags", 2), ("kill:1@2/vote",)))


def test_adamw(foreign: Any, tmp_path: Path) -> None:
    result = fit(tmp_path, recipe("offers", "Offers", rule="adamw"))
    assert_same(result, alone(foreign, "offers", "adamw").shards(2, STEPS).arrays(), 1e-5)


@pytest.mark.parametrize("model", sample(list(DRAWING), 1))
def test_what_draws_has_one_hash(foreign: Any, model: str, tmp_path: Path) -> None:
    one = fit(tmp_path / "1", recipe(model, EQUAL[model], **DRAWING[model]))
    one.assert_sound(STEPS)
    assert_survives(one, fit(tmp_path / "2", recipe(model, EQUAL[model], 2, **DRAWING[model]), ("kill:0@3/backward",)))


def test_what_is_refused_before_a_worker_starts(foreign: Any) -> None:
    for model, words in (("distilled", "Distilled has a train_step of its own"),
                         ("unmade", "VAE has no parameters to train; if its layers make")):
        with pytest.raises(UserError, match=words):
            check_model(recipe(model, "Vectors"), open_model(recipe(model, "Vectors"), {}))
    for data, words in (("Batches", "Batches is a PyDataset of Keras', whose items are batches"),
                        ("Ragged", 'Ragged has a collate_fn, which backend.name = "tensorflow" does not call')):
        with pytest.raises(UserError, match=words) as told:
            check_items(Workload.open(recipe("vae", data), {}))
        assert "\n" not in str(told.value)


def test_what_is_refused_before_the_first_step(foreign: Any, tmp_path: Path) -> None:
    found = fit(tmp_path, recipe("pictures", "Pictures", 2, spectral=True))
    assert found.outcome.status == "failed" and not found.steps
    assert re.search(r"writes to its parameter .*kernel",
                     found.outcome.error) and "\n" not in found.outcome.error, found.outcome.error
