"""Which checkpoint a path or URI means."""

from __future__ import annotations

import os
from collections.abc import Container

from elastic.checkpoint.manager import MANIFEST, newest_good, split
from elastic.checkpoint.remote import join, shown
from elastic.checkpoint.store import Store
from elastic.errors import UserError
from elastic.recipe import loads


def find(path: str | os.PathLike[str], refused: Container[str] = ()) -> tuple[Store, str]:
    """The store and the name of a checkpoint: its folder, its manifest, or a run's directory or folder of checkpoints for its newest good one
    beside those whose names are in `refused`.

    Good is one whose files are all there in full length.
    UserError where there is none, or where the storage cannot be reached.
    """
    given = os.fspath(path).rstrip("/")
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
    raise UserError(f"There is no good checkpoint at {shown(given) or '/'}{why}; give the folder of a checkpoint or of a run.")


def places(given: str) -> list[str]:
    """Where the checkpoints of a run directory may lie; `given` itself may be their folder."""
    recipe, named = os.path.join(given, "recipe.toml"), ""
    if "://" not in given and os.path.isfile(recipe):
        with open(recipe, encoding="utf-8") as file:
            named = getattr(loads(file.read(), locate=False).checkpoint, "path", "")
    return [named] if named else [join(given, "checkpoints"), given]
