"""The training state: where everything lies, what it starts from, and how it passes from one worker to another."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic.collective.local import Hub
from elastic.errors import RecipeError
from elastic.model.backend import Spec
from elastic.model.initial import initial_values
from elastic.state.flat_layout import ALIGN, BLOCK, FlatLayout
from elastic.state.state import State
from tests.support.threads import together

PARAMETERS = {"wte": Spec((10, 7)), "h0.ln.weight": Spec((7,), init="ones"), "h0.up": Spec((7, 5)),
              "h0.ln.bias": Spec((7,), init="zeros"),
              "big": Spec((BLOCK + 3,), init="uniform", scale=0.5)}
BUFFERS = {"mean": Spec((3,), init="zeros"), "count": Spec((), init="zeros", dtype="int64"),
           "mask": Spec((2,), init="given"),
           "weights": Spec((2,), init="zeros", dtype="float64")}


class Backend:
    """As much of one as a state needs, on NumPy."""

    def __init__(self, parameters: Mapping[str, Spec] = PARAMETERS, buffers: Mapping[str, Spec] = BUFFERS):
        self.parameters, self.buffers = parameters, buffers
        self.bound: tuple[Any, Any] = ({}, {})

    def allocate(self, size: int) -> np.ndarray:
        return np.zeros(size, np.float32)

    def initial(self) -> dict[str, Any]:
        return {"mask": np.array([0.0, -np.inf], np.float32)}

    def bind(self, params: Any, buffers: Any) -> None:
        self.bound = (params, buffers)


def started(seed: int = 0, **options: Any) -> State:
    state = State(Backend(), "adamw", **options)
    state.start(seed)
    return state


# The layout.


SHAPES = st.dictionaries(st.text("abcdef", min_size=1, max_size=4), st.lists(st.integers(0, 40), max_size=3).map(tuple),
                         min_size=1, max_size=12)


@settings(max_examples=80, deadline=None)
@given(shapes=SHAPES, frozen=st.booleans(), plain=st.booleans())
def test_arrays_are_aligned_disjoint_and_inside_their_segment(shapes: dict[str, tuple[int, ...]], frozen: bool,
                                                              plain: bool) -> None:
    specs = {name: Spec(shape) for name, shape in shapes.items()}
    freeze = ["a*"] if frozen and any(n.startswith("a")
                                      for n in shapes) and not all(n.startswith("a") for n in shapes) else []
    no_decay = ["*b"] if plain and any(n.endswith("b") for n in shapes) else []
    layout = FlatLayout(specs, {}, freeze, no_decay)
    for edge in (layout.decays[0][2], layout.trainable, layout.size, layout.gradient):
        assert edge % BLOCK == 0
    taken = np.zeros(layout.size, bool)
    for name, place in layout.places.items():
        assert place.offset % ALIGN == 0 and place.shape == shapes[name]
        low, high = ((layout.trainable, layout.size) if freeze and name.startswith("a") else
                     (layout.decays[0][2], layout.trainable) if no_decay and name.endswith("b")
                     else (0, layout.decays[0][2]))
        assert low <= place.offset and place.offset + place.size <= high
        assert not taken[place.offset:place.offset + place.size].any()
        taken[place.offset:place.offset + place.size] = True
    assert set(layout.places) == set(shapes) and taken.sum() == sum(int(np.prod(s)) for s in shapes.values())


def test_buffers_lie_behind_the_gradients() -> None:
    layout = FlatLayout(PARAMETERS, BUFFERS, ["wte"], ["*ln*"])
    assert (layout.decays[0][2], layout.trainable, layout.size,
            layout.gradient) == (2 * BLOCK, 3 * BLOCK, 4 * BLOCK, 4 * BLOCK)
    assert layout.trainable_names == ["h0.up", "big", "h0.ln.weight", "h0.ln.bias"]
    assert min(p.offset for p in layout.statistics.values()) == layout.trainable
    assert [p.offset % ALIGN for p in layout.statistics.values()] == [0] * len(BUFFERS)


def test_views_are_the_buffer_itself() -> None:
    layout = FlatLayout(PARAMETERS)
    buffer = np.zeros(layout.size, np.float32)
    views = layout.views(buffer)
    for number, view in enumerate(views.values(), 1):
        view += number
    assert views["wte"].shape == (10, 7) and {n: float(v.flat[0])
                                              for n, v in views.items()} == dict(zip(PARAMETERS, range(1, 6)))
    assert np.count_nonzero(buffer) == sum(v.size for v in views.values())


@pytest.mark.parametrize(("options", "words"),
                         [({"freeze": ["wpe"]}, "model.freeze = 'wpe'"),
                          ({"no_decay": ["*.bais"]}, "optimizer.no_decay"),
                                                ({"freeze": ["*"]}, "leaves no parameter")])
def test_patterns_that_cannot_be_meant(options: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words.replace("*", r"\*")):
        FlatLayout(PARAMETERS, **options)


# Starting values.


def test_starting_values_depend_on_seed_and_name_alone() -> None:
    forwards = initial_values(PARAMETERS, 3, {})
    backwards = initial_values(dict(reversed(PARAMETERS.items())), 3, {})
    alone = initial_values({"h0.up": PARAMETERS["h0.up"]}, 3, {})
    assert all(np.array_equal(forwards[name], backwards[name]) for name in PARAMETERS)
    assert np.array_equal(alone["h0.up"], forwards["h0.up"])
    assert not np.array_equal(initial_values(PARAMETERS, 4, {})["wte"], forwards["wte"])
    key = int.from_bytes(hashlib.sha256(b"3/wte").digest()[:16], "little")
    wanted = np.random.Generator(np.random.Philox(key=key)).standard_normal((10, 7)) * 0.02
    assert np.array_equal(forwards["wte"], wanted.astype(np.float32))


def test_starting_values_are_what_the_spec_says() -> None:
    values = initial_values({"n": Spec((200, 200), scale=0.1), "u": Spec((40_000,), init="uniform", scale=0.5),
                             "o": Spec((2,), init="ones"),
                             "g": Spec((1,), init="given")}, 0, {"g": [7]})
    assert abs(values["n"].std() - 0.1) < 0.002 and abs(values["n"].mean()) < 0.002
    assert abs(values["u"].std() - 1 / np.sqrt(12)) < 0.005 and np.abs(values["u"]).max() <= 0.5
    assert values["o"].tolist() == [1, 1] and values["g"].tolist() == [7]
    assert {v.dtype.name for name, v in values.items() if name != "g"} == {"float32"}


def test_a_state_starts_and_is_bound_to_the_model() -> None:
    state = started(freeze=["big"], no_decay=["*ln*"])
    params, buffers = state.backend.bound
    assert state.committed == 0 and set(params) == set(PARAMETERS) and set(buffers) == set(BUFFERS)
    assert np.array_equal(params["wte"], initial_values(PARAMETERS, 0, {})["wte"])
    assert np.isneginf(buffers["mask"][1]) and buffers["count"].dtype == np.int64
    assert set(state.arrays()) == {f"parameter/{n}" for n in PARAMETERS} | {f"buffer/{n}" for n in BUFFERS} | {
        f"optimizer/{slot}/{n}" for slot in ("exp_avg", "exp_avg_sq") for n in PARAMETERS if n != "big"}
    given = np.full((10, 7), 2.0, np.float32)
    state.start(0, {"wte": given})
    assert np.array_equal(params["wte"], given) and params["h0.up"].any()


# From worker to worker.


def scrambled(state: State, seed: int, without: tuple[str, ...] = ()) -> State:
    random = np.random.default_rng(seed)
    for array in (array for name, array in state.arrays().items() if not name.startswith(without)):
        array[...] = random.integers(-100, 100, array.shape)
    return state


def test_load_takes_over_what_another_gave() -> None:
    source, target = scrambled(started(), 1), started()
    target.load({name: array.copy() for name, array in source.arrays().items()}, 17)
    assert target.committed == 17
    assert np.array_equal(source.param, target.param)  # padding included: it is zero in both
    for name, array in source.arrays().items():
        assert np.array_equal(array, target.arrays()[name])


def test_load_refuses_arrays_of_another_model_or_optimizer() -> None:
    arrays = {name: array.copy() for name, array in scrambled(started(), 1).arrays().items()}
    extra = arrays | {"optimizer/sum/wte": np.zeros((10, 7), np.float32)}
    smaller = arrays | {"parameter/wte": np.zeros((1, 7), np.float32)}
    counts = arrays | {"buffer/mean": np.zeros(1, np.float32)}
    less = {name: array for name, array in arrays.items() if name != "parameter/big"}
    for wrong, words in ((extra, "optimizer/sum/wte: the checkpoint has shape (10, 7), .* have no such array"),
                         (smaller, "parameter/wte: the checkpoint has shape (1, 7), .* have shape (10, 7)"),
                         (counts, "buffer/mean: the checkpoint has shape (1,), .* have shape (3,)"),
                         (less, f"parameter/big: the checkpoint has no such array, .* have shape ({BLOCK + 3},)")):
        state = started()
        before = state.param.copy()
        with pytest.raises(RecipeError, match=words.replace("(", r"\(").replace(")", r"\)")):
            state.load(wrong, 18)
        assert state.committed == -1 and np.array_equal(state.param, before)  # torn


@pytest.mark.parametrize("averages", [False, True])
def test_heal_gives_every_member_the_root_s_state(averages: bool) -> None:
    states = [scrambled(started(averages=averages), seed) for seed in range(3)]
    states[0].committed = states[1].committed = -1
    wanted = {name: array.copy() for name, array in states[2].arrays().items()}
    moved = together(3, lambda rank, group: states[rank].heal(group, 2, 9))
    assert [state.committed for state in states] == [9, 9, 9]
    for state in states:
        for name, array in state.arrays().items():
            assert np.array_equal(array, wanted[name]) and array.dtype == wanted[name].dtype, name
    assert set(moved) == {states[0].param.nbytes * (3 + averages)
                          + sum(b.nbytes for b in states[0].buffers.values()) * (1 + averages)}


def test_a_heal_that_breaks_off_leaves_the_state_torn() -> None:
    state, hub = started(), Hub()
    group = hub.form(1, 1, 2)
    hub.kill(0, 1)
    with pytest.raises(Exception, match="lost rank 0"):
        state.heal(group, 0, 9)
    assert state.committed == -1


def test_averages_follow_parameters_and_buffers() -> None:
    state = started(averages=True)
    arrays, means = state.arrays(), {name: array for name, array in state.arrays().items()
                                     if name.startswith("optimizer/ema/")}
    sources = {name: f"{'buffer' if name.partition('/ema/')[2] in state.buffers else 'parameter'}/{name.partition('/ema/')[2]}" for name in means}
    assert set(sources.values()) == {name for name in arrays if not name.startswith("optimizer/")}
    wanted = {name: arrays[source].astype(np.float64) for name, source in sources.items()}
    assert all(np.array_equal(means[name], wanted[name]) for name in means)
    for step, decay in ((1, 2 / 11), (2, 3 / 12), (3, 4 / 13), (9000, 0.999)):
        scrambled(state, step, without=("optimizer/", "buffer/mask"))
        state.average(0.999, step)
        for name, source in sources.items():
            blend = arrays[source].dtype.kind == "f" and source != "buffer/mask"
            wanted[name] = decay * wanted[name] + (1 - decay) * arrays[source] if blend else arrays[source].copy()
            # of values up to 100
            np.testing.assert_allclose(means[name], wanted[name], rtol=1e-5, atol=1e-4, err_msg=name)


# Statistics: what the model itself changes.


def changed(state: State, seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {"mean": random.standard_normal(3).astype(np.float32), "count": np.int64(4),
            "mask": state.buffers["mask"].copy(),
            "weights": random.standard_normal(2)}


def test_buffers_change_by_the_weighted_mean_of_the_changes() -> None:
    state = started()
    gradient = np.zeros(state.layout.gradient, np.float32)
    before = {name: value.copy() for name, value in state.buffers.items()}
    shards, weights = [changed(state, seed) for seed in range(3)], [1.0, 2.0, 5.0]
    for new, weight in zip(shards, weights):
        state.add_statistics(gradient, new, weight)
    assert all(np.array_equal(state.buffers[name], before[name]) for name in before)  # nothing counts before the commit
    state.apply_statistics(gradient, sum(weights))
    for name in ("mean", "weights"):
        wanted = sum(w * s[name].astype(np.float64) for w, s in zip(weights, shards)) / 8
        np.testing.assert_allclose(state.buffers[name], wanted, rtol=1e-5)
    assert state.buffers["count"] == 4 and state.buffers["count"].dtype == np.int64
    assert state.buffers["mask"].tolist() == [0.0, -np.inf]
    assert not gradient[:state.layout.trainable].any()


@pytest.mark.parametrize("start", [0, 2**24 + 1, 2**53 + 2])
def test_integers_count_exactly_however_large(start: int) -> None:
    state = started()
    state.buffers["count"][...] = start
    for _ in range(3):
        gradient = np.zeros(state.layout.gradient, np.float32)
        for weight in (1.0, 3.0, 3.0):
            state.add_statistics(gradient, {**state.buffers, "count": state.buffers["count"] + 1}, weight)
        state.apply_statistics(gradient, 7.0)
    assert int(state.buffers["count"]) == start + 3


def test_a_shard_without_rows_changes_nothing() -> None:
    state = started()
    gradient = np.zeros(state.layout.gradient, np.float32)
    state.add_statistics(gradient, dict(state.buffers), 0.0)
    assert not gradient.any()
