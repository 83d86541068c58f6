"""Users' own Gluon blocks of many kinds: what gluon.Trainer makes of them, on any number of workers; or one sentence."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from elastic.checkpoint.export import export
from elastic.errors import UserError
from elastic.recipe import Recipe
from elastic.workload import check_model, open_model
from tests.support.frameworks import assert_close, load
from tests.support.inprocess import Result, fit, module_recipe
from tests.support.models import assert_evaluates, rig_of
from tests.support.plain_gluon import BATCH, DECAY, EPS, LR, STEPS, Plain
from tests.support.sampling import sample

KINDS = "tests.support.gluon_kinds"
DISTURBED = ("kill:1@3/vote", "kill:0@7/update")
ALIKE = ["plain", "slow", "no_decay", "mixed", "frozen", "normed", "still", "penalized", "paired", "tied", "recurrent",
         "teacher",
         "listed", "custom", "sloped", "counted"]
OPTIMIZERS = {"sgd": {"name": "sgd", "momentum": 0.9},
              "adamw": {"name": "adamw", "beta1": 0.9, "beta2": 0.95, "eps": EPS}}


@pytest.fixture(scope="module", params=["mxnet"])
def kinds(request: pytest.FixtureRequest) -> Any:
    load(request.param, "backend")
    return importlib.import_module(KINDS)


def recipe(kind: str, shards: int = 3, workers: int = 1, rule: str = "sgd", **changes: Any) -> Recipe:
    base: dict[str, Any] = {
        "model": {"kind": f"{KINDS}:{kind}"}, "backend": {"name": "mxnet"},
        "optimizer": {"lr": LR, "schedule": "constant", "weight_decay": DECAY, **OPTIMIZERS[rule]},
        "data": {"kind": f"{KINDS}:Rows", "batch_size": BATCH, "shuffle": False},
        "elastic": {"max_workers": workers, "logical_shards": shards}}
    return module_recipe("", STEPS, **{name: {**base.get(name, {}), **changes.get(name, {})}
                                       for name in {**base, **changes}})


def alone(kinds: Any, kind: str, rule: str) -> Plain:
    rows = kinds.Rows()
    return Plain(getattr(kinds, kind), [{"x": rows.x[i], "y": rows.y[i], "id": rows.id[i]} for i in range(kinds.ROWS)],
                 rule)


def assert_same(found: Result, wanted: dict[str, np.ndarray], tolerance: float) -> None:
    arrays = {name.partition("/")[2]: value for name, value in found.arrays().items()
              if name.startswith(("parameter/", "buffer/"))}
    assert {name: value.dtype for name, value in arrays.items()} == {name: value.dtype
                                                                     for name, value in wanted.items()}
    for name, value in wanted.items():
        assert_close(arrays[name], value, 1e-14 if value.dtype == np.float64 else tolerance, name)


def assert_exported(found: Result, plain: Plain, file: Path) -> None:
    """Gluon itself takes the file's arrays, misses none and knows all."""
    export(str(found.run.run_dir), "safetensors", str(file))
    plain.mx.nd.save(str(file) + ".params", {name: plain.mx.nd.array(value, dtype=value.dtype)
                                             for name, value in load_file(file).items()})
    plain.block.load_parameters(str(file) + ".params")
    assert_same(found, {name: p.data().asnumpy() for name, p in plain.named.items()}, 0.0)


@pytest.mark.parametrize("kind", sample(ALIKE, 4, always=["slow", "no_decay"]))
def test_blocks_are_gluon_over_the_same_shards_on_any_number_of_workers(kinds: Any, kind: str, tmp_path: Path) -> None:
    one = fit(tmp_path / "whole", recipe(kind, shards=1))
    one.assert_sound(STEPS)
    assert_same(one, alone(kinds, kind, "sgd").train(1), 1e-6)
    assert_exported(one, alone(kinds, kind, "sgd"), tmp_path / "w.safetensors")
    found = {rule: fit(tmp_path / rule, recipe(kind, rule=rule)) for rule in OPTIMIZERS}
    for rule, tolerance in (("sgd", 1e-6), ("adamw", 1e-5)):
        found[rule].assert_sound(STEPS)
        assert_same(found[rule], alone(kinds, kind, rule).train(3), tolerance)
    for workers, chaos in ((2, DISTURBED[:1]), (3, DISTURBED)):
        again = fit(tmp_path / str(workers), recipe(kind, workers=workers, rule="adamw"), chaos)
        again.assert_sound(STEPS)
        assert len(again.named("worker_lost")) == len(chaos)
        assert again.sha == found["adamw"].sha


def test_multiplied_rates_with_a_sharded_optimizer(kinds: Any, tmp_path: Path) -> None:
    plain, sharded = (fit(tmp_path / str(on), recipe("mixed", workers=3, rule="adamw", optimizer={"sharded": on}))
                      for on in (False, True))
    assert plain.sha == sharded.sha


def test_layers_that_draw_have_one_hash(kinds: Any, tmp_path: Path) -> None:
    one, three = (fit(tmp_path / str(workers), recipe("dropped", workers=workers), DISTURBED[:workers - 1])
                  for workers in (1, 3))
    assert one.sha == three.sha
    assert len({line["loss"] for line in one.metrics}) == STEPS


