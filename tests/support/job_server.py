"""A Ray with a job server, as `ray start --head` makes it: a token, ports and folders of its own, and nothing left of it."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import requests

ROOT = Path(__file__).resolve().parents[2]
START_S, END_S, POLL_S = 90.0, 20.0, 0.1
PORTS = ("--port", "--dashboard-port", "--ray-client-server-port", "--dashboard-agent-listen-port",
         "--dashboard-agent-grpc-port", "--metrics-export-port", "--runtime-env-agent-port")


@dataclass(frozen=True)
class JobServer:
    """`environment` is that of a user on its head."""

    address: str
    gcs: str
    environment: dict[str, str]
    process: subprocess.Popen[bytes]


def free_ports(number: int) -> list[int]:
    """Different ones that nobody listens at now."""
    with contextlib.ExitStack() as stack:
        taken = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in taken:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in taken]


def user_environment(**more: str) -> dict[str, str]:
    """As at a shell whose Python is this one, and finds the platform."""
    names = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_MODE")
    kept = {name: value for name, value in os.environ.items() if name not in names}
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**kept, "PYTHONPATH": paths, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "RAY_USAGE_STATS_ENABLED": "0", **more}


@contextmanager
def serving(num_cpus: int = 3) -> Iterator[JobServer]:
    folder = tempfile.mkdtemp(prefix="job-ray-", dir="/tmp")  # a socket's path is short
    ports = dict(zip(PORTS, free_ports(len(PORTS))))
    environment = user_environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(16), HOME=folder)
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus", str(num_cpus),
               "--temp-dir", folder, "--disable-usage-stats", "--include-dashboard", "true", "--node-ip-address", "127.0.0.1",
               "--object-store-memory", str(200 << 20), *(word for name, port in ports.items() for word in (name, str(port)))]
    with open(Path(folder) / "start.log", "wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    address = f"http://127.0.0.1:{ports['--dashboard-port']}"
    try:
        wait(process, address, environment["RAY_AUTH_TOKEN"], Path(folder) / "start.log")
        yield JobServer(address, f"127.0.0.1:{ports['--port']}", environment, process)
    finally:
        end(process)
        shutil.rmtree(folder, ignore_errors=True)


def wait(process: subprocess.Popen[bytes], address: str, token: str, log: Path) -> None:
    until = time.monotonic() + START_S
    while time.monotonic() < until and process.poll() is None:
        with contextlib.suppress(requests.exceptions.RequestException):
            if requests.get(f"{address}/api/jobs/", headers={"Authorization": f"Bearer {token}"}, timeout=5).ok:
                return
        time.sleep(POLL_S)
    raise AssertionError(log.read_text())


def end(process: subprocess.Popen[bytes]) -> None:
    """With all that it has started, detached or not: they are its descendants."""
    with contextlib.suppress(psutil.NoSuchProcess):
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        psutil.wait_procs(family, timeout=END_S)
