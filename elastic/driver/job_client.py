"""Ray's job server over HTTP: its own client, with time limits, and every error one sentence with a remedy."""

from __future__ import annotations

import logging
import os
import platform
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobSubmissionClient

from elastic.driver.cluster_checks import CONNECT_S, answers, check_token, refused, versions
from elastic.errors import UserError
from elastic.humanize import count

ANSWER_S = 60.0  # for a server to answer: an upload waits for the head's disk
NODES_S, AGAIN_S = 3.0, 0.2  # in which a new head lists itself as a node
ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
LIMIT = ray_constants.DASHBOARD_CLIENT_MAX_SIZE  # bytes of one upload
INSTALL = "`elastic submit` needs Ray's job client, which is not installed here; pip install 'elastic-training[submit]'."
REMEDY = "write the address that `ray start --head` names for jobs, as --address http://HEAD:8265."


class NoAnswer(UserError):
    """The server cannot be reached now; whoever follows a job tries again."""


class Jobs(JobSubmissionClient):
    """`address`: the job server's URL, or a Ray's own address on this network; the caller's word goes before the
    environment's."""

    def __init__(self, address: str = ""):
        if find_spec("aiohttp") is None or find_spec("requests") is None:
            raise UserError(INSTALL)
        self.given = given_address(address)
        logging.getLogger("ray").setLevel(logging.ERROR)
        for name in ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
            logging.getLogger(name).setLevel(logging.ERROR)
        maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
        with told(self.given), without_environment():
            if "://" not in self.given and self.given != "auto":
                answers(self.given)
                check_token(self.given)
            super().__init__(self.given)
        self.check_versions()

    def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
        # sending goes by the first of both limits
        limits = (ANSWER_S if options.get("data") else CONNECT_S, ANSWER_S)
        with told(self.given):
            return super()._do_request(method, endpoint, timeout=limits, **options)

    def check_versions(self) -> None:
        """UserError where the cluster has another Ray, or another Python than modules are sent from."""
        theirs = self.metadata()
        python = ".".join(str(theirs.get("pythonVersion") or platform.python_version()).split(".")[:2])
        own = ".".join(platform.python_version_tuple()[:2])
        if self._server_ray_version != ray.__version__ or python != own:
            raise UserError(versions(self.given, str(self._server_ray_version), python))

    def metadata(self) -> dict[str, Any]:
        found = self._do_request("GET", "/api/v0/cluster_metadata")
        return found.json().get("data", {}) if found.status_code == 200 else {}

    def joined(self) -> str:
        """Which Ray this is, in a line."""
        until = time.monotonic() + NODES_S
        while not (alive := self.alive()) and time.monotonic() < until:
            time.sleep(AGAIN_S)
        return f"Ray {self._server_ray_version} at {self._address}, {count(alive, 'node')}"

    def alive(self) -> int:
        found = self._do_request("GET", "/api/v0/nodes?limit=10000").json().get("data", {})
        return sum(node["state"] == "ALIVE" for node in found.get("result", {}).get("result", []))

    def upload(self, archive: Path) -> str:
        """The URI under which the cluster has it."""
        with told(self.given):
            return self._upload_package_if_needed(str(archive), include_gitignore=False, is_file=True)

    def submit(self, submission_id: str, entrypoint: str, runtime_env: dict[str, Any], metadata: dict[str, str]) -> None:
        with told(self.given):
            self.submit_job(entrypoint=entrypoint, submission_id=submission_id, runtime_env=runtime_env, metadata=metadata)

    def details(self, submission_id: str) -> JobDetails:
        """UserError where there is no such job."""
        with told(self.given, f"no submission {submission_id}; `ray job list --address {self._address}` shows which there "
                              "are"):
            return self.get_job_info(submission_id)

    def log_of(self, submission_id: str) -> str:
        with told(self.given):
            return self.get_job_logs(submission_id)

    def stop(self, submission_id: str) -> None:
        with told(self.given):
            self.stop_job(submission_id)

    def remove(self, submission_id: str) -> None:
        with told(self.given):
            self.delete_job(submission_id)

    def all(self) -> list[JobDetails]:
        with told(self.given):
            return self.list_jobs()


def given_address(address: str) -> str:
    """UserError where neither the caller nor the environment names one."""
    found = address or next(filter(None, map(os.environ.get, ADDRESSES)), "")
    if not found:
        raise UserError(f"No --address, and no {' or '.join(ADDRESSES)} in the environment; {REMEDY}")
    scheme, separator, _ = found.partition("://")
    if separator and scheme not in ("http", "https", "ray"):
        raise UserError(f"--address {found} cannot be a job server's; {REMEDY}")
    return found.rstrip("/")


@contextmanager
def without_environment() -> Iterator[None]:
    """Ray's client takes an address in the environment for the one that it is given."""
    before = {name: os.environ.pop(name) for name in ADDRESSES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)


@contextmanager
def told(address: str, missing: str = "") -> Iterator[None]:
    """What goes wrong inside is one sentence; `missing`: what a 404 means."""
    import requests

    try:
        yield
    except AuthenticationError:
        raise UserError(refused(address)) from None
    except (requests.exceptions.RequestException, ConnectionError) as error:
        bad = isinstance(error, (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema,
                                 requests.exceptions.JSONDecodeError, requests.exceptions.HTTPError))
        raise (UserError if bad else NoAnswer)(f"No job server of Ray answers at {address} ({cause(error)}); {REMEDY}") from None
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        raise UserError(sentence(address, str(error), missing)) from None


def cause(error: BaseException) -> str:
    """The innermost reason, without the objects' addresses."""
    text = str(error)
    if "BadStatusLine" in text or "ConnectionResetError" in text:
        return "what listens there speaks no HTTP"
    found = re.search(r"\[Errno -?\d+\] ([\w ]+)", text) or re.search(r"(timed out|[Tt]imeout)", text)
    return found[1] if found else " ".join(text.split())[:200] or type(error).__name__


def sentence(address: str, text: str, missing: str = "") -> str:
    """What the server or its client said, without a traceback."""
    code = re.search(r"status code (\d+)", text)
    if code and code[1] == "404" and missing:
        return f"The Ray at {address} knows {missing}."
    if "404" in text and "ersion check" in text:
        return f"What answers at {address} is no job server of Ray; {REMEDY}"
    said = (text.strip().rstrip(".").splitlines() or [""])[-1].strip()
    if code and code[1] == "413":
        said = f"more than {LIMIT >> 20} MiB at once"
    return f"The job server at {address} refuses this: {said[:500]}; mend it, or look at the logs of the cluster's dashboard."
