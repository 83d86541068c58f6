"""What the platform asks of a framework and of a model: protocols, owned here, implemented in `backends/`, `nlp/` and so on.

A buffer is a flat float32 array on the worker's device: a NumPy array on the CPU (whatever the framework), a torch
tensor on a GPU. Both slice, reshape and add in place with the same syntax, which is all the platform does with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

Array = Any  # an array of the framework at hand
Buffer = Any  # a flat, 64-byte-aligned float32 array on the worker's device
Batch = Mapping[str, Any]  # NumPy arrays, one per column, rows first


@dataclass(frozen=True)
class Spec:
    """One named array of a model. `dims` names each dimension; layouts map these names to mesh axes.

    `init` is "normal" (standard deviation `scale`), "uniform" (-scale..scale), "zeros", "ones" or "given" (the values
    come with the model, as from a user's own module).
    """

    shape: tuple[int, ...]
    dims: tuple[str, ...] = ()
    init: str = "normal"
    scale: float = 0.02
    dtype: str = "float32"


class Model(Protocol):
    """A model without a framework: named arrays and a function of them that has no side effects."""

    parameters: Mapping[str, Spec]
    buffers: Mapping[str, Spec]

    def loss(self, ops: Any, params: Mapping[str, Array], state: Mapping[str, Array], batch: Mapping[str, Array],
             seed: int) -> tuple[Array, Array, Mapping[str, Array]]:
        """The sum of the loss over the batch, the weight it is to be divided by, and the new buffers."""

    def metrics(self, ops: Any, params: Mapping[str, Array], state: Mapping[str, Array],
                batch: Mapping[str, Array]) -> Mapping[str, tuple[Array, Array]]:
        """Sums and weights by name for evaluation, without dropout; always with "loss".

        In place of a sum there may be an array, one value a row, for the model's tally: see `Tally`.
        """


class Tally(Protocol):
    """Figures that are no means over rows, as the area under a curve: computed from whole numbers, counted batch by batch.

    A model that has some offers `tally()`, which gives a new one. Whole numbers below 2^53 add up the same in any order.
    """

    @property
    def counts(self) -> np.ndarray:
        """float64, one-dimensional, always of the same length."""

    def add(self, batch: Batch, found: Mapping[str, tuple[Any, float]]) -> None:
        """Counts one batch; `found` is what `metrics` said of it, arrays as NumPy arrays."""

    def figures(self, counts: np.ndarray, means: Mapping[str, float]) -> Mapping[str, float]:
        """From the counts of all batches and the means of all metrics."""


@dataclass(frozen=True)
class ShardResult:
    """What one logical shard contributes beside its gradient. `buffers` are the new buffers, as NumPy arrays."""

    loss_sum: float
    weight: float
    buffers: Mapping[str, Any]


@dataclass(frozen=True)
class UpdateRule:
    """One optimizer step on flat buffers; plain numbers, already scheduled for this step.

    The gradient is multiplied by `scale` first (division by the weight, clipping). `step` counts from 1.
    """

    name: str
    lr: float
    weight_decay: float
    scale: float
    step: int
    beta1: float
    beta2: float
    eps: float
    momentum: float


class Backend(Protocol):
    """One framework on one device. Built once per worker process; it outlives generations, so nothing compiles twice."""

    name: str
    parameters: Mapping[str, Spec]
    buffers: Mapping[str, Spec]

    def allocate(self, size: int) -> Buffer:
        """A zeroed buffer of `size` float32 elements on the device, 64-byte aligned."""

    def initial(self) -> Mapping[str, Any]:
        """NumPy values of the arrays whose spec says "given" (a user's own module); else empty."""

    def bind(self, params: Mapping[str, Buffer], buffers: Mapping[str, Any]) -> None:
        """From now on the model's parameters are these shaped views, and its buffers these NumPy arrays."""

    def gradients(self, batch: Batch, seed: int, into: Mapping[str, Buffer]) -> ShardResult:
        """Adds the gradient of one shard's loss sum to `into` (shaped views of a flat buffer, trainable names only)."""

    def metrics(self, batch: Batch) -> Mapping[str, tuple[Any, float]]:
        """Sums and weights of one evaluation shard; what is no scalar comes as a NumPy array."""

    def update(self, rule: UpdateRule, param: Buffer, grad: Buffer, slots: Mapping[str, Buffer], block: int) -> None:
        """Applies `rule` in place to a flat range, block by block. `grad` may be overwritten."""

    def squared_norms(self, grad: Buffer, block: int) -> Any:
        """The squared norm of every block of `grad`, float64 NumPy, computed block by block."""

    def compilations(self) -> int:
        """How many traces or compilations this process has done so far."""


SLOTS = {"adamw": ("exp_avg", "exp_avg_sq"), "adam": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum",), "adagrad": ("sum",)}
