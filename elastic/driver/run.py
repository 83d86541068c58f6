"""`elastic run`, which a submission and every retry of it call: it goes on wherever there is something to go on from, else it trains."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from elastic.checkpoint.claim import owner_of, read
from elastic.checkpoint.manifest import Manifest
from elastic.controller.journal import JOURNAL
from elastic.driver.place import folder
from elastic.driver.rundir import beginning, checkpoints_of, data_of, live_of, newest_of, refuse_taken
from elastic.driver.trainer import Trainer, is_alive
from elastic.errors import RecipeError, UserError
from elastic.messages import Begin
from elastic.observe.run_files import RECIPE, recipe_text
from elastic.recipe import Recipe, check_resumed, loads
from elastic.storage.remote import shown
from elastic.storage.store import Store

LOOK_S = 1.0  # between looks at a claim


@dataclass(frozen=True)
class Found:
    """What lies where a run is to be started."""

    holds_run: bool = False  # the run directory has one
    is_live: bool = False  # it is alive
    saved: int = 0  # the step of the newest checkpoint at `checkpoint.path`


def action(found: Found) -> str:
    """What is to be done. A run outlives the job that started it, whose retry is another job."""
    if found.is_live:
        return "follow"
    if found.holds_run:
        return "resume"
    return "restore" if found.saved else "train"


def trainer_of(recipe: Recipe, run_dir: str | Path, address: str, chaos: Sequence[str] = (),
               run_id: str = "") -> Trainer:
    """The recipe is the caller's own word, so whatever it names is imported without further trust.

    RecipeError where what is there belongs to another recipe.
    """
    run_dir = folder(run_dir).absolute()
    holds = (run_dir / RECIPE).exists()
    live = live_of(run_dir) if holds else None
    if live is None or not is_alive(live):
        live = None
        wait_for(checkpoints_of(recipe, run_dir), owner_of(run_dir))
    saved = None if holds or not recipe.checkpoint.path else newest_of(recipe.checkpoint.path)
    match action(Found(holds, live is not None, saved.step if saved else 0)):
        case "follow":
            assert live is not None
            return Trainer(loads(recipe_text(run_dir), locate=False), run_dir, live["address"], follows=live["run_id"])
        case "resume":
            refuse_taken(run_dir)
            began = recipe_text(run_dir)
            check_resumed(loads(began, locate=False), recipe)
            refuse_lost(checkpoints_of(loads(began, locate=False), run_dir), checkpoints_of(recipe, run_dir))
            return Trainer(recipe, run_dir, address, chaos, beginning(recipe, run_dir), began,
                           run_id=unused(run_dir, run_id))
        case "restore":
            assert saved is not None
            return Trainer(recipe, run_dir, address, chaos, restored(saved, recipe), run_id=run_id)
    return Trainer(recipe, run_dir, address, chaos, run_id=run_id)


def restored(saved: Manifest, recipe: Recipe) -> Begin:
    """Where a run begins whose directory is lost and whose checkpoints are not: its lines begin there, too."""
    try:
        check_resumed(loads(saved.recipe, locate=False), recipe)
    except RecipeError as error:
        raise RecipeError(f'checkpoint.path = "{recipe.checkpoint.path}" holds step {saved.step} of another run: '
                          f"{error}") from None
    return Begin(saved.step, saved.step, saved.generation, 0, saved.step, data_of(saved))


def refuse_lost(before: str, now: str) -> None:
    """UserError where a run that has checkpoints would begin anew, for want of them where it is to look now."""
    if before != now and newest_of(now) is None and (newest := newest_of(before)):
        raise UserError(f'checkpoint.path = "{shown(now)}" has no checkpoint of this run, whose newest, of step {newest.step}, lies in '
                        f"{shown(before)}; write that again, or copy it.")


def wait_for(location: str, owner: str) -> None:
    """Until the claim has run out of a run whose machine is gone. One that is renewed meanwhile is alive: it refuses this."""
    store = Store.open(location)
    first = claim = read(store)
    if first and first.others("", owner):
        print(f"waiting for {first.lapses_in():.0f} s at most: {shown(location)} was {first.run}'s, of {first.owner}", flush=True)
    while claim and claim == first and claim.others("", owner):
        time.sleep(LOOK_S)
        claim = read(store)


def unused(run_dir: Path, run_id: str) -> str:
    """The id, or a new one behind it where the journal has it: a controller would take its own run over, not resume it."""
    with suppress(OSError, ValueError, AttributeError), open(run_dir / JOURNAL, encoding="utf-8") as file:
        if run_id and json.loads(file.readline()).get("run_id") == run_id:
            return f"{run_id}-{time.time_ns():x}"
    return run_id
