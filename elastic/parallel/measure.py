"""What a training pass of a neutral model costs a worker, piece by piece, on whatever part of it the worker holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from elastic.mesh import Coordinate, Mesh
from elastic.model.backend import ROWS, Batch, Spec, is_chain
from elastic.model.shape_ops import FLOAT, MeterOps, Move, Shape
from elastic.parallel.groups import mirrored
from elastic.parallel.layout import Layout


@dataclass(frozen=True)
class Measure:
    """One pass over a batch: `flops` forward and backward, `forward` of them forward, `kept_bytes` alive when the
    backward pass begins,
    `again_bytes` of the largest part that it computes again, `out_shape` of what goes on to the next piece, and the
    collectives.
    """

    flops: int
    kept_bytes: int
    again_bytes: int = 0
    out_shape: tuple[int, ...] = ()
    moves: tuple[Move, ...] = ()
    forward: int = 0

    @classmethod
    def of(cls, ops: MeterOps, out_shape: tuple[int, ...] = ()) -> Measure:
        return cls(ops.flops, ops.kept_bytes, ops.again_bytes, out_shape, tuple(ops.moves), ops.forward)

    @property
    def out_bytes(self) -> int:
        return FLOAT * int(np.prod(self.out_shape, dtype=np.int64))


def measure(model: Any, batch: Batch) -> Measure:
    """Of a whole neutral model on a batch like this one."""
    ops = MeterOps()
    params = {**shapes(model.parameters, True), **looked_up(batch)}
    model.loss(ops, params, shapes(model.buffers, False), columns_of(batch), 0)
    return Measure.of(ops)


def pieces(model: Any, batch: Batch, layout: Layout, coordinate: Coordinate) -> dict[str, Measure]:
    """Of every piece, whoever's stage it is on, with the parts that `coordinate` holds along tensor and expert; a model
    without has one, "".

    `batch`: the rows of one micro-batch that a worker of the coordinate's place on the expert axis gets.
    """
    if not is_chain(model):
        return {"": measure(model, batch)}
    axes = mirrored(layout, coordinate)
    params = shapes({name: Spec(layout.box(name, coordinate).count) for name in layout.parameters}, True)
    columns, x, found = columns_of(batch), None, {}
    for piece in model.pieces:
        ops = MeterOps(axes)
        mine = {**{name: params[name] for name in model.names(piece)}, **looked_up(batch)}
        x = model.run(ops, mine, piece, x, columns, 0)
        is_last = piece == model.pieces[-1]
        if is_last:
            model.score(ops, x, columns, 0)
        found[piece] = Measure.of(ops, () if is_last else x.shape)
        x = Shape(x.shape, True)  # in the next piece's hands, whoever computes that: kept where it needs it
    return found


def shapes(specs: Mapping[str, Spec], grad: bool) -> dict[str, Shape]:
    return {name: Shape(spec.shape, grad, owned=False) for name, spec in specs.items()}


def columns_of(batch: Batch) -> dict[str, Shape]:
    return {name: Shape(np.shape(column), False, owned=False) for name, column in batch.items() if name != ROWS}


def looked_up(batch: Batch) -> dict[str, Shape]:
    """What a batch has of embedding tables, by the names that models read it."""
    return {f"{ROWS}/{name}": Shape(np.shape(rows), True, owned=False) for name, rows in batch.get(ROWS, {}).items()}


def together(parts: Sequence[Measure]) -> Measure:
    """Pieces one after the other on one worker."""
    return Measure(sum(part.flops for part in parts), sum(part.kept_bytes for part in parts),
                   max(part.again_bytes for part in parts),
                   parts[-1].out_shape, tuple(move for part in parts for move in part.moves),
                   sum(part.forward for part in parts))


def costs_of(model: Any, batch: Batch) -> dict[str, float] | None:
    """What a pass over each piece takes, in operations: what to balance stages by. The same wherever it is asked. None
    without pieces."""
    measured = pieces(model, batch, Layout(model, Mesh(1)), Coordinate()) if is_chain(model) else {}
    return {name: float(one.flops) for name, one in measured.items()} or None
