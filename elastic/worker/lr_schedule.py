"""The learning rate as a pure function of the step, counted from 1."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def learning_rate(step: int, num_steps: int, options: Mapping[str, Any]) -> float:
    """By the keys of `[optimizer]`: linear warm-up over `warmup_steps`, then constant; cosine or linear down to
    `min_lr` at `num_steps`; or "step", times `gamma` after every step in `milestones`, `min_lr` at least. "one-cycle"
    has a warm-up of its own.
    """
    kind, lr, min_lr, warmup_steps = (options[key] for key in ("schedule", "lr", "min_lr", "warmup_steps"))
    if kind == "one-cycle":
        return one_cycle(step, num_steps, lr, options)
    if step <= warmup_steps:
        return lr * step / (warmup_steps + 1)
    if kind == "constant":
        return lr
    if kind == "step":
        return max(min_lr, lr * options["gamma"] ** sum(milestone < step for milestone in options["milestones"]))
    done = min(1.0, (step - warmup_steps) / max(1, num_steps - warmup_steps))
    return min_lr + (cosine(done) if kind == "cosine" else 1.0 - done) * (lr - min_lr)


def one_cycle(step: int, num_steps: int, lr: float, options: Mapping[str, Any]) -> float:
    """Smith and Topin 2018, in two halves of cosines, as PyTorch has it: from lr / div_factor up to `lr` over the share
    `pct_start` of the run, and down to lr / div_factor / final_div_factor at its end. Momentum stays as it is.
    """
    first = lr / options["div_factor"]
    last, peak, now = first / options["final_div_factor"], options["pct_start"] * num_steps - 1, step - 1
    if now <= peak:
        return lr + cosine(now / peak if peak else 1.0) * (first - lr)
    return last + cosine(min(1.0, (now - peak) / (num_steps - 1 - peak))) * (lr - last)


def cosine(done: float) -> float:
    """From 1 at 0 to 0 at 1, level at both."""
    return 0.5 * (1.0 + math.cos(math.pi * done))


def scaled(options: Mapping[str, Any], batch_size: int) -> dict[str, Any]:
    """The keys of `[optimizer]` with the rates that `batch_size` calls for: in proportion to it (Goyal et al. 2017,
    section 2.1)."""
    factor = batch_size / options["base_batch"] if options["base_batch"] else 1.0
    return {**options, "lr": options["lr"] * factor, "min_lr": options["min_lr"] * factor}
