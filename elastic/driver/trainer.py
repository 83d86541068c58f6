"""The Python door: `Trainer(recipe).fit()` runs a recipe on Ray and comes back with its result."""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray._private import parameter, services
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from elastic import chaos, workload
from elastic.checkpoint.access import check_access, claimed
from elastic.checkpoint.claim import owner_of
from elastic.controller.actor import ControllerActor
from elastic.controller.controller import Settings
from elastic.controller.policy import bounds_of
from elastic.driver.follow import Callback, Result, Telling, ask, result_of, see_out
from elastic.driver.rundir import LIVE, beginning, checkpoints_of, held, in_use, live_of, refuse_taken
from elastic.driver.trust import check_trust
from elastic.errors import RecipeError, RunFailed, UserError
from elastic.messages import Begin, Job
from elastic.observe.jsonl import JsonLines, replace_text
from elastic.planning import memory as preview
from elastic.planning import plan as planning
from elastic.recipe import Recipe, best_mode, check_resumed, dumps, load_recipe, loads
from elastic.worker.actor import NAMESPACE

AFRESH = "put that data back, or start a new run, with a checkpoint as its model.init."
AGAIN = "put that data back, then replay it again."
CONNECT_S = 5.0  # for a Ray at a given address to take a connection


@dataclass
class Trainer:
    """One run of a recipe. `address`: "local" starts a Ray on this machine, "auto" or an address joins one."""

    recipe: Recipe
    run_dir: Path | None = None
    address: str = "local"
    chaos: Sequence[str] = ()
    begin: Begin | None = None  # where to go on, if this is a resumption
    began: str = ""  # its recipe.toml when that was read
    opened: workload.Workload | None = field(default=None, repr=False)  # the data and the model, after `check`, until the run starts
    num_steps: int = 0  # known after `check`
    notes: tuple[str, ...] = ()  # likewise: what is to be known of data and model
    follows: str = ""  # the id of a live run that is followed instead of starting one
    data: str = ""  # the key of the data that it must have, if it is another run's replay

    @classmethod
    def resume(cls, run_dir: str | Path, overrides: Sequence[str] = (), address: str = "local", chaos: Sequence[str] = (),
               trust: bool = False) -> Trainer:
        """Goes on from the newest good checkpoint of a run (from the start if it has none), or follows it where it is alive.

        RecipeError where `overrides` make it another run, or would change a live one; UserError where it would import what
        `elastic.driver.trust` does not let in.
        """
        run_dir = Path(run_dir)
        if not (run_dir / "recipe.toml").exists():
            raise UserError(f"{run_dir} is no run directory: it has no recipe.toml; give the directory that `elastic train` named.")
        if live := living(run_dir):
            if overrides or chaos:
                raise RecipeError(f"The run in {run_dir} is alive, and {[*overrides, *chaos][0]!r} cannot change it; leave it out to follow the run.")
            return cls(loads((run_dir / "recipe.toml").read_text(encoding="utf-8"), locate=False), run_dir.absolute(), live["address"],
                       follows=live["run_id"])
        refuse_taken(run_dir)
        began = (run_dir / "recipe.toml").read_text(encoding="utf-8")
        recipe = load_recipe(run_dir / "recipe.toml", overrides)
        check_resumed(loads(began, locate=False), recipe)
        check_trust(recipe, run_dir, trust)
        return cls(recipe, run_dir, address, chaos, beginning(recipe, run_dir), began)

    def check(self) -> dict[str, Any]:
        """Everything that can be known before a worker starts: faults, data, model. Returns the data's facts."""
        for spec in self.chaos:
            chaos.parse(spec)
        if self.address == "local" and self.recipe.backend.device == "cuda" and not os.path.exists("/dev/nvidia0"):
            raise UserError('backend.device = "cuda" needs a CUDA GPU, and this machine has none; set backend.device = "cpu".')
        info = workload.prepare(self.recipe)
        began, remedy = (self.begin.data, AFRESH) if self.begin else (self.data, AGAIN)
        if began and not self.recipe.data.kind and began != info.get("key"):
            raise RecipeError(f"data.path = {list(self.recipe.data.path)} holds other data than this run began with; {remedy}")
        with import_path():
            self.opened = opened = workload.Workload.open(self.recipe, info)
            if opened.key:
                info = {**info, "key": opened.key}
            if began and opened.key and began != opened.key:
                raise RecipeError(f"data.kind = {self.recipe.data.kind!r} has {opened.key}, and this run began with {began}; {remedy}")
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
        with import_path():
            self.recipe, why = planning.settle(self.recipe, info, self.opened, nodes)
        return why

    def check_memory(self) -> preview.Preview:
        """What the largest group needs. UserError where it cannot fit on this machine, and is to run here."""
        assert self.opened is not None
        with import_path():
            found = preview.preview(self.recipe, self.opened)
        if self.address == "local":
            preview.check_memory(found, self.recipe)
        return found

    def check_loss(self) -> None:
        """That a model of the user's own computes; workers find out by themselves before the first step."""
        assert self.opened is not None
        with import_path():
            preview.try_loss(self.recipe, self.opened)

    def fit(self, on_step: Callback | None = None, on_eval: Callback | None = None, on_event: Callback | None = None) -> Result:
        """Trains to the end. Ctrl-C checkpoints and ends the run; a second one exits at once."""
        if self.follows:
            return self.follow(on_step, on_eval, on_event)
        info = self.check()
        run_dir = self.free_run_dir()
        if self.recipe.checkpoint.path:
            check_access(self.recipe.checkpoint.path, not self.begin, owner_of(run_dir))
        is_local = self.address == "local" and not ray.is_initialized()  # else it joins whatever Ray this process has joined
        with connected(self.address, self.recipe) as ray_address, held(run_dir):
            why = self.settle(info, 0 if self.address == "local" else sum(node["Alive"] for node in ray.nodes()))
            notes = [("noted", line) for line in self.notes] + [("mesh_chosen", why)] * bool(why)
            run, checkpoints = run_id(run_dir), checkpoints_of(self.recipe, run_dir)
            if self.begin or self.recipe.checkpoint.path:  # else the place is not there yet
                claimed(checkpoints, run, owner_of(run_dir))
            if self.address == "local":
                self.check_memory()
            self.opened = None  # the workers have their own
            begin = self.open_run_dir(run_dir)
            job = Job(run, dumps(self.recipe), info, str(run_dir), checkpoints, search_path(), tuple(self.chaos),
                      self.num_steps, is_local, tuple(notes))
            (run_dir / LIVE).write_text(json.dumps({"address": ray_address, "run_id": job.run_id}))
            return see_out(start_controller(job, self.recipe, begin), job.run_id, run_dir, Telling(on_step, on_eval, on_event))

    def follow(self, on_step: Callback | None, on_eval: Callback | None, on_event: Callback | None) -> Result:
        """Takes the place of a driver that is gone, or stands beside it."""
        assert self.run_dir is not None
        with connected(self.address, self.recipe):
            try:
                controller = ray.get_actor(f"{self.follows}/controller", NAMESPACE)
            except ValueError:  # another driver has seen it out meanwhile
                return result_of(self.run_dir)
            return see_out(controller, self.follows, self.run_dir, Telling(on_step, on_eval, on_event))

    def free_run_dir(self) -> Path:
        """Where the run will write; `UserError` if it cannot, or if something is there already that is not this run's."""
        run_dir = Path(self.run_dir or Path("runs") / f"{self.recipe.run.name}-{time.strftime('%Y%m%d-%H%M%S')}").absolute()
        if not self.begin and run_dir.exists() and (not run_dir.is_dir() or in_use(run_dir)):
            raise self.used(run_dir)
        nearest = next(folder for folder in (run_dir, *run_dir.parents) if folder.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK):
            raise UserError(f"The run directory {run_dir} cannot be written: {nearest} lets nobody write; name another with --run-dir.")
        return run_dir

    @staticmethod
    def used(run_dir: Path) -> UserError:
        return UserError(f"The run directory {run_dir} is already in use; name another with --run-dir, or `elastic resume` it.")

    def open_run_dir(self, run_dir: Path) -> Begin:
        """Makes the directory a run's, or cuts the one to resume back to its checkpoint. Only who holds it may; see `held`."""
        begin = Begin()
        if self.begin:
            if (run_dir / "recipe.toml").read_text(encoding="utf-8") != self.began:
                raise UserError(f"The run in {run_dir} was resumed by somebody else meanwhile, with another recipe; `elastic resume` it again.")
            begin = beginning(self.recipe, run_dir)  # it may have gone further since it was looked at
        elif in_use(run_dir):
            raise self.used(run_dir)
        try:
            replace_text(run_dir / "recipe.toml", dumps(self.recipe))  # first and whole: what is here from now on can be resumed
            if not self.recipe.checkpoint.path:
                (run_dir / "checkpoints").mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(f"The run directory {run_dir} cannot be written ({error.strerror}); name another with --run-dir.") from error
        if self.begin:
            JsonLines(run_dir / "metrics.jsonl").cut_back(begin.written)
            (run_dir / "summary.json").unlink(missing_ok=True)
        return begin


