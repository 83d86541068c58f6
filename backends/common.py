"""What backends share, without a framework: their door and buffers, a user's own data in and out, and what is checked of every user's own model
before the first step: attributes that change, values that two runs give differently.
"""

from __future__ import annotations

import functools
import hashlib
import random
from collections import OrderedDict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np

from elastic.data.collate import stacked
from elastic.errors import ElasticError, UserError
from elastic.model.backend import ROWS, Adapted, Backend, Batch, Buffer, Framework, ShardResult, Spec, is_neutral
from elastic.model.tally import Tally, tally_of
from elastic.model.user_code import is_of_machine, place_of, rebuilt
from elastic.parallel.axis import span

ALIGN_BYTES = 64
DEPTH = 4  # of nested containers that are looked into
TINY = 1e-37  # below it a factor of two need not be exact
KEPT = 8  # block lists of recent ranges: parameters and two slots in two segments, and some to spare

Told = tuple[str, str]


class Door(Framework):
    """What a framework's door does unless it says otherwise. `name` is the recipe's; `trains`: of a user's own, "a
    Gluon block"."""

    name: str
    trains: str

    def adapt(self, model: Any) -> Any:
        return model if is_neutral(model) else self.own(model)

    def own(self, model: Any) -> Any:
        """A user's own, as an `Adapted`."""
        raise UserError(f'model.kind gives a {type(model).__name__}, which is no {self.trains}; backend.name = '
                        f'"{self.name}" trains those.')

    def construct(self, factory: Callable[..., Any], config: Mapping[str, Any], seed: int) -> Any:
        with self.seeded(seed):
            return factory(**config)

    def collate(self, items: Sequence[Any]) -> Any:
        return stacked(items)

    def seeded(self, seed: int) -> AbstractContextManager[None]:
        return drawing(seed)


@contextmanager
def drawing(seed: int) -> Iterator[None]:
    """Inside, the generators of Python and NumPy start from `seed`; then they are as before. For one thread at a time.
    """
    own, theirs = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed & (1 << 32) - 1)
    try:
        yield
    finally:
        random.setstate(own)
        np.random.set_state(theirs)


class ModelBackend(Backend):
    """A backend over one model, and what it asks of a `Chain`."""

    def __init__(self, model: Any):
        self.parameters: Mapping[str, Spec] = model.parameters
        self.buffers: Mapping[str, Spec] = model.buffers
        self._model = model
        self._own: Any = model if isinstance(model, Adapted) else None
        self._state: Mapping[str, np.ndarray] = {}
        self._kept: dict[Any, Any] = {}  # what forward passes leave for their backward passes
        self._compilations = 0

    def initial(self) -> Mapping[str, Any]:
        """Of a user's own, adapted, or of a model of named arrays that has `initial`."""
        if self._own is not None:
            return self._own.given  # type: ignore[no-any-return]
        return self._model.initial() if callable(getattr(self._model, "initial", None)) else {}

    def tally(self) -> Tally | None:
        return tally_of(self._model)

    def forget(self) -> None:
        self._kept.clear()

    def compilations(self) -> int:
        return self._compilations

    def _through(self, ops: Any, params: Mapping[str, Any], pieces: Sequence[str], x: Any, columns: Mapping[str, Any],
                 seed: Any) -> Any:
        for piece in pieces:
            x = self._model.run(ops, params, piece, x, columns, seed)
        return x

    def _ends(self, pieces: Sequence[str]) -> bool:
        return bool(pieces[-1] == self._model.pieces[-1])

    def _read_by(self, pieces: Sequence[str]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for piece in pieces for name in self._model.names(piece)))


