"""Models split over a mesh, in stages too, train as undivided ones do, on every framework: ten steps in float64, workers as threads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import pytest

from elastic.boxes import Box
from elastic.mesh import Mesh
from elastic.parallel.axis import Axis, span
from elastic.parallel.layout import Layout
from nlp import bert, gpt
from recommender import dlrm
from tests.support.axes import Watched, split_ops
from tests.support.descent import CLICKS, IMAGES, LR, ROWS, clicks, hidden, images, start, tokens
from tests.support.frameworks import differentiate, names, ops_of
from tests.support.sampling import sample
from tests.support.threads import together
from vision import vit

STEPS = 10
SMALL = {"layers": 2, "heads": 4, "width": 8}
MODELS: dict[str, tuple[Any, Any]] = {
    "gpt": (gpt.build({**SMALL, "context": 8, "bias": True, "smoothing": 0.1}, {"vocab_size": 11}), tokens),
    "experts": (gpt.build({**SMALL, "context": 8, "experts": 4, "top": 2, "capacity": 2.0, "balance": 0.1},
                          {"vocab_size": 11}), tokens),
    "bert": (bert.build({**SMALL, "context": 8, "smoothing": 0.1, "recompute": True}, {"vocab_size": 11}), hidden),
    "vit": (vit.build({**SMALL, "patch": 4}, IMAGES), images),
    "dlrm": (dlrm.build({"bottom": [8], "top": [12, 5]}, CLICKS), clicks),
    "dcn": (dlrm.build({"arch": "dcn", "top": [12, 5, 8]}, CLICKS), clicks),
    "mf": (dlrm.build({"arch": "mf", "loss": "squared"}, CLICKS), clicks),
}
TWO, STAGES = Mesh(1, tensor=2), Mesh(1, pipeline=4, tensor=2)
MESHES = {"gpt": [TWO, Mesh(1, tensor=4), STAGES],
          "experts": [Mesh(1, expert=2), Mesh(1, tensor=2, expert=2), Mesh(1, pipeline=2, expert=2)],
          "dlrm": [Mesh(1, tensor=4), STAGES], "bert": [TWO, STAGES], "vit": [TWO, STAGES], "mf": [TWO]}
CASES = [(kind, mesh) for kind in MODELS for mesh in MESHES.get(kind, [STAGES])]


@dataclass
class Part:
    """What one worker found: its part of the loss of each step, and of the first gradients and the last parameters, by
    name."""

    losses: np.ndarray
    gradients: dict[str, np.ndarray]
    params: dict[str, np.ndarray]
    calls: dict[str, int]  # collectives by axis


def axes_of(mesh: Mesh, rank: int, group: Any, dropped: tuple[str, int] | None) -> dict[str, Watched]:
    """Every axis of more than one worker, of all those with which `rank` differs along it alone. Of axis `dropped[0]`
    collective `dropped[1]` reaches nobody.
    """
    coordinate, out = mesh.coordinate(rank), {}
    for axis in ("expert", "tensor"):
        ranks = [mesh.rank(replace(coordinate, **{axis: place})) for place in range(getattr(mesh, axis))]
        if len(ranks) > 1:
            out[axis] = Watched(group.subgroup(ranks), dropped[1] if dropped and dropped[0] == axis else None)
    return out


def train(name: str, kind: str, mesh: Mesh, rank: int = 0, group: Any = None, dropped: tuple[str, int] | None = None,
          steps: int = STEPS) -> Part:
    """Plain gradient descent in NumPy on what a worker holds; a framework gives loss and gradients. Members of the
    expert axis share the rows. One worker plays all stages of a pipeline, one after the other.
    """
    model, make = MODELS[kind]
    layout, coordinate, rng = Layout(model, mesh), mesh.coordinate(rank), np.random.default_rng(5)
    axes, ops = axes_of(mesh, rank, group, dropped), ops_of(name, "float64")
    ops.axes = {dim: axes[axis] for dim, axis in layout.dims.items()}
    whole, (low, count) = start(model.parameters), span(ROWS, mesh.expert, coordinate.expert)
    params = {key: value[where(layout.box(key, coordinate))] for key, value in whole.items()}
    losses, first = [], {}
    for step in range(steps):
        batch = {key: value[low:low + count] for key, value in make(rng).items()}
        total, gradients = through_stages(name, ops, layout, params, model, batch, 100 + step)
        if mesh.expert > 1:
            for key in gradients:
                if "expert" not in layout.axes(key):  # past the counting: what is tested is the model's own
                    gradients[key] = Axis.sum(axes["expert"], gradients[key].ravel()).reshape(gradients[key].shape)
        losses.append(total / ROWS)
        first = first or gradients
        params = {key: value - LR * gradients[key] for key, value in params.items()}
    return Part(np.array(losses), first, params, {axis: found.calls for axis, found in axes.items()})


def through_stages(name: str, ops: Any, layout: Layout, params: Mapping[str, np.ndarray], model: Any,
                   batch: Mapping[str, np.ndarray],
                   seed: int) -> tuple[float, dict[str, np.ndarray]]:
    """The loss and the gradients per row, of stages that get nothing from each other but one array, and back its
    gradient."""
    def stage(depth: int, x: np.ndarray | None, cotangent: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        reads = layout.reads[depth]

        def function(ops: Any, *leaves: Any) -> Any:
            columns, out = {key: ops.constant(value) for key, value in batch.items()}, None if x is None else leaves[-1]
            for piece in layout.depths[depth]:
                out = model.run(ops, dict(zip(reads, leaves)), piece, out, columns, seed)
            return model.score(ops, out, columns, seed)[0] if depth == len(layout.depths) - 1 else out

        (found,), slopes = differentiate(name, function, [*(params[key] for key in reads), *([] if x is None else [x])],
                                         "float64", ops, [cotangent])
        return found, slopes

    inputs: list[np.ndarray | None] = [None]
    for depth in range(len(layout.depths) - 1):
        inputs.append(stage(depth, inputs[depth], np.zeros(()))[0])
    gradients, slope, total = {key: np.zeros(value.shape)
                               for key, value in params.items()}, np.array(1.0 / ROWS), np.zeros(())
    for depth in reversed(range(len(layout.depths))):
        found, slopes = stage(depth, inputs[depth], slope)
        total = found if depth == len(layout.depths) - 1 else total
        for key, gradient in zip(layout.reads[depth], slopes):
            gradients[key] += gradient
        slope = slopes[-1]
    return float(total), gradients


def where(box: Box) -> tuple[slice, ...]:
    return tuple(slice(start, start + count) for start, count in zip(box.start, box.count))


@cache
def undivided(kind: str, steps: int = STEPS) -> Part:
    return train("reference", kind, Mesh(1), steps=steps)


def assert_parity(name: str, kind: str, mesh: Mesh, dropped: tuple[str, int] | None = None,
                  steps: int = STEPS) -> dict[str, int]:
    """The numbers of collectives by axis."""
    wanted, layout = undivided(kind, steps), Layout(MODELS[kind][0], mesh)
    workers = replace(mesh, pipeline=1)
    parts = together(workers.world_size, lambda rank, group: train(name, kind, mesh, rank, group, dropped, steps))
    scale = np.sqrt(sum(np.sum(value ** 2) for value in wanted.gradients.values()))
    assert scale > 1e-2 and (steps == 1 or np.ptp(wanted.losses) > 1e-4)
    for rank, part in enumerate(parts):
        coordinate = workers.coordinate(rank)
        losses = sum(parts[workers.rank(replace(coordinate, expert=place))].losses for place in range(mesh.expert))
        np.testing.assert_allclose(losses, wanted.losses, rtol=0, atol=1e-8)
        for key in wanted.gradients:
            box = layout.box(key, coordinate)
            assert np.linalg.norm(part.gradients[key] - wanted.gradients[key][where(box)]) <= 1e-9 * scale, key
            np.testing.assert_allclose(part.params[key], wanted.params[key][where(box)], rtol=0, atol=1e-8, err_msg=key)
    return parts[0].calls


@pytest.mark.parametrize(("name", "case"), sample(list(product(names(), CASES)), 18), ids=str)
def test_a_mesh_trains_as_one_worker(name: str, case: tuple[str, Mesh]) -> None:
    split_ops(name)
    assert_parity(name, *case)


@pytest.mark.parametrize(("kind", "mesh"), [("gpt", TWO), ("experts", Mesh(1, tensor=2, expert=2)), ("dlrm", TWO)])
def test_a_dropped_collective_is_seen(kind: str, mesh: Mesh) -> None:
    calls = assert_parity("reference", kind, mesh, steps=1)
    assert all(count > 3 for count in calls.values())
    for axis, count in calls.items():
        for number in range(count):
            with pytest.raises(AssertionError):
                assert_parity("reference", kind, mesh, (axis, number), steps=1)
