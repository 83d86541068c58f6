"""Users' own Keras models of many kinds: what `fit` makes of them, on any number of workers; or one sentence."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from elastic.checkpoint.export import export
from elastic.driver.inference import evaluate
from elastic.recipe import Recipe
from elastic.workload import Workload, check_model, open_model
from tests.support.frameworks import assert_close, load
from tests.support.inprocess import Result, fit, module_recipe
from tests.support.models import assert_evaluates, rig_of
from tests.support.plain_keras import BATCH, LR, STEPS, Plain
from tests.support.sampling import sample

KINDS = "tests.support.keras_objects"  # with all of keras_kinds
DISTURBED = ("kill:1@3/vote", "kill:0@7/update")
ALIKE = ["constrained", "centred", "regularized", "normed", "group_normed", "frozen", "nested", "two_heads",
         "own_compute_loss", "penalized",
         "recurrent", "averaging", "teacher", "net", "listed", "sloped", "counted"]
OPTIMIZERS = {"sgd": {"name": "sgd", "momentum": 0.9, "weight_decay": 0.0},
              "adamw": {"name": "adamw", "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "eps": 1e-3}}


@pytest.fixture(scope="module", params=["tensorflow"])
def kinds(request: pytest.FixtureRequest) -> Any:
    load(request.param, "backend").start(1)
    return importlib.import_module(KINDS)


def recipe(kind: str, rows: str = "pair", shards: int = 3, workers: int = 1, rule: str = "sgd",
           **changes: Any) -> Recipe:
    base: dict[str, Any] = {
        "model": {"kind": f"{KINDS}:{kind}"}, "backend": {"name": "tensorflow"},
        "optimizer": {"lr": LR, "schedule": "constant", **OPTIMIZERS[rule]},
        "data": {"kind": f"{KINDS}:Rows", "batch_size": BATCH, "shuffle": False},
        "elastic": {"max_workers": workers, "logical_shards": shards}}
    merged = {name: {**base.get(name, {}), **changes.get(name, {})} for name in {**base, **changes}}
    return module_recipe("", STEPS, {"kind": rows}, **merged)


def alone(kinds: Any, model: str, rows: str, rule: str) -> Plain:
    return Plain(getattr(kinds, model), kinds.Rows(rows).columns(), rule)


def fitted(plain: Plain) -> dict[str, np.ndarray]:
    """What `fit` makes of it, which is something else than it began with."""
    start = plain.arrays()
    wanted = plain.fit().arrays()
    assert any(np.abs(value - start[name]).max() > 1e-3 for name, value in wanted.items())
    return wanted


def assert_same(found: Result, wanted: dict[str, np.ndarray], tolerance: float) -> None:
    arrays = {name.partition("/")[2]: value for name, value in found.arrays().items()
              if name.startswith(("parameter/", "buffer/"))}
    assert {name: value.dtype for name, value in arrays.items()} == {name: value.dtype
                                                                     for name, value in wanted.items()}
    for name, value in wanted.items():
        assert_close(arrays[name], value, 1e-14 if value.dtype == np.float64 else tolerance, name)


@pytest.mark.parametrize("model", sample(ALIKE, 4))
def test_one_shard_is_fit_itself(kinds: Any, model: str, tmp_path: Path) -> None:
    rows = kinds.ALIKE[model]
    found = fit(tmp_path, recipe(model, rows, shards=1))
    found.assert_sound(STEPS)
    wanted = fitted(alone(kinds, model, rows, "sgd"))
    assert_same(found, wanted, 1e-6)


@pytest.mark.parametrize("model", sample(ALIKE, 2))
def test_shards_are_keras_over_the_same_shards_on_any_number_of_workers(kinds: Any, model: str, tmp_path: Path) -> None:
    rows = kinds.ALIKE[model]
    found = {name: fit(tmp_path / name, recipe(model, rows, rule=name)) for name in OPTIMIZERS}
    for name, tolerance in (("sgd", 1e-6), ("adamw", 1e-5)):
        found[name].assert_sound(STEPS)
        assert_same(found[name], alone(kinds, model, rows, name).shards(3).arrays(), tolerance)
    for workers, chaos in ((2, DISTURBED[:1]), (3, DISTURBED)):
        again = fit(tmp_path / str(workers), recipe(model, rows, workers=workers, rule="adamw"), chaos)
        again.assert_sound(STEPS)
        assert len(again.named("worker_lost")) == len(chaos)
        assert again.sha == found["adamw"].sha


@pytest.mark.parametrize("model", sample(["summed", "summed_heads", "weighted_mean", "added", "masked",
                                          "masked_weighted", "masked_sum"], 2))
def test_shards_put_together_by_what_their_losses_are_divided_by_are_fit_itself(kinds: Any, model: str, tmp_path: Path) -> None:
    rows = kinds.PUT_TOGETHER[model]
    found = fit(tmp_path / "1", recipe(model, rows))
    found.assert_sound(STEPS)
    wanted = fitted(alone(kinds, model, rows, "sgd"))
    assert_same(found, wanted, 1e-5)
    first = alone(kinds, model, rows, "sgd")
    assert found.metrics[0]["loss"] == pytest.approx(float(np.ravel(first.model.train_on_batch(*first.rows(0, BATCH)))[0]), rel=1e-5)
    again = fit(tmp_path / "2", recipe(model, rows, workers=2), DISTURBED[:1])
    assert again.sha == found.sha and len(again.named("worker_lost")) == 1


@pytest.mark.parametrize("model", sample(["summed", "added", "masked_weighted"], 1))
def test_the_loss_of_what_is_put_together_is_that_of_evaluate(kinds: Any, model: str, tmp_path: Path) -> None:
    rows = kinds.PUT_TOGETHER[model]
    found = fit(tmp_path, recipe(model, rows, workers=2, data={"eval_fraction": 0.5}, run={"eval_every": 0}))
    plain = alone(kinds, model, rows, "sgd")
    arrays = found.arrays()
    plain.take(arrays)
    x, y, weight = (*plain.rows(kinds.ROWS // 2, kinds.ROWS), None, None)[:3]
    assert found.metrics[-1]["eval"]["loss"] == pytest.approx(plain.model.evaluate(x, y, sample_weight=weight, verbose=0), rel=1e-5)


@pytest.mark.parametrize("model", sample(["spread", "summing_penalty", "mixed_heads", "summed_and_regularized",
                                          "masked_and_penalized"], 1))
def test_what_no_shards_make_trains_on_one(kinds: Any, model: str, tmp_path: Path) -> None:
    rows = kinds.ONE_SHARD[model]
    found = fit(tmp_path, recipe(model, rows, shards=1))
    found.assert_sound(STEPS)
    assert_same(found, alone(kinds, model, rows, "sgd").fit().arrays(), 1e-5)


def test_layers_that_draw_have_one_hash(kinds: Any, tmp_path: Path) -> None:
    one, three = (fit(tmp_path / str(workers), recipe("dropped", workers=workers), DISTURBED[:workers - 1])
                  for workers in (1, 3))
    assert one.sha == three.sha
    losses = [line["loss"] for line in one.metrics]
    assert len(set(losses)) == STEPS


def test_thaw_overrules_trainable(kinds: Any, tmp_path: Path) -> None:
    plain = alone(kinds, "frozen", "pair", "sgd")
    start = plain.arrays()
    changes = {"model": {"thaw": ["dense.bias"], "freeze": ["dense_1.bias"]}}
    found = fit(tmp_path, recipe("frozen", workers=2, **changes)).arrays()
    moved = {name for name, value in start.items()
             if not np.array_equal(found.get(f"parameter/{name}", found.get(f"buffer/{name}")), value)}
    assert moved == {"dense.bias", "dense_1.kernel"}


def test_metrics_are_those_of_evaluate(kinds: Any, tmp_path: Path) -> None:
    found = [fit(tmp_path / str(workers), recipe("many_metrics", "near weighted", workers=workers,
                                                 data={"eval_fraction": 0.5}, run={"eval_every": 0},
                                                         checkpoint={"best": "eval.area", "best_mode": "max"}))
             for workers in (1, 3)]
    told = [result.metrics[-1]["eval"] for result in found]
    assert told[0] == told[1] == evaluate(found[0].run.run_dir / "checkpoints" / f"step-{STEPS:08d}")
    plain = alone(kinds, "many_metrics", "near weighted", "sgd")
    arrays = found[0].arrays()
    plain.take(arrays)
    rows = plain.rows(kinds.ROWS // 2, kinds.ROWS)
    wanted = {}  # Keras' own names count what the process has made
    for name, value in plain.model.evaluate(*rows[:2], sample_weight=rows[2], batch_size=7, verbose=0,
                                            return_dict=True).items():
        name = re.sub(r"_\d+$", "", name)
        wanted |= {name: float(value)} if np.size(value) == 1 else {f"{name}.{i}": float(v)
                                                                    for i, v in enumerate(np.ravel(value))}
    assert len(wanted) >= 9 and set(told[0]) == set(wanted)
    assert told[0] == pytest.approx(wanted, rel=1e-5)


def by_hand(model: Any) -> dict[str, Any]:
    """What an exported file calls a model's variables."""
    named = {"dense": ("kernel", "bias"), "dense_1": ("kernel", "bias"), "averaging": ("mean", "calls"),
             "layer_normalization": ("gamma", "beta"),
             "batch_normalization": ("gamma", "beta", "moving_mean", "moving_variance")}
    kinds = {"Dense": ["dense", "dense_1"], "Averaging": ["averaging"], "LayerNormalization": ["layer_normalization"],
             "BatchNormalization": ["batch_normalization"]}
    layers = [(place, inner) for layer in model.layers for place, inner in (
        [("sequential.", part) for part in layer.layers] if hasattr(layer, "layers") else [("", layer)])]
    called = [(place, kinds[type(layer).__name__].pop(0), layer) for place, layer in layers]
    return {f"{place}{name}.{key}": getattr(layer, key) for place, name, layer in called for key in named[name]}


