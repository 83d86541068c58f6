"""A user's own Gluon block as a model: named arrays and a call without side effects.

The block is initialised, its shapes are known, and it has `loss(batch)` giving the mean loss over the batch (or one
value a row) or (sum, weight); it may have `metrics(batch)` giving {name: (sum, weight)}. Parameters without a gradient,
as the statistics of a batch norm, are its buffers: the block gets copies, which are handed back, so a step that is
redone counts once; others with grad_req "null" are frozen parameters. Hybridised or not. The rates and decays that
parameters multiply (`lr_mult`, `wd_mult`) count as in gluon.Trainer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np

from backends.common import check_loss, drawing, mapped, plain_attributes, spoiled, telling
from backends.mxnet.ops import mx
from backends.mxnet.turn import turn
from elastic.data.collate import num_rows
from elastic.errors import UserError
from elastic.model.backend import Adapted, Spec
from elastic.model.user_code import described, pair, pairs


class GluonModel(Adapted):
    """`elastic.model.backend.Model` over a block; `ops` is not used. Shared parameters appear once, under their first
    name."""

    KEEP = 'keep it in a parameter with grad_req = "null", or leave it as it is'
    READ = "ask the parameter for data() in each call"
    GENERATORS = "draw by mx.random, numpy.random or random, which are seeded for every shard, and count nothing in the loss"

    def __init__(self, block: mx.gluon.Block):
        self._block, self.kind = block, type(block).__name__
        check_loss(self.kind, block)
        self._named = named_parameters(block)
        for name, parameter in self._named.items():
            if parameter._data is None:
                raise UserError(f"model.kind: parameter {name} of {self.kind} has no values yet; where the block is "
                                "made, call its initialize(), and give every layer its input size (in_units, "
                                "in_channels) or call the block once on an example.")
        trained = [name for name, parameter in self._named.items() if parameter.grad_req != "null"]
        if not trained:
            raise UserError(f"model.kind: {self.kind} has no parameters to train.")
        for name in trained:
            check_parameter(self.kind, name, self._named[name])
        self._asked = {name: (parameter.grad_req, parameter.lr_mult, parameter.wd_mult)
                       for name, parameter in self._named.items()}
        self.multiplied = {name: self._asked[name][1:] for name in trained if self._asked[name][1:] != (1.0, 1.0)}
        self.numpy = isinstance(self._named[trained[0]].data(), mx.np.ndarray)  # made under mx.npx.set_np()
        self._made = {name: parameter.data() for name, parameter in self._named.items()}
        self.given = {name: made.asnumpy() for name, made in self._made.items()}
        self.parameters = {name: Spec.given(self.given[name], name in trained)
                           for name, parameter in self._named.items()
                           if name in trained or is_weight(parameter)}
        self.buffers = {name: Spec.given(value) for name, value in self.given.items() if name not in self.parameters}

    def array(self, values: Any, is_exact: bool = False) -> Any:
        """A copy in the block's kind of array; float64 becomes float32, unless `is_exact`, and what is no number stays
        as it is."""
        values = np.asarray(values)
        if values.dtype.kind not in "biuf":
            return values
        dtype = np.float32 if values.dtype == np.float64 and not is_exact else values.dtype
        return (mx.np if self.numpy else mx.nd).array(values, dtype=dtype)

    def loss(self, ops: Any, params: Mapping[str, Any], state: Mapping[str, Any], batch: Any,
             seed: int) -> tuple[Any, Any, Mapping[str, Any]]:
        """The loss sum, its weight and the new buffers, which are complete after the backward pass."""
        rows = num_rows(batch)
        if not rows:
            return self.array(np.zeros(1)), 0.0, state
        with seeded(seed), self._holding(params, state):
            total, weight = self._sum(self._block.loss(batch), rows)
        return total, weight, state

    def metrics(self, ops: Any, params: Mapping[str, Any], state: Mapping[str, Any],
                batch: Any) -> Mapping[str, tuple[Any, Any]]:
        """The block's own metrics and always "loss", in predict mode."""
        rows = num_rows(batch)
        if not rows:
            return {"loss": (0.0, 0.0)}
        # in predict mode kernels rearrange weights in place
        copies = {name: value.copy() for name, value in params.items()}
        with seeded(0), mx.autograd.predict_mode(), self._holding(copies, state):
            out = {"loss": self._sum(self._block.loss(mapped(batch)), rows)}
            if hasattr(self._block, "metrics"):
                out |= pairs(self._block.metrics(mapped(batch)), "metrics(batch)")
        return out

    @contextmanager
    def _holding(self, params: Mapping[str, Any], state: Mapping[str, Any]) -> Iterator[None]:
        """Inside, the block computes with these arrays. UserError where it does not leave them in their places."""
        arrays = {**params, **state}
        for name, parameter in self._named.items():
            parameter._data = [arrays[name]]
        try:
            with self.telling(), mx.util.np_array(self.numpy):
                yield
        finally:
            asked = {name: (parameter.grad_req, parameter.lr_mult, parameter.wd_mult)
                     for name, parameter in self._named.items()}
        for name, parameter in self._named.items():
            if parameter._data is None or parameter._data[0] is not arrays[name]:
                raise UserError(f"model.kind: {self.kind} gives its parameter {name} another shape or place while it "
                                "runs; its parameters must stay as they were made.")
            if asked[name] != self._asked[name]:
                raise UserError(f"model.kind: {self.kind} changes grad_req, lr_mult or wd_mult of its parameter {name} "
                                "while it runs; set them where the block is made.")
        if named_parameters(self._block).keys() != self._named.keys():
            raise UserError(f"model.kind: {self.kind} makes parameters while it runs; make all of them where it is "
                            "built.")

    @contextmanager
    def hidden(self, names: Iterable[str]) -> Iterator[None]:
        """Inside, these of the arrays that the block was made with, in place of which it has others, hold other values.
        """
        chosen = tuple(names)
        with turn:
            for name in chosen:
                self._made[name][:] = spoiled(self.given[name])
            try:
                yield
            finally:
                for name in chosen:
                    self._made[name][:] = self.given[name]

    def telling(self) -> AbstractContextManager[None]:
        return telling(self.kind, in_one_line)

    def attributes(self) -> Mapping[str, Any]:
        """The plain values among the attributes of the block and its parts."""
        parts, open_ = [], [("", self._block)]
        while open_:
            path, block = open_.pop()
            parts.append((path, block))
            open_ += [(f"{path}.{name}".lstrip("."), child) for name, child in block._children.items()]
        return plain_attributes(parts, lambda value: value.asnumpy() if isinstance(value, mx.nd.NDArray) else None)

    def _sum(self, found: Any, rows: int) -> tuple[Any, Any]:
        """(sum, weight) as they are; a mean times the number of rows; the sum of one value a row."""
        if isinstance(found, tuple):
            return pair(found, "loss(batch)")
        if not isinstance(found, mx.nd.NDArray) or found.size not in (1, rows):
            raise UserError(f"model.kind: loss(batch) of {self.kind} must give one number, one a row, or (sum, "
                            f"weight), not {described(found)}.")
        return found.sum() * (rows / found.size), float(rows)


