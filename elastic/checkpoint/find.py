"""Which checkpoint a path or URI means."""

from __future__ import annotations

import os
from collections.abc import Callable, Container
from typing import Any, TypeVar, overload

import numpy as np

from elastic.checkpoint.manager import MANIFEST, newest_good, read_sound, read_weights, split
from elastic.checkpoint.manifest import Manifest
from elastic.errors import BadCheckpoint, UserError
from elastic.recipe import loads
from elastic.storage.remote import join, shown
from elastic.storage.store import Store

T = TypeVar("T")


def find(path: str | os.PathLike[str], refused: Container[str] = ()) -> tuple[Store, str]:
    """The store and the name of a checkpoint: its folder, its manifest, or a run's directory or folder of checkpoints
    for its newest good one beside those whose names are in `refused`.

    Good is one whose files are all there in full length.
    UserError where there is none, or where the storage cannot be reached.
    """
    given = os.fspath(path).rstrip("/") or ("/" if path else ".")
    try:
        store, name = split(given)
        if store.size(f"{name}/{MANIFEST}") is not None:
            return store, name
        rejected: list[tuple[str, str]] = []
        for place in places(given):
            store = Store.open(place)
            found, bad = newest_good(store, refused)
            if found is not None:
                return store, found
            rejected += bad
    except (OSError, ValueError) as error:
        why = " ".join(str(error).split())
        raise UserError(f"{shown(given)} cannot be read ({why}); give a checkpoint's folder or a run's directory.") from error
    why = f": {rejected[0][1].rstrip('.')}" if rejected else ""
    raise UserError(f"There is no good checkpoint at {shown(given)}{why}; give the folder of a checkpoint or of a run.")


@overload
def read_newest(path: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], Manifest]: ...


@overload
def read_newest(path: str | os.PathLike[str], read: Callable[[Store, str, Manifest], T]) -> tuple[T, Manifest]: ...


def read_newest(path: str | os.PathLike[str], read: Callable[[Store, str, Manifest], Any] = read_weights
                ) -> tuple[Any, Manifest]:
    """Parameters and buffers of a checkpoint, or their averages, or what `read` makes of it; of a run's newest whose bytes
    turn out good.

    BadCheckpoint, UserError if there is none.
    """
    bad: dict[str, BadCheckpoint] = {}
    while True:
        try:
            store, name = find(path, bad)
        except UserError as error:
            raise next(iter(bad.values()), error) from None
        if name in bad:
            raise bad[name]
        try:
            manifest = read_sound(store, name)
            return read(store, name, manifest), manifest
        except BadCheckpoint as error:
            bad[name] = error


def places(given: str) -> list[str]:
    """Where the checkpoints of a run directory may lie; `given` itself may be their folder."""
    recipe, named = os.path.join(given, "recipe.toml"), ""
    if "://" not in given and os.path.isfile(recipe):
        with open(recipe, encoding="utf-8") as file:
            named = loads(file.read(), locate=False).checkpoint.path
    return [named] if named else [join(given, "checkpoints"), given]