@pytest.mark.parametrize("model", ["normed", "averaging", "nested"])
def test_an_export_is_what_keras_evaluates_alike(kinds: Any, model: str, tmp_path: Path) -> None:
    found = fit(tmp_path / "run", recipe(model, shards=1))
    export(str(found.run.run_dir), "safetensors", str(tmp_path / "w"))
    arrays, fresh, plain = load_file(tmp_path / "w"), alone(kinds, model, "pair",
                                                            "sgd"), alone(kinds, model, "pair", "sgd").fit()
    variables = by_hand(fresh.model)
    assert set(arrays) == set(variables)
    for name, variable in variables.items():
        variable.assign(arrays[name])
    x, told = plain.rows(0, 36)[0], [each.model.evaluate(*each.rows(0, 36), batch_size=36, verbose=0)
                                     for each in (fresh, plain)]
    assert told[0] == pytest.approx(told[1], rel=1e-5)
    np.testing.assert_allclose(fresh.model.predict(x, verbose=0), plain.model.predict(x, verbose=0), rtol=1e-4,
                               atol=1e-5)


@pytest.mark.parametrize("model", ["net", "normed", "frozen", "averaging", "dropped", "sloped"])
def test_an_evaluation_is_keras_own_and_moves_nothing(kinds: Any, model: str) -> None:
    plain = alone(kinds, model, "pair", "sgd")
    batch = plain.rows(0, BATCH)
    wanted = plain.model.evaluate(*batch, batch_size=BATCH, verbose=0)
    rig = rig_of("tensorflow", load("tensorflow", "backend").framework.construct(getattr(kinds, model), {}, 0))
    assert_evaluates(rig, batch, wanted)