def is_weight(parameter: mx.gluon.Parameter) -> bool:
    """Whether a parameter with grad_req "null" could be trained."""
    return parameter._differentiable and not isinstance(parameter,
                                                        mx.gluon.Constant) and parameter.dtype in (np.float32, "float32")


def check_parameter(kind: str, name: str, parameter: mx.gluon.Parameter) -> None:
    """UserError where gluon.Trainer would treat a parameter as no flat buffer of float32 can."""
    if parameter.dtype not in (np.float32, "float32"):
        raise UserError(f"model.kind: parameter {name} is {np.dtype(parameter.dtype)}; parameters must be float32.")
    if parameter.grad_req != "write":
        raise UserError(f'model.kind: parameter {name} of {kind} has grad_req = "{parameter.grad_req}", which adds up '
                        'gradients from step to step; write grad_req = "write" and a larger data.batch_size.')
    if (parameter._stype, parameter._grad_stype) != ("default", "default"):
        raise UserError(f"model.kind: parameter {name} of {kind} is sparse, or its gradient is, which gluon.Trainer "
                        "updates row by row; leave out sparse_grad = True.")


def named_parameters(block: mx.gluon.Block) -> dict[str, Any]:
    """Parameters by their place in the block ("layers.0.weight"): the names of their own count what the process has
    made so far."""
    out: dict[str, Any] = {}
    seen: set[int] = set()
    for name, parameter in block._collect_params_with_prefix().items():
        if id(parameter) not in seen:
            seen.add(id(parameter))
            out[name] = parameter
    return out


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, the generators of MXNet, NumPy and Python start from `seed`; afterwards those of NumPy and Python are as
    they were."""
    with turn, drawing(seed):
        mx.random.seed(seed & (1 << 31) - 1)
        yield


def in_one_line(error: Exception) -> str:
    """What MXNet says of an error, without the stack of its own calls."""
    told = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in reversed(told) if "Error" in line), told[-1] if told else "no words").rstrip(".")
