"""A model in pieces, on every backend: forward and backward through them is what `gradients` of the undivided model gives, cut anywhere."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import pytest

from elastic.collective.local import Hub
from elastic.errors import GroupBroken
from elastic.mesh import Mesh
from elastic.model.initial import initial_values
from elastic.parallel.axis import Axis
from elastic.parallel.layout import Layout
from tests.support.frameworks import assert_close, load, names
from tests.support.models import Rig, Tiny, rig_of
from tests.support.sampling import sample
from tests.support.threads import together

every_backend = pytest.mark.parametrize("name", names())
CUTS = [((0, 4),), ((0, 1), (1, 4)), ((0, 2), (2, 4)), ((0, 3), (3, 4)), ((0, 1), (1, 2), (2, 3), (3, 4))]
EXACT = ("reference", "torch")  # cut or whole, they compute the same things one after the other
MODELS = {"plain": Tiny(), "dropout": Tiny(0.3), "recompute": Tiny(0.3, recompute=True), "shared": Tiny(shares=True)}
EVERY = list(product(names(), MODELS))
every_model = pytest.mark.parametrize(("name", "kind"), sample(EVERY, 7, [(name, "recompute") for name in names()]))


def tolerance(name: str) -> float:
    return 1e-12 if name == "reference" else 1e-5


def tiny_rig(name: str, model: Any = None, **changes: Any) -> Rig:
    """A backend over the small model, or a skip while it cannot run pieces."""
    model = model or Tiny()
    rig = rig_of(name, model, precision="float64" if name == "reference" else "float32", **changes)
    if not hasattr(rig.backend, "connect"):
        pytest.skip(f"the {name} backend cannot run a model in pieces yet")
    rig.backend.connect({})
    return rig


def pieces(span: tuple[int, int]) -> Sequence[str]:
    return Tiny.pieces[span[0]:span[1]]


class Line:
    """One backend that plays all stages: micro-batches go forward and back through the same cuts, gradients into one
    buffer."""

    def __init__(self, rig: Rig, cuts: Sequence[tuple[int, int]], halves: bool = False):
        self.rig, self.cuts, self.halves = rig, cuts, halves
        self.flat = rig.backend.allocate(rig.layout.trainable)
        self.into = rig.by_name(self.flat)

    def forward(self, seed: int) -> Any:
        x, model = None, Tiny()
        for span in self.cuts:
            x = self.rig.backend.forward((seed, span), pieces(span), x, model.shape, model.batch(seed), seed)
            assert span[1] == 4 or (x.shape == (np.prod(model.shape),) and x.dtype == self.flat.dtype)
        return x

    def backward(self, seed: int) -> None:
        gradient, backend = None, self.rig.backend
        for span in reversed(self.cuts):
            if self.halves:
                gradient = backend.backward_input((seed, span), gradient)
                backend.backward_weight((seed, span), self.into)
            else:
                gradient = backend.backward((seed, span), gradient, self.into)
        assert gradient is None


def undivided(rig: Rig, seeds: Sequence[int]) -> tuple[Any, list[Any]]:
    flat = rig.backend.allocate(rig.layout.trainable)
    return flat, [rig.backend.gradients(Tiny().batch(seed), seed, rig.by_name(flat)) for seed in seeds]


def assert_equal(name: str, found: Any, wanted: Any) -> None:
    assert np.linalg.norm(wanted) > 0.1
    if name in EXACT:
        assert np.array_equal(found, wanted)
    assert_close(found, wanted, tolerance(name))


@every_model
def test_pieces_give_what_the_undivided_model_gives(name: str, kind: str) -> None:
    rig = tiny_rig(name, MODELS[kind])
    wanted, (result,) = undivided(rig, [5])
    for cuts in CUTS:
        line = Line(rig, cuts)
        found = line.forward(5)
        assert found.weight == result.weight and found.loss_sum == pytest.approx(result.loss_sum, rel=1e-6) and found.buffers == {}
        line.backward(5)
        assert_equal(name, line.flat, wanted)


@every_model
def test_two_halves_are_the_whole_bit_for_bit(name: str, kind: str) -> None:
    rig = tiny_rig(name, MODELS[kind])
    for cuts in CUTS:
        whole, halves = Line(rig, cuts), Line(rig, cuts, halves=True)
        for line in (whole, halves):
            line.flat[:] = 0.125
            line.forward(5)
            line.backward(5)
        assert np.linalg.norm(whole.flat - 0.125) > 0.1
        assert np.array_equal(whole.flat, halves.flat)


@pytest.mark.parametrize("halves", [False, True])
@every_backend
def test_several_micro_batches_are_alive_at_once(name: str, halves: bool) -> None:
    rig = tiny_rig(name)
    wanted, results = undivided(rig, [1, 2, 3, 4])
    line, losses = Line(rig, CUTS[2], halves), {}
    for order in ("f1", "f2", "f3", "b1", "f4", "b2", "b3", "b4"):  # as one forward, one backward has it
        if order[0] == "f":
            losses[int(order[1])] = line.forward(int(order[1])).loss_sum
        else:
            line.backward(int(order[1]))
    assert_close(line.flat, wanted, tolerance(name))  # the tied parameter gets two terms a micro-batch, not their sum
    alone = Line(rig, CUTS[2], halves)
    for seed in (1, 2, 3, 4):
        alone.forward(seed)
        alone.backward(seed)
    assert np.array_equal(line.flat, alone.flat)
    assert [losses[seed] for seed in (1, 2, 3, 4)] == pytest.approx([result.loss_sum for result in results], rel=1e-6)


@every_backend
def test_all_first_halves_may_come_before_the_second(name: str) -> None:
    """Zero bubble: in a middle stage, where weights' gradients of micro-batches are made much later than their inputs'.
    """
    rig, model, span = tiny_rig(name), Tiny(), (1, 3)
    rng = np.random.default_rng(0)
    inputs, gradients = (rng.standard_normal((2, np.prod(model.shape))).astype(rig.param.dtype) for _ in range(2))
    flats, returned = {}, {}
    for kind in ("whole", "halves"):
        flats[kind] = rig.backend.allocate(rig.layout.trainable)
        into = rig.by_name(flats[kind])
        for i in range(2):
            rig.backend.forward(i, pieces(span), inputs[i], model.shape, model.batch(i), i)
        if kind == "whole":
            returned[kind] = [rig.backend.backward(i, gradients[i], into) for i in range(2)]
        else:
            returned[kind] = [rig.backend.backward_input(i, gradients[i]) for i in range(2)]
            assert not flats[kind].any()
            for i in range(2):
                rig.backend.backward_weight(i, into)
    assert np.array_equal(returned["whole"], returned["halves"]) and np.linalg.norm(returned["whole"]) > 0.1
    assert np.array_equal(flats["whole"], flats["halves"]) and np.linalg.norm(flats["whole"]) > 0.1


@every_backend
def test_frozen_parameters_of_pieces_get_no_gradient(name: str) -> None:
    whole, part = tiny_rig(name), tiny_rig(name, freeze=("wte", "h0.up", "h1.*"))
    wanted, _ = undivided(whole, [5])
    for halves in (False, True):
        line = Line(part, CUTS[2], halves)
        line.forward(5)
        line.backward(5)
        assert set(line.into) == {"h0.norm", "h0.bias", "h0.down"}
        for key, value in line.into.items():
            assert_close(value, whole.by_name(wanted)[key], tolerance(name), key)


@every_backend
def test_inference_through_pieces_is_the_metrics(name: str) -> None:
    model = MODELS["dropout"]
    rig = tiny_rig(name, model)
    (wanted, weight), batch = rig.backend.metrics(model.batch(5))["loss"], model.batch(5)
    for cuts in CUTS:
        x = None
        for span in cuts:
            x = rig.backend.infer(pieces(span), x, model.shape, batch)
        assert x["loss"][1] == weight and x["loss"][0] == pytest.approx(wanted, rel=1e-6)


@every_backend
def test_what_is_forgotten_is_let_go(name: str) -> None:
    rig, model = tiny_rig(name), Tiny()
    for end in ("forget", "backward"):
        inputs = rig.backend.allocate(int(np.prod(model.shape)))
        memory = [weakref.ref(inputs.base)]
        gradient = rig.backend.forward("key", pieces((1, 3)), inputs, model.shape, model.batch(0), 0) * 1
        if end == "forget":
            rig.backend.forget()
            with pytest.raises(KeyError):
                rig.backend.backward("key", gradient, {})
        else:
            flat = rig.backend.allocate(rig.layout.trainable)
            memory.append(weakref.ref(flat.base))  # a gradient buffer ends with its generation
            rig.backend.backward("key", gradient, rig.by_name(flat))
            del flat
        del inputs
        gc.collect()
        assert [ref() for ref in memory] == [None] * len(memory)


@pytest.mark.parametrize("when", ["at once", "in the backward pass"])
@every_backend
def test_a_lost_worker_is_a_broken_group(name: str, when: str) -> None:
    """What the collectives raise comes through the framework as it is."""
    model = Tiny()
    tiny_rig(name)
    layout = Layout(model, Mesh(1, tensor=2))

    def work(rank: int, group: Any) -> Any:
        part = copy.copy(model)
        part.parameters = layout.specs(layout.mesh.coordinate(rank))
        rig = tiny_rig(name, part)
        rig.backend.connect({dim: Axis(axis, group) for dim, axis in layout.dims.items()})
        line = Line(rig, CUTS[0])
        if when == "in the backward pass":
            line.forward(5)
        if rank == 1:
            group.abort()
            return
        steps = {"at once": (lambda: line.forward(5), lambda: rig.backend.gradients(model.batch(5), 5, line.into)),
                 "in the backward pass": (lambda: line.backward(5),)}
        for step in steps[when]:
            with pytest.raises(GroupBroken, match="lost rank 1"):
                step()
        rig.backend.forget()

    together(2, work)


@every_model
def test_a_split_model_is_the_undivided_one(name: str, kind: str) -> None:
    """Tensor parallel over 2, whole and in pieces: every worker's gradients are its boxes of the undivided model's."""
    model = MODELS[kind]
    whole = tiny_rig(name, model)
    wanted, (result,) = undivided(whole, [5])
    layout, values = Layout(model, Mesh(1, tensor=2)), initial_values(model.parameters, 3, {})

    def work(rank: int, group: Any) -> Any:
        coordinate = layout.mesh.coordinate(rank)
        boxes = {key: tuple(slice(s, s + n) for s, n in zip(box.start, box.count))
                 for key, box in layout.boxes(coordinate).items()}
        part = copy.copy(model)
        part.parameters = layout.specs(coordinate)
        rig = tiny_rig(name, part, values={key: values[key][box] for key, box in boxes.items()})
        rig.backend.connect({dim: Axis(axis, group) for dim, axis in layout.dims.items()})
        flat, (own,) = undivided(rig, [5])
        lines = [Line(rig, CUTS[2], halves) for halves in (False, True)]
        for line in lines:
            line.forward(5)
            line.backward(5)
        metrics = rig.backend.metrics(model.batch(5))
        return boxes, own, metrics, [rig.by_name(f) for f in (flat, *(line.flat for line in lines))]

    load(name, "backend")
    for boxes, own, metrics, found in together(2, work):
        assert own.weight == result.weight and own.loss_sum == pytest.approx(result.loss_sum, rel=1e-6)
        assert metrics["loss"][0] == pytest.approx(whole.backend.metrics(model.batch(5))["loss"][0], rel=1e-6)
        for gradients in found:
            for key, gradient in gradients.items():
                assert_close(gradient, whole.by_name(wanted)[key][boxes[key]], tolerance(name), key)


@pytest.mark.parametrize(("kind", "early"), [("plain", 4), ("recompute", 8), ("shared", 8)])
def test_torch_leaves_the_weights_to_the_second_half(kind: str, early: int) -> None:
    """Two layers have four products forward, for which there are four of inputs and four of weights, unless they cannot
    be told apart."""
    rig, model = tiny_rig("torch", MODELS[kind]), Tiny()
    from torch.utils._python_dispatch import TorchDispatchMode

    class Products(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += function.name() == "aten::mm"
            return function(*args, **(kwargs or {}))

    x = np.ones(int(np.prod(model.shape)), np.float32)
    rig.backend.forward(0, pieces((1, 3)), x, model.shape, model.batch(0), 0)
    with Products() as first:
        rig.backend.backward_input(0, x)
    with Products() as second:
        rig.backend.backward_weight(0, rig.by_name(rig.backend.allocate(rig.layout.trainable)))
    again = 2 if kind == "recompute" else 0  # the products without a bias of its layers
    assert (first.count - again, second.count) == (early, 8 - early)


def test_torch_compiles_nothing_that_is_split_or_in_pieces() -> None:
    model = Tiny(0.3)
    layout = Layout(model, Mesh(1, tensor=2))

    def work(rank: int, group: Any) -> Any:
        part = copy.copy(model)
        part.parameters = layout.specs(layout.mesh.coordinate(rank))
        found = []
        for compiled in (False, True):
            rig = tiny_rig("torch", part, compile=compiled)
            rig.backend.connect({dim: Axis(axis, group) for dim, axis in layout.dims.items()})
            flat, _ = undivided(rig, [5])
            line = Line(rig, CUTS[2])
            line.forward(5)
            line.backward(5)
            assert rig.backend.compilations() == 0
            found += [flat, line.flat]
        return found

    load("torch", "backend")
    for found in together(2, work):
        assert np.linalg.norm(found[0]) > 0.1
        assert all(np.array_equal(found[0], other) for other in found[1:])


def test_torch_compiles_once_however_often_it_is_connected() -> None:
    rig = tiny_rig("torch", compile=True)
    found = []
    for sizes in ({}, {}, {"d_ff": 1}, {"d_ff": 2, "vocab": 1}, {"vocab": 1}):
        rig.backend.connect({dim: Axis("tensor", Hub().form(0, 0, size)) for dim, size in sizes.items()})
        if 2 not in sizes.values():
            found.append(undivided(rig, [5])[0])
        assert rig.backend.compilations() == 1
    assert np.linalg.norm(found[0]) > 0.1 and all(np.array_equal(found[0], other) for other in found[1:])
