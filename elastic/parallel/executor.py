"""Runs one stage's part of a schedule over the stage's model and the group's point to point.

What travels is flat float32 buffers of sizes known beforehand: activations one way over a cut of the model, their
gradients the other.

Bits. On each chunk the weight gradients come in ascending order of micro-batches; the checker holds every schedule to
that, so a stage adds each of them straight into one buffer, nothing is held apart, and all schedules give the same
sums. That buffer starts from zeros for every logical shard: (tree + g0) + g1 has other bits than tree + (g0 + g1), so a
shard of several micro-batches is summed by itself first and then goes up the tree as one leaf.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from elastic.collective.group import Buffer, CollectiveGroup
from elastic.parallel.actions import Action, Schedule
from elastic.parallel.checker import check

Item = tuple[int, int]  # micro-batch, depth


class Stage(Protocol):
    """One stage's chunks of a model, at work on one logical shard.

    Buffers are flat float32 arrays. `inputs` is None at the model's beginning, where the stage has its own batch, and
    `output_gradients` at its end, where it has the loss; there nothing is returned either. What is handed in may be
    kept until the micro-batch's backward pass through the chunk is over, and not changed; what is returned is not
    written to again.
    """

    def forward(self, chunk: int, micro_batch: int, inputs: Buffer | None) -> Buffer | None:
        """The chunk's outputs. Losses must be kept by micro-batch and added in their order."""

    def backward(self, chunk: int, micro_batch: int, output_gradients: Buffer | None) -> Buffer | None:
        """Adds the weight gradients to the stage's sum and returns the gradient of `inputs`."""

    def backward_input(self, chunk: int, micro_batch: int, output_gradients: Buffer | None) -> Buffer | None:
        """The gradient of `inputs` alone; the same bits as `backward` gives."""

    def backward_weight(self, chunk: int, micro_batch: int) -> None:
        """The rest of `backward`; the same bits."""


class Executor:
    """One stage of one group: `group.rank` is the stage, and `sizes[d]` the elements that travel between depths d and d
    + 1.

    It keeps its receive buffers from run to run. When a run raises, throw it away, after `GroupBroken` with its group:
    a peer that was only stopped may still write to them.
    """

    def __init__(self, schedule: Schedule, group: CollectiveGroup, sizes: Sequence[int],
                 allocate: Callable[[int], Buffer]):
        check(schedule)
        if group.size != schedule.num_stages:
            raise ValueError(f"a schedule of {schedule.num_stages} stages on a group of {group.size}: they must be as "
                             "many.")
        if len(sizes) != schedule.num_depths - 1:
            raise ValueError(f"{len(sizes)} sizes for {schedule.num_depths} chunks of the model: there must be "
                             f"{schedule.num_depths - 1}.")
        self._schedule, self._group, self._sizes, self._allocate = schedule, group, sizes, allocate
        self._free: dict[int, list[Buffer]] = {}
        self._inputs: dict[Item, Buffer] = {}
        self._gradients: dict[Item, Buffer] = {}
        self._leaving: dict[Item, Buffer] = {}  # by the depth to which it goes

    def run(self, stage: Stage) -> None:
        """All micro-batches of one logical shard, forward and backward."""
        for action in self._schedule.actions[self._group.rank]:
            micro_batch, chunk = action.micro_batch, action.chunk
            depth = self._schedule.depth(self._group.rank, chunk)
            item = micro_batch, depth
            if action.is_message:
                self._pass(action, depth)
            elif action.kind == "forward":
                self._keep(micro_batch, depth, depth + 1, stage.forward(chunk, micro_batch, self._inputs.get(item)))
            elif action.kind == "backward_weight":
                stage.backward_weight(chunk, micro_batch)
            else:
                backward = stage.backward if action.kind == "backward" else stage.backward_input
                self._keep(micro_batch, depth, depth - 1, backward(chunk, micro_batch, self._gradients.get(item)))
            if action.kind in ("backward", "backward_weight"):  # the stage is done with what came
                for held in (self._inputs, self._gradients):
                    if item in held:
                        buffer = held.pop(item)
                        self._free[buffer.shape[0]].append(buffer)

    def _pass(self, action: Action, depth: int) -> None:
        """One message; returns when it has gone or come."""
        peer = self._schedule.peer(self._group.rank, action)
        other = depth + (1 if action.kind in ("send_activation", "receive_gradient") else -1)
        if action.kind.startswith("send"):
            self._group.send(self._leaving.pop((action.micro_batch, other)), peer)
            return
        size = self._sizes[min(depth, other)]
        free = self._free.setdefault(size, [])
        buffer = free.pop() if free else self._allocate(size)
        self._group.receive(buffer, peer)
        (self._inputs if action.kind == "receive_activation" else self._gradients)[action.micro_batch, depth] = buffer

    def _keep(self, micro_batch: int, depth: int, to: int, made: Buffer | None) -> None:
        """What a computation made, until it is sent; nothing at the model's ends."""
        if not 0 <= to < self._schedule.num_depths:
            return
        size = self._sizes[min(depth, to)]
        if made is None or made.shape != (size,):
            raise ValueError(f"chunk {depth} of the model made "
                             f"{'nothing' if made is None else f'an array of shape {tuple(made.shape)}'} for chunk "
                             f"{to}: it must be flat, of {size} elements.")
        self._leaving[micro_batch, to] = made