def run_id(run_dir: Path) -> str:
    """Unique on a cluster: the directory's name and the moment."""
    return f"{run_dir.name}-{time.time_ns():x}"


def search_path() -> tuple[str, ...]:
    """Where workers look for a user's own modules: as this process does."""
    return tuple(dict.fromkeys([os.getcwd(), *[p for p in sys.path if p]]))


@contextmanager
def import_path() -> Iterator[None]:
    """A user's modules lie in the current directory, also when the command is an installed script."""
    added = os.getcwd() not in sys.path
    if added:
        sys.path.insert(0, os.getcwd())
    yield


@contextmanager
def connected(address: str, recipe: Recipe | None) -> Iterator[str]:
    """A Ray to run on; one that was started here ends here."""
    if ":" in address:
        answers(address)
    quiet = {"log_to_driver": False, "logging_level": "ERROR", "namespace": NAMESPACE}
    if ray.is_initialized():
        yield ray.get_runtime_context().gcs_address
        return
    try:
        if address == "local":
            cpus = recipe.elastic.max_workers + recipe.elastic.spares + 1 if recipe else 1
            with alone():
                ray.init(address="local", num_cpus=max(cpus, os.cpu_count() or 1), include_dashboard=False, **quiet)
        else:
            use_token()
            ray.init(address=address, **quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(f"No Ray answers at --address {address} ({str(error).splitlines()[0]}); start one with `ray start --head`, "
                        "or leave --address out.") from error
    try:
        yield ray.get_runtime_context().gcs_address
    finally:
        ray.shutdown()


class Apart(services.ConsolePopen):
    """A process of Ray in a group of its own."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options, process_group=0)


@contextmanager
def alone() -> Iterator[None]:
    """A Ray that is started inside is one command's. Its processes get no signal that is meant for the command's process group, which ends the run
    in order first; and those that nobody would ask are not started: the autoscaler, the dashboard's head and the reader of logs.
    """
    before = services.ConsolePopen, services.start_api_server, parameter.RayParams
    services.ConsolePopen, services.start_api_server = Apart, lambda *_, **__: (None, None)
    parameter.RayParams = partial(parameter.RayParams, no_monitor=True, include_log_monitor=False)
    try:
        yield
    finally:
        services.ConsolePopen, services.start_api_server, parameter.RayParams = before


def use_token() -> None:
    """Ray gives a cluster a token by default, but shows it at an explicit address only where RAY_AUTH_MODE says so."""
    logging.getLogger("ray").setLevel(logging.ERROR)
    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def answers(address: str) -> None:
    """Ray itself tries for minutes, and says so on stderr."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.rpartition("/")[2], int(port)), CONNECT_S).close()
    except (OSError, ValueError) as error:
        raise UserError(f"No Ray answers at --address {address} ({error}); start one with `ray start --head`, or leave --address out.") from None


def start_controller(job: Job, recipe: Recipe, begin: Begin) -> Any:
    elastic = recipe.elastic
    settings = Settings(bounds_of(recipe), elastic.hang_timeout_s, elastic.start_timeout_s, recipe.checkpoint.keep, recipe.checkpoint.best,
                        recipe.checkpoint.keep_every, best_mode(recipe) or "min")
    device = recipe.backend.device
    if device == "auto":
        device = "cuda" if ray.cluster_resources().get("GPU") else "cpu"
    fleet = {"device": device, "threads": recipe.backend.threads, "hang_timeout_s": elastic.hang_timeout_s,
             "orphan_timeout_s": elastic.orphan_timeout_s}
    options = {"name": f"{job.run_id}/controller", "namespace": NAMESPACE, "lifetime": "detached", "num_cpus": 0,
               "max_concurrency": 64, "max_restarts": -1,
               "scheduling_strategy": NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)}
    return ray.remote(ControllerActor).options(**options).remote(job, settings, fleet, begin)


