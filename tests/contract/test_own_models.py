"""Users' own models on every framework: the framework's own gradients, buffers and figures, and nothing that a redone step could count twice."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from elastic.errors import UserError
from elastic.worker.evaluation import measure
from tests.support.frameworks import assert_close, door
from tests.support.models import Rig, rig_of
from tests.support.threads import together

BUILDERS = {"torch": "own_torch", "tensorflow": "own_keras", "mxnet": "own_gluon"}


class Own(SimpleNamespace):
    """A framework's builders, and its backend's way to call them."""

    def build(self, make: Any = None, seed: int = 1, **keys: Any) -> Any:
        return self.backend.construct(make or self.models.Net, keys, seed)

    def rig(self, make: Any = None, seed: int = 1, freeze: tuple[str, ...] = (), **keys: Any) -> Rig:
        return rig_of(self.name, self.build(make, seed, **keys), freeze)

    def untied(self) -> list[dict[str, Any]]:
        return [form for form in self.models.FORMS if "tied" not in form]


@pytest.fixture(params=BUILDERS)
def own(request: pytest.FixtureRequest) -> Own:
    backend = door(request.param)  # first, for it sets what its framework reads when it loads
    return Own(name=request.param, backend=backend,
               models=importlib.import_module(f"tests.support.{BUILDERS[request.param]}"))


def finite(values: Any) -> np.ndarray:
    return np.nan_to_num(np.asarray(values))


def test_loss_and_gradients_are_the_framework_s_own(own: Own) -> None:
    for form in own.models.FORMS:
        rig = own.rig(**form)
        loss, slopes, _ = own.models.plainly(own.build(**form))
        flat, result = rig.gradient(own.models.batch())
        assert result.weight == 6.0 and result.loss_sum == pytest.approx(6 * loss, rel=1e-6)
        found = rig.by_name(flat)
        assert set(found) == set(slopes), "a tied parameter appears once"
        for name, slope in slopes.items():
            # a bias before a batch norm has true gradient 0
            assert_close(found[name], 6 * slope, 5e-5, f"{form} {name}")


def assert_buffers(found: Any, wanted: dict[str, np.ndarray]) -> None:
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        assert_close(finite(found[name]), finite(value), 1e-6, name)


def test_buffers_come_back_and_a_redone_step_counts_once(own: Own) -> None:
    for form in own.models.FORMS:
        rig, plain = own.rig(**form), own.build(**form)
        before = {name: value.copy() for name, value in rig.state.items()}
        (one, first), (two, again) = rig.gradient(own.models.batch()), rig.gradient(own.models.batch())
        assert np.array_equal(one, two)
        assert_buffers(first.buffers, own.models.plainly(plain)[2])
        assert set(before) == set(first.buffers) and any(not np.array_equal(first.buffers[name], value)
                                                         for name, value in before.items())
        for name, value in before.items():
            assert np.array_equal(first.buffers[name], again.buffers[name]) and np.array_equal(rig.state[name], value)
            rig.state[name][...] = first.buffers[name]
        assert_buffers(rig.gradient(own.models.batch())[1].buffers, own.models.plainly(plain)[2])


def evaluated(backend: Any, batch: Any) -> dict[str, float]:
    """The figures of one batch: means of sums, and what is told of merged counts."""
    tally = backend.tally()
    means = {name: total / weight for name, (total, weight) in measure(backend, tally, batch).items()}
    return means if tally is None else {**means, **tally.figures(tally.counts, means)}


def test_evaluation_is_the_framework_s_own_and_leaves_everything_as_it_was(own: Own) -> None:
    for form in own.untied():
        rig, plain = own.rig(dropout=0.5, **form), own.build(dropout=0.5, **form)
        # with the statistics of the start, then with those of a step; no dropout is in front of them
        for steps in range(2):
            wanted, param, state = own.models.evaluated(plain), rig.param.copy(), {name: value.copy() for name, value in rig.state.items()}
            first = evaluated(rig.backend, own.models.batch())
            _, result = rig.gradient(own.models.batch())
            assert evaluated(rig.backend, own.models.batch()) == first, "neither the look before nor the step counts"
            assert np.array_equal(rig.param, param) and all(np.array_equal(rig.state[name], value)
                                                            for name, value in state.items())
            assert first == pytest.approx(wanted, rel=1e-5), f"{form}, {steps} steps"
            own.models.plainly(plain)
            for name, value in result.buffers.items():
                rig.state[name][...] = value


def test_a_frozen_parameter_gets_no_gradient_and_changes_no_other(own: Own) -> None:
    whole = own.rig()
    wanted = whole.by_name(whole.gradient(own.models.batch())[0])
    frozen = next(iter(wanted))
    part = own.rig(freeze=(frozen,))
    found = part.by_name(part.gradient(own.models.batch())[0])
    assert set(found) == set(wanted) - {frozen}
    for name, slope in found.items():
        assert_close(slope, wanted[name], 5e-5, name)
    with pytest.raises(UserError, match="model.freeze"):
        own.rig(freeze=("*",)).gradient(own.models.batch())


def test_sum_and_weight_as_the_model_gives_them(own: Own) -> None:
    total, weight, slopes = own.models.plain_sums(own.build(own.models.Sums))
    rig = own.rig(own.models.Sums)
    flat, result = rig.gradient(own.models.sums_batch())
    assert (result.loss_sum, result.weight) == (pytest.approx(total, rel=1e-5), weight) and weight == 12
    for name, found in rig.by_name(flat).items():
        assert_close(found, slopes[name], 5e-5, name)


def test_no_rows_count_for_nothing(own: Own) -> None:
    rig = own.rig()
    flat, result = rig.gradient(own.models.batch(0))
    assert (result.loss_sum, result.weight, flat.any()) == (0.0, 0.0, False)
    assert set(result.buffers) == set(rig.state) and all(np.array_equal(result.buffers[name], value)
                                                         for name, value in rig.state.items())


def test_dropout_is_a_function_of_the_seed_in_threads_too_and_disturbs_nobody(own: Own) -> None:
    seeds = (1, 2, 2**63 + 5)
    for form in own.untied():
        alone = [own.rig(dropout=0.5, **form).gradient(own.models.batch(), seed)[0] for seed in seeds]
        assert len({flat.tobytes() for flat in alone}) == len(seeds)
        rigs = [own.rig(dropout=0.5, **form) for _ in seeds]
        wanted = own.models.draw()()
        draw = own.models.draw()
        found = together(len(seeds), lambda rank,
                         group: [rigs[rank].gradient(own.models.batch(), seeds[rank])[0] for _ in range(20)])
        assert draw() == wanted
        for flats, flat in zip(found, alone):
            assert all(np.array_equal(one, flat) for one in flats)


def test_starting_values_are_a_function_of_the_model_and_the_seed(own: Own) -> None:
    """Whatever the process built before."""
    first = own.rig()
    own.rig(seed=5)
    second = own.rig()
    assert list(first.backend.parameters) == list(second.backend.parameters) and np.array_equal(first.param, second.param)
    assert {name: value.tobytes() for name, value in first.state.items()} == {name: value.tobytes() for name, value in second.state.items()}


@pytest.mark.parametrize("fault", ["no loss", "no parameters", "float64", "a vector", "detached"])
def test_models_that_cannot_be_trained_are_refused_in_one_sentence(own: Own, fault: str) -> None:
    make, words, feed = own.models.REFUSED[fault]
    with pytest.raises(UserError, match=words) as told:
        own.rig(make).gradient(feed())
    assert "\n" not in str(told.value)
