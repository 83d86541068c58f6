"""`elastic submit`: a run as a job of a Ray elsewhere, known by one id; and what is asked of it there."""

from __future__ import annotations

import os
import re
import shlex
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from ray.runtime_env import RuntimeEnv

from elastic.driver.job_client import LIMIT, Jobs
from elastic.driver.job_package import package
from elastic.driver.place import folder
from elastic.errors import BAD_USAGE, FAILED, INTERRUPTED, RunFailed, UserError
from elastic.recipe import load_recipe
from elastic.recipe.paths import find_recipe

COMMAND = ("python", "-m", "elastic.cli")  # `elastic` itself would leave the packages of a runtime environment out
RUN_DIR = "elastic_run_dir"  # in a job's metadata
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
POLL_S = 0.5


@dataclass(frozen=True)
class Submission:
    """`id` is the job's and the run's; `run_dir` lies on the head, "~" being its user's."""

    id: str
    run_dir: str


def named(name: str, run_dir: str, now_ns: int) -> Submission:
    """A new one, of a run directory or for a recipe's name. UserError for a directory that is none."""
    folder(run_dir)
    moment = time.strftime("%Y%m%d-%H%M%S", time.localtime(now_ns / 1e9))
    if not run_dir:
        run_dir = f"~/runs/{name}-{moment}"
    elif not run_dir.startswith("~/"):
        run_dir = os.path.abspath(run_dir)
    return Submission(f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', Path(run_dir).name)}-{now_ns:x}", run_dir)


def entrypoint(recipe: str, submission: Submission, sets: Sequence[str] = (), chaos: Sequence[str] = ()) -> str:
    options = [word for name, values in (("--set", sets), ("--chaos", chaos)) for value in values for word in (name, value)]
    words = [*COMMAND, "run", recipe, "--id", submission.id, *options]
    return f"{shlex.join(words)} --run-dir {quoted(submission.run_dir)}"


def quoted(run_dir: str) -> str:
    """For the shell of the head, which knows whose home it is."""
    return f"~/{shlex.quote(run_dir[2:])}" if run_dir.startswith("~/") else shlex.quote(run_dir)


def alive_in(jobs: Iterable[Any], run_dir: str) -> str:
    """The id of the submission that a run directory belongs to now; "" where there is none."""
    return next((job.submission_id for job in jobs
                 if (job.metadata or {}).get(RUN_DIR) == run_dir and job.status not in ENDED), "")


def environment_of(file: str) -> dict[str, Any]:
    """Ray's runtime environment in a file of YAML. UserError where it is none, or names what is packed here."""
    if not file:
        return {}
    try:
        found = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--runtime-env {file} cannot be read ({' '.join(str(error).split())}); it is a file of YAML with "
                        "Ray's own keys, as pip and env_vars.") from None
    if not isinstance(found, dict):
        raise UserError(f"--runtime-env {file} has no keys; write Ray's own, as pip: [somepackage].")
    if "working_dir" in found:
        raise UserError(f"--runtime-env {file}: working_dir = {found['working_dir']!r} is what `elastic submit` packs itself; "
                        "take it out.")
    excludes = found.get("excludes") or []
    if not isinstance(excludes, list) or not all(isinstance(one, str) for one in excludes):
        raise UserError(f"--runtime-env {file}: excludes = {excludes!r} must be a list of patterns.")
    try:
        RuntimeEnv(**found)
    except Exception as error:  # of whichever key's own reader
        raise UserError(f"--runtime-env {file} cannot work ({' '.join(str(error).split())[:300]}); write Ray's own keys, as "
                        "pip: [somepackage].") from None
    return found


def submit(jobs: Jobs, recipe_name: str, sets: Sequence[str] = (), run_dir: str = "", runtime_env: str = "",
           chaos: Sequence[str] = ()) -> Submission:
    """Uploads what the run needs and starts it. UserError before anything is sent where that cannot work."""
    environment, file = environment_of(runtime_env), find_recipe(recipe_name)
    recipe = load_recipe(file, sets, locate=False)
    submission = named(recipe.run.name, run_dir, time.time_ns())
    found = package(file, recipe, Path.cwd(), environment.pop("excludes", []))
    if other := alive_in(jobs.all(), submission.run_dir):
        raise UserError(f"The run in {submission.run_dir} is alive, as {other}; stop it first (`ray job stop {other}`), or name "
                        "another --run-dir.")
    with tempfile.TemporaryDirectory(prefix="elastic-submit-") as room:
        archive = Path(room) / "submitted.zip"
        found.write(archive, LIMIT)
        environment["working_dir"] = jobs.upload(archive)
    jobs.submit(submission.id, entrypoint(file.name, submission, sets, chaos), environment, {RUN_DIR: submission.run_dir})
    return submission


def ask_there(jobs: Jobs, submission_id: str, command: str, options: Sequence[str] = ()) -> tuple[int, list[str]]:
    """What `elastic COMMAND RUN_DIR` says on the head of the cluster, and its exit code: as a job, which is gone after it."""
    details = jobs.details(submission_id)
    run_dir = (details.metadata or {}).get(RUN_DIR)
    if run_dir is None:
        raise UserError(f"{submission_id} is no run of `elastic submit`; give the id that it named.")
    errand = f"{submission_id}-{command}-{time.time_ns():x}"
    words = f"{shlex.join([*COMMAND, command, *options])} {quoted(run_dir)}"
    environment = {name: value for name, value in (details.runtime_env or {}).items() if not name.startswith("_")}
    jobs.submit(errand, words, environment, {})
    while (details := jobs.details(errand)).status not in ENDED:
        time.sleep(POLL_S)
    said = list(spoken(jobs.log_of(errand)))
    if details.driver_exit_code is None:
        raise RunFailed(why_of(details, ""))
    jobs.remove(errand)
    return details.driver_exit_code, said


def spoken(text: str) -> Iterator[str]:
    """The lines of a job's log that its own process wrote."""
    for line in text.splitlines():
        if line and not re.match(r"\d{4}-\d\d-\d\d [\d:,]+\s+[A-Z]+ \w+\.py:\d+|Running entrypoint for job ", line):
            yield line


def why_of(details: Any, log: str) -> str:
    """Why a job has ended that did not say so itself, in a sentence; "" where its own words do."""
    code, message = details.driver_exit_code, " ".join((details.message or "").split())
    if details.status == "STOPPED":
        return "The job was stopped; its controller saves the last step and ends the run by itself."
    if details.status == "SUCCEEDED" or code in (BAD_USAGE, FAILED, INTERRUPTED):
        return ""
    if "No module named elastic" in log or "No module named 'elastic'" in log:
        return ("The cluster's Python has no elastic; put elastic-training into its image, or into the pip list of "
                "--runtime-env.")
    if code == 127:
        return "The cluster has no `python` on its PATH; start its Ray from the environment that runs are to use."
    if code is None:
        return f"The job did not start or its head is gone ({message[:500]}); mend that and submit it again: it goes on."
    return f"The job's process ended with exit code {code}; the same submission again goes on from the newest checkpoint."
