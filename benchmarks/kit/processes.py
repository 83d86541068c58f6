"""Running contestants as processes of their own, and ending them with everything they started."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def python(module: str, *arguments: object) -> list[str]:
    return [sys.executable, "-m", module, *map(str, arguments)]


@contextmanager
def started(command: Sequence[str], log: Path, env: Mapping[str, str]
            | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a session of its own; at the end the whole session is killed."""
    with open(log, "ab") as out:
        process = subprocess.Popen(list(command), cwd=ROOT, stdout=out, stderr=out, start_new_session=True,
                                   env={**os.environ, **(env or {})})
    try:
        yield process
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()


def run(command: Sequence[str], log: Path, timeout_s: float = 300.0, env: Mapping[str, str] | None = None) -> None:
    """To the end. RuntimeError with the end of its output if it fails."""
    with started(command, log, env) as process:
        code = process.wait(timeout_s)
    if code:
        raise RuntimeError(f"{' '.join(command)} ended with {code}:\n" + log.read_text(errors="replace")[-2000:])


def tidy_on_termination() -> None:
    """SIGTERM unwinds the stack, so that whatever a script started ends with it."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
