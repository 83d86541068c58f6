"""Whose word names a user's own modules: opening a checkpoint or going on with a run imports them, and so runs them.

The rule. A model or data set of one's own (`model.kind` or `data.kind` as "module:attribute") is imported unasked where
a run directory of the caller's names it. The run directory of a place is the nearest folder at or above it, links
resolved, that holds a recipe.toml; it is the caller's where folder and recipe.toml have the caller's user id; it names
what its recipe.toml has as `model.kind` and `data.kind`. So the checkpoints of a run of one's own may lie anywhere as
long as the run directory is what is given, and one that was copied into it can name nothing else. All other places
(another user's directory, a checkpoint that was copied or downloaded alone, a URI) need `--trust`. Kinds that come with
the platform never do. A recipe that is given to `elastic train` is the caller's own word.
"""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import unquote, urlsplit

from elastic.errors import UserError
from elastic.observe.run_files import RECIPE, recipe_of
from elastic.recipe import Recipe
from elastic.storage.remote import shown


def check_trust(recipe: Recipe, place: str | os.PathLike[str], trust: bool) -> None:
    """UserError, before anything is imported, where `recipe`, of `place` (a path or URI), names a module that the rule
    does not let in."""
    strange = named(recipe) - own(place) if not trust else set()
    if strange:
        modules = " and ".join(f'{kind.partition(":")[0]} ({key} = "{kind}")'
                               for key, kind in sorted(strange, reverse=True))
        raise UserError(f"{shown(os.fspath(place))} {standing(place)}, and would import {modules}; look at what that "
                        "would run, then add --trust (trust=True in Python).")


def named(recipe: Recipe) -> set[tuple[str, str]]:
    """(key, kind) of what is imported by a name of the user's."""
    return {(key, kind) for key, kind in (("model.kind", recipe.model.kind), ("data.kind", recipe.data.kind))
            if ":" in kind}


def own(place: str | os.PathLike[str]) -> set[tuple[str, str]]:
    """What the caller's run directory at or above `place` names; nothing where that is nobody's or somebody else's."""
    folder = run_dir_of(place)
    if folder is None or strangers(folder):
        return set()
    try:
        return named(recipe_of(folder))
    except (UserError, OSError, UnicodeDecodeError):
        return set()


def standing(place: str | os.PathLike[str]) -> str:
    """Why the caller's word does not cover `place`, behind its name."""
    folder = run_dir_of(place)
    if folder is None:
        return "lies in no run directory of yours"
    if users := strangers(folder):
        return f"belongs to another user's run (uid {min(users)})"
    return f"names other modules than the recipe.toml of the run directory {folder}"


def run_dir_of(place: str | os.PathLike[str]) -> Path | None:
    """The nearest folder at or above a place on this machine that holds a recipe."""
    given = os.fspath(place)
    if "://" in given and not given.startswith("file://"):
        return None
    local = Path(os.path.realpath(unquote(urlsplit(given).path) if "://" in given else given))
    return next((folder for folder in (local, *local.parents) if (folder / RECIPE).is_file()), None)


def strangers(folder: Path) -> set[int]:
    """The user ids of a run directory and its recipe that are not the caller's."""
    return {path.stat().st_uid for path in (folder, folder / RECIPE)} - {os.geteuid()}
