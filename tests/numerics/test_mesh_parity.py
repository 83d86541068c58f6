"""Models split over a mesh train as undivided ones do, on every framework: ten steps in float64, workers as threads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from elastic.mesh import Mesh
from elastic.parallel.axis import Axis, span
from elastic.parallel.layout import Box, Layout
from nlp import bert, gpt
from recommender import dlrm
from tests.contract.frameworks import differentiate, names, ops_of
from tests.contract.threads import together
from tests.numerics.test_parity import CLICKS, IMAGES, LR, ROWS, clicks, hidden, images, start, tokens
from vision import vit

STEPS = 10
SMALL = {"layers": 2, "heads": 4, "width": 8}
MODELS: dict[str, tuple[Any, Any]] = {
    "gpt": (gpt.build({**SMALL, "context": 8, "bias": True, "smoothing": 0.1}, {"vocab_size": 11}), tokens),
    "bert": (bert.build({**SMALL, "context": 8, "smoothing": 0.1, "recompute": True}, {"vocab_size": 11}), hidden),
    "vit": (vit.build({**SMALL, "patch": 4}, IMAGES), images),
    "dlrm": (dlrm.build({"bottom": [8], "top": [12, 5]}, CLICKS), clicks),
    "dcn": (dlrm.build({"arch": "dcn", "top": [12, 5, 8]}, CLICKS), clicks),
    "mf": (dlrm.build({"arch": "mf", "loss": "squared"}, CLICKS), clicks),
}
MESHES = {"gpt": [Mesh(1, tensor=2), Mesh(1, tensor=4)], "bert": [Mesh(1, tensor=2)], "vit": [Mesh(1, tensor=2)],
          "dlrm": [Mesh(1, tensor=2), Mesh(1, tensor=4)], "dcn": [Mesh(1, tensor=2)], "mf": [Mesh(1, tensor=2)]}
CASES = [(kind, mesh) for kind, meshes in MESHES.items() for mesh in meshes]


class Deaf(Axis):
    """The collective called `dropped` by number reaches nobody, on any worker."""

    def __init__(self, name: str, group: Any, dropped: int | None):
        super().__init__(name, group)
        self.calls, self.dropped = 0, dropped

    def _drops(self) -> bool:
        self.calls += 1
        return self.calls - 1 == self.dropped

    def sum(self, x: Any) -> Any:
        return x * 1 if self._drops() else super().sum(x)

    def exchange(self, x: Any, counts: Any, out_counts: Any) -> Any:
        return x * 1 if self._drops() else super().exchange(x, counts, out_counts)


@dataclass
class Part:
    """What one worker found: its part of the loss of each step, and of the first gradients and the last parameters, by name."""

    losses: np.ndarray
    gradients: dict[str, np.ndarray]
    params: dict[str, np.ndarray]


def axes_of(mesh: Mesh, rank: int, group: Any, dropped: int | None) -> dict[str, Deaf]:
    """Every axis of more than one worker, of all those with which `rank` differs along it alone."""
    seat, out = mesh.seat(rank), {}
    for axis in ("expert", "tensor"):
        ranks = [mesh.rank(replace(seat, **{axis: place})) for place in range(getattr(mesh, axis))]
        if len(ranks) > 1:
            out[axis] = Deaf(axis, group.subgroup(ranks), dropped)
    return out


def train(name: str, kind: str, mesh: Mesh, rank: int = 0, group: Any = None, dropped: int | None = None, steps: int = STEPS) -> Part:
    """Plain gradient descent in NumPy on what a worker holds; a framework gives loss and gradients. Members of the expert axis share the rows."""
    model, make = MODELS[kind]
    layout, seat, rng = Layout(model, mesh), mesh.seat(rank), np.random.default_rng(5)
    axes, ops = axes_of(mesh, rank, group, dropped), ops_of(name, "float64")
    ops.axes = {dim: axes[axis] for dim, axis in layout.dims.items()}
    whole, (low, count) = start(model.parameters), span(ROWS, mesh.expert, seat.expert)
    params = {key: whole[key][where(box)] for key, box in layout.boxes(seat).items()}
    losses, first = [], {}
    for step in range(steps):
        batch = {key: value[low:low + count] for key, value in make(rng).items()}

        def function(ops: Any, *leaves: Any, batch: Mapping[str, np.ndarray] = batch, step: int = step) -> Any:
            return model.loss(ops, dict(zip(params, leaves)), {}, {key: ops.constant(value) for key, value in batch.items()}, 100 + step)[0]

        (total,), found = differentiate(name, function, list(params.values()), "float64", ops, [np.array(1.0)])
        gradients = {key: np.asarray(g, np.float64) / ROWS for key, g in zip(params, found)}
        for shared in layout.shared(seat):
            for key in shared.names:
                gradients[key] = Axis.sum(axes["expert"], gradients[key].ravel()).reshape(gradients[key].shape)
        losses.append(float(total) / ROWS)
        first = first or gradients
        params = {key: value - LR * gradients[key] for key, value in params.items()}
    return Part(np.array(losses), first, params)


def where(box: Box) -> tuple[slice, ...]:
    return tuple(slice(start, start + count) for start, count in zip(box.start, box.count))


@cache
def undivided(kind: str, steps: int = STEPS) -> Part:
    return train("reference", kind, Mesh(1), steps=steps)


def assert_parity(name: str, kind: str, mesh: Mesh, dropped: int | None = None, steps: int = STEPS) -> None:
    wanted, layout = undivided(kind, steps), Layout(MODELS[kind][0], mesh)
    parts = together(mesh.world_size, lambda rank, group: train(name, kind, mesh, rank, group, dropped, steps))
    scale = np.sqrt(sum(np.sum(value ** 2) for value in wanted.gradients.values()))
    assert scale > 1e-2 and np.abs(wanted.losses - wanted.losses[0]).max() > 1e-4 * (steps > 1)
    for rank, part in enumerate(parts):
        seat = mesh.seat(rank)
        losses = sum(parts[mesh.rank(replace(seat, expert=place))].losses for place in range(mesh.expert))
        np.testing.assert_allclose(losses, wanted.losses, rtol=0, atol=1e-8)
        for key, box in layout.boxes(seat).items():
            assert np.linalg.norm(part.gradients[key] - wanted.gradients[key][where(box)]) <= 1e-9 * scale, key
            np.testing.assert_allclose(part.params[key], wanted.params[key][where(box)], rtol=0, atol=1e-8, err_msg=key)


def split_ops(name: str) -> None:
    if not hasattr(ops_of(name, "float64"), "_enter"):
        pytest.skip(f"the {name} backend has no kernels between workers yet")


@pytest.mark.parametrize(("kind", "mesh"), CASES, ids=[f"{kind}-tensor{mesh.tensor}-expert{mesh.expert}" for kind, mesh in CASES])
@pytest.mark.parametrize("name", names())
def test_a_mesh_trains_as_one_worker(name: str, kind: str, mesh: Mesh) -> None:
    split_ops(name)
    assert_parity(name, kind, mesh)
