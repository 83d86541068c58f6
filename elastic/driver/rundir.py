"""A run's directory: who may start a run there, where it goes on, and how it ended."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from elastic.checkpoint.access import remedy
from elastic.checkpoint.manager import newest_good, read_manifest
from elastic.checkpoint.manifest import Manifest
from elastic.errors import UserError
from elastic.messages import Begin
from elastic.observe.jsonl import GLANCE_S, JsonLines, has_writer
from elastic.observe.metrics import evaluations_of, steps_of
from elastic.observe.run_files import LIVE, RECIPE, lines_of, recipe_text, summary_of
from elastic.observe.verify import first_step
from elastic.recipe import Recipe, loads
from elastic.storage.atomic import locked, write_atomically
from elastic.storage.remote import shown
from elastic.storage.store import Store

# held by the process that starts the run. It stays: whoever removed it might remove a lock that another has just taken
LOCK = "driver.lock"


@contextmanager
def held(run_dir: Path) -> Iterator[None]:
    """The directory is this process's to start a run in: nobody else's, and no run lives there. UserError otherwise,
    with nothing changed.

    A controller's own claim, on events.jsonl, begins while this lasts and goes on without it.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = open(run_dir / LOCK, "a", encoding="utf-8")  # noqa: SIM115 - closed below
    except OSError as error:
        raise UserError(f"The run directory {run_dir} cannot be written ({error.strerror}); name another with "
                        "--run-dir.") from error
    with file:
        if not locked(file, GLANCE_S) or has_writer(run_dir / "events.jsonl"):
            raise taken(run_dir)
        yield


def refuse_taken(run_dir: Path) -> None:
    """What `held` would say, before anything costly is done."""
    if has_writer(run_dir / LOCK) or has_writer(run_dir / "events.jsonl"):
        raise taken(run_dir)


def taken(run_dir: Path) -> UserError:
    return UserError(f"The run in {run_dir} is alive, or is being started; stop it first, or look with `elastic status "
                     f"{run_dir}`.")


def in_use(run_dir: Path) -> bool:
    """A start that was killed before its recipe was in place has left nothing."""
    return any(path.name != LOCK and not (path.name.startswith(f"{RECIPE}.") and path.suffix in (".tmp", ".new"))
               for path in run_dir.iterdir())


def checkpoints_of(recipe: Recipe, run_dir: Path) -> str:
    """Where a run's checkpoints lie: a path or URI."""
    return recipe.checkpoint.path or str(run_dir / "checkpoints")


def beginning(recipe: Recipe, run_dir: Path) -> Begin:
    """Where a run that is over goes on: at its newest good checkpoint, as far as its lines go."""
    events, metrics = lines_of(run_dir)
    newest = newest_of(checkpoints_of(recipe, run_dir))
    # a directory that was begun anew, at a checkpoint, may have no line yet
    first = first_step(events) - 1 if events else newest.step if newest else 0
    last = max((fields["step"] for fields in steps_of(metrics)), default=first)
    step = min(newest.step if newest else 0, last)  # a checkpoint ahead of the lines brings its own
    evaluated = max((fields["step"] for fields in evaluations_of(metrics) if fields["step"] <= step), default=0)
    return Begin(step, evaluated, max((fields["generation"] for fields in events), default=0), len(events), last,
                 data_of(newest))


def opened(run_dir: Path, recipe: str, began: str, begin: Begin) -> Begin:
    """Makes the directory a run's with this recipe, or cuts the one to resume, whose recipe was `began`, back to its
    checkpoint. Only who holds it may; see `held`."""
    if began:
        if recipe_text(run_dir) != began:
            raise UserError(f"The run in {run_dir} was resumed by somebody else meanwhile, with another recipe; "
                            "`elastic resume` it again.")
        begin = beginning(loads(recipe, locate=False), run_dir)  # it may have gone further since it was looked at
    try:
        # first and whole: what is here from now on can be resumed
        write_atomically(run_dir / RECIPE, recipe)
        if not loads(recipe, locate=False).checkpoint.path:
            (run_dir / "checkpoints").mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"The run directory {run_dir} cannot be written ({error.strerror}); name another with "
                        "--run-dir.") from error
    if began:
        JsonLines(run_dir / "metrics.jsonl").cut_back(begin.written)
        (run_dir / "summary.json").unlink(missing_ok=True)
    return begin


def data_of(manifest: Manifest | None) -> str:
    """The key of the data that a checkpoint's run trained on."""
    return (manifest.extra.get("info", {}).get("key") if manifest else "") or ""


def newest_of(location: str) -> Manifest | None:
    """Of the newest good checkpoint; None if there is none."""
    try:
        store = Store.open(location)
        name, _ = newest_good(store)
        return read_manifest(store, name) if name else None
    except OSError as error:
        why = " ".join(str(error).split())[:300]
        raise UserError(f'checkpoint.path = "{shown(location)}" cannot be read ({why}); {remedy(location)}.') from error


def live_of(run_dir: Path) -> dict[str, str] | None:
    """The address and run_id of the run that lives here, as far as the files say: its machines may be gone."""
    found: dict[str, str] | None = None
    with contextlib.suppress(OSError, ValueError):
        if summary_of(run_dir) is None:  # else its controller may still wait for a driver
            found = json.loads((run_dir / LIVE).read_text())
    return found


def clear_live(run_dir: Path, run_id: str) -> bool:
    """The run is over. Whether this process is the one that took the file of it away, of several that followed the run.
    """
    with contextlib.suppress(OSError, ValueError):
        if json.loads((run_dir / LIVE).read_text())["run_id"] == run_id:
            (run_dir / LIVE).unlink()
            return True
    return False
