"""A user's own `torch.nn.Module` wrapped as a model, which `module_backend` trains: its objects by name, its batches, losses and draws.

The module has `loss(batch)` giving the mean loss over the batch or (sum, weight), and may have `metrics(batch)` giving
{name: (sum, weight)}. It keeps its own Parameter and buffer objects for good: `backends.pytorch.module_backend` lets
the parameters' storage be the platform's, and copies buffers in before a shard and out after it, so a step that is
redone counts once.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from backends.common import check_float32, check_loss
from backends.pytorch import watch
from backends.pytorch.arrays import as_numpy, as_torch, plain
from elastic.errors import UserError
from elastic.model.backend import Adapted, Spec
from elastic.model.user_code import described, pair

# Random draws in a module or a data set come from the process-wide generators. What one thread seeds and draws must not
# interleave with another's: the training and the loading ahead of one worker, and the workers that are threads of one
# process. A thread also holds it over its backward pass, which draws again where a module recomputes its activations.
drawing = threading.RLock()
# in the place of NumPy's own meanwhile: saving and restoring that takes longer than a small model's step
_spare = np.random.MT19937(0)
KEPT = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128,
                  torch.bool,
                  torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64})  # by a checkpoint


IDLE = (torch.nn.modules.dropout._DropoutNd, torch.nn.modules.batchnorm._BatchNorm)  # what differs in evaluation mode


@dataclass(frozen=True)
class Slot:
    """A buffer: where the module has it, and the tensor that belongs there. So is a frozen parameter that is not
    float32."""

    holder: dict[str, Any]
    key: str
    tensor: torch.Tensor


class ModuleModel(Adapted):
    """A module's arrays by name, as `elastic.model.backend.Model` has them. Tied ones appear once, under their first
    name.

    UserError where it cannot be trained.
    """

    def __init__(self, module: torch.nn.Module):
        self.module, self.kind = module, type(module).__name__
        check_loss(self.kind, module)
        named = dict(module.named_parameters())
        if not named:
            raise self.error("has no parameters to train.")
        for name, p in [*named.items(), *module.named_buffers()]:
            if p.is_meta or isinstance(p, (torch.nn.UninitializedParameter, torch.nn.UninitializedBuffer)):
                raise self.error(f"has no values in {name} yet; let the factory call it once on an example, or build "
                                 "it with its sizes.")
            if p.layout != torch.strided or p.is_quantized or p.dtype not in KEPT:
                what = p.dtype if p.layout == torch.strided else p.layout
                raise self.error(f"keeps {name} as {what}, which no checkpoint holds; keep it dense, as one of torch's "
                                 "plain kinds of numbers.")
        check_float32({name: p.dtype for name, p in named.items() if p.requires_grad})
        watch.refuse_hooks(self.kind, named, seeded)
        watch.refuse_views(self.kind, module, named)
        self.tensors = {name: p for name, p in named.items() if p.dtype == torch.float32}
        self.slots = slots_of(module, named)
        self.tied = aliases(module)
        self.flags = [(part, part.training) for part in module.modules()]
        kept = {name: slot.tensor for name, slot in self.slots.items()}
        self._kinds = {name: (value.dtype, value.shape) for name, value in kept.items()}
        self._values: list[torch.Tensor] = []
        self._into: list[torch.Tensor] = []
        self.given = {name: as_numpy(value) for name, value in [*self.tensors.items(), *kept.items()]}
        self.parameters = {name: Spec.given(self.given[name], p.requires_grad) for name, p in self.tensors.items()}
        self.buffers = {name: Spec.given(self.given[name]) for name in kept}

    @property
    def notes(self) -> tuple[str, ...]:  # type: ignore[override]
        still = [name or self.kind for name, part in self.module.named_modules() if not part.training
                 and isinstance(part, IDLE)]
        if not still:
            return ()
        named = ", ".join(still[:3]) + (f" and {len(still) - 3} more" if len(still) > 3 else "")
        return (f"{self.kind} is made with {named} in evaluation mode, and trains so: dropout drops nothing, a batch "
                "norm keeps its statistics; call train() where the model is made if that is not meant.",)

    def error(self, what: str) -> UserError:
        return UserError(f"model.kind: {self.kind} {what}")

    def bind(self, state: Mapping[str, np.ndarray]) -> None:
        """From now on `begin` takes the buffers' values from there."""
        self._values = [as_torch(state[name]) for name in self.slots]
        self._into = [slot.tensor.detach() for slot in self.slots.values()]

    def begin(self) -> None:
        """Buffers have their values, and every part the mode that the constructor left it in; the module's own objects
        are in their places."""
        for slot in self.slots.values():
            if slot.holder.get(slot.key) is not slot.tensor:
                slot.holder[slot.key] = slot.tensor
        for alias, slot in self.tied:
            alias.holder[alias.key] = slot.tensor
        for part, training in self.flags:
            if part.training != training:
                part.training = training
        if self._into:
            torch._foreach_copy_(self._into, self._values)

    def found(self) -> dict[str, np.ndarray]:
        """Copies of the buffers as they are now. UserError where one is not what it was."""
        for alias, slot in self.tied:
            if alias.holder.get(alias.key) is not slot.holder.get(slot.key):
                raise self.error(f"ties {alias.key} to {slot.key} and gives one of them another tensor; write to it in "
                                 "place.")
        return {name: as_numpy(self._same(name, slot)) for name, slot in self.slots.items()}

    def _same(self, name: str, slot: Slot) -> torch.Tensor:
        now, (kind, shape) = slot.holder.get(slot.key), self._kinds[name]
        if not isinstance(now, torch.Tensor):
            raise self.error(f"takes its buffer {name} away in loss(batch); keep a tensor of the same shape there.")
        if now.shape != shape or now.dtype != kind:
            raise self.error(f"makes its buffer {name} {plain(now.dtype)} of shape {tuple(now.shape)} in loss(batch), "
                             f"where it was {plain(kind)} of shape {tuple(shape)}; a buffer keeps its shape and kind "
                             "of numbers: make it as large as it gets.")
        return now


