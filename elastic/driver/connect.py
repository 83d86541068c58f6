"""The way to a Ray: one that is started on this machine for a run, or one that is there."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import ray
from ray._private import parameter, services
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available

from elastic.driver.cluster_checks import answers, check_token, not_joined
from elastic.errors import UserError
from elastic.humanize import count
from elastic.messages import NAMESPACE
from elastic.recipe import Recipe


@contextmanager
def connected(address: str, recipe: Recipe | None = None) -> Iterator[str]:
    """A Ray to run on, of which the address is given; one that was started here ends here."""
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
            # Ray gives a cluster a token by default, but shows it at an explicit address only where RAY_AUTH_MODE says
            # so.
            logging.getLogger("ray").setLevel(logging.ERROR)
            maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
            if ":" in address:
                check_token(address)
            ray.init(address=address, **quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(not_joined(address, str(error))) from error
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
    """A Ray that is started inside is one command's. Its processes get no signal that is meant for the command's
    process group, which ends the run in order first; and those that nobody would ask are not started: the autoscaler,
    the dashboard's head and the reader of logs.
    """
    before = services.ConsolePopen, services.start_api_server, parameter.RayParams
    services.ConsolePopen, services.start_api_server = Apart, lambda *_, **__: (None, None)
    parameter.RayParams = partial(parameter.RayParams, no_monitor=True, include_log_monitor=False)
    try:
        yield
    finally:
        services.ConsolePopen, services.start_api_server, parameter.RayParams = before


def joined_to(address: str) -> str:
    """Which Ray this process has joined, in a line."""
    return f"Ray {ray.__version__} at {address}, {count(sum(node['Alive'] for node in ray.nodes()), 'node')}"


def controller_of(run_id: str) -> Any:
    """The controller of a run on the Ray that is connected to; ValueError where there is none."""
    return ray.get_actor(f"{run_id}/controller", NAMESPACE)
