"""Small models and backends for contract tests, with starting values, flat buffers and batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from elastic.model.backend import Spec
from elastic.model.initial import initial_values
from elastic.state.flat_layout import FlatLayout, shaped
from nlp.gpt import build
from tests.support.frameworks import door, settings

VOCAB = 13
SMALL = {"layers": 2, "heads": 2, "width": 16, "context": 8}


@dataclass
class Rig:
    """A backend bound to a flat parameter buffer."""

    backend: Any
    layout: FlatLayout
    param: Any
    state: dict[str, np.ndarray]

    def gradient(self, batch: Any, seed: int = 1, start: float = 0.0) -> tuple[Any, Any]:
        """(flat gradient added to `start`, result)."""
        flat = self.backend.allocate(self.layout.trainable)
        flat[:] = start
        result = self.backend.gradients(batch, seed,
                                        shaped(flat, {n: self.layout.places[n] for n in self.layout.trainable_names}))
        return flat, result

    def by_name(self, flat: Any) -> dict[str, Any]:
        return shaped(flat, {n: self.layout.places[n] for n in self.layout.trainable_names})


def rig_of(name: str, model: Any, freeze: tuple[str, ...] = (), no_decay: tuple[str, ...] = (), seed: int = 3,
           values: dict[str, np.ndarray] | None = None, **changes: Any) -> Rig:
    """`values`: in place of what the seed says, the parameters to start from."""
    backend = door(name).create(model, settings(**changes))
    layout = FlatLayout(backend.parameters, backend.buffers, freeze, no_decay)
    param = backend.allocate(layout.size)
    given = backend.initial()
    for key, value in (values or initial_values(backend.parameters, seed, given)).items():
        view = layout.views(param)[key]
        view[...] = view.new_tensor(value) if hasattr(view, "new_tensor") else value
    state = initial_values(backend.buffers, seed, given)
    backend.bind(layout.views(param), state)
    return Rig(backend, layout, param, state)


def gpt_rig(name: str, freeze: tuple[str, ...] = (), config: dict[str, Any] | None = None, **changes: Any) -> Rig:
    return rig_of(name, build({**SMALL, **(config or {})}, {"vocab_size": VOCAB}), freeze, **changes)


class Tiny:
    """A small `elastic.model.backend.Chain`: an embedding, two layers with biases split along d_ff, and a head tied to
    the embedding."""

    layout = {"d_ff": "tensor", "vocab": "tensor"}
    pieces = ("embed", "h0", "h1", "head")
    width, d_ff, rows, time = 8, 12, 2, 3
    buffers: dict[str, Spec] = {}

    def __init__(self, rate: float = 0.0, recompute: bool = False, shares: bool = False):
        """`shares`: both layers read the first one's parameters."""
        self.rate, self.recompute, self.shares = rate, recompute, shares
        self.parameters = {"wte": Spec((VOCAB, self.width), ("vocab", "d_model"), scale=0.5)}
        for h in ("h0",) if shares else ("h0", "h1"):
            self.parameters |= {
                f"{h}.norm": Spec((self.width,), ("d_model",), "ones"),
                f"{h}.up": Spec((self.width, self.d_ff), ("d_model", "d_ff"), scale=0.3),
                f"{h}.bias": Spec((self.d_ff,), ("d_ff",), "uniform", 0.1),
                f"{h}.down": Spec((self.d_ff, self.width), ("d_ff", "d_model"), scale=0.3)}

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what passes from piece to piece."""
        return (self.rows, self.time, self.width)

    def batch(self, seed: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(seed)
        tokens = rng.integers(0, VOCAB, (self.rows, self.time + 1)).astype(np.int32)
        return {"tokens": tokens, "row_weight": np.float32([1.0, 0.5])}

    def names(self, piece: str) -> tuple[str, ...]:
        layer = "h0" if piece == "h1" and self.shares else piece
        return tuple(n for n in self.parameters if n.startswith(f"{layer}.")) or ("wte",)

    def run(self, ops: Any, params: Any, piece: str, x: Any, batch: Any, seed: int | None) -> Any:
        if piece == "embed":
            return ops.gather(params["wte"], ops.narrow(batch["tokens"], 1, 0, self.time), "vocab", VOCAB)
        if piece == "head":
            return ops.contract("btd,vd->btv", ops.enter(x, "vocab"), params["wte"])

        def layer(x: Any, norm: Any, up: Any, bias: Any, down: Any) -> Any:
            hidden = ops.gelu(ops.contract("btd,df->btf", ops.enter(ops.layer_norm(x, norm), "d_ff"), up, bias))
            made = ops.leave(ops.contract("btf,fd->btd", hidden, down), "d_ff")
            return ops.add(x, ops.dropout(made, self.rate, seed, piece) if self.rate and seed is not None else made)

        weights = [params[name] for name in self.names(piece)]
        return ops.recompute(layer, x, *weights) if self.recompute else layer(x, *weights)

    def score(self, ops: Any, x: Any, batch: Any, seed: int) -> tuple[Any, Any]:
        weights = ops.multiply(ops.reshape(batch["row_weight"], (self.rows, 1)), ops.constant(np.ones((1, self.time))))
        return ops.cross_entropy(x, ops.narrow(batch["tokens"], 1, 1, self.time), weights, "vocab",
                                 VOCAB), ops.sum(weights)

    def measure(self, ops: Any, x: Any, batch: Any) -> dict[str, tuple[Any, Any]]:
        return {"loss": self.score(ops, x, batch, 0)}

    def _last(self, ops: Any, params: Any, batch: Any, seed: int | None) -> Any:
        x = None
        for piece in self.pieces:
            x = self.run(ops, params, piece, x, batch, seed)
        return x

    def loss(self, ops: Any, params: Any, state: Any, batch: Any, seed: int) -> tuple[Any, Any, dict[str, Any]]:
        return *self.score(ops, self._last(ops, params, batch, seed), batch, seed), {}

    def metrics(self, ops: Any, params: Any, state: Any, batch: Any) -> dict[str, tuple[Any, Any]]:
        return self.measure(ops, self._last(ops, params, batch, None), batch)


def token_batch(rows: int = 3, seed: int = 0, real: int | None = None) -> dict[str, np.ndarray]:
    """Random tokens; rows from `real` on are fillers."""
    rng = np.random.default_rng(seed)
    weight = (np.arange(rows) < (rows if real is None else real)).astype(np.float32)
    return {"tokens": rng.integers(0, VOCAB, (rows, SMALL["context"] + 1)).astype(np.int32), "row_weight": weight}


def assert_evaluates(rig: Rig, batch: Any, wanted: float) -> None:
    """To this mean loss, again and again, and without a trace in gradients or state."""
    rig.backend.rehearse(batch, lambda: rig.by_name(rig.backend.allocate(rig.layout.trainable)))
    before, state = rig.gradient(batch)[0].copy(), {name: value.copy() for name, value in rig.state.items()}
    for _ in range(2):
        total, weight = rig.backend.metrics(batch)["loss"]
        assert total / weight == pytest.approx(wanted, rel=1e-6)
    assert np.array_equal(rig.gradient(batch)[0], before) and all(np.array_equal(rig.state[name], state[name])
                                                                  for name in state)
