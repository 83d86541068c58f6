"""The training state: named arrays as views into flat buffers, and how a worker gets it from a peer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np

from elastic.boxes import Box, scaled, without
from elastic.buffers import fill, follow, like, spec_of, take_over, to_numpy, weighed
from elastic.checkpoint.manifest import Piece
from elastic.checkpoint.plan import pieces_of, shares
from elastic.errors import RecipeError, RunFailed
from elastic.model.backend import SLOTS, Backend, Buffer, Spec
from elastic.model.initial import initial_values
from elastic.parallel.layout import Portion
from elastic.state.flat_layout import BLOCK, FlatLayout, Place, is_frozen, shaped
from elastic.state.holding import Holding
from elastic.state.ownership import owned

NAMED = 3  # arrays that a message names; the rest is counted
AVERAGE = "ema"  # beside the optimizer's slots, with the layout of one


def check_same(wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> None:
    """RecipeError, with the first arrays that differ, unless both hold the same names and shapes."""
    differ = [name for name in sorted({*wanted, *found}) if wanted.get(name) != found.get(name)]
    if not differ:
        return

    def has(side: Mapping[str, tuple[int, ...]], name: str) -> str:
        return f"shape {tuple(side[name])}" if name in side else "no such array"

    first = "; ".join(f"{name}: the checkpoint has {has(found, name)}, the recipe's model and optimizer have "
                      f"{has(wanted, name)}"
                      for name in differ[:NAMED])
    more = f" (and {len(differ) - NAMED} more arrays)" if len(differ) > NAMED else ""
    raise RecipeError(f"{first}{more}; it is of another model or optimizer: put [model] and optimizer.name back, or "
                      "start a new run with model.init.")


class State:
    """Parameters, optimizer slots, averages, model buffers and the count of committed steps of one worker.

    With a `portion`, of its coordinate alone: `boxes` says which part of an array each one is, and shapes are those of
    the parts. Slots and averages are those that its `holding` has, while all parameters are there: but after a step
    others may have to send what they updated.
    """

    def __init__(self, backend: Backend, optimizer: str, freeze: Sequence[str] = (), no_decay: Sequence[str] = (),
                 averages: bool = False,
                 portion: Portion | None = None, decayed: Sequence[str] = ("*",), thaw: Sequence[str] = (),
                 holders: int = 0):
        """`holders` of each block of the optimizer's slots; 0: every worker holds all."""
        self.backend, self.portion = backend, portion
        self.replica_size = portion.mesh.replica_size if portion else 1
        self.whole: Mapping[str, Spec] = portion.whole if portion else backend.parameters
        copies = {name for name in backend.parameters if portion and not portion.keeps(name)}
        self.layout = FlatLayout(backend.parameters, backend.buffers, freeze, no_decay, copies, self.whole, decayed,
                                 thaw)
        self.param = backend.allocate(self.layout.size)
        self.holding = Holding(backend.allocate, (*SLOTS[optimizer], *([AVERAGE] if averages else [])),
                               self.layout.trainable, holders)
        # blocks of slots that are shared out, if any
        self.is_sharded, self.twin, self.num_blocks = holders > 0, holders > 1, self.holding.num_blocks
        self.buffers = {name: np.zeros(spec.shape, spec.dtype) for name, spec in backend.buffers.items()}
        self.averaged_buffers = {name: np.zeros_like(values)
                                 for name, values in self.buffers.items()} if averages else {}
        self.committed, self.torn = -1, False  # torn: parameters whose slots others hold are not of `committed`
        backend.bind(self.layout.views(self.param), self.buffers)
        self.freeze, self.thaw = freeze, thaw
        self.views = self._views()

    # What is held of the slots.

    @property
    def slots(self) -> dict[str, Buffer]:
        return self.holding.store.slots

    def own_as(self, rank: int, size: int) -> None:
        """From now on this is replica `rank` of `size`; what it had does not count any more."""
        self.committed, self.torn = -1, False
        self.holding.own_as(rank, size)

    @property
    def is_all(self) -> bool:
        """Whether this worker alone has the whole state."""
        return self.replica_size == 1 and not self.torn and self.holding.has_all

    def start(self, seed: int, init: Mapping[str, np.ndarray] | None = None) -> None:
        """Starting values at step 0; `init` overrides some by name."""
        given = self.backend.initial()
        wholes = initial_values({name: self.whole[name] for name in self.backend.parameters}, seed, given) | {
            name: value for name, value in (init or {}).items() if name in self.backend.parameters}
        values = {name: value[box.slices] if (box := self.box(name)) else value for name, value in wholes.items()}
        buffers = initial_values(self.backend.buffers, seed, given)
        begun = {f"optimizer/{slot}/{name}": values[name] if slot == AVERAGE
                 else np.broadcast_to(0.0, self.layout.places[name].shape)
                 for slot in self.slots for name in self.layout.trainable_names}
        begun |= {f"optimizer/{AVERAGE}/{name}": buffers[name] for name in self.averaged_buffers}
        self.load({f"parameter/{n}": v for n, v in values.items()} | begun
                  | {f"buffer/{n}": v for n, v in buffers.items()}, 0)

    def _views(self) -> dict[str, Buffer]:
        """What does not move, by name, on its device: parameter/NAME, buffer/NAME, and where slots are not shared out,
        optimizer/SLOT/NAME."""
        out = {f"parameter/{n}": v for n, v in self.layout.views(self.param).items()}
        for slot, buffer in {} if self.is_sharded else self.slots.items():
            out |= {f"optimizer/{slot}/{n}": v for n, v in self.layout.views(buffer, self.layout.trainable_names).items()}
        # no parameter and buffer share a name
        out |= {f"optimizer/{AVERAGE}/{n}": v for n, v in self.averaged_buffers.items()}
        return out | {f"buffer/{n}": v for n, v in self.buffers.items()}

    def specs(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """(dtype, shape) of everything by name, as this worker holds it or its part of it."""
        kind, _ = spec_of(self.param)
        return {name: spec_of(view) for name, view in self.views.items()} | {
            f"optimizer/{slot}/{name}": (kind, self.layout.places[name].shape) for slot in self.slots
            for name in self.layout.trainable_names}

    def whole_specs(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """(dtype, shape) of everything by name, of the whole model."""
        found = self.specs()
        if self.portion is None:
            return found
        kind, _ = spec_of(self.param)
        trainable = [n for n, spec in self.whole.items() if not is_frozen(n, spec, self.freeze, self.thaw)]
        names = [f"parameter/{n}" for n in self.whole] + [f"optimizer/{slot}/{n}" for slot in self.slots
                                                          for n in trainable]
        return found | {name: (kind, tuple(self.whole[parameter_of(name)].shape)) for name in names}

    def box(self, name: str) -> Box | None:
        """Which part of an array this worker holds, by a parameter's name or one of `views`; None for all of it."""
        return self.portion.boxes.get(parameter_of(name)) if self.portion and not name.startswith("buffer/") else None

    def _place(self, name: str) -> Place | None:
        """Where the trained parameter lies that an array is, or is a slot of; None where every worker has the array."""
        parameter = "" if name.startswith("buffer/") else parameter_of(name)
        return self.layout.places[parameter] if parameter in self.layout.trainable_set else None

    def shares(self, rank: int, size: int) -> tuple[Piece, ...]:
        """The boxes that replica `rank` of `size` writes into a checkpoint, of the arrays as this worker holds them.
        What is trained with slots that are shared out is written by who owns those, or its twin: a torn state has no
        more. RunFailed where this worker does not hold it.
        """
        mine, portion = self.specs(), self.portion
        if portion:  # what no other worker of the replica saves
            mine = {name: spec for name, spec in mine.items()
                    if (portion.keeps(parameter_of(name)) if self.box(name) else portion.is_first)}
        trained = {name: place for name in mine if (place := self._place(name))} if self.is_sharded else {}
        low, high = scaled([owned(rank, size, self.num_blocks)], BLOCK)[0]
        if without([(low, high)], self.holding.store.ranges):
            raise RunFailed(f"Blocks {low // BLOCK} to {high // BLOCK - 1} of the optimizer's state are kept by other "
                            "workers; resume the run.")
        pieces = list(shares({name: spec for name, spec in mine.items() if name not in trained}, size)[rank])
        for name, place in trained.items():
            if place.size or not rank:
                pieces += pieces_of(name, *mine[name], max(0, low - place.offset), min(place.size, high - place.offset))
        return tuple(pieces)

    def local(self, name: str, group: Any) -> np.ndarray:
        """An array of `specs`, as NumPy. `group`: the workers of this coordinate, who all call this."""
        if name in self.views:
            return to_numpy(self.views[name])
        slot, place = self._slot(name)
        return to_numpy(self._gathered(slot, place.offset, place.offset + place.size, group)).reshape(place.shape)

    def _slot(self, name: str) -> tuple[str, Place]:
        """Which slot an array that is shared out is of, and its parameter's place."""
        place = self._place(name)
        assert place is not None
        return name.split("/", 2)[1], place

    def _gathered(self, slot: str, low: int, high: int, group: Any) -> Buffer:
        """A range of a slot, where slots are shared out from all its owners."""
        if not self.is_sharded:
            return self.holding.find(slot, low, high)
        out = self.backend.allocate(max(1, high - low))[:high - low]
        for rank, (begin, end) in enumerate(zip(self.holding.cuts, self.holding.cuts[1:])):
            first, last = max(low, begin), min(high, end)
            if first < last:
                part = out[first - low:last - low]
                if rank == group.rank:
                    part[:] = self.holding.find(slot, first, last)
                group.broadcast(part, rank)
        return out

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything by name as NumPy, of a worker that holds all. Shares memory on the CPU, where slots are not shared
        out."""
        return {name: self.take(name, 0, math.prod(shape)).reshape(shape) for name, (_, shape) in self.specs().items()}

    def take(self, name: str, low: int, high: int) -> np.ndarray:
        """Elements low..high-1 of an array in C order, all of them held here. Shares memory on the CPU, unless they lie
        apart."""
        if name in self.views:
            return to_numpy(self.views[name].reshape(-1)[low:high])
        slot, place = self._slot(name)
        runs = sorted(self.holding.store.runs(place.offset + low, place.offset + high))
        parts = [to_numpy(self.slots[slot][at:at + last - first]) for first, last, at in runs]
        return parts[0] if len(parts) == 1 else np.concatenate([*parts, np.zeros(0, np.float32)])

    def put(self, name: str, box: Box, low: int, values: np.ndarray) -> None:
        """Writes `values` to the elements from `low` on of a box of a whole array, as far as they are this worker's."""
        view, place = self.views.get(name), self._place(name)
        if view is None and place is None:
            return
        mine = self.box(name) or Box.all(box.shape)
        for run in box.runs(low, low + len(values)):
            part, values = values[:run.size].reshape(run.count), values[run.size:]
            if here := run.meet(mine):
                part, here = part[here.relative(run).slices], here.relative(mine)
                if view is not None:
                    fill(view[here.slices], part)
                elif place is not None:
                    self.holding.store.put_box(name.split("/", 2)[1], place.offset, here, part)

    def in_whole(self, piece: Piece) -> Piece:
        """Where a box of an array that this worker holds lies in the whole one."""
        mine = self.box(piece.name)
        box = piece.box.inside(mine) if mine else piece.box
        return replace(piece, shape=box.shape, start=box.start)

    def load(self, arrays: Mapping[str, Any], committed: int, without: str = "\0") -> None:
        """Takes over what `arrays()` of any worker gave; names that begin with `without` may be left out. The state
        counts as torn until all of it is in place.

        RecipeError, before anything is copied, where they are those of another model or optimizer.
        """
        self.committed = -1
        shapes = {name: shape for name, (_, shape) in self.specs().items() if not name.startswith(without)}
        check_same(shapes, {name: np.shape(array) for name, array in arrays.items()})
        for name in shapes:
            if name in self.views:
                fill(self.views[name], arrays[name])
            else:
                slot, place = self._slot(name)
                self.holding.store.put(slot, place.offset, place.offset + place.size,
                                       np.ascontiguousarray(arrays[name]).reshape(-1))
        self.committed, self.torn = committed, False

    def heal(self, group: Any, root: int, committed: int) -> int:
        """Every member of `group` takes the root's state; returns the bytes that each of the others received.

        Where slots are shared out it is the model's own buffers alone: slots and parameters come from their holders,
        and others than the root hold nothing from now on.
        """
        if group.rank != root:
            self.committed, self.torn = -1, False
            if self.is_sharded:
                self.holding.drop()
        # not every group knows every dtype
        moved = [b.reshape(-1).view(np.uint8) for b in (*self.buffers.values(), *self.averaged_buffers.values())]
        if not self.is_sharded:
            moved = [self.param, *self.slots.values(), *moved]
        for buffer in moved:
            group.broadcast(buffer, root)
        if not self.is_sharded:
            self.committed = committed
        return sum(int(b.nbytes) for b in moved)

    def moving(self, name: str) -> np.ndarray:
        """A buffer, or a frozen parameter that the model moves."""
        return self.buffers[name] if name in self.buffers else to_numpy(self.views[f"parameter/{name}"])

    def add_statistics(self, gradient: Buffer, new: Mapping[str, np.ndarray], weight: float) -> None:
        """Adds what one shard changed in the buffers, times its weight, behind the gradients."""
        for name, view in shaped(gradient, self.layout.statistics).items():
            view += like(view, weighed(name, self.moving(name), new[name], weight))

    def apply_statistics(self, gradient: Buffer, weight: float) -> None:
        """The buffers change by the weighted mean over all shards of what each changed."""
        for name, view in shaped(gradient[self.holding.store.size:], self.layout.statistics,
                                 self.layout.trainable).items():
            values = self.moving(name)
            take_over(values, np.asarray(to_numpy(view), np.float64) / weight)
            if name not in self.buffers:
                fill(self.views[f"parameter/{name}"], values)  # on a GPU they were a copy

    def average(self, decay: float, step: int) -> None:
        """Moves the averages, if kept, towards the parameters and buffers after `step`: by 1 - `decay`, and by more in
        the beginning, so that what the parameters started from soon stops to matter. Elementwise, block by block: no
        cut can show in the bits.
        """
        if AVERAGE not in self.slots:
            return
        share = 1.0 - min(decay, (1 + step) / (10 + step))
        for low, high, at in self.holding.store.runs(0, self.layout.trainable):
            for more in range(0, high - low, BLOCK):
                mean = self.slots[AVERAGE][at + more:at + more + BLOCK]
                mean += (self.param[low + more:low + more + BLOCK] - mean) * share
        for name, mean in self.averaged_buffers.items():
            follow(mean, self.buffers[name], share)

    @contextmanager
    def averaged(self, group: Any) -> Iterator[None]:
        """Inside, the model's parameters and buffers are their averages, where they are kept. `group`: the workers of
        this coordinate."""
        if AVERAGE not in self.slots:
            yield
            return
        views = self.layout.views(self.param)
        means = self._gathered(AVERAGE, 0, self.layout.trainable, group)
        self.backend.bind(views | self.layout.views(means, self.layout.trainable_names), self.averaged_buffers)
        try:
            yield
        finally:
            self.backend.bind(views, self.buffers)


def parameter_of(name: str) -> str:
    """"wte" of "parameter/wte" and of "optimizer/exp_avg/wte"; a parameter's own name as it is."""
    kind, _, rest = name.partition("/")
    return rest if kind in ("parameter", "buffer") else rest.partition("/")[2] if kind == "optimizer" else name
