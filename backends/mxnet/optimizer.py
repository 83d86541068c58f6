"""Optimizer steps on flat ranges, by MXNet's fused kernels, block by block.

The kernels know no bias correction: Adam's goes into the numbers they get. They are elementwise, so cuts cannot show in
the bits.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import mxnet as mx

from elastic.model.backend import UpdateRule

Array = Any  # an mx.nd.NDArray


def apply(rule: UpdateRule, param: Array, grad: Array, slots: Mapping[str, Array]) -> None:
    """One step in place on one block; `grad` may be overwritten."""
    STEPS[rule.name](rule, param, grad, slots)


def adam(rule: UpdateRule, param: Array, grad: Array, slots: Mapping[str, Array]) -> None:
    """lr m^/(sqrt(v^) + eps) with m^ = m/(1 - beta1^t) and v^ = v/(1 - beta2^t) is lr' m/(sqrt(v) + eps')."""
    lr, eps = corrected(rule)
    mx.nd.adam_update(param, grad, slots["exp_avg"], slots["exp_avg_sq"], lr=lr, beta1=rule.beta1, beta2=rule.beta2,
                      epsilon=eps,
                      wd=rule.weight_decay, rescale_grad=rule.scale, lazy_update=False, out=param)


def adamw(rule: UpdateRule, param: Array, grad: Array, slots: Mapping[str, Array]) -> None:
    lr, eps = corrected(rule)
    mx.nd.contrib.adamw_update(param, grad, slots["exp_avg"], slots["exp_avg_sq"], in_array(rule.scale), lr=lr, eta=1.0,
                               beta1=rule.beta1,
                               beta2=rule.beta2, epsilon=eps, wd=rule.lr * rule.weight_decay, out=param)


@functools.lru_cache(maxsize=1)
def in_array(number: float) -> Array:
    """A step's blocks share it: making one takes as long as updating half a block."""
    return mx.nd.array([number])


def corrected(rule: UpdateRule) -> tuple[float, float]:
    root = math.sqrt(1 - rule.beta2 ** rule.step)
    return rule.lr * root / (1 - rule.beta1 ** rule.step), rule.eps * root


def sgd(rule: UpdateRule, param: Array, grad: Array, slots: Mapping[str, Array]) -> None:
    if not rule.momentum:
        mx.nd.sgd_update(param, grad, lr=rule.lr, wd=rule.weight_decay, rescale_grad=rule.scale, lazy_update=False,
                         out=param)
        return
    # the library keeps its momentum multiplied by -lr, which no other framework does: with lr = -1 it is ours, and the
    # parameters that come with it go where the gradient was
    mx.nd.sgd_mom_update(param, grad, slots["momentum"], lr=-1.0, momentum=rule.momentum, wd=rule.weight_decay,
                         rescale_grad=rule.scale, lazy_update=False, out=grad)
    mx.nd.sgd_update(param, slots["momentum"], lr=rule.lr, wd=0.0, rescale_grad=1.0, lazy_update=False, out=param)


def adagrad(rule: UpdateRule, param: Array, grad: Array, slots: Mapping[str, Array]) -> None:
    grad *= rule.scale
    if rule.weight_decay:
        grad += rule.weight_decay * param
    slots["sum"][:] += mx.nd.square(grad)
    grad /= mx.nd.sqrt(slots["sum"]) + rule.eps
    grad *= rule.lr
    param -= grad


STEPS = {"adamw": adamw, "adam": adam, "sgd": sgd, "adagrad": adagrad}
