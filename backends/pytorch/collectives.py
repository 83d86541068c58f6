"""The collectives of a model's kernels, forward and backward, on flat buffers: NumPy's view of a CPU tensor, a GPU's tensor as it is.

On the CPU a backward pass runs in the thread that asks for it, so the workers of one process do not wait in each
other's place; the order of its nodes is that of the forward pass reversed, so all workers call in the same order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from elastic.parallel.axis import span

Tensor = torch.Tensor
NARROW = (torch.bfloat16, torch.float16)  # NumPy lacks the one and adds up the other badly


def moved(x: Tensor, call: Callable[[Any], Any]) -> Tensor:
    """`call` on all of x's elements, flat, in C order; its result is flat as well. Narrow floats travel as float32."""
    flat = x.detach().reshape(-1)
    if flat.device.type != "cpu":
        return call(flat)
    if flat.dtype in NARROW:
        return torch.as_tensor(call(flat.float().numpy())).to(x.dtype)
    return torch.as_tensor(call(flat.numpy()))


def unmoved(axis: Any, x: Tensor, length: int = 0) -> Tensor:
    return x.view_as(x)


def summed(axis: Any, x: Tensor, length: int = 0) -> Tensor:
    return moved(x, axis.sum).view(x.shape)


def swapped(axis: Any, x: Tensor, length: int = 0) -> Tensor:
    """Slice i of x (parts, ...) to place i, and in its stead what came from there."""
    counts = [x[0].numel()] * axis.size
    return moved(x, lambda flat: axis.exchange(flat, counts, counts)).view(x.shape)


def gathered(axis: Any, x: Tensor, length: int) -> Tensor:
    """All spans of the last dim side by side; everybody gives as much as the longest has."""
    padded = torch.nn.functional.pad(x.detach(), (0, -(-length // axis.size) - x.shape[-1]))
    parts = moved(padded, lambda flat: torch.cat([torch.as_tensor(part)
                                                  for part in axis.gather(flat)])).view(axis.size, *padded.shape)
    return torch.cat([part[..., :span(length, axis.size, rank)[1]] for rank, part in enumerate(parts)], -1)


def own_range(axis: Any, x: Tensor, length: int) -> Tensor:
    return x.narrow(-1, *axis.span(length))


# `backends.common.MOVES` on tensors
MOVES = {"enter": (unmoved, summed), "leave": (summed, unmoved), "collect": (gathered, own_range),
         "exchange": (swapped, swapped)}


class Across(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: str, axis: Any, length: int) -> Tensor:
        ctx.back = functools.partial(MOVES[kind][1], axis, length=length)
        return MOVES[kind][0](axis, x, length)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return ctx.back(grads[0]), None, None, None


class Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, penalty: Tensor) -> Tensor:
        ctx.like = penalty.detach()
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], torch.ones_like(ctx.like)


class CrossEntropy(torch.autograd.Function):
    """Logits (places, classes of this worker), targets and weights (places,) -> (). The softmax alone is kept."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, weights: Tensor, axis: Any, length: int) -> Tensor:
        start, count = axis.span(length)
        mine = targets - start
        held, own = (mine >= 0) & (mine < count), mine.clamp(0, count - 1).unsqueeze(-1)
        highest = moved(logits.amax(-1), axis.max)
        shifted = logits - highest.unsqueeze(-1)
        logit = shifted.gather(-1, own).squeeze(-1).masked_fill(~held, 0.0)
        exps = shifted.exp_()
        total, logit = summed(axis, torch.stack((exps.sum(-1), logit)))
        ctx.save_for_backward(exps.div_(total.unsqueeze(-1)), own, held, weights)
        return ((total.log() - logit) * weights).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        softmax, own, held, weights = ctx.saved_tensors
        slope = softmax.scatter_add(-1, own, -held.to(softmax.dtype).unsqueeze(-1))  # minus one-hot
        return slope.mul_((grads[0] * weights).unsqueeze(-1)), None, None, None, None
