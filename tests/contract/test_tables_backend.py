"""Batches of what features have looked up, on every backend: slopes of the loss with respect to it, beside everything that was there without."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backends.common import looked_up
from elastic.errors import UserError
from tests.support.frameworks import assert_close, door, names, settings
from tests.support.lookups import READ, ROWS, SHAPES, Counting, Lookups, batch, by_hand, numeric, values
from tests.support.models import Rig, rig_of

every_backend = pytest.mark.parametrize("name", names())
PLAIN = {"torch": "lookups_torch", "tensorflow": "lookups_keras", "mxnet": "lookups_gluon"}
every_framework = pytest.mark.parametrize("name", PLAIN)


def plain(name: str) -> Any:
    door(name)  # first, for it sets what its framework reads when it loads
    return importlib.import_module(f"tests.support.{PLAIN[name]}")


def neutral_rig(name: str, freeze: tuple[str, ...] = (), **changes: Any) -> Rig:
    return rig_of(name, Lookups(), freeze, values=values(), **changes)


def own_rig(name: str, make: str = "Net", freeze: tuple[str, ...] = (), keys: dict[str, Any] | None = None,
            **changes: Any) -> Rig:
    return rig_of(name, door(name).construct(getattr(plain(name), make), keys or {}, 1), freeze, values=values(), **changes)


def rehearsed(rig: Rig, fed: Any) -> Any:
    return rig.backend.rehearse(fed, lambda: rig.by_name(rig.backend.allocate(rig.layout.trainable)))


def assert_is(found: Any, result: Any, wanted: tuple[Any, Any, Any], tolerance: float = 1e-5) -> None:
    loss, gradients, slopes = wanted
    assert result.loss_sum == pytest.approx(loss, rel=1e-5) and result.weight == ROWS - 2
    assert found.keys() == gradients.keys() and result.slopes.keys() == SHAPES.keys()
    for key, value in gradients.items():
        assert_close(found[key], value, tolerance, key)
    for feature, shape in SHAPES.items():
        slope = result.slopes[feature]
        assert isinstance(slope, np.ndarray) and slope.dtype == np.float32 and slope.flags.c_contiguous
        assert_close(slope, slopes.get(feature, np.zeros(shape)), tolerance, feature)
        assert slope[:-2].any() == (feature in READ) and not slope[-2:].any(), "fillers count for nothing"


@every_framework
def test_loss_gradients_and_slopes_are_the_framework_s_own(name: str) -> None:
    rig = neutral_rig(name)
    flat, result = rig.gradient(batch())
    assert_is(rig.by_name(flat), result, plain(name).plainly(values(), batch()))


@every_framework
def test_so_are_those_of_a_user_s_own_model(name: str) -> None:
    forms: list[tuple[str, dict[str, Any]]] = [("Net", {}), ("Net", {"takes": True})]
    for make, keys in forms + ([("Net", {"hybrid": True}), ("NumPy", {})] if name == "mxnet" else []):
        rig = own_rig(name, make, keys=keys)
        rehearsed(rig, batch())
        flat, result = rig.gradient(batch())
        assert_is(rig.by_name(flat), result, plain(name).plainly(values(), batch()))


@every_backend
def test_slopes_are_the_reference_s_which_are_finite_differences(name: str) -> None:
    precision = "float64" if name == "reference" else "float32"
    fed = batch()
    if precision == "float64":
        fed["rows"] = {feature: array.astype(np.float64) for feature, array in fed["rows"].items()}
    result = neutral_rig(name, precision=precision).gradient(fed)[1]
    assert result.loss_sum == pytest.approx(by_hand(values(), fed), rel=1e-5)
    for feature in READ:
        assert_close(result.slopes[feature], numeric(values(), batch(), feature),
                     1e-8 if precision == "float64" else 1e-5, feature)


@every_backend
def test_nothing_is_kept_or_written_to(name: str) -> None:
    rig, fed, others = neutral_rig(name), batch(), batch(1)
    for array in fed["rows"].values():
        array.setflags(write=False)
    first = rig.gradient(fed)[1].slopes
    copies = {feature: slope.copy() for feature, slope in first.items()}
    assert not np.array_equal(rig.gradient(others)[1].slopes["user"], copies["user"])
    rig.backend.metrics(others)
    for feature, slope in first.items():
        assert np.array_equal(slope, copies[feature]) and slope.flags.writeable
        assert np.array_equal(fed["rows"][feature], batch()["rows"][feature])
    again = rig.gradient(batch())[1].slopes
    assert all(np.array_equal(again[feature], slope) for feature, slope in copies.items())


@every_backend
def test_where_rows_lie_changes_no_bit(name: str) -> None:
    rig, found = neutral_rig(name), []
    for shift in (0, 4, 20, 64):
        fed = batch()
        for feature, array in fed["rows"].items():
            room = np.empty(array.nbytes + 256, np.uint8)
            start = -room.ctypes.data % 64 + shift
            fed["rows"][feature] = room[start:start + array.nbytes].view(np.float32).reshape(array.shape)
            fed["rows"][feature][...] = array
        flat, result = rig.gradient(fed)
        found.append((np.array(flat).tobytes(), *(slope.tobytes() for slope in result.slopes.values())))
    assert len(set(found)) == 1


@every_backend
def test_evaluation_reads_rows_and_leaves_them(name: str) -> None:
    rig, fed = neutral_rig(name), batch()
    found = rig.backend.metrics(fed)
    assert found["loss"] == (pytest.approx(by_hand(values(), batch()), rel=1e-5), ROWS - 2)
    assert found.keys() == {"loss", "score"}
    assert found["loss"][0] == pytest.approx(rig.gradient(fed)[1].loss_sum, rel=1e-6)
    assert rig.backend.metrics(batch(1))["loss"][0] == pytest.approx(by_hand(values(), batch(1)), rel=1e-5)
    assert all(np.array_equal(array, batch()["rows"][feature]) for feature, array in fed["rows"].items())


@every_framework
def test_a_user_s_own_figures_read_rows(name: str) -> None:
    rig = own_rig(name)
    rehearsed(rig, batch())
    found = rig.backend.metrics(batch())
    loss, weight = found["loss"]
    assert loss / weight == pytest.approx(by_hand(values(), batch()) / (ROWS - 2), rel=1e-5)
    assert found["size"] == (pytest.approx(np.square(batch()["rows"]["user"]).sum(), rel=1e-5), ROWS - 2)


@pytest.mark.parametrize("compile", (False, True), ids=("", "compiled"))
@pytest.mark.parametrize("build", (neutral_rig, own_rig), ids=("named arrays", "a user's own"))
@every_framework
def test_nothing_traces_twice_whatever_was_looked_up(name: str, build: Any, compile: bool) -> None:
    rig = build(name, compile=compile)
    rehearsed(rig, batch())
    rig.backend.metrics(batch())
    flat, result = rig.gradient(batch())
    assert_is(rig.by_name(flat), result, plain(name).plainly(values(), batch()), 1e-4)
    before = rig.backend.compilations()
    for seed in range(2, 6):
        slopes = rig.gradient(batch(seed), seed)[1].slopes
        assert_close(slopes["user"], plain(name).plainly(values(), batch(seed))[2]["user"], 1e-4)
        rig.backend.metrics(batch(seed))
    assert rig.backend.compilations() == before
    if build is neutral_rig and (compile or name != "torch"):
        assert before >= 1, "it counts"


@every_backend
def test_a_loss_of_rows_alone_trains_them(name: str) -> None:
    flat, result = rig_of(name, Counting()).gradient(batch())
    assert not np.asarray(flat).any()
    for feature, shape in SHAPES.items():
        slope = result.slopes[feature]
        assert np.array_equal(slope, np.full(shape, -1.0 if feature in READ else 0.0))
        assert slope.flags.c_contiguous and slope.flags.writeable, "though every element is the same number"


@every_backend
def test_slopes_that_are_no_numbers_are_handed_on(name: str) -> None:
    fed = batch()
    fed["rows"]["user"][1, 2] = np.nan
    slopes = neutral_rig(name).gradient(fed)[1].slopes
    assert np.isnan(slopes["user"][1]).all() and np.isfinite(slopes["user"][[0, 2, 3, 4, 5]]).all()


@every_framework
def test_no_rows_of_a_batch_have_no_slopes(name: str) -> None:
    rig = own_rig(name)
    rehearsed(rig, batch())
    result = rig.gradient(batch(rows=0))[1]
    assert (result.loss_sum, result.weight) == (0.0, 0.0)
    assert {feature: slope.shape for feature, slope in result.slopes.items()} == {
        feature: (0, *shape[1:]) for feature, shape in SHAPES.items()}


@every_framework
def test_gradients_of_rows_that_are_not_linear_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="not linear: twice the loss"):
        rehearsed(own_rig(name, "Clipped"), batch())


def test_a_gradient_of_rows_that_counts_is_refused() -> None:
    with pytest.raises(UserError, match="gives the rows of user another gradient when it is called again"):
        rehearsed(own_rig("torch", "Unsteady"), batch())


EXAMPLES = {"torch": "own_tables_torch", "tensorflow": "own_tables_keras", "mxnet": "own_tables_gluon"}


@every_framework
def test_the_examples_models_learn(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples")
    backend, luck = door(name), np.random.default_rng(0)
    backend.before_models(settings())
    rig = rig_of(name, backend.construct(importlib.import_module(EXAMPLES[name]).Net, {"width": 4}, 1))
    rows = {feature: luck.standard_normal((8, 4)).astype(np.float32) for feature in ("item", "user")}
    fed = {"likes": (np.arange(8) % 2).astype(np.float32), "rows": rows}
    rehearsed(rig, fed)
    losses = []
    for _ in range(100):
        flat, result = rig.gradient(fed)
        losses.append(result.loss_sum / result.weight)
        rig.param[:len(flat)] -= 0.05 * flat
        rows.update({feature: array - result.slopes[feature] for feature, array in rows.items()})
    assert losses[-1] < 0.3 * losses[0]
    assert rig.backend.metrics(fed)["accuracy"] == (8.0, 8.0)


def test_a_batch_without_tables_has_no_rows_whatever_its_columns_are_called() -> None:
    for column in (np.ones((2, 3), np.float32), {"a": np.ones(2, np.int64)}, {"a": [1.0]}, [np.ones(2)]):
        assert looked_up({"rows": column}) == {}
    assert looked_up((np.ones(2),)) == {} and looked_up({"label": np.ones(2)}) == {}
    assert list(looked_up(batch())) == list(SHAPES)
