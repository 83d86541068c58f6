"""Items of a user's own data set as a batch: any nesting of dicts, lists and tuples, whatever the framework makes of its leaves."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from elastic.errors import RecipeError
from elastic.model.user_code import Named, rebuilt

Collate = Callable[[Sequence[Any]], Any]
STRANGE = "OmMV"  # kinds of NumPy's that no framework computes with, but for bfloat16 and its like, which have names
PLAIN = (bool, int, float, complex)
WIDE = ("float128", "complex256")


@dataclass(frozen=True)
class Collated:
    """What a data set's own `collate_fn` makes of so many items: whatever it is, it cannot be cut by rows."""

    content: Any
    rows: int


def stacked(items: Sequence[Any], kinds: Collection[str] = (), is_item: bool = True,
            as_array: Callable[[Any], Any] = np.asarray) -> Any:
    """Leaves stacked by NumPy along a new first axis, in the structure of the first item. A list of Python's numbers is
    an array, unless it is the item itself. TypeError for what is no array of numbers or texts, or whose type is none of
    `kinds`, if any are given."""
    first = items[0]
    if isinstance(first, Mapping):
        return {key: stacked([item[key] for item in items], kinds, False, as_array) for key in first}
    if isinstance(first, (list, tuple)) and (is_item
                                             or not (isinstance(first, list)
                                                     and all(type(entry) in PLAIN for entry in first))):
        columns = [stacked(column, kinds, False, as_array) for column in zip(*items, strict=True)]
        return type(first)(*columns) if isinstance(first, Named) else type(first)(columns)
    found = np.stack([as_array(item) for item in items])
    name = found.dtype.name
    if (found.dtype.kind in STRANGE and not name.startswith(("bfloat", "float"))) or name in WIDE:
        raise TypeError(f"{type(first).__name__} holds no numbers that a framework computes with")
    if kinds and found.dtype.kind in "biufcV" and name not in kinds:
        raise TypeError(f"there is no {name} in the framework, only {', '.join(sorted(kinds))}")
    return found


def batch_of(items: Sequence[Any], numbers: Sequence[int], collate: Collate) -> Any:
    """`collate` of all items. RecipeError names the path of what does not fit together or cannot be in a batch;
    `numbers` are the items'."""
    for item, number in zip(items, numbers, strict=True) if not alike(items) else ():
        refuse_unlike("item", items[0], item, numbers[0], number)
    try:
        return collate(items)
    except Exception as error:
        path, what, why = culprit("item", items, collate, error)
        raise RecipeError(f"data.kind: {path} cannot be put into a batch: it is {what}, as in item {numbers[0]} "
                          f"({type(why).__name__}: {' '.join(str(why).split())}); give numbers, arrays or tensors, in "
                          "dicts, lists and tuples.") from error


def alike(items: Sequence[Any]) -> bool:
    """Whether all items have the same structure, and arrays of the same shapes: the quick look that nearly all pass, a
    column at a time."""
    first, kinds = items[0], set(map(type, items))
    if len(kinds) > 1 and {issubclass(kind, (Mapping, list, tuple)) for kind in kinds} != {False}:
        return False
    if isinstance(first, (list, tuple)):
        return len(set(map(len, items))) == 1 and all(map(alike, zip(*items, strict=True)))
    if isinstance(first, Mapping):
        return all(item.keys() == first.keys() for item in items) and all(alike([item[key] for item in items]) for key in first)
    return len(set(map(shape_of, items))) == 1


def parts(value: Any) -> dict[str, Any] | None:
    """What a dict, list or tuple holds, by the sign that leads there; None for a leaf."""
    if isinstance(value, Mapping):
        return {f"[{key!r}]": entry for key, entry in value.items()}
    if isinstance(value, Named):
        return {f".{name}": entry for name, entry in value._asdict().items()}
    if isinstance(value, (list, tuple)):
        return {f"[{place}]": entry for place, entry in enumerate(value)}
    return None


