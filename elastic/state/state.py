"""The training state: named arrays as views into flat buffers, and how a worker gets it from a peer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from elastic.buffers import follow, take_over, weighed
from elastic.checkpoint.plan import shares
from elastic.errors import RecipeError
from elastic.model.backend import SLOTS, Backend, Buffer, Spec
from elastic.model.initial import initial_values
from elastic.state.flat_layout import BLOCK, FlatLayout, is_frozen, shaped

if TYPE_CHECKING:
    from elastic.checkpoint.manifest import Piece
    from elastic.parallel.layout import Box, Portion

NAMED = 3  # arrays that a message names; the rest is counted
AVERAGE = "ema"  # beside the optimizer's slots, with the layout of one


def fill(view: Buffer, values: np.ndarray) -> None:
    """Copies values, NumPy's or of the view's own kind, into a view on any device."""
    view[...] = view.new_tensor(values) if hasattr(view, "new_tensor") and not hasattr(values, "new_tensor") else values


def check_same(wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> None:
    """RecipeError, with the first arrays that differ, unless both hold the same names and shapes."""
    differ = [name for name in sorted({*wanted, *found}) if wanted.get(name) != found.get(name)]
    if not differ:
        return

    def has(side: Mapping[str, tuple[int, ...]], name: str) -> str:
        return f"shape {tuple(side[name])}" if name in side else "no such array"

    first = "; ".join(f"{name}: the checkpoint has {has(found, name)}, the recipe's model and optimizer have {has(wanted, name)}"
                      for name in differ[:NAMED])
    more = f" (and {len(differ) - NAMED} more arrays)" if len(differ) > NAMED else ""
    raise RecipeError(f"{first}{more}; it is of another model or optimizer: put [model] and optimizer.name back, or start a new run "
                      "with model.init.")


def to_numpy(view: Buffer) -> np.ndarray:
    """A NumPy array of a view on any device; shares memory on the CPU."""
    return view.detach().cpu().numpy() if hasattr(view, "detach") else view


class State:
    """Parameters, optimizer slots, averages, model buffers and the count of committed steps of one worker.

    With a `portion`, of its seat alone: `boxes` says which part of an array each one is, and shapes are those of the parts.
    """

    def __init__(self, backend: Backend, optimizer: str, freeze: Sequence[str] = (), no_decay: Sequence[str] = (), averages: bool = False,
                 portion: Portion | None = None, decayed: Sequence[str] = ("*",), thaw: Sequence[str] = ()):
        self.backend, self.portion = backend, portion
        self.replica_size = portion.mesh.replica_size if portion else 1
        self.whole: Mapping[str, Spec] = portion.whole if portion else backend.parameters
        copies = {name for name in backend.parameters if portion and not portion.keeps(name)}
        self.layout = FlatLayout(backend.parameters, backend.buffers, freeze, no_decay, copies, self.whole, decayed, thaw)
        self.param = backend.allocate(self.layout.size)
        self.slots: dict[str, Buffer] = self._allocate((*SLOTS[optimizer], *([AVERAGE] if averages else [])))
        self.buffers = {name: np.zeros(spec.shape, spec.dtype) for name, spec in backend.buffers.items()}
        self.averaged_buffers = {name: np.zeros_like(values) for name, values in self.buffers.items()} if averages else {}
        self.committed, self.torn = -1, False  # torn: parameters whose slots others keep are not of `committed`
        backend.bind(self.layout.views(self.param), self.buffers)
        self.freeze, self.thaw = freeze, thaw
        self.views = self._views()

    def _allocate(self, slots: Iterable[str]) -> dict[str, Buffer]:
        return {slot: self.backend.allocate(self.layout.trainable) for slot in slots}

    def runs(self, low: int, high: int) -> list[tuple[int, int, int]]:
        """What this worker keeps the slots of, within low..high-1: (low, high, where it lies in a slot and in the reduced gradient)."""
        return [(low, high, low)] if low < high else []

    blocks: tuple[tuple[int, int], ...] = ()  # stretches of the blocks that are kept, of `num_blocks`; 0: not shared out
    num_blocks = 0
    keeps_all = True

    def keep(self, rank: int, size: int) -> None:
        """From now on this is replica `rank` of `size`; what it had does not count any more."""
        self.committed, self.torn = -1, False

    @property
    def tail(self) -> int:
        """Where the statistics lie in the reduced gradient."""
        return self.layout.trainable

    def start(self, seed: int, init: Mapping[str, np.ndarray] | None = None) -> None:
        """Starting values at step 0; `init` overrides some by name."""
        given = self.backend.initial()
        wholes = initial_values({name: self.whole[name] for name in self.backend.parameters}, seed, given) | {
            name: value for name, value in (init or {}).items() if name in self.backend.parameters}
        values = {name: cut(value, self.box(name)) for name, value in wholes.items()}
        buffers = initial_values(self.backend.buffers, seed, given)
        begun = {f"optimizer/{slot}/{name}": values[name] if slot == AVERAGE else np.broadcast_to(0.0, self.layout.places[name].shape)
                 for slot in self.slots for name in self.layout.trainable_names}
        begun |= {f"optimizer/{AVERAGE}/{name}": buffers[name] for name in self.averaged_buffers}
        self.load({f"parameter/{n}": v for n, v in values.items()} | begun | {f"buffer/{n}": v for n, v in buffers.items()}, 0)

    def _views(self) -> dict[str, Buffer]:
        """Everything by name, on its device: parameter/NAME, optimizer/SLOT/NAME, buffer/NAME."""
        out = {f"parameter/{n}": v for n, v in self.layout.views(self.param).items()} | self._slot_views()
        out |= {f"optimizer/{AVERAGE}/{n}": v for n, v in self.averaged_buffers.items()}  # no parameter and buffer share a name
        return out | {f"buffer/{n}": v for n, v in self.buffers.items()}

    def _slot_views(self) -> dict[str, Buffer]:
        return {f"optimizer/{slot}/{n}": v for slot, buffer in self.slots.items()
                for n, v in self.layout.views(buffer, self.layout.trainable_names).items()}

    def specs(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """(dtype, shape) of everything by name, as this worker holds it."""
        return {name: (str(view.dtype).removeprefix("torch."), tuple(view.shape)) for name, view in self.views.items()}

    def whole_specs(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """(dtype, shape) of everything by name, of the whole model."""
        found = self.specs()
        if self.portion is None:
            return found
        kind = str(self.param.dtype).removeprefix("torch.")
        trainable = [n for n, spec in self.whole.items() if not is_frozen(n, spec, self.freeze, self.thaw)]
        names = [f"parameter/{n}" for n in self.whole] + [f"optimizer/{slot}/{n}" for slot in self.slots for n in trainable]
        return found | {name: (kind, tuple(self.whole[parameter_of(name)].shape)) for name in names}

    def box(self, name: str) -> Box | None:
        """Which part of an array this worker holds, by a parameter's name or one of `views`; None for all of it."""
        return self.portion.boxes.get(parameter_of(name)) if self.portion and not name.startswith("buffer/") else None

    def kept(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """`specs` of what no other worker of the replica saves."""
        if self.portion is None:
            return self.specs()
        return {name: spec for name, spec in self.specs().items()
                if (self.portion.keeps(parameter_of(name)) if self.box(name) else self.portion.is_first)}

    @property
    def is_all(self) -> bool:
        """Whether this worker alone has the whole state."""
        return self.replica_size == 1

    def shares(self, rank: int, size: int) -> tuple[Piece, ...]:
        """The boxes that replica `rank` of `size` writes into a checkpoint, of the arrays as this worker holds them."""
        return shares(self.kept(), size)[rank]

    def local(self, name: str, group: Any) -> np.ndarray:
        """An array of `specs`, as NumPy. `group`: the workers of this seat, who all call this."""
        return to_numpy(self.views[name])

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything by name as NumPy. Shares memory on the CPU."""
        return {name: to_numpy(view) for name, view in self.views.items()}

    def take(self, name: str, low: int, high: int) -> np.ndarray:
        """Elements low..high-1 of an array in C order. Shares memory on the CPU."""
        return to_numpy(self.views[name].reshape(-1)[low:high])

    def put(self, name: str, start: Sequence[int], count: Sequence[int], low: int, values: np.ndarray) -> None:
        """Writes `values` to the elements from `low` on of the box (start, count) of a whole array, as far as they are this worker's."""
        if name not in self.views:
            return
        mine = self.box(name)
        if mine is not None and not mine.is_whole:
            inside, target = within(mine, start, count, low, len(values))
            scatter(self.views[name].reshape(-1), target, values[inside])
            return
        box = self.views[name][(*(slice(s, s + c) for s, c in zip(start, count, strict=True)), ...)]
        if isinstance(box, np.ndarray) and not box.flags.c_contiguous:  # no single run of the array's elements
            box.flat[low:low + len(values)] = values
        else:
            fill(box.view(-1)[low:low + len(values)] if hasattr(box, "new_tensor") else box.reshape(-1)[low:low + len(values)], values)

    def in_whole(self, piece: Piece) -> Piece:
        """Where a box of an array that this worker holds lies in the whole one."""
        mine = self.box(piece.name)
        if mine is None:
            return piece
        return replace(piece, shape=mine.shape, start=tuple(s + m for s, m in zip(piece.start, mine.start, strict=True)))

    def load(self, arrays: Mapping[str, Any], committed: int, without: str = "\0") -> None:
        """Takes over what `arrays()` of any worker gave; names that begin with `without` may be left out. The state counts as torn until
        all of it is in place.

        RecipeError, before anything is copied, where they are those of another model or optimizer.
        """
        self.committed = -1
        shapes = {name: shape for name, (_, shape) in self.specs().items() if not name.startswith(without)}
        check_same(shapes, {name: np.shape(array) for name, array in arrays.items()})
        for name in shapes:
            self._fill(name, arrays[name])
        self.committed, self.torn = committed, False

    def _fill(self, name: str, values: np.ndarray) -> None:
        fill(self.views[name], values)

    def heal(self, group: Any, root: int, committed: int) -> int:
        """Every member of `group` takes the root's state; returns the bytes that each of the others received."""
        if group.rank != root:
            self.committed = -1
        moved = [self.param, *self.slots.values(), *self.flat_buffers()]
        for buffer in moved:
            group.broadcast(buffer, root)
        self.committed = committed
        return sum(int(b.nbytes) for b in moved)

    def flat_buffers(self) -> list[np.ndarray]:
        """As bytes: not every collective knows every dtype."""
        return [b.reshape(-1).view(np.uint8) for b in (*self.buffers.values(), *self.averaged_buffers.values())]

    def moving(self, name: str) -> np.ndarray:
        """A buffer, or a frozen parameter that the model moves."""
        return self.buffers[name] if name in self.buffers else to_numpy(self.views[f"parameter/{name}"])

    def add_statistics(self, gradient: Buffer, new: Mapping[str, np.ndarray], weight: float) -> None:
        """Adds what one shard changed in the buffers, times its weight, behind the gradients."""
        for name, view in shaped(gradient, self.layout.statistics).items():
            value = weighed(name, self.moving(name), new[name], weight)
            view += view.new_tensor(value) if hasattr(view, "new_tensor") else value

    def apply_statistics(self, gradient: Buffer, weight: float) -> None:
        """The buffers change by the weighted mean over all shards of what each changed."""
        for name, view in shaped(gradient[self.tail:], self.layout.statistics, self.layout.trainable).items():
            values = self.moving(name)
            take_over(values, np.asarray(to_numpy(view), np.float64) / weight)
            if name not in self.buffers:
                fill(self.views[f"parameter/{name}"], values)  # on a GPU they were a copy

    def average(self, decay: float, step: int) -> None:
        """Moves the averages, if kept, towards the parameters and buffers after `step`: by 1 - `decay`, and by more in the beginning, so that
        what the parameters started from soon stops to matter. Elementwise, block by block: no cut can show in the bits.
        """
        if AVERAGE not in self.slots:
            return
        share = 1.0 - min(decay, (1 + step) / (10 + step))
        for low, high, at in self.runs(0, self.layout.trainable):
            for more in range(0, high - low, BLOCK):
                mean = self.slots[AVERAGE][at + more:at + more + BLOCK]
                mean += (self.param[low + more:low + more + BLOCK] - mean) * share
        for name, mean in self.averaged_buffers.items():
            follow(mean, self.buffers[name], share)

    @contextmanager
    def averaged(self, group: Any) -> Iterator[None]:
        """Inside, the model's parameters and buffers are their averages, where they are kept. `group`: the workers of this seat."""
        if AVERAGE not in self.slots:
            yield
            return
        views = self.layout.views(self.param)
        self.backend.bind(views | self.layout.views(self._all_averages(group), self.layout.trainable_names), self.averaged_buffers)
        try:
            yield
        finally:
            self.backend.bind(views, self.buffers)

    def _all_averages(self, group: Any) -> Buffer:
        return self.slots[AVERAGE]


def cut(values: np.ndarray, box: Box | None) -> np.ndarray:
    """A worker's part of a whole array."""
    if box is None or box.is_whole:
        return values
    return values[tuple(slice(s, s + c) for s, c in zip(box.start, box.count, strict=True))]


def within(mine: Box, start: Sequence[int], count: Sequence[int], low: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Which of `length` elements, from `low` on, of a box (start, count) of a whole array lie in a worker's part of it, and where there.

    Element by element: where a stretch of one box lies in another is simplest said of each.
    """
    places = np.unravel_index(np.arange(low, low + length), tuple(count))
    inside = np.ones(length, bool)
    local = []
    for at, s, m, n in zip(places, start, mine.start, mine.count, strict=True):
        here = at + (s - m)
        inside &= (here >= 0) & (here < n)
        local.append(here)
    return inside, np.ravel_multi_index(tuple(here[inside] for here in local), mine.count)


def scatter(flat: Buffer, target: np.ndarray, values: np.ndarray) -> None:
    """Values to elements of a flat buffer on any device."""
    if isinstance(flat, np.ndarray):
        flat[target] = values
    else:
        flat[flat.new_tensor(target).long()] = flat.new_tensor(np.ascontiguousarray(values))


def parameter_of(name: str) -> str:
    """"wte" of "parameter/wte" and of "optimizer/exp_avg/wte"; a parameter's own name as it is."""
    kind, _, rest = name.partition("/")
    return rest if kind in ("parameter", "buffer") else rest.partition("/")[2] if kind == "optimizer" else name
