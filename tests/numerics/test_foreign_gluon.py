"""Gluon blocks that people bring, against gluon.Trainer over whole batches and over the same logical shards; equal over workers and a kill, or
refused."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from elastic.errors import UserError
from elastic.recipe import Recipe
from elastic.workload import Workload, check_items, check_model, open_model
from tests.support.frameworks import assert_close, load
from tests.support.inprocess import Result, fit, module_recipe
from tests.support.plain_gluon import BATCH, DECAY, EPS, LR, Plain

HERE, STEPS = "tests.support.foreign_gluon", 6
RULES = {"sgd": {"name": "sgd", "momentum": 0.9}, "adamw": {"name": "adamw", "beta1": 0.9, "beta2": 0.95, "eps": EPS}}
EQUAL = {"Language": "Texts", "Net": "Pictures", "Siamese": "Triplets"}
BY_ROWS = ["Language"]  # the others have a batch norm and a centre, which are their shards'


@pytest.fixture(scope="module", params=["mxnet"])
def foreign(request: pytest.FixtureRequest) -> Any:
    load(request.param, "backend")
    return importlib.import_module(HERE)


def recipe(model: str, data: str, workers: int = 1, rule: str = "sgd", shards: int = 2, spares: int = 0,
           **options: Any) -> Recipe:
    return module_recipe(
        "", STEPS, model={"kind": f"{HERE}:{model}", **options}, backend={"name": "mxnet"},
        optimizer={"lr": LR, "weight_decay": DECAY, **RULES[rule]},
        data={"kind": f"{HERE}:{data}", "batch_size": BATCH, "shuffle": False}, checkpoint={"every_steps": 0},
        elastic={"max_workers": workers, "logical_shards": shards, "spares": spares})


def alone(foreign: Any, model: str, rule: str, shards: int) -> dict[str, Any]:
    return Plain(getattr(foreign, model), getattr(foreign, EQUAL[model])(), rule).train(shards, STEPS)


def assert_same(found: Result, wanted: dict[str, Any], tolerance: float) -> None:
    found.assert_sound(STEPS)
    arrays = {name.partition("/")[2]: value for name, value in found.arrays().items()
              if name.startswith(("parameter/", "buffer/"))}
    assert set(arrays) == set(wanted)
    for name, value in wanted.items():
        assert_close(arrays[name], value, tolerance, name)


@pytest.mark.parametrize("model", EQUAL)
def test_it_trains_as_in_gluon_alone(foreign: Any, model: str, tmp_path: Path) -> None:
    found = {rule: fit(tmp_path / rule, recipe(model, EQUAL[model], rule=rule)) for rule in RULES}
    for rule, tolerance in (("sgd", 1e-6), ("adamw", 1e-5)):
        assert_same(found[rule], alone(foreign, model, rule, 2), tolerance)
    if model in BY_ROWS:
        assert_same(found["sgd"], alone(foreign, model, "sgd", 1), 2e-6)
    two = fit(tmp_path / "2", recipe(model, EQUAL[model], 2, "adamw", spares=1), ("kill:1@3/vote",))
    two.assert_sound(STEPS)
    assert two.sha == found["adamw"].sha and two.named("worker_lost")


def test_dropout_has_one_hash(foreign: Any, tmp_path: Path) -> None:
    one, two = (fit(tmp_path / str(n), recipe("Language", "Texts", n, spares=n - 1, dropout=0.3),
                    ("kill:0@4/backward",) * (n - 1)) for n in (1, 2))
    for result in (one, two):
        result.assert_sound(STEPS)
    assert one.sha == two.sha and two.named("worker_lost")


def test_items_that_are_arrays_alone_are_refused(foreign: Any) -> None:
    with pytest.raises(UserError, match="item 0 is a ndarray; give a dict or a tuple of arrays"):
        check_items(Workload.open(recipe("Siamese", "Bare"), {}))


def test_shapes_that_are_not_known_yet_are_refused(foreign: Any) -> None:
    asked = recipe("Deferred", "Pictures")
    with pytest.raises(UserError, match="has no values yet; where the block is made"):
        check_model(asked, open_model(asked, {}))