def slots_of(module: torch.nn.Module, named: Mapping[str, torch.Tensor]) -> dict[str, Slot]:
    found = {}
    for name, tensor in [*((n, p) for n, p in named.items() if p.dtype != torch.float32), *module.named_buffers()]:
        owner, _, key = name.rpartition(".")
        part = module.get_submodule(owner)
        if torch._debug_has_internal_overlap(tensor):  # type: ignore[attr-defined]
            # as an expanded one cannot be written to
            tensor.data = tensor.detach().clone(memory_format=torch.contiguous_format)
        found[name] = Slot(part._buffers if key in part._buffers else part._parameters, key, tensor)
    return found


def aliases(module: torch.nn.Module) -> list[tuple[Slot, Slot]]:
    """Every further place of a tied buffer, with its first."""
    first: dict[int, Slot] = {}
    out = []
    for name, tensor in module.named_buffers(remove_duplicate=False):
        owner, _, key = name.rpartition(".")
        slot = Slot(module.get_submodule(owner)._buffers, key, tensor)
        if first.setdefault(id(tensor), slot) is not slot:
            out.append((slot, first[id(tensor)]))
    return out


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, the default generators of torch, NumPy and Python start from `seed`.

    Afterwards those of torch (on the CPU) and NumPy are as they were, and Python's goes on from a number that it drew
    before. Not `torch.manual_seed`: where CUDA sleeps, that formats three stack traces a call, a tenth of a small
    model's step.
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


def as_sum(found: Any, rows: int) -> tuple[Any, Any]:
    """(sum, weight) as they are; a mean times the number of rows."""
    if isinstance(found, tuple):
        total, weight = pair(found, "loss(batch)")
        if isinstance(weight, torch.Tensor) and weight.requires_grad:
            raise UserError("model.kind: loss(batch) gives (sum, weight) with a weight that has a gradient, and none "
                            "goes through it: give the loss alone if the second is a figure beside it, or "
                            "weight.detach() if it is what the sum is to be divided by.")
        return total, weight
    if not isinstance(found, torch.Tensor) or found.numel() != 1:
        raise UserError(f"model.kind: loss(batch) must give one number or (sum, weight), not {described(found)}.")
    return found.reshape(()) * rows, float(rows)
