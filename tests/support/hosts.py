"""Real hosts on one machine: each a network namespace with an address of its own, and a mount namespace with a disk of its own at `DISK`."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[2]
DISK = "/mnt"  # each host's own, and empty
OWN = (DISK, "/tmp/ray", "/dev/shm")  # Ray's folder too: else a driver finds the Ray of another host by its files there
PORT = 6379  # of the head, in its own network
HOLD = "echo held; exec sleep infinity"
LIMIT_S = 90.0


def obstacle() -> str:
    """Why there can be no hosts here; "" where there can."""
    Path("/tmp/ray").mkdir(exist_ok=True)
    for tool in ("unshare", "nsenter", "ip"):
        found = subprocess.run(["which", tool], capture_output=True)
        if found.returncode:
            return f"there is no {tool} here, which makes namespaces"
    tried = subprocess.run(["unshare", "-n", "-m", "sh", "-c", f"mount -t tmpfs tmpfs {DISK} && ip link add type veth"],
                           capture_output=True, text=True)
    return f"namespaces are not allowed here ({' '.join(tried.stderr.split())[:200]})" if tried.returncode else ""


def held(*flags: str, script: str = HOLD) -> subprocess.Popen[str]:
    """New namespaces, which last as long as the process and those that have entered them."""
    process = subprocess.Popen(["unshare", *flags, "sh", "-ec", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n", "no namespace"
    return process


@dataclass
class Process:
    """One that was started on a host."""

    process: subprocess.Popen[str]
    log: IO[str]

    def wait(self) -> int:
        """Its exit code."""
        return self.process.wait(LIMIT_S)

    @property
    def has_ended(self) -> bool:
        return self.process.poll() is not None

    @property
    def said(self) -> str:
        self.log.seek(0)
        return self.log.read()


@dataclass
class Host:
    """`keeper` holds its namespaces."""

    number: int
    keeper: subprocess.Popen[str]
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"10.77.0.{self.number}"

    @property
    def disk(self) -> Path:
        """Its `DISK`, as the test sees it."""
        return Path(f"/proc/{self.keeper.pid}/root{DISK}")

    def start(self, *command: str, cwd: str = str(ROOT), **environment: str) -> Process:
        log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - no pipe: what Ray starts would hold it open
        process = subprocess.Popen(
            ["nsenter", "-t", str(self.keeper.pid), "-n", "-m", f"--wd={cwd}", *command], text=True,
            stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]), "RAY_AUTH_MODE": "disabled",
                 "RAY_DISABLE_IMPORT_WARNING": "1", **environment})
        self.started.append(process)
        return Process(process, log)

    def elastic(self, *arguments: str) -> Process:
        return self.start(sys.executable, "-m", "elastic.cli", *arguments)

    def join_ray(self, head: Host, num_cpus: int) -> None:
        """A node of Ray; the head itself begins one."""
        who = ["--head", f"--port={PORT}", "--include-dashboard=false"] if head is self else [f"--address={head.address}:{PORT}"]
        process = self.start(sys.executable, "-m", "ray.scripts.scripts", "start", *who, f"--node-ip-address={self.address}",
                             f"--num-cpus={num_cpus}", "--object-store-memory=100000000", "--disable-usage-stats")
        assert process.wait() == 0, process.said

    def processes(self) -> list[int]:
        """All that run in its network."""
        if self.keeper.poll() is not None:
            return []
        mine = os.stat(f"/proc/{self.keeper.pid}/ns/net").st_ino
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and os.stat(entry / "ns/net").st_ino == mine:
                    found.append(int(entry.name))
        return found

    def die(self) -> None:
        """As a machine that loses its power; its disk goes with it."""
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in (*self.started, self.keeper):
            process.wait(LIMIT_S)


@contextmanager
def hosts(count: int) -> Iterator[list[Host]]:
    """Numbered from 1, on one switch, which no other network is on."""
    switch = held("-n", script=f"ip link add bridge type bridge; ip link set bridge up; {HOLD}")
    found: list[Host] = []
    mounts = "; ".join(f"mount -t tmpfs tmpfs {place}" for place in OWN)
    try:
        for number in range(1, count + 1):
            host = Host(number, held("-n", "-m", script=f"ip link set lo up; {mounts}; {HOLD}"))
            found.append(host)
            inside = ["nsenter", "-n", "-t", str(switch.pid), "ip", "link"]
            run([*inside, "add", f"to{number}", "type", "veth", "peer", "name", "net", "netns", str(host.keeper.pid)])
            run([*inside, "set", f"to{number}", "master", "bridge", "up"])
            run(["nsenter", "-n", "-t", str(host.keeper.pid), "ip", "address", "add", f"{host.address}/24", "dev", "net"])
            run(["nsenter", "-n", "-t", str(host.keeper.pid), "ip", "link", "set", "net", "up"])
        yield found
    finally:
        for host in found:
            host.die()
        switch.kill()
        switch.wait()


def run(command: Sequence[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def until(find: Any, *, unless: Process | None = None) -> Any:
    """What `find` gives once that is something, unless a process ends before."""
    end = time.monotonic() + LIMIT_S
    while not (found := find()):
        assert time.monotonic() < end, f"it did not come: {unless and unless.said}"
        assert unless is None or not unless.has_ended, unless and unless.said
        time.sleep(0.05)
    return found
