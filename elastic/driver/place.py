"""A run's directory where its controller is, on the head node: in this process where that runs there, else through an actor."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import ray

from elastic.checkpoint.access import check_access, claimed
from elastic.checkpoint.claim import owner_of
from elastic.driver.rundir import (
    beginning,
    checkpoints_of,
    clear_live,
    held,
    in_use,
    live_of,
    opened,
    refuse_taken,
)
from elastic.driver.trust import check_trust
from elastic.errors import ElasticError, RunFailed, UserError
from elastic.messages import Begin
from elastic.observe.report import write_report
from elastic.observe.run_files import LIVE, RECIPE, lines_of, recipe_text, summary_of
from elastic.recipe import loads
from elastic.storage.head import HEAD
from elastic.storage.remote import shown

URI = re.compile(r"([A-Za-z][\w+.-]+):/+")
USED = "The run directory {run_dir} is already in use; name another with --run-dir, or `elastic resume` it."


def folder(run_dir: str | os.PathLike[str]) -> Path:
    """UserError for a URI, of which a `Path` has lost a slash."""
    given = os.fspath(run_dir)
    if match := URI.match(given):
        uri = shown(f"{match[1]}://{'/' * (match[1] == 'file')}{given[match.end():]}")
        raise UserError(f"The run directory {uri} is a URI, and must be a folder of the head node's file system; name a folder "
                        f'with --run-dir, and let the checkpoints go there with checkpoint.path = "{uri}".')
    return Path(given)


class Place:
    """What a driver does with a run's directory. Recipes are TOML."""

    def __init__(self, run_dir: Path):
        self.run_dir, self.held = run_dir, ExitStack()

    def has_run(self) -> bool:
        return (self.run_dir / RECIPE).is_file()

    def recipe_text(self) -> str:
        return recipe_text(self.run_dir)

    def live(self) -> dict[str, str] | None:
        return live_of(self.run_dir)

    def refuse_taken(self) -> None:
        refuse_taken(self.run_dir)

    def check_trust(self, recipe: str, trust: bool) -> None:
        check_trust(loads(recipe, locate=False), self.run_dir, trust)

    def beginning(self, recipe: str) -> Begin:
        return beginning(loads(recipe, locate=False), self.run_dir)

    def check_free(self, is_resumed: bool, checkpoints: str, is_new: bool) -> None:
        """UserError where the run cannot write, or where something is that is not this run's. `checkpoints`: where they
        lie if not in the directory, and there may be none of a run that is new."""
        run_dir = self.run_dir
        if not is_resumed and run_dir.exists() and (not run_dir.is_dir() or in_use(run_dir)):
            raise UserError(USED.format(run_dir=run_dir))
        nearest = next(folder for folder in (run_dir, *run_dir.parents) if folder.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK):
            raise UserError(f"The run directory {run_dir} cannot be written: {nearest} lets nobody write; name another "
                            "with --run-dir.")
        if checkpoints:
            check_access(checkpoints, is_new, owner_of(run_dir))

    def hold(self) -> None:
        """Until `let_go`, or the end of this process; see `rundir.held`."""
        self.held.enter_context(held(self.run_dir))

    def let_go(self) -> None:
        self.held.close()

    def claim(self, recipe: str, run_id: str) -> None:
        claimed(checkpoints_of(loads(recipe, locate=False), self.run_dir), run_id, owner_of(self.run_dir))

    def open(self, recipe: str, began: str, begin: Begin) -> Begin:
        """`began`: the recipe of the run that is resumed, as it was when that was looked at; "" where there is none."""
        if not began and in_use(self.run_dir):
            raise UserError(USED.format(run_dir=self.run_dir))
        return opened(self.run_dir, recipe, began, begin)

    def go_live(self, text: str) -> None:
        (self.run_dir / LIVE).write_text(text)

    # Of a run that ends.

    def summary(self) -> dict[str, Any] | None:
        return summary_of(self.run_dir)

    def lines(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        return lines_of(self.run_dir)

    def clear_live(self, run_id: str) -> bool:
        return clear_live(self.run_dir, run_id)

    def write_report(self) -> None:
        write_report(self.run_dir)


class Far:
    """A `Place` on the head node."""

    def __init__(self, actor: Any):
        self.actor = actor

    def __getattr__(self, method: str) -> Any:
        def call(*arguments: Any) -> Any:
            try:
                return ray.get(getattr(self.actor, method).remote(*arguments))
            except ray.exceptions.RayTaskError as failed:
                if isinstance(failed.cause, (ElasticError, OSError)):
                    raise failed.cause from None
                raise
            except ray.exceptions.RayError as gone:
                raise RunFailed(f"The head node does not answer ({type(gone).__name__}); `elastic resume` goes on when it does.") from gone

        return call


def is_on_head() -> bool:
    """Whether this process runs on the head node of the Ray that it is connected to."""
    here = ray.get_runtime_context().get_node_id()
    return any(node["NodeID"] == here and set(HEAD) <= set(node["Resources"]) for node in ray.nodes())


@contextmanager
def place_of(run_dir: Path, is_here: bool = False) -> Iterator[Place]:
    """`is_here`: it is known to be this machine's. UserError where this node has a run at the same path that the head node
    does not see."""
    if is_here or is_on_head():
        place = Place(run_dir)
        try:
            yield place
        finally:
            place.let_go()
        return
    actor = ray.remote(Place).options(num_cpus=0, resources=HEAD).remote(run_dir)
    try:
        far = cast(Place, Far(actor))
        if Place(run_dir).has_run() and not far.has_run():
            raise UserError(f"The run in {run_dir} is on this node alone, and its controller would be on the head node "
                            f"({head_address()}), which does not see it; copy the directory there, or name another with --run-dir.")
        yield far
    finally:
        ray.kill(actor)


def head_address() -> str:
    return str(next((node["NodeManagerAddress"] for node in ray.nodes() if set(HEAD) <= set(node["Resources"])), "unknown"))
