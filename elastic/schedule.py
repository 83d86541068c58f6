"""The learning rate as a pure function of the step, counted from 1."""

from __future__ import annotations

import math


def learning_rate(step: int, *, kind: str, lr: float, min_lr: float, warmup_steps: int, num_steps: int) -> float:
    """Linear warm-up over `warmup_steps`, then constant, cosine or linear down to `min_lr` at `num_steps`."""
    if step <= warmup_steps:
        return lr * step / (warmup_steps + 1)
    if kind == "constant":
        return lr
    done = min(1.0, (step - warmup_steps) / max(1, num_steps - warmup_steps))
    share = 0.5 * (1.0 + math.cos(math.pi * done)) if kind == "cosine" else 1.0 - done
    return min_lr + share * (lr - min_lr)
