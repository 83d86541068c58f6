"""What holds of the TensorFlow backend alone where dims are split: its graphs outlive generations, places and lost peers."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

from elastic.errors import GroupBroken
from elastic.mesh import Coordinate, Mesh
from elastic.model.initial import initial_values
from elastic.parallel.axis import Axis
from elastic.parallel.layout import Layout
from tests.support import models
from tests.support.frameworks import assert_close
from tests.support.models import Rig, Tiny, rig_of
from tests.support.threads import together

pytest.importorskip("tensorflow", reason="tensorflow is not installed")

SIZE = 2


@pytest.fixture(autouse=True)
def even_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every place has parts of the same shapes, so that a worker can change places."""
    monkeypatch.setattr(models, "VOCAB", 12)


def boxes_of(model: Tiny, part: int) -> dict[str, Any]:
    boxes = Layout(model, Mesh(1, tensor=SIZE)).boxes(Coordinate(tensor=part))
    return {key: tuple(slice(s, s + n) for s, n in zip(box.start, box.count)) for key, box in boxes.items()}


def split_rig(model: Tiny, part: int, **changes: Any) -> Rig:
    own = copy.copy(model)
    own.parameters = Layout(model, Mesh(1, tensor=SIZE)).specs(Coordinate(tensor=part))
    rig = rig_of("tensorflow", own, **changes)
    take(rig, model, part)
    return rig


def take(rig: Rig, model: Tiny, part: int) -> None:
    """The parameters of a place into the worker's buffer."""
    values = initial_values(model.parameters, 3, {})
    for key, box in boxes_of(model, part).items():
        rig.layout.views(rig.param)[key][...] = values[key][box]


def connect(rig: Rig, group: Any) -> None:
    rig.backend.connect({dim: Axis("tensor", group) for dim in Tiny.layout})


def whole_step(rig: Rig, model: Tiny) -> tuple[dict[str, np.ndarray], float]:
    """The gradients by `gradients`, and again through pieces, which must agree; the loss."""
    flat, result = rig.gradient(model.batch(5), 5)
    other, x = rig.backend.allocate(len(flat)), None
    spans = (model.pieces[:2], model.pieces[2:])
    for span in spans:
        x = rig.backend.forward(span, span, x, model.shape, model.batch(5), 5)
    slope = None
    for span in reversed(spans):
        slope = rig.backend.backward(span, slope, rig.by_name(other))
    assert_close(other, flat, 1e-5)
    assert x is not None and x.loss_sum == pytest.approx(result.loss_sum, rel=1e-6)
    return rig.by_name(flat), result.loss_sum


def assert_boxes(found: dict[str, np.ndarray], model: Tiny, part: int, tolerance: float = 1e-5) -> None:
    rig = rig_of("tensorflow", model)
    wanted = rig.by_name(rig.gradient(model.batch(5), 5)[0])
    for key, box in boxes_of(model, part).items():
        assert_close(found[key], wanted[key][box], tolerance, f"{key} of place {part}")


def test_new_groups_and_other_places_trace_nothing_again() -> None:
    model = Tiny(0.3)
    rigs = [split_rig(model, part) for part in range(SIZE)]
    traced = []
    for generation in range(3):
        places = [(worker + generation) % SIZE for worker in range(SIZE)]
        for worker, place in enumerate(places):
            take(rigs[worker], model, place)

        def work(place: int, group: Any, places: list[int] = places) -> Any:
            rig = rigs[places.index(place)]
            connect(rig, group)
            return whole_step(rig, model)[0]

        for place, found in enumerate(together(SIZE, work)):
            assert_boxes(found, model, place)
        traced.append([rig.backend.compilations() for rig in rigs])
    assert traced == [[3, 3]] * 3  # `gradients` and two ranges of pieces


class Asking(Tiny):
    """Its loss on a worker depends on the place that it asks for."""

    def score(self, ops: Any, x: Any, batch: Any, seed: int) -> tuple[Any, Any]:
        loss, weight = super().score(ops, x, batch, seed)
        return ops.multiply(loss, 1.0 + ops.part("d_ff")), weight


def test_a_model_that_asks_for_its_place_is_traced_once_for_each() -> None:
    model = Asking()
    rig, peer = split_rig(model, 0), split_rig(model, 0)
    losses, traced = [], []
    for place in (0, 1, 0, 1):
        def work(rank: int, group: Any, place: int = place) -> Any:
            mine = rig if rank == place else peer
            connect(mine, group)
            return mine.gradient(model.batch(5), 5)[1].loss_sum

        losses.append(together(SIZE, work)[place])
        traced.append(rig.backend.compilations())
    assert losses[1] == pytest.approx(2 * losses[0], rel=1e-6) and losses[:2] == losses[2:]
    assert traced == [1, 2, 2, 2]


def test_a_compiled_split_step_gives_the_same_gradient() -> None:
    model = Tiny(0.3)

    def work(rank: int, group: Any) -> Any:
        rig = split_rig(model, rank, compile=True)
        connect(rig, group)
        return whole_step(rig, model)[0]

    for part, found in enumerate(together(SIZE, work)):
        assert_boxes(found, model, part, 1e-4)


class Dying(Axis):
    """Leaves the group in place of its collective number `last`."""

    last = 4

    def sum(self, x: Any) -> Any:
        self.last -= 1
        if not self.last:
            self.group.abort()
        return super().sum(x)


def test_a_lost_peer_is_a_broken_group_and_the_next_generation_works() -> None:
    model = Tiny()
    rigs = [split_rig(model, part) for part in range(SIZE)]

    def broken(rank: int, group: Any) -> None:
        axis = (Dying if rank else Axis)("tensor", group)
        rigs[rank].backend.connect(dict.fromkeys(Tiny.layout, axis))
        with pytest.raises(GroupBroken):
            rigs[rank].gradient(model.batch(5), 5)

    together(SIZE, broken)
    traced = [rig.backend.compilations() for rig in rigs]

    def whole(rank: int, group: Any) -> Any:
        connect(rigs[rank], group)
        return rigs[rank].by_name(rigs[rank].gradient(model.batch(5), 5)[0])

    for part, found in enumerate(together(SIZE, whole)):
        assert_boxes(found, model, part)
    assert [rig.backend.compilations() for rig in rigs] == traced == [1, 1]


def test_frozen_parameters_do_not_change_the_others_bits() -> None:
    """A first half computes the same whatever the second is asked for."""
    model = Tiny()
    found = {}
    for freeze in ((), ("h0.*",)):
        rig = rig_of("tensorflow", model, freeze)
        flat = rig.backend.allocate(rig.layout.trainable)
        for _ in range(2):
            rig.backend.forward(0, model.pieces, None, model.shape, model.batch(5), 5)
            rig.backend.backward(0, None, rig.by_name(flat))
        found[freeze] = rig.by_name(flat)
    assert set(found["h0.*",]) == {key for key in found[()] if not key.startswith("h0.")}
    for key, value in found["h0.*",].items():
        assert np.array_equal(value, found[()][key]) and np.linalg.norm(value) > 1e-3
