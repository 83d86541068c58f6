"""A file written past the page cache: the same bytes as any other way, whatever the alignment, and wherever it is refused."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from elastic.storage import sink as module
from elastic.storage.sink import PAGE, LocalSink, aligned
from elastic.storage.store import Store


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WRITE", 4 * PAGE)


def content(size: int, shift: int = 0) -> np.ndarray:
    """Random bytes that begin `shift` bytes behind a page's start."""
    memory = aligned(size + shift)[shift:]
    memory[:] = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    return memory


class Calls:
    """Stands for os.write: notes whether each went past the cache; a fault may come first."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fault: int = 0, most: int = 1 << 30):
        self.real, self.fault, self.most, self.past = os.write, fault, most, []
        monkeypatch.setattr(module.os, "write", self)

    def __call__(self, descriptor: int, data: memoryview) -> int:
        past = bool(module.fcntl.fcntl(descriptor, module.fcntl.F_GETFL) & module.DIRECT)
        self.past.append((past, len(data)))
        if past and self.fault:
            raise OSError(self.fault, os.strerror(self.fault))
        return self.real(descriptor, data[:self.most])


def written(path: Path, pieces: list[np.ndarray]) -> bytes:
    sink = LocalSink(str(path))
    for piece in pieces:
        sink.write(piece)
    sink.close()
    return path.read_bytes()


@pytest.mark.parametrize("shift", [0, 1, 16])
@pytest.mark.parametrize("sizes", [[0], [1], [PAGE], [10 * PAGE], [10 * PAGE + 7], [PAGE, 5 * PAGE, 3],
                                   [PAGE + 1, 9 * PAGE], [3, 3, 8 * PAGE]])
def test_the_bytes_are_those_that_were_given(tmp_path: Path, sizes: list[int], shift: int) -> None:
    pieces = [content(size, shift) for size in sizes]
    assert written(tmp_path / "f", pieces) == b"".join(piece.tobytes() for piece in pieces)


def test_whole_pages_go_past_the_cache_and_the_rest_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, piece = Calls(monkeypatch), content(10 * PAGE + 7)
    assert written(tmp_path / "f", [piece]) == piece.tobytes()
    if not calls.past[0][0]:
        pytest.skip("the file system of the tests' folder writes through the page cache alone")
    assert calls.past == [(True, 4 * PAGE), (True, 4 * PAGE), (True, 2 * PAGE), (False, 7)]


@pytest.mark.parametrize("fault", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_file_system_that_refuses_is_written_to_as_ever(tmp_path: Path, fault: int,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    calls, piece = Calls(monkeypatch, fault), content(10 * PAGE)
    assert written(tmp_path / "f", [piece, piece]) == piece.tobytes() * 2
    assert sum(past for past, _ in calls.past) <= 1, "it is not asked again"


def test_a_full_disk_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Calls(monkeypatch, errno.ENOSPC)
    sink = LocalSink(str(tmp_path / "f"))
    if not module.DIRECT:
        pytest.skip("this system has no way past the page cache")
    with pytest.raises(OSError, match="No space left"):
        sink.write(content(2 * PAGE))
    sink.abort()


@pytest.mark.parametrize("most", [PAGE, PAGE + 1, 512, 100])
def test_short_writes_lose_nothing(tmp_path: Path, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    Calls(monkeypatch, most=most)
    piece = content(6 * PAGE + 5)
    assert written(tmp_path / "f", [piece, piece]) == piece.tobytes() * 2


def test_a_file_is_on_the_disk_before_it_has_its_name_and_its_name_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a power cut must not undo: the bytes, then the name, then the names of its folders."""
    done, sync, rename = list[tuple[str, int]](), os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (sync(descriptor),
                                                         done.append(("synced", os.fstat(descriptor).st_ino))))
    monkeypatch.setattr(os, "replace", lambda source,
                        target: (done.append(("named", os.stat(source).st_ino)), rename(source, target)))
    Store.open(tmp_path).write("step/file", [b"content"])
    file, folder, root = (os.stat(tmp_path / name).st_ino for name in ("step/file", "step", ""))
    assert done == [("synced", file), ("named", file), ("synced", folder), ("synced", root)]