def living(run_dir: Path) -> dict[str, str] | None:
    """Where the live run of a directory is, if there is one: its Ray's address and its id."""
    live = live_of(run_dir)
    if live is None:
        return None
    try:
        answers(live["address"])
        with connected(live["address"], None):
            ray.get_actor(f"{live['run_id']}/controller", NAMESPACE)
    except (ValueError, UserError):
        return None
    return live


def scale(run_dir: str | Path, workers: int, trust: bool = False, **degrees: int) -> None:
    """Asks a live run to grow or shrink; `degrees`, of tensor, pipeline and expert, make a mesh to prefer. Those not given are the recipe's."""
    live = live_of(Path(run_dir))
    if live is None:
        raise UserError(f"No live run in {run_dir}; `elastic status {run_dir}` says how it ended.")
    if workers < 1:
        raise UserError(f"--workers {workers} must be at least 1.")
    recipe = load_recipe(Path(run_dir) / "recipe.toml", [f"mesh.{axis}={degree}" for axis, degree in degrees.items()])
    low, high, mesh = recipe.elastic.min_workers, recipe.elastic.max_workers, recipe.mesh
    if not low <= workers <= high:
        raise UserError(f"--workers {workers} is outside elastic.min_workers = {low} .. elastic.max_workers = {high} of this run.")
    if degrees and workers < mesh.replica_size:
        raise UserError(f"--workers {workers} is less than a replica of this mesh; write --workers {mesh.replica_size} or more.")
    if degrees:
        check_trust(recipe, run_dir, trust)
        Trainer(recipe, address=live["address"]).check()  # a mesh that the model does not fit would end the run
    preferred = (mesh.pipeline, mesh.tensor, mesh.expert) if degrees else None
    with connected(live["address"], recipe):
        try:
            ask(ray.get_actor(f"{live['run_id']}/controller", NAMESPACE), "scale", workers, preferred)
        except ValueError as error:
            raise RunFailed(f"The run in {run_dir} has no controller any more; `elastic resume` it.") from error
