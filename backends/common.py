"""What is checked of every user's own model alike, before the first step: attributes that change, values that two runs give differently."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from elastic.errors import ElasticError, UserError
from elastic.model.backend import ShardResult
from elastic.model.user_code import is_of_machine, place_of

DEPTH = 4  # of nested containers that are looked into
TINY = 1e-37  # below it a factor of two need not be exact

Told = tuple[str, str]


def before_models(settings: Any) -> None:
    """The default of `elastic.model.backend.Framework`: this framework needs nothing set before a user's own code computes."""


@contextmanager
def telling(kind: str, in_one_line: Callable[[Exception], str]) -> Iterator[None]:
    """What goes wrong in a user's code, in one sentence with its place. `in_one_line`: what the framework says of it."""
    try:
        yield
    except ElasticError:
        raise
    except Exception as error:
        if is_of_machine(error):
            raise
        raise UserError(f"model.kind: {kind} cannot be called ({type(error).__name__}: {in_one_line(error)}){place_of(error)}.") from error


def plain_attributes(parts: Iterable[tuple[str, Any]], as_numpy: Callable[[Any], np.ndarray | None],
                     without: Container[str] = ()) -> dict[str, Told]:
    """The plain values among the attributes of a model's parts, by path. `as_numpy`: of the framework's arrays; None for anything else.
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
    entries = sorted(map(repr, value)) if isinstance(value, (set, frozenset)) else value.items() if isinstance(value, dict) else value
    return repr([fingerprint(entry, as_numpy, depth - 1) for entry in entries])


def check_attributes(kind: str, before: Mapping[str, Told], after: Mapping[str, Told], remedy: str) -> None:
    """UserError that names the first attribute that is not what it was."""
    for name in [*before, *(name for name in after if name not in before)]:
        if before.get(name) != after.get(name):
            raise UserError(f"model.kind: {kind} changes its attribute {name} while it computes, which a step that is done again or on another "
                            f"worker would not repeat; {remedy}.")


def differing(first: ShardResult, second: ShardResult) -> str:
    """What is not the same to the bit, or ""."""
    one, other = ({"loss": np.asarray(found.loss_sum), **{f"buffer {name}": np.asarray(value) for name, value in found.buffers.items()}}
                  for found in (first, second))
    return next((what for what, value in one.items() if not np.array_equal(value, other[what], equal_nan=value.dtype.kind in "fc")), "")


def check_repeats(kind: str, first: ShardResult, second: ShardResult, remedy: str) -> None:
    """UserError unless one shard, computed twice from one seed, has given the same bits."""
    if what := differing(first, second):
        raise UserError(f"model.kind: {kind} gives another {what} when one shard is computed twice from one seed; {remedy}.")


def check_read(kind: str, names: Iterable[str], first: ShardResult, hidden: ShardResult, again: Callable[[str], ShardResult], remedy: str) -> None:
    """UserError where the loss reads arrays that the model was made with, though training goes on in others. `hidden`: `first` once more, with
    all of those spoiled; `again`: with the one of this name, or with none ("")."""
    if differing(first, hidden) and not differing(first, again("")):
        for name in names:
            if differing(first, again(name)):
                raise UserError(f"model.kind: {kind} reads its parameter or buffer {name} as it was when it was made, by an array that was taken "
                                f"out of it, which no training changes; {remedy}.")


def spoiled(value: np.ndarray) -> np.ndarray:
    """Other values of the same kind, by which a reader gives itself away."""
    return np.invert(value) if value.dtype.kind in "biu" else np.full_like(value, np.nan)


def check_linear(kind: str, once: Mapping[str, np.ndarray], twice: Mapping[str, np.ndarray]) -> None:
    """UserError unless twice the slope of the loss has given twice the gradient, by name."""
    for name, value in once.items():
        same = np.array_equal(2 * value, twice[name], equal_nan=True)
        if not same and not np.allclose(2 * value, twice[name], rtol=0, atol=TINY, equal_nan=True):
            raise UserError(f"model.kind: the gradient of {name} in {kind} is not linear: twice the loss does not give twice of it, so those of "
                            "the shards cannot be added up; take out what clips or rounds gradients in the model (optimizer.clip_norm clips "
                            "the whole gradient).")
