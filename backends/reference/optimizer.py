"""Optimizer steps written plainly from the papers, in place on one range of a flat buffer.

AdamW: Loshchilov and Hutter 2019, algorithm 2. Adam: Kingma and Ba 2015, algorithm 1, weight decay as an L2 term.
SGD with momentum: Sutskever et al. 2013 in the form v = momentum v + g. Adagrad: Duchi et al. 2011, diagonal.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from elastic.model.backend import UpdateRule


def apply(rule: UpdateRule, param: np.ndarray, grad: np.ndarray, slots: Mapping[str, np.ndarray]) -> None:
    steps = {"adamw": adam, "adam": adam, "sgd": sgd, "adagrad": adagrad}
    gradient = grad * param.dtype.type(rule.scale)
    if rule.name == "adamw":
        param *= 1 - rule.lr * rule.weight_decay
    else:
        gradient += rule.weight_decay * param
    steps[rule.name](rule, param, gradient, slots)


def adam(rule: UpdateRule, param: np.ndarray, gradient: np.ndarray, slots: Mapping[str, np.ndarray]) -> None:
    mean, square = slots["exp_avg"], slots["exp_avg_sq"]
    mean[:] = rule.beta1 * mean + (1 - rule.beta1) * gradient
    square[:] = rule.beta2 * square + (1 - rule.beta2) * gradient * gradient
    unbiased_mean = mean / (1 - rule.beta1 ** rule.step)
    unbiased_square = square / (1 - rule.beta2 ** rule.step)
    param -= rule.lr * unbiased_mean / (np.sqrt(unbiased_square) + rule.eps)


def sgd(rule: UpdateRule, param: np.ndarray, gradient: np.ndarray, slots: Mapping[str, np.ndarray]) -> None:
    if rule.momentum:
        slots["momentum"][:] = rule.momentum * slots["momentum"] + gradient
        gradient = slots["momentum"]
    param -= rule.lr * gradient


def adagrad(rule: UpdateRule, param: np.ndarray, gradient: np.ndarray, slots: Mapping[str, np.ndarray]) -> None:
    slots["sum"] += gradient * gradient
    param -= rule.lr * gradient / (np.sqrt(slots["sum"]) + rule.eps)
