"""Optimizer steps and norms on flat ranges, by PyTorch's fused kernels.

Every kernel gets one tensor per block: a fused loop ends in a scalar tail where it likes, and with ranges cut at block
multiples the tail falls on the same elements however the buffer is shared out.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from elastic.model.backend import UpdateRule

Blocks = tuple[torch.Tensor, ...]


def apply(rule: UpdateRule, params: Blocks, grads: Blocks, slots: Mapping[str, Blocks]) -> None:
    """One step in place. The kernels unscale the gradient as they go and may write it back.

    Numbers go to a device by `torch.full`: a GPU's host waits with `torch.tensor` until all is done that it was given
    before.
    """
    device = params[0].device
    unscale = None if rule.scale == 1.0 else torch.full((), 1.0 / rule.scale, dtype=torch.float32, device=device)
    if rule.name in ("adam", "adamw"):
        kernel = torch._fused_adamw_ if rule.name == "adamw" else torch._fused_adam_
        steps = [torch.full((), float(rule.step), dtype=torch.float32, device=device)] * len(params)
        kernel(params, grads, slots["exp_avg"], slots["exp_avg_sq"], [], steps, lr=rule.lr, beta1=rule.beta1,
               beta2=rule.beta2,
               weight_decay=rule.weight_decay, eps=rule.eps, amsgrad=False, maximize=False, grad_scale=unscale)
    elif rule.name == "sgd":
        torch._fused_sgd_(params, grads, slots["momentum"] if rule.momentum else [], weight_decay=rule.weight_decay,
                          momentum=rule.momentum, lr=rule.lr, dampening=0.0, nesterov=False, maximize=False,
                          is_first_step=False, grad_scale=unscale)
    else:
        adagrad(rule, params, grads, slots["sum"], unscale)


def adagrad(rule: UpdateRule, params: Blocks, grads: Blocks, sums: Blocks, unscale: torch.Tensor | None) -> None:
    if params[0].device.type == "cpu":
        steps = [torch.tensor(float(rule.step))] * len(params)
        torch._fused_adagrad_(params, grads, sums, steps, lr=rule.lr, lr_decay=0.0, weight_decay=rule.weight_decay,
                              eps=rule.eps,
                              maximize=False, grad_scale=unscale)
        return
    if unscale is not None:  # there is no fused kernel on a GPU; these are elementwise, so cuts cannot show
        torch._foreach_div_(grads, unscale)
    if rule.weight_decay:
        torch._foreach_add_(grads, params, alpha=rule.weight_decay)
    torch._foreach_addcmul_(sums, grads, grads, value=1.0)
    roots = torch._foreach_sqrt(sums)
    torch._foreach_add_(roots, rule.eps)
    torch._foreach_addcdiv_(params, grads, roots, value=-rule.lr)


def squared_norms(blocks: Blocks) -> np.ndarray:
    """float64 squared norm of each block, each computed by itself."""
    if blocks[0].device.type != "cpu":
        return np.square(torch.stack(torch._foreach_norm(blocks, 2, dtype=torch.float64)).cpu().numpy())
    wide = torch.empty(max(b.numel() for b in blocks), dtype=torch.float64)  # one block at a time stays in the cache
    out = np.empty(len(blocks))
    for i, block in enumerate(blocks):
        copy = wide[:block.numel()].copy_(block)
        out[i] = torch.dot(copy, copy).item()
    return out