class HostBackend(ModelBackend):
    """A backend whose buffers are NumPy's, in float32 or, for tests, float64."""

    def __init__(self, model: Any, settings: Any):
        if settings.device not in ("cpu", "auto"):
            raise UserError(f'backend.device = {settings.device!r} is not for the {self.name} backend, which runs on '
                            '"cpu"; write backend.name = "torch" for a GPU.')
        if settings.precision not in ("float32", "float64"):
            raise UserError(f'backend.precision = {settings.precision!r} must be "float32" with the {self.name} '
                            'backend.')
        super().__init__(model)
        self._dtype = np.dtype(settings.precision)

    def allocate(self, size: int) -> Buffer:
        return aligned(size, self._dtype)

    def squared_norms(self, grad: Buffer, block: int) -> np.ndarray:
        """Each by itself, in NumPy's pairwise order: a BLAS has threads of its own."""
        return np.array([np.square(grad[i:i + block], dtype=np.float64).sum() for i in range(0, len(grad), block)])


def aligned(size: int, dtype: np.dtype) -> np.ndarray:
    """Zeros, from a multiple of 64 bytes."""
    room = np.zeros(size * dtype.itemsize + ALIGN_BYTES, np.uint8)
    start = -room.ctypes.data % ALIGN_BYTES
    return room[start:start + size * dtype.itemsize].view(dtype)


def neutral(batch: Batch, dtype: np.dtype) -> dict[str, np.ndarray]:
    """The columns of a model of named arrays: whole numbers as int64, floats as `dtype`. What was looked up is not
    among them: see `named_rows`."""
    kinds: dict[str, Any] = {"f": dtype, "i": np.int64, "u": np.int64, "b": np.bool_}
    return {name: np.asarray(column).astype(kinds[np.asarray(column).dtype.kind], copy=False)
            for name, column in batch.items() if not isinstance(column, Mapping)}


def looked_up(batch: Any) -> Mapping[str, np.ndarray]:
    """By feature, what a batch's features have looked up. A user's own data without tables may have another "rows"."""
    found = batch.get(ROWS) if isinstance(batch, Mapping) else None
    is_theirs = isinstance(found, Mapping) and all(isinstance(rows, np.ndarray) and rows.dtype.kind == "f"
                                                   for rows in found.values())
    return found if found is not None and is_theirs else {}


def named_rows(rows: Mapping[str, Any]) -> dict[str, Any]:
    """What belongs to features, by the names under which a model of named arrays reads what they have looked up."""
    return {f"{ROWS}/{feature}": value for feature, value in rows.items()}


def tallied(found: Mapping[str, tuple[Any, Any]],
            as_numpy: Callable[[Any], Any] = np.asarray) -> dict[str, tuple[Any, float]]:
    """Sums and weights as numbers; a sum that is no scalar as float64 NumPy."""
    sums = {name: np.asarray(as_numpy(total)) for name, (total, _) in found.items()}
    return {name: (total.astype(np.float64) if total.ndim else float(total), float(found[name][1]))
            for name, total in sums.items()}


def address_of(buffer: np.ndarray) -> int:
    return buffer.__array_interface__["data"][0]  # type: ignore[no-any-return]


class Blocks:
    """Recent ranges of buffers, cut into the framework's arrays. Only of buffers that live as long as the model: what
    is kept holds its memory, so the address cannot pass to another.
    """

    def __init__(self, cut: Callable[[Buffer, int], Any], address: Callable[[Buffer], int] = address_of):
        self._cut, self._address, self._kept = cut, address, OrderedDict[tuple[int, int, int], Any]()

    def __call__(self, buffer: Buffer, block: int) -> Any:
        key = self._address(buffer), len(buffer), block
        if key not in self._kept:
            self._kept[key] = self._cut(buffer, block)
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]

    def clear(self) -> None:
        self._kept.clear()


def summed(axis: Any, x: np.ndarray, length: int = 0) -> np.ndarray:
    return axis.sum(x.reshape(-1)).reshape(x.shape)  # type: ignore[no-any-return]


def largest(axis: Any, x: np.ndarray, length: int = 0) -> np.ndarray:
    return axis.max(x.reshape(-1)).reshape(x.shape)  # type: ignore[no-any-return]


