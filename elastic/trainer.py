"""The Python door: `Trainer(recipe).fit()` runs a recipe on Ray and comes back with its result."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from elastic import chaos, workload
from elastic.actor import NAMESPACE
from elastic.checkpoint.access import check_access, remedy
from elastic.checkpoint.commits import Commits
from elastic.checkpoint.manager import read_manifest, split
from elastic.checkpoint.remote import shown
from elastic.controller import Settings
from elastic.controller_actor import ControllerActor
from elastic.errors import RecipeError, RunFailed, UserError
from elastic.messages import Job
from elastic.observe.events import JsonLines, has_writer, read_lines, replace_text
from elastic.observe.report import write_report
from elastic.policy import Bounds
from elastic.recipe import Recipe, check_resumed, dumps, load_recipe, loads

Callback = Callable[[dict[str, Any]], None]
CONNECT_S = 5.0  # for a Ray at a given address to take a connection
AWAY_S, AGAIN_S = 120.0, 0.1  # how long a controller may take to come back, and between tries
END_S = 60.0  # for the workers to end where the driver gives up
LIVE = "live.json"  # in the run directory while the run lives: where its Ray is


@dataclass(frozen=True)
class Result:
    """How a run ended. `summary` is summary.json."""

    status: str  # "done" | "failed" | "interrupted"
    summary: dict[str, Any]
    run_dir: Path
    error: str = ""


@dataclass
class Trainer:
    """One run of a recipe. `address`: "local" starts a Ray on this machine, "auto" or an address joins one."""

    recipe: Recipe
    run_dir: Path | None = None
    address: str = "local"
    chaos: Sequence[str] = ()
    begin: dict[str, Any] = field(default_factory=dict)  # where to go on, if this is a resumption
    num_steps: int = 0  # known after `check`
    follows: str = ""  # the id of a live run that is followed instead of starting one

    @classmethod
    def resume(cls, run_dir: str | Path, overrides: Sequence[str] = (), address: str = "local", chaos: Sequence[str] = ()) -> Trainer:
        """Goes on from the newest good checkpoint of a run (from the start if it has none), or follows it where it is alive.

        RecipeError where `overrides` make it another run, or would change a live one.
        """
        run_dir = Path(run_dir)
        if not (run_dir / "recipe.toml").exists():
            raise UserError(f"{run_dir} is no run directory: it has no recipe.toml.")
        if live := living(run_dir):
            if overrides or chaos:
                raise RecipeError(f"The run in {run_dir} is alive, and {[*overrides, *chaos][0]!r} cannot change it; leave it out to follow the run.")
            return cls(loads((run_dir / "recipe.toml").read_text(encoding="utf-8"), locate=False), run_dir.absolute(), live["address"],
                       follows=live["run_id"])
        refuse_live(run_dir)
        recipe = load_recipe(run_dir / "recipe.toml", overrides)
        check_resumed(loads((run_dir / "recipe.toml").read_text(encoding="utf-8"), locate=False), recipe)
        lines = read_lines(run_dir / "metrics.jsonl")
        events = read_lines(run_dir / "events.jsonl")
        path, step, info = newest_of(checkpoints_of(recipe, run_dir))
        step = min(step, max((m["step"] for m in lines if "eval" not in m), default=0))  # a checkpoint ahead of the lines brings its own
        return cls(recipe, run_dir, address, chaos, {
            "written": step, "data": info.get("key"), "evaluated": max((m["step"] for m in lines if "eval" in m and m["step"] <= step), default=0),
            "generation": max((e["generation"] for e in events), default=0),
            "rewound_from": max((m["step"] for m in lines if "eval" not in m), default=0)})

    def check(self) -> dict[str, Any]:
        """Everything that can be known before a worker starts: faults, data, model. Returns the data's facts."""
        for spec in self.chaos:
            chaos.parse(spec)
        if self.address == "local" and self.recipe.backend.device == "cuda" and not os.path.exists("/dev/nvidia0"):
            raise UserError('backend.device = "cuda" needs a CUDA GPU, and this machine has none; set backend.device = "cpu".')
        info = workload.prepare(self.recipe)
        if self.begin.get("data") and self.begin["data"] != info.get("key"):
            raise RecipeError(f"data.path = {list(self.recipe.data.path)} holds other data than this run began with; put that back, or start a new "
                              "run, with a checkpoint as its model.init.")
        with import_path():
            opened = workload.Workload.open(self.recipe, info)
            self.num_steps = opened.sampler.num_steps
            workload.check_model(self.recipe, opened.model)
        return info

    def fit(self, on_step: Callback | None = None, on_eval: Callback | None = None, on_event: Callback | None = None) -> Result:
        """Trains to the end. Ctrl-C checkpoints and ends the run; a second one exits at once."""
        if self.follows:
            return self.follow(on_step, on_eval, on_event)
        info = self.check()
        run_dir = self.free_run_dir()
        if self.recipe.checkpoint.path:
            check_access(self.recipe.checkpoint.path, not self.begin)
        with connected(self.address, self.recipe) as ray_address:
            self.open_run_dir(run_dir)
            job = Job(run_id(run_dir), dumps(self.recipe), info, str(run_dir), checkpoints_of(self.recipe, run_dir), search_path(), tuple(self.chaos),
                      self.num_steps)
            (run_dir / LIVE).write_text(json.dumps({"address": ray_address, "run_id": job.run_id}))
            return see_out(start_controller(job, self.recipe, self.begin), run_dir, on_step, on_eval, on_event)

    def follow(self, on_step: Callback | None, on_eval: Callback | None, on_event: Callback | None) -> Result:
        """Takes the place of a driver that is gone, or stands beside it."""
        assert self.run_dir is not None
        with connected(self.address, self.recipe):
            try:
                controller = ray.get_actor(f"{self.follows}/controller", NAMESPACE)
            except ValueError as error:
                raise RunFailed(f"The run in {self.run_dir} has just ended; `elastic status {self.run_dir}` says how.") from error
            return see_out(controller, self.run_dir, on_step, on_eval, on_event)

    def free_run_dir(self) -> Path:
        """Where the run will write; `UserError` if it cannot, or if something is there already that is not this run's."""
        run_dir = Path(self.run_dir or Path("runs") / f"{self.recipe.run.name}-{time.strftime('%Y%m%d-%H%M%S')}").absolute()
        if not self.begin and run_dir.exists() and (not run_dir.is_dir() or in_use(run_dir)):
            raise UserError(f"The run directory {run_dir} is already in use; name another with --run-dir, or `elastic resume` it.")
        nearest = next(folder for folder in (run_dir, *run_dir.parents) if folder.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK):
            raise UserError(f"The run directory {run_dir} cannot be written: {nearest} lets nobody write; name another with --run-dir.")
        return run_dir

    def open_run_dir(self, run_dir: Path) -> None:
        """Makes the directory, or cuts the one to resume back to its checkpoint."""
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            replace_text(run_dir / "recipe.toml", dumps(self.recipe))  # first and whole: what is here from now on can be resumed
            if not self.recipe.checkpoint.path:
                (run_dir / "checkpoints").mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(f"The run directory {run_dir} cannot be written ({error.strerror}); name another with --run-dir.") from error
        if self.begin:
            JsonLines(run_dir / "metrics.jsonl").cut_back(self.begin["written"])
            (run_dir / "summary.json").unlink(missing_ok=True)