def test_each_of_the_users_functions_has_a_batch_of_its_own(kinds: Any, tmp_path: Path) -> None:
    found = fit(tmp_path, recipe("pops", workers=2, data={"kind": f"{KINDS}:Named", "eval_fraction": 0.5},
                                 run={"eval_every": 0}))
    found.assert_sound(STEPS)
    plain, arrays = alone(kinds, "pops", "pair", "sgd"), found.arrays()
    plain.take(arrays)
    x, y = plain.rows(18, 36)
    off = plain.model.predict(x, verbose=0) - y
    assert found.metrics[-1]["eval"] == pytest.approx({"loss": np.square(off).mean(), "mae": np.abs(off).mean()},
                                                      rel=1e-5)


@pytest.mark.parametrize("how", ["pairs", "best", "fixed"])
def test_rows_that_come_last_are_tried_first(kinds: Any, how: str, tmp_path: Path) -> None:
    data = {"kind": f"{KINDS}:Named", "eval_fraction": 11.5 / 36}
    found = fit(tmp_path / "shard", recipe("together", workers=2, model={"how": how}, data=data,
                                           run={"steps": None, "epochs": 1}))
    assert_refused(found, r"leaves 1 of a logical shard's 4 samples to .*\(keras_objects.py, line \d+, in " + how)
    changes = {"model": {"how": how}, "data": {**data, "eval_fraction": 33.5 / 36}, "run": {"steps": 2}}
    assert_refused(fit(tmp_path / "batch", recipe("together", workers=2, **changes)),
                   r"last batch of the evaluation has 1 rows .*\(keras_objects.py, line \d+, in " + how)


