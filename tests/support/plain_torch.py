"""The oracle of own torch modules: plain torch, which computes the logical shards of a step one after the other."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from elastic.data.dataset import batch_seed
from elastic.worker.gradients import shard_seed


def train(module: torch.nn.Module, rows: Any, steps: int, batch_size: int, num_shards: int, optimizer: str, lr: float,
          frozen: Sequence[str] = (), thawed: Sequence[str] = (), seed: int = 0,
          eps: float = 1e-8) -> dict[str, np.ndarray]:
    """The arrays after so many steps over the rows in their order.

    A step's gradient is the sum of its shards' losses over the sum of their weights (rows, where the loss is a mean);
    each shard begins from the buffers (and moved frozen parameters) that the last step left, and those take over the
    weighted mean of the shards' changes.
    """
    for name, p in module.named_parameters():
        p.requires_grad_((p.requires_grad and name not in frozen) or name in thawed)
    trained = [p for p in module.parameters() if p.requires_grad]
    kinds: dict[str, Callable[..., Any]] = {"sgd": torch.optim.SGD, "adamw": lambda p,
                                            lr: torch.optim.AdamW(p, lr=lr, weight_decay=0.0, eps=eps)}
    rule, size = kinds[optimizer](trained, lr=lr), batch_size // num_shards
    for step in range(1, steps + 1):
        grads = [torch.zeros_like(p) for p in trained]
        still = {name: t for name, t in arrays_of(module).items() if all(t is not p for p in trained)}
        began = {name: t.detach().clone() for name, t in still.items()}
        changes = {name: torch.zeros(t.shape, dtype=torch.complex128 if t.is_complex() else torch.float64)
                   for name, t in still.items()}
        whole = 0.0
        for shard in range(num_shards):
            for name, t in arrays_of(module).items():
                if name in began:
                    t.detach().copy_(began[name])
            low = (step - 1) * batch_size + shard * size
            batch = loaded(rows, range(low, low + size), seed)
            module.zero_grad(set_to_none=True)
            start(shard_seed(seed, step, shard))
            found = module.loss(batch)
            total, weight = (found[0], float(found[1])) if isinstance(found, tuple) else (found * size, float(size))
            total.backward()
            whole += weight
            for total, p in zip(grads, trained):
                total += torch.zeros_like(p) if p.grad is None else p.grad.to_dense()
            for name, t in arrays_of(module).items():
                if name in began:
                    changes[name] += (t.detach().to(changes[name].dtype) - began[name].to(changes[name].dtype)) * weight
        for total, p in zip(grads, trained):
            p.grad = total / whole
        rule.step()
        for name, t in arrays_of(module).items():
            if name in began:
                change = changes[name] / whole
                rounded = change if t.is_floating_point() or t.is_complex() else change.round()
                t.detach().copy_((began[name].to(change.dtype) + rounded).to(t.dtype))
    return {name: t.detach().float().numpy() if t.dtype == torch.bfloat16 else t.detach().numpy()
            for name, t in arrays_of(module).items()}


def arrays_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def start(seed: int) -> None:
    """The generators that users draw from."""
    torch.manual_seed(seed)
    np.random.seed(seed & (1 << 32) - 1)
    random.seed(seed)


def loaded(rows: Any, numbers: range, seed: int) -> Any:
    """A batch as torch's own loader makes it, by the data set's `collate_fn` where it has one."""
    start(batch_seed(seed, numbers[0] // len(rows), numbers[0] % len(rows)))
    collate = rows.collate_fn if hasattr(rows, "collate_fn") else torch.utils.data.default_collate
    return collate([rows[i % len(rows)] for i in numbers])
