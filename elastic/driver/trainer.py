"""The Python door: `Trainer(recipe).fit()` runs a recipe on Ray and comes back with its result."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray

from elastic import chaos, workload
from elastic.controller.actor import ControllerActor
from elastic.controller.controller import Settings
from elastic.controller.events import ScaleTo
from elastic.driver.connect import connected, controller_of, joined_to
from elastic.driver.follow import Callback, Callbacks, Result, ask, result_of, see_out
from elastic.driver.place import Place, folder, place_of
from elastic.driver.rundir import checkpoints_of, live_of
from elastic.driver.trust import check_trust
from elastic.errors import RecipeError, RunFailed, UserError
from elastic.messages import NAMESPACE, Begin, Job
from elastic.observe.run_files import RECIPE
from elastic.planning import memory as preview
from elastic.planning import plan as planning
from elastic.planning import rows
from elastic.recipe import Recipe, check_resumed, dumps, load_recipe, loads
from elastic.storage.head import HEAD

AFRESH = "put that data back, or start a new run, with a checkpoint as its model.init."
AGAIN = "put that data back, then replay it again."


@dataclass
class Trainer:
    """One run of a recipe. `address`: "local" starts a Ray on this machine, "auto" or an address joins one."""

    recipe: Recipe
    run_dir: Path | None = None
    address: str = "local"
    chaos: Sequence[str] = ()
    begin: Begin | None = None  # where to go on, if this is a resumption
    began: str = ""  # its recipe.toml when that was read; "" with a `begin` where only checkpoints are left of the run
    # the data and the model, after `check`, until the run starts
    opened: workload.Workload | None = field(default=None, repr=False)
    num_steps: int = 0  # known after `check`
    notes: tuple[str, ...] = ()  # likewise: what is to be known of data and model
    follows: str = ""  # the id of a live run that is followed instead of starting one
    data: str = ""  # the key of the data that it must have, if it is another run's replay
    run_id: str = ""  # what the run is to be called; none: its directory's name and the moment

    @classmethod
    def resume(cls, run_dir: str | Path, overrides: Sequence[str] = (), address: str = "local",
               chaos: Sequence[str] = (),
               trust: bool = False) -> Trainer:
        """Goes on from the newest good checkpoint of a run (from the start if it has none), or follows it where it is
        alive.

        RecipeError where `overrides` make it another run, or would change a live one; UserError where it would import
        what
        `elastic.driver.trust` does not let in.
        """
        run_dir = folder(run_dir).absolute()
        is_here = address == "local" or (run_dir / RECIPE).is_file()
        with nullcontext() if is_here else connected(address), place_of(run_dir, is_here) as place:
            began, live = place.recipe_text(), place.live()
            if live and is_alive(live):
                if overrides or chaos:
                    raise RecipeError(f"The run in {run_dir} is alive, and {[*overrides, *chaos][0]!r} cannot change "
                                      "it; leave it out to follow the run.")
                return cls(loads(began, locate=False), run_dir, live["address"], follows=live["run_id"])
            place.refuse_taken()
            recipe = loads(began, overrides, run_dir)
            check_resumed(loads(began, locate=False), recipe)
            place.check_trust(dumps(recipe), trust)
            return cls(recipe, run_dir, address, chaos, place.beginning(dumps(recipe)), began)

    def check(self) -> dict[str, Any]:
        """Everything that can be known before a worker starts: faults, data, model. Returns the data's facts."""
        for spec in self.chaos:
            chaos.parse(spec)
        if self.address == "local" and self.recipe.backend.device == "cuda" and not os.path.exists("/dev/nvidia0"):
            raise UserError('backend.device = "cuda" needs a CUDA GPU, and this machine has none; set backend.device = '
                            '"cpu".')
        info = workload.prepare(self.recipe)
        began, remedy = (self.begin.data, AFRESH) if self.begin else (self.data, AGAIN)
        if began and not self.recipe.data.kind and began != info.get("key"):
            raise RecipeError(f"data.path = {list(self.recipe.data.path)} holds other data than this run began with; "
                              f"{remedy}")
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())  # where a user's modules lie, also when the command is an installed script
        self.opened = opened = workload.Workload.open(self.recipe, info)
        if opened.training.key:
            info = {**info, "key": opened.training.key}
        if began and opened.training.key and began != opened.training.key:
            raise RecipeError(f"data.kind = {self.recipe.data.kind!r} has {opened.training.key}, and this run began "
                              f"with {began}; {remedy}")
        self.num_steps = opened.sampler.num_steps
        workload.check_items(opened)
        workload.check_best(self.recipe, opened)
        self.notes = (*info.get("notes", ()), *workload.check_model(self.recipe, opened.model))
        return info

    def settle(self, info: dict[str, Any], nodes: int = 0) -> str:
        """Puts numbers in place of `mesh = "auto"`, and says why these; "" where the recipe has numbers."""
        if not self.recipe.mesh.auto:
            return ""
        assert self.opened is not None
        self.recipe, why = planning.settle(self.recipe, info, self.opened, nodes)
        return why

    def check_memory(self) -> preview.Preview:
        """What the largest group needs. UserError where it cannot fit on this machine, and is to run here."""
        assert self.opened is not None
        found = preview.preview(self.recipe, self.opened)
        if self.address == "local":
            preview.check_memory(found, self.recipe)
        return found

    @property
    def table_lines(self) -> list[str]:
        """What the rows of embedding tables will take, where there are any."""
        assert self.opened is not None
        return list(rows.lines(self.opened.tables, self.recipe.elastic.min_workers, self.recipe.elastic.max_workers))

    def check_loss(self) -> None:
        """That a model of the user's own computes; workers find out by themselves before the first step."""
        assert self.opened is not None
        preview.try_loss(self.recipe, self.opened)

    def fit(self, on_step: Callback | None = None, on_eval: Callback | None = None, on_event: Callback
            | None = None) -> Result:
        """Trains to the end. Ctrl-C checkpoints and ends the run; a second one exits at once."""
        if self.follows:
            return self.follow(on_step, on_eval, on_event)
        run_dir = folder(self.run_dir or Path("runs") / f"{self.recipe.run.name}-{time.strftime('%Y%m%d-%H%M%S')}").absolute()
        info = self.check()
        # else it joins whatever Ray this process has joined
        is_local = self.address == "local" and not ray.is_initialized()
        wanted = bool(self.began), self.recipe.checkpoint.path, self.begin is None
        if is_local:  # before one is started
            Place(run_dir).check_free(*wanted)
        with connected(self.address, self.recipe) as ray_address, place_of(run_dir, is_local) as place:
            if not is_local:
                place.check_free(*wanted)
            place.hold()
            why = self.settle(info, 0 if self.address == "local" else sum(node["Alive"] for node in ray.nodes()))
            joined = () if is_local else (joined_to(ray_address),)
            notes = [("noted", line) for line in (*joined, *self.notes)] + [("mesh_chosen", why)] * bool(why)
            # unique on a cluster
            run, recipe = self.run_id or f"{run_dir.name}-{time.time_ns():x}", dumps(self.recipe)
            if self.begin or self.recipe.checkpoint.path:  # else the place is not there yet
                place.claim(recipe, run)
            if self.address == "local":
                self.check_memory()
            self.opened = None  # the workers have their own
            begin = place.open(recipe, self.began, self.begin or Begin())
            # for a user's own modules: as in this process
            search_path = tuple(dict.fromkeys([os.getcwd(), *filter(None, sys.path)]))
            job = Job(run, recipe, info, str(run_dir), checkpoints_of(self.recipe, run_dir), search_path,
                      tuple(self.chaos), self.num_steps, is_local, tuple(notes))
            place.go_live(json.dumps({"address": ray_address, "run_id": job.run_id}))
            return see_out(start_controller(job, self.recipe, begin), job.run_id, run_dir,
                           Callbacks(on_step, on_eval, on_event), place)

    def follow(self, on_step: Callback | None, on_eval: Callback | None, on_event: Callback | None) -> Result:
        """Takes the place of a driver that is gone, or stands beside it."""
        assert self.run_dir is not None
        with connected(self.address, self.recipe), place_of(self.run_dir) as place:
            try:
                controller = controller_of(self.follows)
            except ValueError:  # another driver has seen it out meanwhile
                return result_of(self.run_dir, place=place)
            return see_out(controller, self.follows, self.run_dir, Callbacks(on_step, on_eval, on_event), place)