def refuse_unlike(path: str, first: Any, other: Any, number: int, another: int) -> None:
    """RecipeError where two items differ in structure or in an array's shape."""
    mine, its = parts(first), parts(other)
    if (mine is None) != (its is None) or (set(mine or ()) != set(its or ()) if mine is not None
                                           else shape_of(first) != shape_of(other)):
        raise RecipeError(f"data.kind: {path} is {described(other)} in item {another} and {described(first)} in item "
                          f"{number}; give every item the same structure and shapes (on torch a collate_fn(items) of "
                          "the data set may put them together).")
    for sign, entry in (mine or {}).items():
        refuse_unlike(path + sign, entry, (its or {})[sign], number, another)


def shape_of(value: Any) -> tuple[int, ...]:
    return tuple(getattr(value, "shape", ()))


def described(value: Any) -> str:
    """In a few words."""
    if isinstance(value, Mapping):
        return f"a dict with {', '.join(map(repr, value)) or 'nothing'}"
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} of {len(value)}"
    shape = shape_of(value)
    return f"a {type(value).__name__}" + (f" of shape {shape}" if shape else "")


def culprit(path: str, items: Sequence[Any], collate: Collate, error: Exception) -> tuple[str, str, Exception]:
    """The deepest part that cannot be put together, what it is, and why not."""
    inside = [each for item in items if (each := parts(item)) is not None]
    for sign in inside[0] if inside else ():
        column = [each[sign] for each in inside]
        try:
            collate([{"": entry} for entry in column])
        except Exception as deeper:  # frameworks and users' own objects raise what they like
            path, error = path + sign, deeper
            return culprit(path, column, collate, error)
    return path, described(items[0]), error


def num_rows(batch: Any) -> int:
    """Of the first array in a batch. RecipeError if it has none."""
    if isinstance(batch, Collated):
        return batch.rows
    found = _rows(batch)
    if found is None:
        raise RecipeError("data.kind: a batch has no columns; give items with a number or an array at least.")
    return found


def _rows(batch: Any) -> int | None:
    if is_texts(batch):
        return len(batch)
    if isinstance(batch, (Mapping, list, tuple)):
        found = map(_rows, batch.values() if isinstance(batch, Mapping) else batch)
        return next((rows for rows in found if rows is not None), None)
    return len(batch) if callable(batch.shape) else int(batch.shape[0])  # of `Bags` a method: no array


def sliced(batch: Any, low: int, high: int) -> Any:
    """Rows low..high-1 of every column. RecipeError for some of the rows that a data set's own collate_fn put together.
    """
    if isinstance(batch, Collated):
        if 0 < high - low < batch.rows:
            raise RecipeError("data.kind: what its collate_fn gives cannot be cut by rows into micro-batches; set "
                              "mesh.micro_batches = 1.")
        return Collated(batch.content, min(batch.rows, high - low))
    if is_texts(batch):
        return batch[low:high]
    if isinstance(batch, (Mapping, list, tuple)):
        return rebuilt(batch, lambda column: sliced(column, low, high))
    return batch[low:high]


def is_texts(batch: Any) -> bool:
    """Whether it is a column of texts, which torch leaves a list."""
    return isinstance(batch, (list, tuple)) and bool(batch) and isinstance(batch[0], (str, bytes))


def unlike(path: str, one: Any, other: Any) -> str:
    """The path of the first array, number or text that differs; "" where none does."""
    if isinstance(one, Collated):
        return unlike(path, one.content, other.content)
    if getattr(one, "is_nested", False):
        return unlike(path, list(one.unbind()), list(other.unbind()))
    inside, its = parts(one), parts(other)
    if inside is not None:
        if inside.keys() != (its or {}).keys():
            return path
        return next((found for sign, entry in inside.items()
                     if (found := unlike(path + sign, entry, (its or {})[sign]))), "")
    if isinstance(one, (*PLAIN, str, bytes)):
        return "" if one == other or one != one else path
    try:
        if (repr(one.dtype), tuple(one.shape)) != (repr(other.dtype), tuple(other.shape)):
            return path
    except AttributeError:  # an object that a collate_fn made
        return ""
    with suppress(RuntimeError):  # sparse tensors cannot be compared
        return "" if bool(((one == other) | (one != one)).all()) else path
    return ""
