"""A user's own `torch.nn.Module` as a model: named arrays and a call without side effects.

The module has `loss(batch)` giving the mean loss over the batch or (sum, weight), and may have `metrics(batch)` giving
{name: (sum, weight)}. It is called through `torch.func.functional_call` over its parameters and buffers: what it writes to its
buffers (a batch norm's statistics) goes to copies, which are handed back, so a step that is redone counts once.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from elastic.backend import Spec
from elastic.data.collate import num_rows
from elastic.errors import UserError
from elastic.own import described, pair, pairs, rebuilt

# Random draws in a module or a data set come from the process-wide generators. What one thread seeds and draws must not
# interleave with another's: the training and the loading ahead of one worker, and the workers that are threads of one process.
# A thread also holds it over its backward pass, which draws again where a module recomputes its activations.
drawing = threading.RLock()
_spare = np.random.MT19937(0)  # in the place of NumPy's own meanwhile: saving and restoring that takes longer than a small model's step


class ModuleModel:
    """`elastic.backend.Model` over a module; `ops` is not used. Tied parameters appear once, under their first name."""

    def __init__(self, module: torch.nn.Module):
        if not callable(getattr(module, "loss", None)):
            raise UserError(f"model.kind: {type(module).__name__} has no method loss(batch) that gives the mean loss or (sum, weight).")
        self._caller = _Caller(module)
        self._call: Callable[..., Any] = self._evaluate
        parameters = dict(module.named_parameters())
        if not parameters:
            raise UserError(f"model.kind: {type(module).__name__} has no parameters to train.")
        wrong = [name for name, p in parameters.items() if p.dtype != torch.float32]
        if wrong:
            raise UserError(f"model.kind: parameter {wrong[0]} is {parameters[wrong[0]].dtype}; parameters must be float32.")
        self._aliases = aliases(module)
        self._given = {name: value.detach().cpu().numpy().copy() for name, value in module.named_parameters()}
        self._given |= {name: value.detach().cpu().numpy().copy() for name, value in module.named_buffers()}
        self.parameters = {name: given_spec(self._given[name]) for name in parameters}
        self.buffers = {name: given_spec(self._given[name]) for name, _ in module.named_buffers()}

    def initial(self) -> Mapping[str, np.ndarray]:
        """The values that the module was built with, parameters and buffers."""
        return self._given

    def compile(self, compiler: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Callable[..., Any]:
        """`loss` with the module's own code compiled; seeding stays outside."""
        self._call = compiler(self._evaluate)
        return self.loss

    def loss(self, ops: Any, params: Mapping[str, Any], state: Mapping[str, Any], batch: Any,
             seed: int) -> tuple[Any, Any, Mapping[str, Any]]:
        """The loss sum, its weight and the new buffers; whatever the module draws is a function of `seed`."""
        rows = num_rows(batch)
        if not rows:
            return torch.zeros(()), 0.0, state
        self._switch(training=True)
        with seeded(seed):
            found, new = self._call("loss", params, state, batch)
        total, weight = as_sum(found, rows)
        return total, weight, new

    def metrics(self, ops: Any, params: Mapping[str, Any], state: Mapping[str, Any],
                batch: Any) -> Mapping[str, tuple[Any, Any]]:
        """The module's own metrics and always "loss", in evaluation mode."""
        rows = num_rows(batch)
        if not rows:
            return {"loss": (0.0, 0.0)}
        self._switch(training=False)
        with seeded(0):
            out = {"loss": as_sum(self._evaluate("loss", params, state, batch)[0], rows)}
            if hasattr(self._caller.module, "metrics"):
                out |= pairs(self._evaluate("metrics", params, state, batch)[0], "metrics(batch)")
        return out

    def _switch(self, training: bool) -> None:
        if self._caller.module.training != training:
            self._caller.module.train(training)

    def _evaluate(self, method: str, params: Mapping[str, Any], state: Mapping[str, Any],
                  batch: Any) -> tuple[Any, dict[str, Any]]:
        arrays = {f"module.{name}": value for name, value in [*params.items(), *state.items()]}
        arrays |= {f"module.{alias}": arrays[f"module.{name}"] for alias, name in self._aliases.items()}
        found = torch.func.functional_call(self._caller, arrays, (method, batch), tie_weights=False)
        # functional_call leaves in `arrays` what the module assigned; in-place writes went to the copies themselves
        return found, {name: arrays[f"module.{name}"] for name in state}


class _Caller(torch.nn.Module):
    """Lets functional_call reach methods other than forward."""

    def __init__(self, module: torch.nn.Module):
        super().__init__()
        self.module = module

    def forward(self, method: str, batch: Any) -> Any:
        return getattr(self.module, method)(batch)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, the default generators of torch, NumPy and Python start from `seed`.

    Afterwards those of torch (on the CPU) and NumPy are as they were, and Python's goes on from a number that it drew before.
    Not `torch.manual_seed`: where CUDA sleeps, that formats three stack traces a call, a tenth of a small model's step.
    """
    with drawing:
        before, own, follows = torch.default_generator.get_state(), np.random.get_bit_generator(), random.getrandbits(64)
        torch.default_generator.manual_seed(seed & (1 << 63) - 1)
        np.random.set_bit_generator(_spare)
        np.random.seed(seed & (1 << 32) - 1)
        random.seed(seed)
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed_all(seed & (1 << 63) - 1)
        try:
            yield
        finally:
            torch.default_generator.set_state(before)
            np.random.set_bit_generator(own)
            random.seed(follows)


def aliases(module: torch.nn.Module) -> dict[str, str]:
    """Every further name of a tied parameter or buffer -> its first name."""
    first: dict[int, str] = {}
    out = {}
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    for name, value in named:
        if first.setdefault(id(value), name) != name:
            out[name] = first[id(value)]
    return out


def given_spec(value: np.ndarray) -> Spec:
    return Spec(tuple(value.shape), (), "given", dtype=str(value.dtype))


def as_sum(found: Any, rows: int) -> tuple[Any, Any]:
    """(sum, weight) as they are; a mean times the number of rows."""
    if isinstance(found, tuple):
        return pair(found, "loss(batch)")
    if not isinstance(found, torch.Tensor) or found.numel() != 1:
        raise UserError(f"model.kind: loss(batch) must give one number or (sum, weight), not {described(found)}.")
    return found.reshape(()) * rows, float(rows)


def columns(batch: Any, device: torch.device) -> Any:
    """The batch as its data set made it, dict or tuple, with tensors for arrays (copies, of which float64 becomes float32); texts stay."""
    if isinstance(batch, torch.Tensor):
        return batch.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else batch
    if isinstance(batch, (str, bytes)):
        return batch
    if isinstance(batch, Mapping):
        return {name: columns(value, device) for name, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return rebuilt(batch, lambda value: columns(value, device))
    array = np.asarray(batch)
    if array.dtype.kind not in "biuf":
        return array
    return placed(array, device, torch.float32 if array.dtype == np.float64 else None)


def placed(array: np.ndarray, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A copy on the device. Through pinned memory, so that the host need not wait until a GPU is done with all that it was given."""
    copy = torch.tensor(array, dtype=dtype)
    return copy.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else copy