def test_thaw_overrules_grad_req(kinds: Any, tmp_path: Path) -> None:
    start = {name: p.data().asnumpy() for name, p in alone(kinds, "frozen", "sgd").named.items()}
    found = fit(tmp_path, recipe("frozen", workers=2, model={"thaw": ["0.bias"], "freeze": ["1.bias"]})).arrays()
    assert {name for name, value in start.items()
            if not np.array_equal(found[f"parameter/{name}"], value)} == {"0.bias", "1.weight"}


def test_each_of_the_users_functions_has_a_batch_of_its_own(kinds: Any, tmp_path: Path) -> None:
    found = fit(tmp_path, recipe("plain", workers=2, data={"eval_fraction": 0.5}))
    assert set(found.metrics[-1]["eval"]) == {"loss", "far"}


@pytest.mark.parametrize("kind", ["plain", "normed", "dropped", "sloped", "always", "counted"])
def test_an_evaluation_is_gluon_s_own_and_moves_nothing(kinds: Any, kind: str) -> None:
    backend, rows = load("mxnet", "backend"), kinds.Rows()
    batch = {name: getattr(rows, name)[:BATCH] for name in ("x", "y", "id")}
    with backend.computing(1, False):
        wanted = alone(kinds, kind, "sgd").block.loss({name: kinds.mx.nd.array(values)
                                                       for name, values in batch.items()}).mean().asscalar()
    rig = rig_of("mxnet", backend.framework.construct(getattr(kinds, kind), {}, 0))
    assert_evaluates(rig, batch, wanted)


@pytest.mark.parametrize("how", ["pairs", "best", "fixed"])
def test_rows_that_come_last_are_tried_first(kinds: Any, how: str, tmp_path: Path) -> None:
    data = {"eval_fraction": 11.5 / 36}
    found = fit(tmp_path / "shard", recipe("together", workers=2, model={"how": how}, data=data,
                                           run={"steps": None, "epochs": 1}))
    assert found.outcome.status == "failed" and not found.steps
    assert re.search(r"leaves 1 of a logical shard's 4 samples to .*\(gluon_kinds.py, line \d+, in " + how,
                     found.outcome.error), found.outcome.error
    found = fit(tmp_path / "batch", recipe("together", workers=2, model={"how": how}, data={"eval_fraction": 33.5 / 36},
                                           run={"steps": 2}))
    assert found.outcome.status == "failed" and not found.steps
    assert re.search(r"last batch of the evaluation has 1 rows .*\(gluon_kinds.py, line \d+, in " + how,
                     found.outcome.error), found.outcome.error


REFUSED_BEFORE = [("adding", 'grad_req = "add"'), ("sparse", "is sparse, or its gradient is")]
ODD = [("counter", "changes its attribute count"), ("listing", "changes its attribute told"),
       ("keeping", "changes its attribute kept"),
       ("generator", "another loss"), ("clipped", "not linear"), ("writing", "writes to its parameter 0.weight"),
       ("holding", "reads its parameter or buffer 0.weight as it was when it was made"),
       ("viewing", "reads its parameter or buffer 1.bias as it was when it was made"),
       ("broken", r"so many cats\) \(gluon_kinds.py, line \d+, in do_broken"),
       ("shapes", r"\(gluon_kinds.py, line \d+, in do_shapes"),
       ("requests", "changes grad_req, lr_mult or wd_mult of its parameter 0.weight"),
       ("measuring", r"no such figure.*\(gluon_kinds.py, line \d+, in metrics")]


@pytest.mark.parametrize(("kind", "words"), REFUSED_BEFORE)
def test_what_is_refused_before_any_worker_starts(kinds: Any, kind: str, words: str) -> None:
    asked = recipe(kind)
    with pytest.raises(UserError, match=words):
        check_model(asked, open_model(asked, {}))


@pytest.mark.parametrize(("what", "words"), ODD)
def test_what_a_loss_should_not_do(kinds: Any, what: str, words: str, tmp_path: Path) -> None:
    found = fit(tmp_path, recipe("odd", workers=2, model={"what": what}, data={"eval_fraction": 0.3}))
    told = found.outcome.error
    assert found.outcome.status == "failed" and not found.steps
    assert re.search(words, told), told
    assert "\n" not in told and told.endswith(".") and told.startswith("model.kind") and len(told) < 600, told
    assert len(found.named("worker_lost")) <= 2, "at once, not worker after worker"


@pytest.mark.parametrize("workers", [1, 2])
def test_a_write_that_shows_late_is_refused_before_its_vote(kinds: Any, workers: int, tmp_path: Path) -> None:
    found = fit(tmp_path, recipe("Late", workers=workers))
    assert found.outcome.status == "failed" and "changes its parameter 0.weight while it computes (seen at step " in found.outcome.error
    assert 1 <= len(found.steps) < STEPS, "it does not write when it first runs"
    assert f"(seen at step {len(found.steps) + 1})" in found.outcome.error


@pytest.mark.parametrize("backend", ["torch", "tensorflow"])
def test_another_backend_s_name_is_told(kinds: Any, backend: str) -> None:
    load(backend, "backend")
    with pytest.raises(UserError, match='a Gluon block .Base.; write backend.name = "mxnet"'):
        open_model(recipe("plain", backend={"name": backend}), {})