def swapped(axis: Any, x: np.ndarray, length: int = 0) -> np.ndarray:
    """Slice i of x (parts, ...) to place i, and in its stead what came from there."""
    counts = [x.size // axis.size] * axis.size
    return axis.exchange(x.reshape(-1), counts, counts).reshape(x.shape)  # type: ignore[no-any-return]


def as_it_is(axis: Any, x: np.ndarray, length: int = 0) -> np.ndarray:
    return x


def side_by_side(axis: Any, x: np.ndarray, length: int) -> np.ndarray:
    """All spans of the last dim, `length` of it; the shorter ones are filled up on their way."""
    filled = np.zeros((*x.shape[:-1], -(-length // axis.size)), x.dtype)
    filled[..., :x.shape[-1]] = x
    parts = axis.gather(filled.reshape(-1))
    return np.concatenate([part.reshape(filled.shape)[..., :span(length, axis.size, r)[1]]
                           for r, part in enumerate(parts)], -1)


def own_range(axis: Any, x: np.ndarray, length: int) -> np.ndarray:
    """This worker's span of the last dim."""
    start, count = axis.span(length)
    return np.ascontiguousarray(x[..., start:start + count])


# by kind of `Kernels.across`: what is done to the array, and what to its gradient; `length` is that of the whole dim
MOVES = {"enter": (as_it_is, summed), "leave": (summed, as_it_is), "collect": (side_by_side, own_range),
         "exchange": (swapped, swapped)}


@functools.cache
def matrix_product(equation: str) -> tuple[int, int, bool] | None:
    """(lead, trail, turned) where an einsum of two arrays is one matrix product: the first has `lead` dims, then the
    inner ones; the second these and then `trail` dims, or the other way round if `turned`.
    """
    inputs, out = equation.replace(" ", "").split("->")
    left, right = inputs.split(",")
    inner = "".join([letter for letter in left if letter in right and letter not in out])
    lead, trail = left.removesuffix(inner), right.replace(inner, "") if inner else ""
    if inner and left == lead + inner and out == lead + trail and right in (inner + trail, trail + inner):
        return len(lead), len(trail), right != inner + trail
    return None


def check_loss(kind: str, model: Any) -> None:
    if not callable(getattr(model, "loss", None)):
        raise UserError(f"model.kind: {kind} has no method loss(batch) that gives the mean loss or (sum, weight); "
                        "write one.")


def check_float32(dtypes: Mapping[str, Any]) -> None:
    """UserError where a parameter that is to train is of another kind; `dtypes` as the framework writes them."""
    for name, dtype in dtypes.items():
        if str(dtype).rpartition(".")[2] != "float32":
            raise UserError(f"model.kind: parameter {name} is {dtype}; parameters must be float32.")


def mapped(batch: Any, convert: Callable[[Any], Any] = lambda leaf: leaf) -> Any:
    """Other containers with the same entries, or what `convert` makes of them: a user's function may take entries out.
    """
    if isinstance(batch, Mapping):
        return {name: mapped(value, convert) for name, value in batch.items()}
    return rebuilt(batch, lambda entry: mapped(entry, convert)) if isinstance(batch, (tuple, list)) else convert(batch)


@contextmanager
def telling(kind: str, in_one_line: Callable[[Exception], str]) -> Iterator[None]:
    """What goes wrong in a user's code, in one sentence with its place. `in_one_line`: what the framework says of it.
    """
    try:
        yield
    except ElasticError:
        raise
    except Exception as error:
        if is_of_machine(error):
            raise
        raise UserError(f"model.kind: {kind} cannot be called ({type(error).__name__}: "
                        f"{in_one_line(error)}){place_of(error)}.") from error


def plain_attributes(parts: Iterable[tuple[str, Any]], as_numpy: Callable[[Any], np.ndarray | None],
                     without: Container[str] = ()) -> dict[str, Told]:
    """The plain values among the attributes of a model's parts, by path. `as_numpy`: of the framework's arrays; None
    for anything else.
    `without`: attributes that the framework keeps.
    """
    out = {}
    for path, part in parts:
        for name, value in vars(part).items():
            told = None if name in without else fingerprint(value, as_numpy, DEPTH)
            if told is not None:
                out[f"{path}.{name}" if path else name] = (type(value).__name__, told)
    return out


def fingerprint(value: Any, as_numpy: Callable[[Any], np.ndarray | None], depth: int) -> str | None:
    """Equal for equal plain values; None for what is none. Containers are plain as far as their entries are."""
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        return repr(value)
    array = value if isinstance(value, (np.ndarray, np.generic)) else as_numpy(value)
    if array is not None:
        return f"{array.dtype}{array.shape}{hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()}"
    if not depth or not isinstance(value, (list, tuple, dict, set, frozenset)):
        return None
    entries = sorted(map(repr, value)) if isinstance(value,
                                                     (set, frozenset)) else value.items() if isinstance(value, dict) else value
    return repr([fingerprint(entry, as_numpy, depth - 1) for entry in entries])


def check_attributes(kind: str, before: Mapping[str, Told], after: Mapping[str, Told], remedy: str) -> None:
    """UserError that names the first attribute that is not what it was."""
    for name in [*before, *(name for name in after if name not in before)]:
        if before.get(name) != after.get(name):
            raise UserError(f"model.kind: {kind} changes its attribute {name} while it computes, which a step that is "
                            f"done again or on another worker would not repeat; {remedy}.")


def differing(first: ShardResult, second: ShardResult) -> str:
    """What is not the same to the bit, or ""."""
    one, other = ({"loss": np.asarray(found.loss_sum),
                   **{f"buffer {name}": np.asarray(value) for name, value in found.buffers.items()}}
                  for found in (first, second))
    return next((what for what, value in one.items()
                 if not np.array_equal(value, other[what], equal_nan=value.dtype.kind in "fc")), "")


def rehearse(own: Any, names: Sequence[str],
             run: Callable[[Sequence[str], float], tuple[ShardResult, Mapping[str, np.ndarray]]],
             attributes: Callable[[], Mapping[str, Told]] = dict) -> Mapping[str, np.ndarray]:
    """The gradients of one shard, computed twice from one seed. UserError where the user's own model `own` would train
    wrong without a word.

    `run(hidden, factor)` gives the shard's result and `factor` times its gradients, while those of the arrays that the
    model was made with which are `hidden` hold what nothing should read. The second time all `names` are, and the slope
    is two.
    """
    first, once = run((), 1.0)
    before = attributes()
    second, twice = run(names, 2.0)
    check_attributes(own.kind, before, attributes(), own.KEEP)
    if differing(first, second) and not differing(first, run((), 1.0)[0]):
        for name in names:
            if differing(first, run((name,), 1.0)[0]):
                raise UserError(f"model.kind: {own.kind} reads its parameter or buffer {name} as it was when it was "
                                f"made, by an array that was taken out of it, which no training changes; {own.READ}.")
    if what := differing(first, second):
        raise UserError(f"model.kind: {own.kind} gives another {what} when one shard is computed twice from one seed; "
                        f"{own.GENERATORS}.")
    check_linear(own.kind, {**once, **named_rows(first.slopes)}, {**twice, **named_rows(second.slopes)})
    return once


def spoiled(value: np.ndarray) -> np.ndarray:
    """Other values of the same kind, by which a reader gives itself away."""
    return np.invert(value) if value.dtype.kind in "biu" else np.full_like(value, np.nan)


def check_linear(kind: str, once: Mapping[str, np.ndarray], twice: Mapping[str, np.ndarray]) -> None:
    """UserError unless twice the slope of the loss has given twice the gradient, by name."""
    for name, value in once.items():
        same = np.array_equal(2 * value, twice[name], equal_nan=True)
        if not same and not np.allclose(2 * value, twice[name], rtol=0, atol=TINY, equal_nan=True):
            raise UserError(f"model.kind: the gradient of {name} in {kind} is not linear: twice the loss does not give "
                            "twice of it, so those of the shards cannot be added up; take out what clips or rounds "
                            "gradients in the model (optimizer.clip_norm clips the whole gradient).")
