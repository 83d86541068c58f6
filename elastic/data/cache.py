"""What was found out about data, kept in a folder of the cache: made once, by one of the processes that ask for it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from elastic.errors import UserError
from elastic.storage.atomic import locked, write_atomically

T = TypeVar("T")
FACTS = "facts.json"  # written last: it makes the folder count


def cache_dir() -> Path:
    """Where tokenised text, converted tables and data that was made are kept from run to run."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "elastic"


def once(folder: Path, kept: Callable[[], T | None], make: Callable[[], T]) -> T:
    """What is kept, or is made while the others of this machine wait. Makes the folder. UserError if it cannot be
    written."""
    found = kept()
    if found is not None:
        return found
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / ".lock", "a", encoding="utf-8") as lock:
            locked(lock, math.inf)
            found = kept()  # by now another process may have made it
            return make() if found is None else found
    except OSError as error:
        raise UserError(f"The cache {folder} cannot be written ({error.strerror}); make it writable or free some "
                        "space.") from error


def facts_once(folder: Path, make: Callable[[], dict[str, Any]], beside: str = FACTS) -> dict[str, Any]:
    """Plain facts, where the folder has a file `beside` them too."""
    def kept() -> dict[str, Any] | None:
        try:
            found: dict[str, Any] = json.loads((folder / FACTS).read_text())
            return found if (folder / beside).exists() else None
        except (OSError, ValueError):
            return None

    def made() -> dict[str, Any]:
        found = make()
        write_atomically(folder / FACTS, json.dumps(found))
        return found

    return once(folder, kept, made)
