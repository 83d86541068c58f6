"""What a user's own code gives back or raises, told in one sentence instead of a framework's words."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from elastic.errors import ElasticError, RecipeError, UserError

OURS = tuple(str(Path(__file__).resolve().parents[2] / folder) + "/" for folder in ("elastic", "backends"))

# by package
HOMES = {"keras": ("a Keras model", "tensorflow"), "mxnet": ("a Gluon block", "mxnet"),
         "torch": ("a torch module", "torch")}
# torch's and TensorFlow's, which are none of Python's own
MACHINES = ("OutOfMemoryError", "AcceleratorError", "ResourceExhaustedError")

UNTRAINED = ("model.freeze or the model itself leaves the loss without any trainable parameter behind it; freeze less, "
             "name some in model.thaw, or take out what detaches the loss (detach, no_grad, stop_gradient).")


def check_home(kind: str, model: Any, backend: str) -> None:
    """RecipeError where a user's model is of another framework than the one that is to train it, known without
    importing either."""
    packages = [cls.__module__.partition(".")[0] for cls in type(model).__mro__]
    for package, (what, home) in HOMES.items():
        if package in packages:
            if home != backend:
                raise RecipeError(f'backend.name = "{backend}" cannot train model.kind = "{kind}", {what} '
                                  f'({type(model).__name__}); write '
                                f'backend.name = "{home}".')
            return


def is_of_machine(error: BaseException) -> bool:
    """Whether the machine lacks something, as room or a device, in Python's words or a framework's: elsewhere or later
    it may be there."""
    return isinstance(error, (OSError, MemoryError)) or any(cls.__name__ in MACHINES for cls in type(error).__mro__)


@contextmanager
def users(is_own: bool) -> Iterator[None]:
    """Around what computes with a model and a data set. With `is_own`, what fails there is the user's own code and
    would fail again on every worker: a UserError, which nobody retries. What the group (GroupBroken) or the machine
    lacks stays what it is.
    """
    try:
        yield
    except ElasticError:
        raise
    except Exception as error:
        if not is_own or is_of_machine(error):
            raise
        raise UserError(describe(error)) from error


def pair(found: Any, what: str) -> tuple[Any, Any]:
    """(sum, weight) of one number each. UserError, which begins with `what` gave it, where it is anything else."""
    if not isinstance(found, tuple) or len(found) != 2 or not all(map(is_number, found)):
        raise UserError(f"model.kind: {what} must give (sum, weight), one number each, not {described(found)}.")
    return found


def pairs(found: Any, what: str) -> dict[str, tuple[Any, Any]]:
    """{name: (sum, weight)}."""
    if not isinstance(found, Mapping):
        raise UserError(f"model.kind: {what} must give a dict of (sum, weight) by name, not {described(found)}.")
    return {str(name): pair(value, f"{what}[{name!r}]") for name, value in found.items()}


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) or set(shape_of(value, (0,))) <= {1}


def shape_of(value: Any, otherwise: Any = None) -> Any:
    """An array's of any framework."""
    return getattr(value, "shape", otherwise)


def described(found: Any) -> str:
    if isinstance(found, tuple):
        return f"({', '.join(map(described, found))})"
    shape = shape_of(found)
    return type(found).__name__ if shape is None else f"an array of shape {tuple(shape)}"


@runtime_checkable
class Named(Protocol):
    """A named tuple."""

    def _make(self, entries: Iterable[Any]) -> Any: ...

    def _asdict(self) -> dict[str, Any]: ...


def rebuilt(batch: Mapping[Any, Any] | Sequence[Any], convert: Callable[[Any], Any]) -> Any:
    """A dict, list or tuple of the same kind, a user's own or a named one too, of converted entries."""
    if isinstance(batch, Mapping):
        found = {name: convert(entry) for name, entry in batch.items()}
        if type(batch) is dict or not isinstance(batch, MutableMapping):
            return found
        again = copy(batch)  # as torch's collate does
        again.update(found)
        return again
    entries = [convert(entry) for entry in batch]
    return type(batch)(*entries) if isinstance(batch, Named) else type(batch)(entries)  # type: ignore[call-arg]


def describe(error: BaseException) -> str:
    """One line: the platform's own errors speak for themselves, others are named, with the user's line behind them."""
    if isinstance(error, ElasticError):
        return str(error)
    text = " ".join(str(error).split())
    return (f"{type(error).__name__}: {text}" if text else type(error).__name__) + place_of(error)


def place_of(error: BaseException) -> str:
    """" (file.py, line 12, in loss)": the user's own line behind an error; "" where there is none."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith((*OURS,
                                          "<")) and "-packages/" not in frame.filename and "/lib/python" not in frame.filename:
            return f" ({Path(frame.filename).name}, line {frame.lineno}, in {frame.name})"
    return ""
