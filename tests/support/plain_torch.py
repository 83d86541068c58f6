"""The oracle of own torch modules: plain torch, which computes the logical shards of a step one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from elastic.gradients import shard_seed


def train(module: torch.nn.Module, rows: Any, steps: int, batch_size: int, num_shards: int, optimizer: str, lr: float,
          frozen: Sequence[str] = (), thawed: Sequence[str] = (), seed: int = 0) -> dict[str, np.ndarray]:
    """The arrays after so many steps over the rows in their order.

    A step's gradient is the mean of its shards'; each shard begins from the buffers (and moved frozen parameters) that the last step left,
    and those take over the mean of the shards' changes.
    """
    for name, p in module.named_parameters():
        p.requires_grad_((p.requires_grad and name not in frozen) or name in thawed)
    trained = [p for p in module.parameters() if p.requires_grad]
    kinds: dict[str, Callable[..., Any]] = {"sgd": torch.optim.SGD, "adamw": lambda p, lr: torch.optim.AdamW(p, lr=lr, weight_decay=0.0)}
    rule, size = kinds[optimizer](trained, lr=lr), batch_size // num_shards
    for step in range(1, steps + 1):
        grads = [torch.zeros_like(p) for p in trained]
        still = {name: t for name, t in arrays_of(module).items() if all(t is not p for p in trained)}
        began = {name: t.detach().clone() for name, t in still.items()}
        changes = {name: torch.zeros(t.shape, dtype=torch.complex128 if t.is_complex() else torch.float64) for name, t in still.items()}
        for shard in range(num_shards):
            for name, t in arrays_of(module).items():
                if name in began:
                    t.detach().copy_(began[name])
            low = (step - 1) * batch_size + shard * size
            items = [rows[i % len(rows)] for i in range(low, low + size)]
            module.zero_grad(set_to_none=True)
            torch.manual_seed(shard_seed(seed, step, shard))
            module.loss({key: torch.as_tensor(np.stack([item[key] for item in items])) for key in items[0]}).backward()
            for total, p in zip(grads, trained):
                total += (torch.zeros_like(p) if p.grad is None else p.grad.to_dense()) / num_shards
            for name, t in arrays_of(module).items():
                if name in began:
                    changes[name] += (t.detach().to(changes[name].dtype) - began[name].to(changes[name].dtype)) / num_shards
        for total, p in zip(grads, trained):
            p.grad = total
        rule.step()
        for name, t in arrays_of(module).items():
            if name in began:
                t.detach().copy_((began[name].to(changes[name].dtype) + changes[name]).to(t.dtype))
    return {name: t.detach().float().numpy() if t.dtype == torch.bfloat16 else t.detach().numpy() for name, t in arrays_of(module).items()}


def arrays_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}
