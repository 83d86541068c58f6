"""What all tests share: which framework's tests run in this process, the neighbouring data folder, and a look at what a run leaves behind."""

from __future__ import annotations

import ctypes
import gc
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import sampling
from tests.support.frameworks import FOLDERS, SELECTED
from tests.support.s3 import Server, serving

try:
    import psutil
except ImportError:  # a GPU's machine has torch and NumPy only
    psutil = None

os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")  # before any test loads torch: the bits of small products depend on it
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
ROOT = Path(__file__).resolve().parent.parent
GRACE_S = 15.0  # Ray ends its processes some seconds after the driver lets go
GROWN_BYTES = 200 << 20  # by so much a process may grow before what tests have left is looked for


# a word in the name of a file of tests that imports one
FILES = {"tensorflow": ("tensorflow", "keras"), "mxnet": ("mxnet", "gluon")}


def owner_of(file: Path) -> str:
    return next((name for name, words in FILES.items() if any(word in file.stem for word in words)), "")


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Not even imported."""
    owner = owner_of(collection_path) if collection_path.name.startswith("test_") else ""
    return True if SELECTED and owner and owner not in SELECTED else None


def home_of(item: pytest.Item) -> str:
    """The framework in whose process a test runs: that of its file; of those that its marker or its parameters name,
    the last one; else torch."""
    if owner := owner_of(item.path):
        return owner
    marks = [name for mark in item.iter_markers("backends") for name in mark.args]
    values = list(item.callspec.params.values()) if isinstance(item,
                                                               pytest.Function) and hasattr(item, "callspec") else []
    named = {*marks, *(word for value in values for word in (value if isinstance(value, tuple) else (value,))
                       if isinstance(word, str))}
    return next((name for name in reversed(FOLDERS) if name in named), "torch")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """ELASTIC_TEST_BACKENDS chooses: what belongs to a framework that it does not name runs in another process. NumPy's
    is torch's."""
    if not SELECTED:
        return
    chosen = {*SELECTED, *(["reference"] if "torch" in SELECTED else [])}
    kept = [item for item in items if home_of(item) in chosen]
    config.hook.pytest_deselected(items=[item for item in items if home_of(item) not in chosen])
    items[:] = kept


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not sampling.WHOLE:
        terminalreporter.line(f"samples of long suites: ELASTIC_TEST_SEED={sampling.SEED}")


@pytest.fixture(scope="session")
def _held() -> list[int]:
    return [0]


@pytest.fixture(autouse=True)
def lean(_held: list[int]) -> Iterator[None]:
    """Runs on threads leave cycles with whole models in them, and glibc keeps what was freed: given back before it adds
    up to gigabytes."""
    yield
    if psutil is None or psutil.Process().memory_info().rss < _held[0] + GROWN_BYTES:
        return
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    _held[0] = psutil.Process().memory_info().rss


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


@pytest.fixture(scope="session")
def plays(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small text that needs no download: made of a few words in an order that a model can learn."""
    file = tmp_path_factory.mktemp("plays") / "plays.txt"
    file.write_text("".join(f"KING: to be or not to be, that is line {n % 10}.\n" for n in range(400)),
                    encoding="utf-8")
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
    while (left := [child for child in _children() if child.pid not in before
                    and not _harmless(child)]) and time.monotonic() < end:
        psutil.wait_procs(left, timeout=0.2)
    assert not left, f"processes left behind: {[(child.pid, child.cmdline()[:4]) for child in left]}"


def _harmless(process: psutil.Process) -> bool:
    """Python's own resource tracker lives as long as its parent."""
    try:
        return "resource_tracker" in " ".join(process.cmdline())
    except psutil.Error:
        return True
