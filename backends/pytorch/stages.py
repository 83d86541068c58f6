"""Pieces of a model between their forward and their backward pass, which may come in two halves (Qi et al. 2023, zero bubble).

The graph of a stage hangs between its result and its input. A node on a way between the two that has parameters beside
that way is a fork: the first half runs down to the input and notes what gradient each fork got; the second runs from
every fork to its own parameters, and nothing is computed twice, for a node computes only what is asked for. Walking the
graph costs some microseconds a node. Where it cannot be cut so (a parameter under two forks, activations that are
computed again) the first half does all the work and keeps the weights' gradients apart: nothing is saved then by their
coming later, and they take as much memory as the parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

Tensor = torch.Tensor


@dataclass
class Fork:
    """A node with the parameters beside the way to the input, and the gradients of its results."""

    node: Node
    names: tuple[str, ...]
    gradients: tuple[Tensor | None, ...] = ()

    def note(self, gradients: Sequence[Tensor | None]) -> None:
        self.gradients = tuple(gradients)

    def weights(self, leaves: Mapping[str, Tensor], names: Sequence[str]) -> Iterator[tuple[str, Tensor | None]]:
        """Of those of the names that are here, the gradients; what the node keeps is let go."""
        own = [name for name in self.names if name in names]
        came = [(GradientEdge(self.node, i), gradient) for i, gradient in enumerate(self.gradients)
                if gradient is not None]
        if not own or not came:
            return iter(())
        edges, gradients = zip(*came)
        return zip(own, torch.autograd.grad(edges, [leaves[name] for name in own], gradients, allow_unused=True))


@dataclass
class Run:
    """`leaves` are the parameters that were read, `start` the leaf that stands for the input; `recomputes`: activations
    are computed again."""

    result: Tensor
    start: Tensor | None
    leaves: Mapping[str, Tensor]
    recomputes: bool
    _gradient: Tensor | None = None
    _forks: list[Fork] = field(default_factory=list)
    _weights: list[tuple[str, Tensor | None]] = field(default_factory=list)

    def backward(self, gradient: Tensor | None, into: Mapping[str, Tensor]) -> Tensor | None:
        """Adds to `into` and gives the input's gradient."""
        names = [name for name in self.leaves if name in into]
        for name in names:
            self.leaves[name].grad = into[name]
        try:
            inputs = [self.leaves[name] for name in names] + ([] if self.start is None else [self.start])
            if inputs:
                torch.autograd.backward(self.result, gradient, inputs=inputs)
        finally:
            for name in names:
                self.leaves[name].grad = None  # a gradient buffer ends with its generation
        return None if self.start is None else filled(self.start.grad, self.start)

    def backward_input(self, gradient: Tensor | None) -> Tensor | None:
        """The input's gradient; without an input, all is left to the second half."""
        self._gradient = gradient
        if self.start is None:
            return None
        forks = None if self.recomputes else find_forks(self.result, self.start, self.leaves)
        if forks is None:
            names = list(self.leaves)
            found, *weights = torch.autograd.grad(self.result, [self.start, *(self.leaves[name] for name in names)],
                                                  gradient, allow_unused=True)
            self._weights = list(zip(names, weights))
            return filled(found, self.start)
        hooks = [fork.node.register_prehook(fork.note) for fork in forks]
        (found,) = torch.autograd.grad(self.result, [self.start], gradient, retain_graph=True, allow_unused=True)
        for hook in hooks:
            hook.remove()
        self._forks = forks
        return filled(found, self.start)

    def backward_weight(self, into: Mapping[str, Tensor]) -> None:
        """Adds the parameters' gradients to `into`."""
        if self.start is None:
            self.backward(self._gradient, into)
        for name, gradient in self._weights:
            if name in into and gradient is not None:
                into[name].add_(gradient)
        for fork in self._forks:
            for name, gradient in fork.weights(self.leaves, list(into)):
                if gradient is not None:
                    into[name].add_(gradient)


def filled(gradient: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if gradient is None else gradient


def find_forks(result: Tensor, start: Tensor, leaves: Mapping[str, Tensor]) -> list[Fork] | None:
    """All forks between a result and the input; None where a parameter is under two of them."""
    ends = {get_gradient_edge(leaf).node: name for name, leaf in leaves.items()}
    goal = get_gradient_edge(start).node
    on_way: dict[Node, bool] = {}
    below: dict[Node, tuple[str, ...]] = {}  # the parameters that a node leads to, other than over the way
    forks = []
    for node, children in ordered(get_gradient_edge(result).node):
        on_way[node] = node is goal or any(on_way[child] for child in children)
        names = [ends[node]] if node in ends else [name for child in children if not on_way[child]
                                                   for name in below[child]]
        below[node] = tuple(dict.fromkeys(names))
        if on_way[node] and names:
            forks.append(Fork(node, below[node]))
    under = [name for fork in forks for name in fork.names]
    return forks if len(under) == len(set(under)) else None


def ordered(root: Node) -> Iterator[tuple[Node, list[Node]]]:
    """The nodes of a graph with those that they lead to, these first; without recursion, because a deep model is a deep
    graph."""
    seen: set[Any] = set()
    stack: list[tuple[Node, list[Node] | None]] = [(root, None)]
    while stack:
        node, children = stack.pop()
        if children is not None:
            yield node, children
        elif node not in seen:
            seen.add(node)
            children = [child for child, _ in node.next_functions if child is not None]
            stack.append((node, children))
            stack.extend((child, None) for child in children)
