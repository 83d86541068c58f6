"""`elastic.model.backend.Backend` on PyTorch for models of named arrays: parameters are leaves over the platform's flat buffers, without a copy.

Gradients accumulate in place: a leaf's `.grad` is set to the caller's view, and the engine adds to what is there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from backends.common import Blocks, ModelBackend, aligned, looked_up, named_rows, neutral, tallied
from backends.pytorch import optimizer
from backends.pytorch.arrays import (
    address,
    as_buffer,
    as_float64,
    as_scalar,
    as_tensor,
    placed,
    plain,
    row_leaf,
    shaped_like,
    slopes_of,
    tensors,
)
from backends.pytorch.ops import TorchOps, signed
from backends.pytorch.stages import Run
from elastic.errors import UserError
from elastic.model.backend import Batch, Buffer, ShardResult, UpdateRule
from elastic.model.user_code import UNTRAINED

_thread = threading.local()


def choose_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise UserError(f"backend.device = {name!r} must be cpu, cuda or auto.")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError('backend.device = "cuda" needs a CUDA GPU and a CUDA build of torch, and this process sees '
                        'none; set backend.device = "cpu".')
    return torch.device(name)


class TorchBackend(ModelBackend):
    """One model on one device. Calls may come from any thread, one at a time; processes may hold several backends."""

    name = "torch"

    def __init__(self, model: Any, settings: Any):
        if settings.precision not in ("float32", "bfloat16", "float64"):
            raise UserError(f"backend.precision = {settings.precision!r} must be float32 or bfloat16 with the torch "
                            "backend.")
        super().__init__(model)
        self.device = choose_device(settings.device)
        self._dtype = torch.float64 if settings.precision == "float64" else torch.float32
        self._ops = TorchOps(self.device, self._dtype)
        self._threads = int(settings.threads)
        self._bfloat16 = settings.precision == "bfloat16"
        self._leaves: dict[str, torch.Tensor] = {}
        self._trainable: set[str] = set()
        self._blocks = Blocks(lambda buffer, block: as_tensor(buffer).split(block), address)
        self._compiled = bool(settings.compile)
        self._loss = self._choose_loss()
        self._splits = False
        # use_deterministic_algorithms() is the same, and loads the compiler: 1.3 s of every start
        torch.set_deterministic_debug_mode("error")
        # a debugging aid of deterministic mode that costs a pass over every new tensor
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]

    def allocate(self, size: int) -> Buffer:
        if self.device.type == "cuda":
            return torch.zeros(size, device=self.device, dtype=self._dtype)
        return aligned(size, np.dtype(plain(self._dtype)))

    def bind(self, params: Mapping[str, Buffer], buffers: Mapping[str, Any]) -> None:
        self._leaves = {name: as_tensor(params[name]).detach().requires_grad_() for name in self.parameters}
        self._state = {name: buffers[name] for name in self.buffers}
        self._trainable = set(self.parameters)
        self._blocks.clear()

    def gradients(self, batch: Batch, seed: int, into: Mapping[str, Buffer]) -> ShardResult:
        self._enter()
        self._aim(into)
        columns, rows = self._columns(batch), self._rows(batch)
        params = {**self._leaves, **named_rows(rows)} if rows else self._leaves
        try:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self._bfloat16):
                function = self._model.loss if self._splits else self._loss
                loss, weight, new = function(self._ops, params, self._device_state(), columns, self._seed(seed))
            if loss.requires_grad:
                loss.backward()
        finally:
            for name in into:
                self._leaves[name].grad = None  # a gradient buffer ends with its generation
        if not loss.requires_grad and float(weight):
            raise UserError(UNTRAINED)
        total, count = torch.stack((loss.detach().double(), as_scalar(weight, loss))).tolist()
        return ShardResult(total, count, {name: value.detach().cpu().numpy() for name, value in new.items()},
                           slopes_of(rows))

    def metrics(self, batch: Batch) -> Mapping[str, tuple[Any, float]]:
        self._enter()
        columns, params = self._columns(batch), {**self._leaves, **named_rows(self._rows(batch))}
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=self._bfloat16):
            return tallied(self._model.metrics(self._ops, params, self._device_state(), columns), as_float64)

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """As float32."""
        self._enter()
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=self._bfloat16):
            out = self._model.logits(self._ops, self._leaves,
                                     torch.as_tensor(tokens, dtype=torch.int64, device=self.device))
        return out.float().cpu().numpy()

    def update(self, rule: UpdateRule, param: Buffer, grad: Buffer, slots: Mapping[str, Buffer], block: int) -> None:
        self._enter()
        # its kernels have no tail that depends on the cut, and thousands of blocks take longer to name than to update
        if self.device.type == "cuda":
            block = len(param)
        with torch.no_grad():
            optimizer.apply(rule, self._blocks(param, block), as_tensor(grad).split(block),
                            {name: self._blocks(slot, block) for name, slot in slots.items()})

    def squared_norms(self, grad: Buffer, block: int) -> np.ndarray:
        self._enter()
        with torch.no_grad():
            return optimizer.squared_norms(as_tensor(grad).split(block))

    def connect(self, axes: Mapping[str, Any]) -> None:
        """Where a dim is split, the model runs as it is written: a compiled function cannot hold the collectives."""
        # a key more or less would compile anew
        self._ops.axes = {dim: axis for dim, axis in axes.items() if axis.size > 1}
        self._splits = bool(self._ops.axes)

    def forward(self, key: Any, pieces: Sequence[str], inputs: Buffer | None, shape: Sequence[int], batch: Batch,
                seed: int
                ) -> Buffer | ShardResult:
        self._enter()
        self._train(set(self.parameters))
        start = None if inputs is None else as_tensor(inputs).detach().view(tuple(shape)).requires_grad_()
        columns, recomputed = self._columns(batch), self._ops.recomputed
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._bfloat16):
            x, weight = self._through(self._ops, self._leaves, pieces, start, columns, seed), None
            if self._ends(pieces):
                x, weight = self._model.score(self._ops, x, columns, seed)
        self._kept[key] = Run(x, start, {name: self._leaves[name] for name in self._read_by(pieces)},
                              self._ops.recomputed > recomputed)
        if weight is None:
            return as_buffer(x)
        total, count = torch.stack((x.detach().double(), as_scalar(weight, x))).tolist()
        return ShardResult(total, count, {})

    def backward(self, key: Any, gradient: Buffer | None, into: Mapping[str, Buffer]) -> Buffer | None:
        self._enter()
        run = self._kept.pop(key)
        return as_buffer(run.backward(shaped_like(run.result, gradient), tensors(into)))

    def backward_input(self, key: Any, gradient: Buffer | None) -> Buffer | None:
        self._enter()
        run = self._kept[key]
        return as_buffer(run.backward_input(shaped_like(run.result, gradient)))

    def backward_weight(self, key: Any, into: Mapping[str, Buffer]) -> None:
        self._enter()
        self._kept.pop(key).backward_weight(tensors(into))

    def infer(self, pieces: Sequence[str], inputs: Buffer | None, shape: Sequence[int], batch: Batch) -> Any:
        self._enter()
        start, columns = None if inputs is None else as_tensor(inputs).view(tuple(shape)), self._columns(batch)
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=self._bfloat16):
            x = self._through(self._ops, self._leaves, pieces, start, columns, None)
            if not self._ends(pieces):
                return as_buffer(x)
            return tallied(self._model.measure(self._ops, x, columns), as_float64)

    def _choose_loss(self) -> Callable[..., Any]:
        return self._compiler(fullgraph=True)(self._model.loss) if self._compiled else self._model.loss

    def _compiler(self, fullgraph: bool) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """A user's module may break its graph; ours must not, it would compile in pieces."""
        import torch._inductor.config
        from torch._inductor.compile_fx import compile_fx

        torch._inductor.config.deterministic = True
        torch._inductor.config.compile_threads = 1  # its pool of compiling processes would outlive a killed worker
        torch._dynamo.config.fail_on_recompile_limit_hit = True  # not other kernels, which have other bits

        def counted(graph: Any, inputs: Any) -> Any:
            self._compilations += 1
            return compile_fx(graph, inputs)

        return lambda function: torch.compile(function, backend=counted, dynamic=False, fullgraph=fullgraph)

    def _enter(self) -> None:
        # the intra-op thread count is partly a thread's own setting, and bits depend on it
        if getattr(_thread, "count", None) != self._threads:
            torch.set_num_threads(self._threads)
            _thread.count = self._threads

    def _seed(self, seed: int) -> int | torch.Tensor:
        if not self._compiled or self._splits:
            return seed
        # a Python number would recompile every step
        return torch.full((), signed(seed), dtype=torch.int64, device=self.device)

    def _columns(self, batch: Batch) -> dict[str, torch.Tensor]:
        return {name: placed(column, self.device)
                for name, column in neutral(batch, np.dtype(plain(self._dtype))).items()}

    def _rows(self, batch: Batch) -> dict[str, torch.Tensor]:
        return {feature: row_leaf(rows, self.device, self._dtype) for feature, rows in looked_up(batch).items()}

    def _device_state(self) -> dict[str, torch.Tensor]:
        return {name: placed(value, self.device) for name, value in self._state.items()}

    def _aim(self, into: Mapping[str, Buffer]) -> None:
        """Makes the leaves' gradients accumulate in `into`; leaves that are not in it are frozen."""
        self._train(set(into))
        for name, view in into.items():
            self._leaves[name].grad = as_tensor(view)

    def _train(self, names: set[str]) -> None:
        if names != self._trainable:
            self._trainable = names
            for name, leaf in self._leaves.items():
                leaf.grad = None
                leaf.requires_grad_(name in names)
