"""A user's own module on the PyTorch backend, as the object that it is.

Its Parameters stay its own; their storage is the platform's flat buffer and their `.grad` the gradient buffer's, as
flat-parameter trainers (FSDP: https://arxiv.org/abs/2304.11277, section 4.2) have it. Hooks, `requires_grad`,
references and recomputation are plain torch's.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from backends.common import looked_up
from backends.pytorch.adapter import ModuleModel, as_sum, seeded
from backends.pytorch.arrays import as_numpy, as_scalar, as_tensor, columns, slopes_of
from backends.pytorch.neutral_backend import TorchBackend
from backends.pytorch.rehearsal import rehearse
from elastic.data.collate import num_rows
from elastic.errors import Overwritten, UserError
from elastic.model.backend import ROWS, Batch, Buffer, Habits, ShardResult
from elastic.model.user_code import UNTRAINED, pairs


class ModuleBackend(TorchBackend):
    """`elastic.model.backend.Backend` over a module."""

    def __init__(self, model: ModuleModel, settings: Any):
        super().__init__(model, settings)
        self._leaves = dict(model.tensors)
        for slot in model.slots.values():
            slot.tensor.data = slot.tensor.data.to(self.device)
        self._trains: frozenset[str] = frozenset()
        # may be, as long as nothing is known
        self._moved = tuple(name for name, leaf in self._leaves.items() if not leaf.requires_grad)
        self._versions: dict[str, int] = {}
        self._where: dict[str, int] = {}
        self._aims: dict[str, torch.Tensor] = {}

    def bind(self, params: Mapping[str, Buffer], buffers: Mapping[str, Any]) -> None:
        """The Parameters stay the objects that they are: no graph, hook or compiled function notices."""
        for name, leaf in self._leaves.items():
            leaf.data = as_tensor(params[name])
        self._where = {name: leaf.data_ptr() for name, leaf in self._leaves.items()}
        self._state = {name: buffers[name] for name in self.buffers}
        self._own.bind(self._state)
        self._blocks.clear()

    def gradients(self, batch: Batch, seed: int, into: Mapping[str, Buffer]) -> ShardResult:
        self._enter()
        self._aim(into)
        found = self._shard(batch, seed)
        self._refuse_writes()
        return found

    def rehearse(self, batch: Batch, room: Callable[[], Mapping[str, Buffer]]) -> Habits:
        """Twice from one seed: backward from 1 into zeros, then from 2 into a filled buffer x. x + 2g it must be, bit
        for bit."""
        self._enter()
        if num_rows(batch):
            trained = room().keys()
            self._moved = tuple(name for name in self._leaves if name not in trained)
            habits = rehearse(self, self._own, batch, room)
            self._moved = habits.moved
            return habits
        return Habits()

    def once(self, batch: Batch, into: Mapping[str, Buffer], scale: float) -> ShardResult:
        self._aim(into)
        return self._shard(batch, 0, scale)

    def written(self) -> list[str]:
        """Parameters that were written to in place in the last call."""
        return [name for name, leaf in self._leaves.items() if leaf._version != self._versions.get(name, leaf._version)]

    def metrics(self, batch: Batch) -> Mapping[str, tuple[Any, float]]:
        self._enter()
        own, rows = self._own, num_rows(batch)
        if not rows:
            return {"loss": (0.0, 0.0)}
        with self._lent(), torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16,
                                                           enabled=self._bfloat16), seeded(0):
            own.module.eval()
            out = {"loss": as_sum(self._asked("loss", batch), rows)}
            if callable(getattr(own.module, "metrics", None)):
                own.begin()
                own.module.eval()
                out |= pairs(self._asked("metrics", batch), "metrics(batch)")
            found = {name: (float(total), float(weight)) for name, (total, weight) in out.items()}
        self._refuse_writes()
        return found

    def _asked(self, method: str, batch: Batch) -> Any:
        """What the module's loss or metrics says of its own copy of the batch."""
        try:
            return getattr(self._own.module, method)(columns(batch, self.device))
        except RuntimeError as error:
            if "does not require grad" not in str(error):
                raise
            raise self._own.error(f"asks in {method}(batch) for a gradient while it is evaluated, where torch records "
                                  "none; put `with torch.enable_grad():` around that, or set data.eval_fraction = 0.") from error

    @contextmanager
    def _lent(self) -> Iterator[None]:
        """Modes, buffers and moved parameters are as before afterwards, whatever is done to them inside."""
        self._own.begin()
        kept = {name: self._leaves[name].detach().clone() for name in self._moved}
        self._versions = {name: leaf._version for name, leaf in self._leaves.items()}
        try:
            yield
        finally:
            for leaf in self._leaves.values():
                leaf.grad = None  # a gradient buffer ends with its generation
            self._own.begin()
            for name, values in kept.items():
                self._leaves[name].data.copy_(values)

    def _shard(self, batch: Batch, seed: int, scale: float = 1.0) -> ShardResult:
        """Into the gradients that are aimed at; what the module draws on its way forward and back is a function of
        `seed`."""
        own, rows, found = self._own, num_rows(batch), looked_up(batch)
        if not rows:
            return ShardResult(0.0, 0.0, dict(self._state)
                               | {name: as_numpy(self._leaves[name]) for name in self._moved},
                               {feature: np.zeros_like(array) for feature, array in found.items()})
        with self._lent():
            with seeded(seed):
                given = columns(batch, self.device)
                # the leaves themselves: a loss may put others in their place in its batch
                looked = {feature: given[ROWS][feature].requires_grad_() for feature in found}
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self._bfloat16):
                    total, weight = as_sum(self._loss(given), rows)
                if isinstance(total, torch.Tensor) and total.requires_grad:
                    (total if scale == 1.0 else total * scale).backward()  # a gradient that is handed in loads sympy
                elif float(weight):
                    raise UserError(UNTRAINED)
            self._refuse_swaps()
            new = own.found() | {name: as_numpy(self._leaves[name]) for name in self._moved}
            loss = torch.as_tensor(total).detach()
            figure, count = torch.stack((loss.double().reshape(()), as_scalar(weight, loss))).tolist()
        return ShardResult(figure, count, new, slopes_of(looked))

    def _refuse_writes(self) -> None:
        for name in self.written():
            if name in self._trains:
                raise Overwritten(f"model.kind: {self._own.kind} writes to its parameter {name} in place, and did not "
                                  "when it first ran; a trained parameter changes once a step, by the optimizer: "
                                  "compute the changed values from it instead, or freeze it.")
            if name not in self._moved:
                raise Overwritten(f"model.kind: {self._own.kind} writes to its frozen parameter {name} in place, and "
                                  "did not when it first ran; write to it in every loss(batch), so that it is known to "
                                  "move, or never.")

    def _refuse_swaps(self) -> None:
        for name, leaf in self._leaves.items():
            if leaf.requires_grad != (name in self._trains):
                raise self._own.error(f"changes requires_grad of {name} while it trains; set it where the model is "
                                      "made (model.freeze and model.thaw may name it), and use .detach() for a part of "
                                      "the loss that is not to reach it.")
            if leaf.data_ptr() != self._where[name]:
                raise self._own.error(f"gives its parameter {name} other memory while it trains; write into the "
                                      "Parameter that is there.")
            if leaf.grad is not self._aims.get(name):
                raise self._own.error(f"takes away or replaces the .grad of its parameter {name} in loss(batch), as "
                                      "zero_grad() does, and with it what other shards have added there; ask for "
                                      "gradients within a loss by torch.autograd.grad().")

    def _aim(self, into: Mapping[str, Buffer]) -> None:
        """Which parameters train is settled by the first call; from then on the module may not change it."""
        if self._trains != into.keys():
            self._trains = frozenset(into)
            for name, leaf in self._leaves.items():
                leaf.requires_grad_(name in into)
        self._aims = {name: as_tensor(view) for name, view in into.items()}
        for name, view in self._aims.items():
            self._leaves[name].grad = view

    def _choose_loss(self) -> Callable[..., Any]:
        """The module's own `loss`, compiled by itself: torch counts how often it traces one piece of code, whoever's it
        is."""
        module: Any = self._own.module
        if not self._compiled:
            return module.loss  # type: ignore[no-any-return]

        def loss(batch: Any) -> Any:
            return module.loss(batch)

        code = loss.__code__.replace(co_name=f"loss_{id(self)}")
        compiled = self._compiler(fullgraph=False)(types.FunctionType(code, globals(), code.co_name, None,
                                                                      loss.__closure__))

        def call(batch: Any) -> Any:
            try:
                return compiled(batch)
            except torch._dynamo.exc.FailOnRecompileLimitHit as error:
                raise self._own.error("makes torch compile its loss again and again (backend.compile = true), because "
                                      "its shapes or its attributes change from call to call; set backend.compile = "
                                      "false.") from error

        return call