def in_use(run_dir: Path) -> bool:
    """A start that was killed before its recipe was in place has left nothing."""
    return any(path.name != "recipe.toml.new" for path in run_dir.iterdir())


def checkpoints_of(recipe: Recipe, run_dir: Path) -> str:
    """Where a run's checkpoints lie: a path or URI."""
    return recipe.checkpoint.path or str(run_dir / "checkpoints")


def newest_of(location: str) -> tuple[str, int, dict[str, Any]]:
    """(path, step, the data's facts) of the newest good checkpoint; ("", 0, {}) if there is none."""
    try:
        path, step, _ = Commits(location, 1, "").newest_good()
        return path, step, read_manifest(*split(path)).extra.get("info", {}) if path else {}
    except OSError as error:
        why = " ".join(str(error).split())[:300]
        raise UserError(f'checkpoint.path = "{shown(location)}" cannot be read ({why}); {remedy(location)}.') from error


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


def start_controller(job: Job, recipe: Recipe, begin: dict[str, Any]) -> Any:
    elastic = recipe.elastic
    settings = Settings(Bounds(elastic.min_workers, elastic.max_workers, elastic.logical_shards, elastic.spares), elastic.hang_timeout_s,
                        elastic.start_timeout_s, recipe.checkpoint.keep, recipe.checkpoint.best, recipe.checkpoint.keep_every)
    device = recipe.backend.device
    if device == "auto":
        device = "cuda" if ray.cluster_resources().get("GPU") else "cpu"
    fleet = {"device": device, "threads": recipe.backend.threads, "hang_timeout_s": elastic.hang_timeout_s,
             "orphan_timeout_s": elastic.orphan_timeout_s}
    options = {"name": f"{job.run_id}/controller", "namespace": NAMESPACE, "lifetime": "detached", "num_cpus": 0,
               "max_concurrency": 64, "max_restarts": -1,
               "scheduling_strategy": NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)}
    return ray.remote(ControllerActor).options(**options).remote(job, settings, fleet, begin)