def test_the_metrics_of_two_outputs(kinds: Any, tmp_path: Path) -> None:
    found = fit(tmp_path, recipe("two_heads", "two", workers=2, data={"eval_fraction": 0.5},
                                 run={"eval_every": 0})).metrics[-1]["eval"]
    assert set(found) == {"loss", "line_loss", "side_loss", "line_mse"}
    assert found["loss"] == pytest.approx(0.3 * found["line_loss"] + 2 * found["side_loss"], rel=1e-5)


REFUSED_BEFORE = [("unreduced", "reduction = None"), ("stepping", "has a train_step of its own"),
                  ("measuring", "has a test_step of its own"),
                  ("half", "computes in float16")]
REFUSED = [("spread", "pair", "is not a mean over rows"), ("summing_penalty", "pair", "is not a mean over rows"),
           ("mixed_heads", "two", 'reduction = "sum" and another part'),
           ("summed_and_regularized", "pair", 'reduction = "sum" and another part'),
           ("masked_and_penalized", "steps", "has a mask, by which Keras divides, and more than one part"),
           ("lossless", "pair", "No loss to compute"), ("net", "x", r"trains on rows \(x, y\)"),
           ("recomputed", "pair", "another gradient of dense.(kernel|bias) here than in Keras itself"),
           ("held", "pair", "reads its parameter or buffer dense.kernel as it was when it was made"),
           ("spectral", "pair", "writes to its parameter .*kernel"),
           ("largest", "pair", "metric largest .* cannot be added up")]
ODD = [("counter", "changes its attribute odd.*count"), ("listing", "changes its attribute odd.*seen"),
       ("variable", r"tf.Variable odd\w*\.plain"),
       ("generator", "writes to the variable seed_generator"), ("stateful", "another loss|writes to the tf.Variable"),
       ("clipped", "not linear"),
       ("broken", r"so many cats\) \(keras_kinds.py, line \d+, in do_broken"),
       ("gather", r"keras_kinds.py|GatherV2|indices"),
       ("thawing", "changes `trainable`")]


@pytest.mark.parametrize(("model", "words"), REFUSED_BEFORE)
def test_what_is_refused_before_any_worker_starts(kinds: Any, model: str, words: str) -> None:
    from elastic.errors import UserError

    asked = recipe(model)
    with pytest.raises(UserError, match=words) as told:
        check_model(asked, open_model(asked, {}))
    assert_sentence(str(told.value))


@pytest.mark.parametrize(("model", "rows", "words"), REFUSED)
def test_what_is_refused_before_the_first_step(kinds: Any, model: str, rows: str, words: str, tmp_path: Path) -> None:
    assert_refused(fit(tmp_path, recipe(model, rows, workers=2, data={"eval_fraction": 0.3})), words)


@pytest.mark.parametrize(("what", "words"), ODD)
def test_what_a_layer_should_not_do(kinds: Any, what: str, words: str, tmp_path: Path) -> None:
    assert_refused(fit(tmp_path, recipe("odd", workers=2, model={"what": what})), words)


def assert_refused(found: Result, words: str) -> None:
    assert found.outcome.status == "failed" and not found.steps
    assert re.search(words, found.outcome.error), found.outcome.error
    assert_sentence(found.outcome.error)
    assert len(found.named("worker_lost")) <= 2, "at once, not worker after worker"


def assert_sentence(told: str) -> None:
    assert "\n" not in told and told.endswith(".") and "model.kind" in told, told
    assert len(told) < 600


def test_a_constraint_needs_whole_parameters(kinds: Any) -> None:
    asked = recipe("constrained")
    check_model(asked, open_model(asked, {}))
    asked = recipe("constrained", rule="adamw", optimizer={"sharded": True})
    with pytest.raises(ValueError, match="optimizer.sharded = true cuts parameter dense.kernel"):
        check_model(asked, open_model(asked, {}))


@pytest.mark.parametrize("backend", ["torch", "mxnet"])
def test_another_backend_s_name_is_told(kinds: Any, backend: str) -> None:
    load(backend, "backend")
    asked = recipe("net", backend={"name": backend})
    with pytest.raises(ValueError, match='a Keras model .Sequential.; write backend.name = "tensorflow"'):
        Workload.open(asked, {})
