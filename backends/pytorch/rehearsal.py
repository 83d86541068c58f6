"""A user's module runs twice from one seed before the first step, and whatever would train wrong without a word shows.

First backward from 1 into zeros, then from 2 into a filled buffer x: powers of two scale exactly, so the second must be
x + 2g bit for bit. What differs draws or counts on its own, has a hook or a Function that is not linear in the
gradient, or adds in several goes. What the first run left in plain attributes is spoiled before the second: who reads
it gives itself away.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np
import torch

from backends.pytorch.adapter import ModuleModel
from backends.pytorch.arrays import as_tensor
from backends.pytorch.watch import Leaf, checksum, described, differing, leaves, spoil
from elastic.errors import UserError
from elastic.model.backend import Batch, Buffer, Habits, ShardResult
from elastic.model.user_code import is_of_machine

SMALL = 1e-30  # apart by less than this is not apart: below 2^-126 a power of two does not scale exactly
Views = Mapping[str, Buffer]


class Stage(Protocol):
    """What runs the module."""

    def once(self, batch: Batch, into: Views, scale: float) -> ShardResult:
        """One shard from seed 0, backward from `scale`. Every frozen parameter is put back, and its new value is among
        the buffers."""

    def written(self) -> list[str]:
        """Parameters that it wrote to in place."""


def rehearse(stage: Stage, own: ModuleModel, batch: Batch, room: Callable[[], Views]) -> Habits:
    """UserError, by the name of what is wrong, where the module cannot be trained faithfully."""
    before, sums, names = described(leaves(own.module)), {name: checksum(p)
                                                          for name, p in own.tensors.items()}, arrays_of(own)
    hooks = {name: len(p._backward_hooks or {}) for name, p in own.tensors.items()}
    first = room()
    one = stage.once(batch, first, 1.0)
    moved = moving(own, stage.written(), sums, one, first)
    if arrays_of(own) != names:
        changed = next(iter(arrays_of(own).items() ^ names.items()))[0]
        raise own.error(f"makes or replaces its parameter or buffer {changed} in loss(batch); make it where the module "
                        "is made, with its full size.")
    if {name: len(p._backward_hooks or {}) for name, p in own.tensors.items()} != hooks:
        raise own.error("puts a hook on a parameter each time that it computes its loss; put it there once, where the "
                        "module is made.")
    after = leaves(own.module)
    steady = described(after)
    left = [path for path in differing(before, steady) if path in after]
    for path in left:
        spoil(after[path])
    second = room()
    for name, view in second.items():
        as_tensor(view).copy_(filling(as_tensor(first[name])))
    try:
        two = stage.once(batch, second, 2.0)
    except UserError:
        raise
    except Exception as error:
        if not left or is_of_machine(error):
            raise
        raise remembering(own, left[0], after) from error
    now = leaves(own.module)
    stale = differing(steady, described(now))
    if stale:
        raise remembering(own, stale[0], now)
    compare(own, one, two, left, now)
    check_slopes(stage, own, batch, room, one, two)
    return Habits(adds_apart(stage, own, batch, room, first, second), moved)


def arrays_of(own: ModuleModel) -> dict[str, int]:
    """Every parameter, as the object that it is, and the names of the buffers."""
    return {name: id(p) for name, p in own.module.named_parameters()} | {name: 0 for name, _ in own.module.named_buffers()}


def moving(own: ModuleModel, written: list[str], sums: Mapping[str, str], one: ShardResult,
           trained: Views) -> tuple[str, ...]:
    """The frozen parameters that the loss writes to. UserError where it writes to one that trains."""
    for name, p in own.tensors.items():
        if name in trained and (name in written or checksum(p) != sums[name]):
            raise own.error(f"writes to its parameter {name} in place while it computes its loss, as max_norm, a clamp "
                            "or a normalisation does; a trained parameter changes once a step, by the optimizer: "
                            "compute the changed values from it instead, or freeze it.")
    return tuple(name for name in own.tensors if name not in trained and (
        name in written or checksum(torch.from_numpy(one.buffers[name])) != sums[name]))


def remembering(own: ModuleModel, path: str, found: Mapping[str, Leaf]) -> UserError:
    if path in found and found[path].described[0] == "generator":
        return own.error(f"draws from a generator of its own, {path}; draw from the default ones of torch, NumPy or "
                         "Python, which are seeded for each shard.")
    return own.error(f"remembers something in its attribute {path} from one loss(batch) to the next, which no other "
                     "worker sees and no checkpoint keeps; keep it in a buffer (register_buffer), or make it anew in "
                     "each call.")


def compare(own: ModuleModel, one: ShardResult, two: ShardResult, left: list[str], found: Mapping[str, Leaf]) -> None:
    same = np.array_equal([one.loss_sum, one.weight], [two.loss_sum, two.weight], equal_nan=True)
    other = [name for name in one.buffers if one.buffers[name].tobytes() != two.buffers[name].tobytes()]
    if same and not other:
        return
    if left:
        raise remembering(own, left[0], found)
    what = f"its buffer {other[0]} another value" if same else "another loss"
    raise own.error(f"gives {what} when it is called again on the same rows from the same seed: it draws from a "
                    "generator of its own or keeps a count outside of its buffers; draw from the default generators of "
                    "torch, NumPy or Python, and count in a buffer.")


def adds_apart(stage: Stage, own: ModuleModel, batch: Batch, room: Callable[[], Views], first: Views,
               second: Views) -> bool:
    """Whether gradients are added in several goes. UserError where twice the loss has not twice the gradient."""
    if not any(differ(filling(as_tensor(g)).add_(as_tensor(g) * 2), as_tensor(second[name]))
               for name, g in first.items()):
        return False
    doubled = room()
    stage.once(batch, doubled, 2.0)
    wrong = [name for name, g in first.items() if differ(as_tensor(g) * 2, as_tensor(doubled[name]))]
    if not wrong:
        return True
    again = room()
    stage.once(batch, again, 1.0)
    if any(differ(as_tensor(g), as_tensor(again[name])) for name, g in first.items()):
        raise unsteady(own, f"the parameter {wrong[0]}")
    raise not_linear(own, wrong[0])


def check_slopes(stage: Stage, own: ModuleModel, batch: Batch, room: Callable[[], Views], one: ShardResult,
                 two: ShardResult) -> None:
    """UserError where twice the loss has not twice the gradient of what was looked up."""
    wrong = [feature for feature, g in one.slopes.items()
             if differ(as_tensor(g) * 2, as_tensor(two.slopes[feature]))]
    if not wrong:
        return
    again = stage.once(batch, room(), 1.0)
    if any(differ(as_tensor(g), as_tensor(again.slopes[feature])) for feature, g in one.slopes.items()):
        raise unsteady(own, f"the rows of {wrong[0]}")
    raise not_linear(own, f"the rows of {wrong[0]}")


def unsteady(own: ModuleModel, what: str) -> UserError:
    return own.error(f"gives {what} another gradient when it is called again on the same rows from the same seed: "
                     "something in its backward pass draws from a generator of its own or counts; draw from the "
                     "default generators.")


def not_linear(own: ModuleModel, what: str) -> UserError:
    return own.error(f"has a gradient of {what} that is not linear: twice the loss gives it something else than twice "
                     "the gradient, as with a hook or an autograd Function that clips or normalises; gradients of "
                     "shards are added up here: make it linear, or take it out.")


def filling(g: torch.Tensor) -> torch.Tensor:
    """x: as large as the gradient, element by element, so that one rounding more would show. The same for the same g.
    """
    drawn = torch.rand(g.shape, generator=torch.Generator().manual_seed(1)).to(g) + 0.5
    size = g.abs().nan_to_num(1.0, 1.0, 1.0)
    return drawn * torch.where(size > 0, size, size.max() if size.numel() and size.max() > 0 else 1.0)


def differ(wanted: torch.Tensor, found: torch.Tensor) -> bool:
    near = (wanted == found) | ((wanted - found).abs() < SMALL) | ~wanted.isfinite()
    return not bool(near.all())
