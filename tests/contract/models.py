"""Small models and backends for contract tests, with starting values, flat buffers and batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from elastic.state import FlatLayout, initial_values, shaped
from nlp.gpt import build
from tests.contract.frameworks import load, settings

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
        result = self.backend.gradients(batch, seed, shaped(flat, {n: self.layout.places[n] for n in self.layout.trainable_names}))
        return flat, result

    def by_name(self, flat: Any) -> dict[str, Any]:
        return shaped(flat, {n: self.layout.places[n] for n in self.layout.trainable_names})


def rig_of(name: str, model: Any, freeze: tuple[str, ...] = (), no_decay: tuple[str, ...] = (), seed: int = 3, **changes: Any) -> Rig:
    backend = load(name, "backend").create(model, settings(**changes))
    layout = FlatLayout(backend.parameters, backend.buffers, freeze, no_decay)
    param = backend.allocate(layout.size)
    given = backend.initial()
    for key, value in initial_values(backend.parameters, seed, given).items():
        view = layout.views(param)[key]
        view[...] = view.new_tensor(value) if hasattr(view, "new_tensor") else value
    state = initial_values(backend.buffers, seed, given)
    backend.bind(layout.views(param), state)
    return Rig(backend, layout, param, state)


def gpt_rig(name: str, freeze: tuple[str, ...] = (), config: dict[str, Any] | None = None, **changes: Any) -> Rig:
    return rig_of(name, build({**SMALL, **(config or {})}, {"vocab_size": VOCAB}), freeze, **changes)


def token_batch(rows: int = 3, seed: int = 0, real: int | None = None) -> dict[str, np.ndarray]:
    """Random tokens; rows from `real` on are fillers."""
    rng = np.random.default_rng(seed)
    weight = (np.arange(rows) < (rows if real is None else real)).astype(np.float32)
    return {"tokens": rng.integers(0, VOCAB, (rows, SMALL["context"] + 1)).astype(np.int32), "row_weight": weight}