def start_controller(job: Job, recipe: Recipe, begin: Begin) -> Any:
    device, elastic = recipe.backend.device, recipe.elastic
    if device == "auto":
        device = "cuda" if ray.cluster_resources().get("GPU") else "cpu"
    fleet = {"device": device, "threads": recipe.backend.threads, "hang_timeout_s": elastic.hang_timeout_s,
             "orphan_timeout_s": elastic.orphan_timeout_s}
    options = {"name": f"{job.run_id}/controller", "namespace": NAMESPACE, "lifetime": "detached", "num_cpus": 0,
               "max_concurrency": 64, "max_restarts": -1, "resources": HEAD}
    return ray.remote(ControllerActor).options(**options).remote(job, Settings.of(recipe), fleet, begin)


def is_alive(live: Mapping[str, str]) -> bool:
    """Whether there is the run that a directory says lives there."""
    try:
        with connected(live["address"]):
            controller_of(live["run_id"])
    except (ValueError, UserError):
        return False
    return True


def scale(run_dir: str | Path, workers: int, trust: bool = False, **degrees: int) -> None:
    """Asks a live run to grow or shrink; `degrees`, of tensor, pipeline and expert, make a mesh to prefer. Those not
    given are the recipe's."""
    live = live_of(Path(run_dir))
    if live is None:
        raise UserError(f"No live run in {run_dir}; `elastic status {run_dir}` says how it ended.")
    if workers < 1:
        raise UserError(f"--workers {workers} must be at least 1.")
    recipe = load_recipe(Path(run_dir) / RECIPE, [f"mesh.{axis}={degree}" for axis, degree in degrees.items()])
    low, high, mesh = recipe.elastic.min_workers, recipe.elastic.max_workers, recipe.mesh
    if not low <= workers <= high:
        raise UserError(f"--workers {workers} is outside elastic.min_workers = {low} .. elastic.max_workers = {high} "
                        "of this run.")
    if degrees and workers < mesh.replica_size:
        raise UserError(f"--workers {workers} is less than a replica of this mesh; write --workers {mesh.replica_size} "
                        "or more.")
    if degrees:
        check_trust(recipe, run_dir, trust)
        Trainer(recipe, address=live["address"]).check()  # a mesh that the model does not fit would end the run
    preferred = (mesh.pipeline, mesh.tensor, mesh.expert) if degrees else None
    with connected(live["address"], recipe):
        try:
            ask(controller_of(live["run_id"]), "request", ScaleTo(workers, preferred))
        except ValueError as error:
            raise RunFailed(f"The run in {run_dir} has no controller any more; `elastic resume` it.") from error
