"""Where the arrays of a model lie in flat buffers of fixed blocks. Pure functions of names, shapes and patterns.

Parameters lie in segments, [decay, one for each pattern of it | no decay | frozen], each starting at a block; all but
the last are cut once more where a worker holds copies of parameters that another worker of its replica counts.
Optimizer slots cover the trainable segments only, and so do the parameters' moving averages, if kept. The gradient
buffer is as long as the trainable segments and ends with room for the model's own buffers (batch-norm statistics),
which are summed over shards by the same reduction. Blocks never move: reduction, optimizer and norms work block by
block, so bits do not depend on how many workers share the work.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from elastic.errors import RecipeError
from elastic.model.backend import Buffer, Spec

BLOCK = 65_536  # elements; 256 KB: small enough that a model of a few million parameters balances over four owners
ALIGN = 16  # elements; 64 bytes: vector loops and MKL see the same alignment wherever an array lies


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


@dataclass(frozen=True)
class Place:
    """Where a named array lies in a flat buffer, in elements."""

    offset: int
    size: int
    shape: tuple[int, ...]


def matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def is_frozen(name: str, spec: Spec, freeze: Iterable[str], thaw: Iterable[str]) -> bool:
    """`thaw` overrules the model itself and `freeze`."""
    return (not spec.trainable or matches(name, freeze)) and not matches(name, thaw)


def pack(specs: Mapping[str, Spec], names: Iterable[str], start: int, places: dict[str, Place]) -> int:
    """Places the arrays one after the other from `start`; returns the next block's start."""
    offset = start
    for name in names:
        shape = tuple(specs[name].shape)
        size = int(np.prod(shape, dtype=np.int64))
        places[name] = Place(offset, size, shape)
        offset += round_up(size, ALIGN)
    return round_up(offset, BLOCK)


def rooms(specs: Mapping[str, Spec], names: Iterable[str]) -> dict[str, Spec]:
    """What a change of each array takes behind the gradients."""
    return {name: Spec((*specs[name].shape, *((2,) if specs[name].dtype.startswith("complex") else ())))
            for name in names}


class FlatLayout:
    """Where every parameter and buffer of a model lies. A pure function of specs and patterns."""

    def __init__(self, parameters: Mapping[str, Spec], buffers: Mapping[str, Spec] | None = None,
                 freeze: Sequence[str] = (), no_decay: Sequence[str] = (), copies: Container[str] = (),
                 known: Iterable[str] = (),
                 decayed: Sequence[str] = ("*",), thaw: Sequence[str] = ()):
        """`copies`: names that another worker counts; `known`: the names of the whole model, where `parameters` are a
        part of it; `decayed`: patterns whose parameters have a weight decay each, of which the first that matches
        counts."""
        buffers = buffers or {}
        known = list(known) or list(parameters)
        for key, patterns in (("model.freeze", freeze), ("model.thaw", thaw), ("optimizer.no_decay", no_decay),
                              ("optimizer.weight_decay", decayed)):
            unused = [p for p in patterns if not any(fnmatch.fnmatchcase(name, p) for name in known)]
            if unused:
                raise RecipeError(f"{key} = {unused[0]!r} matches no parameter; names look like "
                                  f"{', '.join(known[:3])}.")
        frozen = [n for n, spec in parameters.items() if is_frozen(n, spec, freeze, thaw)]
        groups: list[list[str]] = [[] for _ in (*decayed, "none")]
        for name in parameters:
            if name not in frozen:
                patterns = () if matches(name, no_decay) else decayed
                groups[next((place for place, p in enumerate(patterns) if matches(name, [p])), -1)].append(name)
        if not any(groups):
            raise RecipeError("model.freeze leaves no parameter to train, with what the model itself freezes; take a "
                              "pattern out of it, or name what is to train in model.thaw.")
        self.places: dict[str, Place] = {}
        ends = [0]
        for names in groups:
            for counts in (True, False):
                ends.append(pack(parameters, [n for n in names if (n not in copies) == counts], ends[-1], self.places))
        # (pattern, low, high), "" of those without
        self.decays = tuple(zip((*decayed, ""), ends[:-1:2], ends[2::2], strict=True))
        self.trainable = ends[-1]
        # in norms
        self.counted = tuple((low, high) for low, high in zip(ends[:-1:2], ends[1::2], strict=True) if low < high)
        self.size = pack(parameters, frozen, self.trainable, self.places)
        self.trainable_names = [name for names in groups for name in names]
        self.trainable_set = frozenset(self.trainable_names)
        self.names = list(parameters)
        self.specs = {**parameters, **buffers}
        self.move(buffers)

    def move(self, names: Iterable[str]) -> None:
        """These arrays change with the shards: the gradient buffer ends with room for what each changed in them."""
        self.statistics: dict[str, Place] = {}
        self.gradient = pack(rooms(self.specs, names), names, self.trainable, self.statistics)

    def views(self, buffer: Buffer, names: Iterable[str] | None = None) -> dict[str, Buffer]:
        """Shaped views of `buffer`, by parameter name."""
        return shaped(buffer, {n: self.places[n] for n in (names or self.names)})


def shaped(buffer: Buffer, places: Mapping[str, Place], start: int = 0) -> dict[str, Buffer]:
    """`start`: the place at which `buffer` begins."""
    return {name: buffer[p.offset - start:p.offset - start + p.size].reshape(p.shape) for name, p in places.items()}
