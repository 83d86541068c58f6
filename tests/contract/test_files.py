"""One suite for every kind of files a store is made of: a local disk, an S3, a file system in memory, the head node's disk from another
node, and the faulty one without a fault."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyarrow import fs

from elastic.errors import UserError
from elastic.storage import head
from elastic.storage.faulty import FaultyFiles
from elastic.storage.files import Files, Info, LocalFiles, RemoteFiles
from elastic.storage.head import HeadFiles, HeadStorage, at_head, parted_head
from elastic.storage.remote import join, open_files, parted, shown
from elastic.storage.store import TEMPORARY, Store

KINDS = ["local", "s3", "hdfs-like", "head", "faulty local", "faulty s3"]


class Postponed:
    """`Calls` that are carried out when one of them is waited for, the latest first and none before it is that one's turn, as an
    actor with several threads may. What they are given crosses a process."""

    def __init__(self) -> None:
        self.host, self.most = HeadStorage(), 0
        self.waiting: list[Any] = []

    def start(self, method: str, *arguments: Any) -> Any:
        call = {"method": method, "arguments": pickle.dumps(arguments)}
        self.waiting.append(call)
        self.most = max(self.most, len(self.waiting))
        return call

    def result(self, call: Any) -> Any:
        while call in self.waiting:
            late = self.waiting.pop()
            try:
                late["result"] = getattr(self.host, late["method"])(*pickle.loads(late["arguments"]))
            except OSError as error:
                late["error"] = error
        if "error" in call:
            raise call["error"]
        return call["result"]


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Files, str]:
    """Files and an absolute folder in them, which is not there yet."""
    kind = request.param
    if kind.endswith("s3"):
        files, root = open_files(request.getfixturevalue("s3").bucket("/some/run"))
    elif kind == "hdfs-like":
        files, root = RemoteFiles(fs.LocalFileSystem()), f"{tmp_path}/some/run"
        assert files.renames
    elif kind == "head":
        files, root = HeadFiles(Postponed()), f"{tmp_path}/some/run"
    else:
        files, root = open_files(tmp_path / "some" / "run")
    return (FaultyFiles(files) if kind.startswith("faulty") else files), root


def put(files: Files, path: str, *pieces: Any) -> None:
    files.make_folder(path.rpartition("/")[0])
    sink = files.create(path)
    for piece in pieces:
        sink.write(piece)
    sink.close()


def test_nothing_is_there_at_first(place: tuple[Files, str]) -> None:
    files, root = place
    assert files.info(root) is None and files.info(f"{root}/file") is None
    assert files.names(root) == []
    with pytest.raises(OSError):
        files.read(f"{root}/file", 0, 4)
    with pytest.raises(OSError):
        files.remove(f"{root}/file")


def test_what_is_written_is_read_in_any_range(place: tuple[Files, str]) -> None:
    files, root = place
    content = bytes(range(256)) * 100
    put(files, f"{root}/a/file", content[:1000], memoryview(content)[1000:1001], bytearray(content[1001:]), b"")
    assert files.info(f"{root}/a/file") == Info(len(content), False)
    for low, high in ((0, len(content)), (0, 0), (17, 4099), (len(content) - 1, len(content)),
                      (len(content) - 5, len(content) + 5)):
        assert files.read(f"{root}/a/file", low, high) == content[low:high], (low, high)
    put(files, f"{root}/a/none")
    assert files.info(f"{root}/a/none") == Info(0, False) and files.read(f"{root}/a/none", 0, 9) == b""


def test_names_of_files_and_folders(place: tuple[Files, str]) -> None:
    files, root = place
    for name in ("a/one", "a/two", "b/deep/three"):
        put(files, f"{root}/{name}", name.encode())
    found = files.info(f"{root}/b/deep")
    assert found is not None and found.is_folder
    assert sorted(files.names(root)) == ["a", "b"] and sorted(files.names(f"{root}/a")) == ["one", "two"]
    files.remove(f"{root}/a/one")
    assert files.names(f"{root}/a") == ["two"]
    Store(files, root).remove("b")
    assert files.names(root) == ["a"] and files.info(f"{root}/b/deep/three") is None


def test_a_file_is_replaced_whole(place: tuple[Files, str]) -> None:
    files, root = place
    put(files, f"{root}/file", b"old and long")
    if files.renames:
        put(files, f"{root}/beside", b"new")
        files.rename(f"{root}/beside", f"{root}/file")
        files.sync(root)
        assert files.info(f"{root}/beside") is None
    else:
        sink = files.create(f"{root}/file")
        sink.write(b"new")
        assert files.read(f"{root}/file", 0, 99) == b"old and long", "seen before it is closed"
        sink.close()
    assert files.read(f"{root}/file", 0, 99) == b"new"


def test_a_file_that_is_given_up_is_not_there_or_not_finished(place: tuple[Files, str]) -> None:
    files, root = place
    put(files, f"{root}/kept", b"kept")
    sink = files.create(f"{root}/given up")
    sink.write(b"half")
    sink.abort()
    found = files.info(f"{root}/given up")
    assert found is None or files.renames, "an object appeared that was never closed"
    assert files.read(f"{root}/kept", 0, 9) == b"kept"


# The store above them.


def test_a_store_writes_whole_files_and_leaves_nothing_beside(place: tuple[Files, str]) -> None:
    store = Store(*place)
    store.write("step/file", [b"one", b"two"])
    assert store.names() == ["step"] and store.names("step") == ["file"] and store.size("step/file") == 6
    assert store.read_range("step/file", 0, 9) == b"onetwo" and store.read_range("step/file", 2, 4) == b"et"
    assert store.size("step") is None and store.size("none") is None


@pytest.mark.parametrize("mode", ["error", "full"])
def test_of_a_failed_write_nothing_is_left_and_the_old_file_stays(place: tuple[Files, str], mode: str) -> None:
    files, root = place
    Store(files, root).write("file", [b"old"])
    calls = FaultyFiles(files)
    Store(calls, root).write("file", [b"old"])
    for at in range(1, len(calls.calls) + 1):
        if calls.calls[at - 1] == "sync":
            continue  # the new file is in its place by then
        faulty = FaultyFiles(files, mode, at)
        with pytest.raises(OSError):
            Store(faulty, root).write("file", [b"new"])
        assert faulty.fired.is_set() and files.read(f"{root}/file", 0, 9) == b"old"
        assert not [name for name in files.names(root) if name.endswith(TEMPORARY)], f"call {at}, {calls.calls[at - 1]}"


def test_a_short_write_and_a_delay_are_silent(place: tuple[Files, str]) -> None:
    files, root = place
    Store(FaultyFiles(files, "short", 1, "write"), root).write("short", [b"12345678"])
    assert files.read(f"{root}/short", 0, 9) == b"1234"
    slow = FaultyFiles(files, "delay", 1, "write", delay_s=0.01)
    Store(slow, root).write("slow", [b"12345678"])
    assert slow.fired.is_set() and files.read(f"{root}/slow", 0, 9) == b"12345678"


def test_chunks_may_arrive_in_any_order_and_few_are_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "CHUNK", 1000)
    calls = Postponed()
    content = np.random.default_rng(1).bytes(12_345)
    store = Store(HeadFiles(calls), str(tmp_path))
    store.write("file", [content[:100], content[100:9_000], content[9_000:]])
    assert (tmp_path / "file").read_bytes() == content and calls.most == head.IN_FLIGHT
    for low, high in ((0, 20_000), (0, 12_345), (999, 5_001), (12_000, 13_000), (13_000, 15_000)):
        assert store.read_range("file", low, high) == content[low:high], (low, high)
    assert calls.most == head.IN_FLIGHT


def test_a_path_of_the_head_node_is_a_location_like_others() -> None:
    location = at_head("a run?@1", "/run dir/?/checkpoints")
    assert parted_head(location) == ("a run?@1", "/run dir/?/checkpoints")
    assert parted(join(location, "step-1")) == (location, "step-1")
    assert shown(location) == "/run dir/?/checkpoints on the head node"


# Where they are.


@pytest.mark.parametrize(("location", "name", "joined", "seen"), [
    ("/a/b", "c", "/a/b/c", "/a/b"),
    ("/a/b?c/", "d", "/a/b?c/d", "/a/b?c/"),
    ("s3://bucket/run", "c", "s3://bucket/run/c", "s3://bucket/run"),
    ("s3://bucket/", "c", "s3://bucket/c", "s3://bucket/"),
    ("s3://KEY:SECRET@bucket/run?region=eu&secret_key=S", "c", "s3://KEY:SECRET@bucket/run/c?region=eu&secret_key=S",
     "s3://bucket/run"),
])
def test_locations_are_joined_parted_and_shown_without_secrets(location: str, name: str, joined: str,
                                                               seen: str) -> None:
    assert join(location, name) == joined
    parent, last = parted(joined)
    assert last == name and join(parent, name) == joined
    assert shown(location) == seen and "SECRET" not in shown(joined)


@pytest.mark.parametrize("location", ["ftp://host/x", "s3://", "s3://bucket/x?colour=red", "nothing://x"])
def test_what_is_no_location_is_told_in_one_sentence(location: str) -> None:
    with pytest.raises(UserError) as error:
        open_files(location)
    assert shown(location) in str(error.value) and "s3://" in str(error.value) and "\n" not in str(error.value)


def test_a_file_uri_is_a_path(tmp_path: Path) -> None:
    files, root = open_files(f"file://{tmp_path}/a%20b")
    assert isinstance(files, LocalFiles) and root == f"{tmp_path}/a b"


def test_a_crash_is_for_ever(tmp_path: Path) -> None:
    from elastic.storage.faulty import Crashed

    files = FaultyFiles(LocalFiles(), "crash", 3)
    with pytest.raises(Crashed):
        Store(files, str(tmp_path)).write("file", [b"x"])
    calls: list[Callable[[], Any]] = [lambda: files.names(str(tmp_path)), lambda: files.info(str(tmp_path)),
                                      lambda: files.remove(str(tmp_path))]
    for call in calls:
        with pytest.raises(Crashed):
            call()
    assert files.calls == ["make_folder", "create", "write"]
