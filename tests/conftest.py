"""What all tests share: the neighbouring data folder, and a look at what processes a run of the tests leaves behind."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.s3 import Server, serving

try:
    import psutil
except ImportError:  # a GPU's machine has torch and NumPy only
    psutil = None

os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")  # before any test loads torch: the bits of small products depend on it
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
ROOT = Path(__file__).resolve().parent.parent
GRACE_S = 15.0  # Ray ends its processes some seconds after the driver lets go


@pytest.fixture(scope="session")
def DATA() -> Path:
    """The folder with tiny-shakespeare.txt and so on: ELASTIC_TEST_DATA, else the neighbour folder."""
    folder = Path(os.environ.get("ELASTIC_TEST_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"there is no test data at {folder}: name its folder in ELASTIC_TEST_DATA")
    return folder


@pytest.fixture(scope="session")
def s3() -> Iterator[Server]:
    """An S3 on loopback."""
    with serving() as server:
        yield server


@pytest.fixture
def plays(tmp_path: Path) -> Path:
    """A small text that needs no download: made of a few words in an order that a model can learn."""
    file = tmp_path / "plays.txt"
    file.write_text("".join(f"KING: to be or not to be, that is line {n % 10}.\n" for n in range(400)), encoding="utf-8")
    return file


def _children() -> list[psutil.Process]:
    mine = psutil.Process()
    return [child for child in mine.children(recursive=True) if child.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture(scope="session", autouse=True)
def no_process_left() -> Iterator[None]:
    """Every process that a test starts has ended when the session ends."""
    if psutil is None:
        yield
        return
    before = {child.pid for child in _children()}
    yield
    ray = __import__("sys").modules.get("ray")
    if ray is not None and getattr(ray, "is_initialized", bool)():
        ray.shutdown()
    end = time.monotonic() + GRACE_S
    while (left := [child for child in _children() if child.pid not in before and not _harmless(child)]) and time.monotonic() < end:
        psutil.wait_procs(left, timeout=0.2)
    assert not left, f"processes left behind: {[(child.pid, child.cmdline()[:4]) for child in left]}"


def _harmless(process: psutil.Process) -> bool:
    """Python's own resource tracker lives as long as its parent."""
    try:
        return "resource_tracker" in " ".join(process.cmdline())
    except psutil.Error:
        return True
