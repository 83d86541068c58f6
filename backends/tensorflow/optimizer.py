"""Optimizer steps on flat NumPy ranges, in place.

TensorFlow's own updates write to variables, and those copy a buffer that anybody else holds. These are elementwise
NumPy loops of exactly rounded operations, so no cut of a range can show in the bits; a range at a time, so that its
temporaries stay in the cache. Formulas: AdamW, Loshchilov and Hutter 2019, algorithm 2; Adam, Kingma and Ba 2015,
algorithm 1; SGD, Sutskever et al. 2013 with v = momentum v + g; Adagrad, Duchi et al. 2011, diagonal.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from elastic.model.backend import UpdateRule

RANGE = 65_536  # elements; 256 KB: shorter ones cost more in calls than they save in the cache

Array = np.ndarray


def apply(rule: UpdateRule, param: Array, grad: Array, slots: Mapping[str, Array]) -> None:
    """One step in place; `grad` is overwritten."""
    step, rooms = {"adamw": adam, "adam": adam, "sgd": sgd,
                   "adagrad": adagrad}[rule.name], np.empty((2, min(RANGE, len(param))), param.dtype)
    for start in range(0, len(param), RANGE):
        cut = slice(start, start + RANGE)
        p, g, scale = param[cut], grad[cut], rule.scale
        room = rooms[:, :len(p)]
        if rule.name == "adamw":
            p *= 1 - rule.lr * rule.weight_decay
        elif rule.weight_decay:
            g *= scale
            g += np.multiply(p, rule.weight_decay, out=room[0])
            scale = 1.0
        step(rule, p, g, scale, {name: slot[cut] for name, slot in slots.items()}, room)


def adam(rule: UpdateRule, p: Array, g: Array, scale: float, slots: Mapping[str, Array], room: Array) -> None:
    """The factors that are the same for all elements are drawn together, which saves passes."""
    mean, square = slots["exp_avg"], slots["exp_avg_sq"]
    mean *= rule.beta1
    mean += np.multiply(g, scale * (1 - rule.beta1), out=room[0])
    g *= scale * (1 - rule.beta2) ** 0.5
    g *= g
    square *= rule.beta2
    square += g
    unbias = (1 - rule.beta2 ** rule.step) ** 0.5
    root = np.sqrt(square, out=room[0])
    root += rule.eps * unbias
    change = np.divide(mean, root, out=room[1])
    change *= rule.lr * unbias / (1 - rule.beta1 ** rule.step)
    p -= change


def sgd(rule: UpdateRule, p: Array, g: Array, scale: float, slots: Mapping[str, Array], room: Array) -> None:
    if scale != 1.0:
        g *= scale
    if rule.momentum:
        momentum = slots["momentum"]
        momentum *= rule.momentum
        momentum += g
        g = momentum
    p -= np.multiply(g, rule.lr, out=room[0])


def adagrad(rule: UpdateRule, p: Array, g: Array, scale: float, slots: Mapping[str, Array], room: Array) -> None:
    if scale != 1.0:
        g *= scale
    total = slots["sum"]
    total += np.multiply(g, g, out=room[0])
    root = np.sqrt(total, out=room[0])
    root += rule.eps
    g /= root
    g *= rule.lr
    p -= g
