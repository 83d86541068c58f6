"""`elastic.model.ops.Ops` on PyTorch's native kernels. The shapes are documented there."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from backends.common import matrix_product
from backends.pytorch import collectives
from elastic.model import ops as neutral

Tensor = torch.Tensor


class TorchOps(neutral.Kernels):
    """Kernels on one device. `dtype` is what constants of floating point become."""

    name = "torch"
    concatenate = staticmethod(torch.cat)
    unbind = staticmethod(torch.unbind)
    narrow = staticmethod(torch.narrow)
    exp = staticmethod(torch.exp)
    log = staticmethod(torch.log)
    sqrt = staticmethod(torch.sqrt)
    relu = staticmethod(F.relu)
    gelu = staticmethod(F.gelu)
    sigmoid = staticmethod(torch.sigmoid)
    tanh = staticmethod(torch.tanh)

    def __init__(self, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32):
        self.device = torch.device(device)
        self.dtype = dtype
        self.axes = {}
        self.recomputed = 0  # calls of `recompute` so far

    def constant(self, values: Any) -> Tensor:
        tensor = torch.as_tensor(np.asarray(values), device=self.device)
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def reshape(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        return x.reshape(tuple(shape))

    def transpose(self, x: Tensor, axes: Sequence[int]) -> Tensor:
        return x.permute(tuple(axes))

    def gather(self, table: Tensor, indices: Tensor, dim: str = "", length: int = 0) -> Tensor:
        if self.degree(dim) > 1:
            start, count = self.axes[dim].span(length)
            mine = indices - start
            foreign = ((mine < 0) | (mine >= count)).view(indices.shape + (1,) * (table.dim() - 1))
            return self.leave(self.gather(table, mine.clamp(0, count - 1)).masked_fill(foreign, 0.0), dim)
        if table.dim() == 2:
            return F.embedding(indices, table)
        rows = F.embedding(indices, table.reshape(table.shape[0], -1))
        return rows.reshape(indices.shape + table.shape[1:])

    def sum(self, x: Tensor, axes: Sequence[int] | None = None, keep: bool = False) -> Tensor:
        return x.sum(None if axes is None else tuple(axes), keepdim=keep)

    def mean(self, x: Tensor, axes: Sequence[int] | None = None, keep: bool = False) -> Tensor:
        return x.mean(None if axes is None else tuple(axes), keepdim=keep)

    def contract(self, equation: str, x: Tensor, y: Tensor, bias: Tensor | None = None) -> Tensor:
        # a tracer sees no caches
        plan = (matrix_product.__wrapped__ if torch.compiler.is_compiling() else matrix_product)(equation)
        if plan is None:
            out = torch.einsum(equation, x, y)
            return out if bias is None else out + bias
        lead, trail, turned = plan
        left, right = x.shape[:lead], y.shape[:trail] if turned else y.shape[y.dim() - trail:]
        if not turned:
            flat_x, flat_y = x.reshape(left.numel(), -1), y.reshape(-1, right.numel())
            out = flat_x.mm(flat_y) if bias is None else torch.addmm(bias.reshape(-1), flat_x, flat_y)
        else:
            out = F.linear(x.reshape(left.numel(), -1), y.reshape(right.numel(), -1), None if bias is None
                           else bias.reshape(-1))
        return out.view(left + right)

    def softmax(self, x: Tensor, axis: int = -1) -> Tensor:
        return x.softmax(axis)

    def log_softmax(self, x: Tensor, axis: int = -1) -> Tensor:
        return x.log_softmax(axis)

    def one_hot(self, indices: Tensor, num: int) -> Tensor:
        return F.one_hot(indices, num).to(self.dtype)

    def top_k(self, x: Tensor, k: int) -> Tensor:
        return x.detach().sort(dim=-1, descending=True, stable=True).indices[..., :k]

    def queue(self, chosen: Tensor, num: int, capacity: int) -> tuple[Tensor, Tensor]:
        (rows, choices), full = chosen.shape, num * capacity
        queues = chosen.t().reshape(-1)
        hot = F.one_hot(queues, num)
        position = (hot.cumsum(0) * hot).sum(1) - 1
        places = torch.where(position < capacity, queues * capacity + position, full)
        row = torch.arange(rows, device=chosen.device).repeat(choices)
        # those without a place fall behind the last
        sources = torch.full((full + 1,), rows, device=chosen.device).scatter(0, places, row)
        return places.view(choices, rows).t(), sources[:full]

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
        return F.layer_norm(x, weight.shape, weight, bias, eps)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, eps)

    def attention(self, query: Tensor, key: Tensor, value: Tensor, causal: bool, rate: float = 0.0, seed: int = 0,
                  tag: str = "") -> Tensor:
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        if not rate:
            return F.scaled_dot_product_attention(query, key, value, is_causal=causal).transpose(1, 2)
        # the fused kernel draws its dropout from the process-wide generator, which no shard owns
        scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[-1])
        if causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(later, -math.inf)
        return (self.dropout(scores.softmax(-1), rate, seed, tag) @ value).transpose(1, 2)

    def dropout(self, x: Tensor, rate: float, seed: int, tag: str) -> Tensor:
        levels = neutral.dropout_levels(rate)
        if not levels:
            return x
        if x.device.type != "cpu":
            keep = keep_mask(x.shape, levels, seed, tag, x.device)
        elif isinstance(seed, Tensor):
            keep = opaque_mask(x.shape, rate, seed, tag)
        else:
            keep = torch.from_numpy(neutral.keep_mask(x.shape, rate, seed, tag))
        return x * keep * (neutral.DROPOUT_LEVELS / (neutral.DROPOUT_LEVELS - levels))

    def recompute(self, function: Callable[..., Tensor], *arrays: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            self.recomputed += 1
        # what is random here is a function of the seed: the generators need not be brought back
        return checkpoint(function, *arrays, use_reentrant=False, preserve_rng_state=False)

    def conv2d(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1,
               padding: int = 0) -> Tensor:
        # turned this way, an image with its channels last is what PyTorch calls channels_last: no copy, and its fastest
        # kernels
        return channels_last(F.conv2d(channels_first(x), weight.permute(3, 2, 0, 1), bias, stride, padding))

    def max_pool(self, x: Tensor, size: int, stride: int, padding: int = 0) -> Tensor:
        return channels_last(F.max_pool2d(channels_first(x), size, stride, padding))

    def batch_norm(self, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, training: bool,
                   momentum: float = 0.1,
                   eps: float = 1e-5) -> tuple[Tensor, Tensor, Tensor]:
        if training:
            mean, var = mean.clone(), var.clone()  # the kernel writes to them
        y = F.batch_norm(channels_first(x), mean, var, weight, bias, training, momentum, eps)
        return channels_last(y), mean, var

    def group_norm(self, x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
        return channels_last(F.group_norm(channels_first(x), groups, weight, bias, eps))

    def across(self, kind: str, x: Tensor, dim: str, length: int) -> Tensor:
        return collectives.Across.apply(x, kind, self.axes[dim], length)

    def attach(self, x: Tensor, penalty: Tensor) -> Tensor:
        return collectives.Attach.apply(x, penalty)

    def cross_entropy(self, logits: Tensor, targets: Tensor, weights: Tensor, dim: str = "", length: int = 0) -> Tensor:
        if self.degree(dim) > 1:
            wide = logits.float() if logits.dtype in collectives.NARROW else logits
            return collectives.CrossEntropy.apply(wide.reshape(-1, wide.shape[-1]), targets.reshape(-1),
                                                  weights.reshape(-1),
                                                  self.axes[dim], length)
        each = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), reduction="none")
        return (each * weights.reshape(-1)).sum()

    def binary_cross_entropy(self, logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits, targets, weights, reduction="sum")

    def squared_error(self, x: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        return ((x - targets).square() * weights).sum()

    def correct(self, logits: Tensor, targets: Tensor, weights: Tensor, top: int = 1) -> Tensor:
        if top == 1:
            return ((logits.argmax(-1) == targets) * weights).sum()
        own = logits.gather(-1, targets.unsqueeze(-1))
        earlier = torch.arange(logits.shape[-1], device=logits.device) < targets.unsqueeze(-1)
        rank = ((logits > own) | ((logits == own) & earlier)).sum(-1)
        return ((rank < top) * weights).sum()


def channels_first(x: Tensor) -> Tensor:
    """(rows, ..., c) -> (rows, c, ...), a view."""
    return x.movedim(-1, 1)


def channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1)


def signed(number: int) -> int:
    number &= (1 << 64) - 1
    return number - (1 << 64) if number >> 63 else number


def _shifted(x: Tensor, by: int) -> Tensor:
    return (x >> by) & ((1 << (64 - by)) - 1)  # int64 shifts drag the sign along; SplitMix64 wants zeros


def _mixed(x: Tensor) -> Tensor:
    x = (x ^ _shifted(x, 30)) * signed(neutral.MIX1)
    x = (x ^ _shifted(x, 27)) * signed(neutral.MIX2)
    return x ^ _shifted(x, 31)


def keep_mask(shape: torch.Size, levels: int, seed: int | Tensor, tag: str, device: torch.device) -> Tensor:
    """`elastic.model.ops.keep_mask` in int64 tensor arithmetic; a tensor `seed` keeps a compiled graph free of
    constants."""
    size = shape.numel()
    if not isinstance(seed, Tensor):
        seed = torch.tensor(signed(seed), dtype=torch.int64, device=device)
    start = _mixed(seed + signed(neutral.GOLDEN * (neutral.tag_key(tag) + 1)))
    numbers = torch.arange(1, -(-size // 4) + 1, dtype=torch.int64, device=device) * signed(neutral.GOLDEN) + start
    parts = _mixed(numbers).view(torch.int16)[:size]
    return (parts >= levels - neutral.DROPOUT_LEVELS // 2).view(shape)


@torch.library.custom_op("elastic::keep_mask", mutates_args=(),
                         schema="(int[] shape, float rate, Tensor seed, str tag) -> Tensor")
def opaque_mask(shape: Sequence[int], rate: float, seed: Tensor, tag: str) -> Tensor:
    """`elastic.model.ops.keep_mask` as one kernel for compiled code: of its int64 arithmetic torch 2.13's compiler
    makes CPU loops that give other bits, and write outside of their memory, where the last dim is no multiple of its
    vectors.
    """
    return torch.from_numpy(neutral.keep_mask(shape, rate, int(seed), tag))


@opaque_mask.register_fake
def _(shape: Sequence[int], rate: float, seed: Tensor, tag: str) -> Tensor:
    return torch.empty(shape, dtype=torch.bool)
