"""Reverse-mode differentiation of NumPy arrays: a variable remembers its parents and how to pull a gradient back to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Pull = Callable[[np.ndarray], Sequence[np.ndarray | None]]


class Variable:
    """An array that a gradient is wanted for, or that depends on one."""

    __slots__ = ("value", "parents", "pull", "gradient")

    def __init__(self, value: np.ndarray, parents: tuple[Any, ...] = (), pull: Pull | None = None):
        self.value = value
        self.parents = parents
        self.pull = pull
        self.gradient: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    @property
    def dtype(self) -> np.dtype:
        return self.value.dtype


def value_of(x: Any) -> Any:
    return x.value if isinstance(x, Variable) else x


def record(value: Any, parents: tuple[Any, ...], pull: Pull) -> Any:
    """A variable if any parent is one, else the plain value. `pull` gives one gradient (or None) per parent."""
    if any(isinstance(parent, Variable) for parent in parents):
        return Variable(np.asarray(value), parents, pull)
    return value


def backward(result: Variable, gradient: np.ndarray | None = None) -> None:
    """Adds d result / d leaf, weighted with `gradient` (1 where there is none), to the `gradient` of every variable
    behind `result`."""
    order = topological(result)
    result.gradient = np.ones_like(result.value) if gradient is None else gradient
    for variable in reversed(order):
        if variable.pull is None or variable.gradient is None:
            continue
        for parent, gradient in zip(variable.parents, variable.pull(variable.gradient), strict=True):
            if isinstance(parent, Variable) and gradient is not None:
                gradient = summed_to(gradient, parent.shape).astype(parent.dtype, copy=False)
                parent.gradient = gradient if parent.gradient is None else parent.gradient + gradient


def topological(result: Variable) -> list[Variable]:
    """Parents before children; without recursion, because a deep model is a deep graph."""
    order, seen, stack = [], set(), [(result, False)]
    while stack:
        variable, done = stack.pop()
        if done:
            order.append(variable)
        elif id(variable) not in seen:
            seen.add(id(variable))
            stack.append((variable, True))
            stack.extend((parent, False) for parent in variable.parents if isinstance(parent, Variable))
    return order


def summed_to(gradient: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Undoes broadcasting."""
    extra = gradient.ndim - len(shape)
    axes = (*range(extra), *(i + extra for i, length in enumerate(shape) if length == 1
                             and gradient.shape[i + extra] != 1))
    return gradient.sum(axis=axes).reshape(shape) if axes else gradient
