"""What the platform asks of a framework and of a model: protocols, owned here, implemented in `backends/`, `nlp/` and so on.

A buffer is a flat float32 array on the worker's device: a NumPy array on the CPU (whatever the framework), a torch
tensor on a GPU. Both slice, reshape and add in place with the same syntax, which is all the platform does with them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeGuard, runtime_checkable

from elastic.errors import UserError
from elastic.model.tally import Tally

Array = Any  # an array of the framework at hand
Buffer = Any  # a flat, 64-byte-aligned float32 array on the worker's device
Batch = Mapping[str, Any]  # NumPy arrays, one per column, rows first; where there are tables, under ROWS those of features
ROWS = "rows"


@dataclass(frozen=True)
class Spec:
    """One named array of a model. `dims` names each dimension; layouts map these names to mesh axes.

    `init` is "normal" (standard deviation `scale`), "uniform" (-scale..scale), "zeros", "ones", "values" (as `values`
    lists them, in C order) or "given" (the values come with the model, as from a user's own module). `trainable` false:
    the model itself says that the array is frozen. `whole`: an update needs all of it at once, so no optimizer may be
    sharded.
    """

    shape: tuple[int, ...]
    dims: tuple[str, ...] = ()
    init: str = "normal"
    scale: float = 0.02
    dtype: str = "float32"
    values: tuple[float, ...] = ()
    trainable: bool = True
    whole: bool = False

    @classmethod
    def given(cls, values: Any, trainable: bool = True, whole: bool = False) -> Spec:
        """Of an array that comes with its model, as NumPy."""
        return cls(tuple(values.shape), (), "given", dtype=values.dtype.name, trainable=trainable, whole=whole)


class Model(Protocol):
    """A model without a framework: named arrays and a function of them that has no side effects."""

    parameters: Mapping[str, Spec]
    buffers: Mapping[str, Spec]

    @abstractmethod
    def loss(self, ops: Any, params: Mapping[str, Array], state: Mapping[str, Array], batch: Mapping[str, Array],
             seed: int) -> tuple[Array, Array, Mapping[str, Array]]:
        """The sum of the loss over the batch, the weight it is to be divided by, and the new buffers."""

    def metrics(self, ops: Any, params: Mapping[str, Array], state: Mapping[str, Array],
                batch: Mapping[str, Array]) -> Mapping[str, tuple[Array, Array]]:
        """Sums and weights by name for evaluation, without dropout; always with "loss".

        In place of a sum there may be an array, one value a row, for the model's tally: see `Tally`.
        """


class Adapted:
    """A user's own model as the door of its framework adapts it, for that framework's backend alone."""

    parameters: Mapping[str, Spec]
    buffers: Mapping[str, Spec]
    notes: tuple[str, ...] = ()  # what whoever starts a run with it should know, a sentence each
    given: Mapping[str, Any]  # the NumPy values that it was made with, parameters and buffers


@runtime_checkable
class Pieces(Protocol):
    """What the platform asks of a `Chain` beside its kernels: where it may be cut."""

    layout: Mapping[str, str]
    pieces: Sequence[str]

    def names(self, piece: str) -> Sequence[str]:
        """The parameters that a piece reads. Two pieces may read the same one (a head tied to the embedding)."""


class Chain(Model, Pieces, Protocol):
    """A model in pieces, one after the other: what can be laid out on a mesh. `elastic.model.layers.Chained` makes a
    `Model` of it.

    `layout` names the axis along which each dim may be split, {"heads": "tensor", "d_ff": "tensor"}; the model puts
    `ops.enter` and
    `ops.leave` around what is split. Where no axis has more than one worker they do nothing.
    """

    @abstractmethod
    def run(self, ops: Any, params: Mapping[str, Array], piece: str, x: Array | None, batch: Mapping[str, Array],
            seed: int | None) -> Array:
        """One piece: from what the piece before made (None for the first) to one floating-point array with the rows
        first.

        `seed` None means evaluation: no dropout.
        """

    @abstractmethod
    def score(self, ops: Any, x: Array, batch: Mapping[str, Array], seed: int) -> tuple[Array, Array]:
        """The loss's sum and weight, of what the last piece made."""

    def measure(self, ops: Any, x: Array, batch: Mapping[str, Array]) -> Mapping[str, tuple[Array, Array]]:
        """What `metrics` gives, of what the last piece made."""


def is_chain(model: Any) -> TypeGuard[Chain]:
    """Whether a model comes in pieces; what does not cannot be laid out on a mesh."""
    return isinstance(model, Pieces)


def is_neutral(model: Any) -> bool:
    """Whether a model is written in ops; else it is an object of a framework's, to be adapted by that framework's door.
    """
    return isinstance(getattr(model, "parameters", None), Mapping)


@dataclass(frozen=True)
class ShardResult:
    """What one logical shard contributes beside its gradient. `buffers` are the new buffers, as NumPy arrays, and with
    them the frozen parameters that the model moves (see `Habits`). `slopes`: of a batch with "rows", the gradient of
    the loss sum with respect to each feature's, as NumPy arrays of their own, in the same shapes.
    """

    loss_sum: float
    weight: float
    buffers: Mapping[str, Any]
    slopes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Habits:
    """What `Backend.rehearse` has found out about a model, the same on every worker.

    `apart`: its gradients are added in several goes, so every shard needs a buffer of its own. `moved`: frozen
    parameters that its loss writes to, as to an average of weights; each shard begins from the same values, and a step
    takes over the weighted mean of the changes.
    `sums`: a step's loss is the sum of its shards', by whose gradient it is trained, and not their mean. `undivided`:
    why a batch's loss is not made of its shards', as a UserError is to say it; such a model trains on one logical
    shard.
    """

    apart: bool = False
    moved: tuple[str, ...] = ()
    sums: bool = False
    undivided: str = ""


SLOTS = {"adamw": ("exp_avg", "exp_avg_sq"), "adam": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum",),
         "adagrad": ("sum",)}


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

    def __post_init__(self) -> None:
        if self.name not in SLOTS:
            raise UserError(f"optimizer.name = {self.name!r} is not one of {', '.join(SLOTS)}.")


class Backend(Protocol):
    """One framework on one device. Built once per worker process; it outlives generations, so nothing compiles twice.

    Backends inherit the defaults; what has none they must bring.
    """

    name: str
    parameters: Mapping[str, Spec]
    buffers: Mapping[str, Spec]

    @abstractmethod
    def allocate(self, size: int) -> Buffer:
        """A zeroed buffer of `size` float32 elements on the device, 64-byte aligned."""

    def initial(self) -> Mapping[str, Any]:
        """NumPy values of the arrays whose spec says "given" (a user's own module); else empty."""
        return {}

    @abstractmethod
    def bind(self, params: Mapping[str, Buffer], buffers: Mapping[str, Any]) -> None:
        """From now on the model's parameters are these shaped views, and its buffers these NumPy arrays."""

    @abstractmethod
    def gradients(self, batch: Batch, seed: int, into: Mapping[str, Buffer]) -> ShardResult:
        """Adds the gradient of one shard's loss sum to `into` (shaped views of a flat buffer, trainable names only).

        `batch["rows"]`, where there are tables, is what each feature has looked up: {feature: float32, C-contiguous}. A
        model of named arrays reads `params["rows/FEATURE"]`, a user's own `batch["rows"]["FEATURE"]`. Slopes come for
        every feature, zeros for one that the model does not read, and are not looked at: they may be NaN. Nothing of
        the batch is kept or written to.
        """

    def rehearse(self, batch: Batch, room: Callable[[], Mapping[str, Buffer]]) -> Habits:
        """Computes one shard, as often as it takes to know the model, before any step, and leaves parameters and
        buffers as they were.

        `room` gives a zeroed place for gradients, as `into` of `gradients`. UserError where a user's own model cannot
        be trained faithfully.
        """
        self.gradients(batch, 0, room())
        return Habits()

    @abstractmethod
    def metrics(self, batch: Batch) -> Mapping[str, tuple[Any, float]]:
        """Sums and weights of one evaluation shard; what is no scalar comes as a NumPy array. It reads "rows" as
        `gradients` does."""

    def tally(self) -> Tally | None:
        """A new one for an evaluation, of a model that counts."""
        return None

    def logits(self, tokens: Any) -> Any:
        """Of a model that offers `logits`: NumPy integers (rows, time) -> the scores of each next token, (rows, time,
        vocab)."""
        raise UserError(f'backend.name = "{self.name}" scores no tokens; write another.')

    @abstractmethod
    def update(self, rule: UpdateRule, param: Buffer, grad: Buffer, slots: Mapping[str, Buffer], block: int) -> None:
        """Applies `rule` in place to a flat range, block by block. `grad` may be overwritten."""

    @abstractmethod
    def squared_norms(self, grad: Buffer, block: int) -> Any:
        """The squared norm of every block of `grad`, float64 NumPy, computed block by block."""

    # Of a model that is a `Chain`, on a mesh.

    def connect(self, axes: Mapping[str, Any]) -> None:
        """From now on, until the next call, dims are split over these axes: `elastic.parallel.axis.Axis` by dim. Once a
        generation.

        The model's parameters are already the parts that this worker holds; `parameters` has their shapes. The default
        refuses a split.
        """
        if any(axis.size > 1 for axis in axes.values()):
            raise self.whole()

    def whole(self) -> UserError:
        """What a backend says that trains whole models alone."""
        return UserError(f'[mesh]: backend.name = "{self.name}" does not split a model; write 1 for every degree, or '
                         'another backend.')

    def forward(self, key: Any, pieces: Sequence[str], inputs: Buffer | None, shape: Sequence[int], batch: Batch,
                seed: int
                ) -> Buffer | ShardResult:
        """Runs pieces of the model on one micro-batch and keeps what their backward pass needs under `key`.

        `inputs`: what the pieces before made, flat, to be read as `shape`; None where `pieces` begins the model. The
        result, flat, or where `pieces` ends the model the loss. It is not written to again, and neither is `inputs`
        before the backward pass.
        """
        raise self.whole()

    def backward(self, key: Any, gradient: Buffer | None, into: Mapping[str, Buffer]) -> Buffer | None:
        """Adds the gradients of the pieces' parameters to `into` and returns that of `inputs`, flat; None where there
        were none.

        `gradient` is that of the result, flat; None where the result was the loss. What was kept under `key` is let go.
        """
        slope = self.backward_input(key, gradient)
        self.backward_weight(key, into)
        return slope

    def backward_input(self, key: Any, gradient: Buffer | None) -> Buffer | None:
        """The first half of `backward`: the gradient of `inputs`, the same bits. `backward_weight` follows."""
        raise self.whole()

    def backward_weight(self, key: Any, into: Mapping[str, Buffer]) -> None:
        """The second half of `backward`; the same bits."""
        raise self.whole()

    def forget(self) -> None:
        """Lets go of all that is kept: a step was cut off."""

    def infer(self, pieces: Sequence[str], inputs: Buffer | None, shape: Sequence[int], batch: Batch) -> Any:
        """Pieces for evaluation: a flat buffer, or where `pieces` ends the model what `metrics` gives."""
        raise self.whole()

    def compilations(self) -> int:
        """How many traces or compilations this process has done so far."""
        return 0


class Framework(Protocol):
    """The door of a framework: `framework` in the module that `backend.name` finds. `backends.common.Door` has the
    defaults."""

    def before_models(self, settings: Any) -> None:
        """Sets what has to be set before a user's own code computes anything, for most frameworks nothing; called
        before every other."""
        return

    def create(self, model: Any, settings: Any) -> Backend:
        """A backend over a model, shipped or the user's own. `settings`: the recipe's `[backend]`. UserError where it
        cannot be had."""

    def adapt(self, model: Any) -> Any:
        """A user's own model as an `Adapted`; a model of named arrays as it is. UserError where it cannot serve."""

    def construct(self, factory: Callable[..., Any], config: Mapping[str, Any], seed: int) -> Any:
        """A user's model or data set; what it draws to begin with is a function of `seed`."""

    def collate(self, items: Sequence[Any]) -> Any:
        """A user's items as a batch."""

    def seeded(self, seed: int) -> AbstractContextManager[None]:
        """Inside, all that a user's code may draw from starts from `seed`; then it is as before."""