def see_out(controller: Any, run_dir: Path, on_step: Callback | None, on_eval: Callback | None, on_event: Callback | None) -> Result:
    """Follows a run to its end, and clears up after it."""
    try:
        with interrupting(controller):
            follow(controller, on_step, on_eval, on_event)
        status, error = ask(controller, "outcome")
    except ray.exceptions.RayError as gone:
        raise RunFailed(f"Ray or the run's controller is gone ({str(gone).splitlines()[0]}); `elastic resume {run_dir}` goes on.") from gone
    except BaseException:
        with contextlib.suppress(ray.exceptions.RayError):
            ray.get(controller.end.remote(), timeout=END_S)  # a callback failed: no worker may stay behind
        raise
    finally:
        with contextlib.suppress(ray.exceptions.RayError):
            ray.kill(controller)
        (run_dir / LIVE).unlink(missing_ok=True)
    if not (run_dir / "summary.json").exists():
        raise RunFailed(error)
    summary = json.loads((run_dir / "summary.json").read_text())
    write_report(run_dir)
    return Result(status, summary, run_dir, error)


@contextmanager
def interrupting(controller: Any) -> Iterator[None]:
    """The first Ctrl-C asks for a checkpoint and the end, the second exits at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = threading.Event()

    def on_signal(number: int, frame: Any) -> None:
        if asked.is_set():
            os._exit(130)
        asked.set()
        print("\nInterrupted: a last checkpoint is written; press Ctrl-C again to exit at once.", file=sys.stderr)
        threading.Thread(target=ask, args=(controller, "interrupt"), daemon=True).start()  # it may be on its way back

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def follow(controller: Any, on_step: Callback | None, on_eval: Callback | None, on_event: Callback | None) -> None:
    """Hands every new line to its callback until the run has ended."""
    pid, known, latest, finished = 0, 0, 0.0, False
    while not finished:
        found, lines, known, finished = ask(controller, "poll", pid, known)
        if found != pid and pid:  # a new controller tells all of it again
            lines = [line for line in lines if line.get("time", 0.0) > latest]
        pid = found
        for line in lines:
            latest = max(latest, line.get("time", 0.0))
            callback = on_event if "event" in line else on_eval if "eval" in line else on_step
            if callback is not None:
                callback(line)


def ask(controller: Any, method: str, *arguments: Any) -> Any:
    """A call that waits for a controller on its way back."""
    until = time.monotonic() + AWAY_S
    while True:
        try:
            return ray.get(getattr(controller, method).remote(*arguments))
        except ray.exceptions.ActorUnavailableError:
            if time.monotonic() > until:
                raise
            time.sleep(AGAIN_S)


def living(run_dir: Path) -> dict[str, str]:
    """Where the live run of a directory is, if there is one: its Ray's address and its id."""
    try:
        live: dict[str, str] = json.loads((run_dir / LIVE).read_text())
        answers(live["address"])
        with connected(live["address"], None):
            ray.get_actor(f"{live['run_id']}/controller", NAMESPACE)
    except (OSError, ValueError, UserError):
        return {}
    return live


def refuse_live(run_dir: Path) -> None:
    """A living controller holds its event log, whatever became of the driver."""
    if has_writer(run_dir / "events.jsonl"):
        raise UserError(f"The run in {run_dir} is alive; stop it first, or look with `elastic status`.")


def scale(run_dir: str | Path, workers: int) -> None:
    """Asks a live run to grow or shrink."""
    file = Path(run_dir) / LIVE
    if not file.exists():
        raise UserError(f"No live run in {run_dir}; `elastic status {run_dir}` says how it ended.")
    if workers < 1:
        raise UserError(f"--workers {workers} must be at least 1.")
    live = json.loads(file.read_text())
    recipe = load_recipe(Path(run_dir) / "recipe.toml")
    low, high = recipe.elastic.min_workers, recipe.elastic.max_workers
    if not low <= workers <= high:
        raise UserError(f"--workers {workers} is outside elastic.min_workers = {low} .. elastic.max_workers = {high} of this run.")
    with connected(live["address"], recipe):
        try:
            ask(ray.get_actor(f"{live['run_id']}/controller", NAMESPACE), "scale", workers)
        except ValueError as error:
            raise RunFailed(f"The run in {run_dir} has no controller any more; `elastic resume` it.") from error
