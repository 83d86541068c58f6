"""The store at which processes meet, under whatever may come in at its port: members find each other as if nothing were there."""

from __future__ import annotations

import multiprocessing
import os
import resource
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from elastic.collective import kv_store as store
from elastic.collective.kv_store import ANSWER, NONCE, PROOF, REQUEST, SET, Endpoint, StoreClient, proof
from elastic.collective.shared import SharedGroup
from elastic.errors import GroupBroken
from tests.support.attacks import (
    FOUR_GIB,
    descriptors_exhausted,
    ends_within,
    half_open,
    reach,
    slow_readers,
    under_attack,
)

WAIT_S = 20.0


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    yield Endpoint()


def port_of(endpoint: Endpoint) -> int:
    return int(endpoint.place.rpartition(":")[2])


def client(endpoint: Endpoint, prefix: str = "run/1", timeout_s: float = WAIT_S) -> StoreClient:
    return StoreClient(endpoint.address, prefix, threading.Event(), timeout_s)


def read(source: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size and (more := source.recv(size - len(found))):
        found += more
    return found


def let_in(endpoint: Endpoint) -> socket.socket:
    """A connection that has shown the secret: a member that may go mad."""
    found, mine = reach(port_of(endpoint)), bytes(NONCE)
    theirs, secret = read(found, NONCE), endpoint.address.partition("@")[0]
    found.sendall(mine + proof(secret, b"client", theirs, mine))
    assert read(found, PROOF) == proof(secret, b"server", theirs, mine)
    return found


def assert_serves(endpoint: Endpoint) -> None:
    """A value goes in, and to one who has waited for it."""
    found: list[bytes] = []
    waits = threading.Thread(target=lambda: found.append(client(endpoint, "fresh").get("key")))
    waits.start()
    client(endpoint, "fresh").set("key", b"value")
    waits.join(WAIT_S)
    assert found == [b"value"]


def test_strangers_change_nothing(endpoint: Endpoint) -> None:
    before = client(endpoint)
    before.set("kept", b"as it was")
    with under_attack([port_of(endpoint)]) as number:
        assert number > 150
        assert_serves(endpoint)
        assert before.get("kept") == client(endpoint).get("kept") == b"as it was"
    assert set(endpoint._values) == {b"run/1/kept", b"fresh/key"}


def test_who_does_not_know_the_secret_is_not_let_in(endpoint: Endpoint) -> None:
    for secret in ("", "another"):
        with pytest.raises(GroupBroken, match="does not let this member in") as caught:
            StoreClient(f"{secret}@{endpoint.place}", "run/1", threading.Event(), WAIT_S)
        assert endpoint.address.partition("@")[0] not in str(caught.value)
    assert len({Endpoint().address.partition("@")[0] for _ in range(3)}) == 3


def test_a_member_does_not_believe_a_server_that_does_not_know_the_secret() -> None:
    listener = socket.create_server(("127.0.0.1", 0))

    def pretend() -> None:
        taken, _ = listener.accept()
        taken.sendall(bytes(NONCE))
        read(taken, NONCE + PROOF)
        taken.sendall(bytes(PROOF) + ANSWER.pack(5) + b"false")

    threading.Thread(target=pretend, daemon=True).start()
    with pytest.raises(GroupBroken, match="another run's"):
        StoreClient(f"secret@127.0.0.1:{listener.getsockname()[1]}", "run/1", threading.Event(), WAIT_S).get("key")


def test_a_stranger_s_time_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "STRANGER_S", 0.1)
    endpoint = Endpoint()
    assert all(ends_within(one, WAIT_S) for one in half_open(port_of(endpoint), 3))
    assert_serves(endpoint)


def test_there_are_only_so_many_strangers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "MAX_STRANGERS", 4)
    endpoint = Endpoint()
    first, *others = half_open(port_of(endpoint), 9)
    assert ends_within(first, store.STRANGER_S / 2), "the one that came first makes room"
    assert_serves(endpoint)
    assert others


@pytest.mark.parametrize("sizes", [(FOUR_GIB, 0), (0, FOUR_GIB), (3, store.MAX_VALUE + 1), (store.MAX_KEY + 1, 0)])
def test_a_member_s_header_that_announces_too_much_ends_it(endpoint: Endpoint, sizes: tuple[int, int]) -> None:
    mad = let_in(endpoint)
    mad.sendall(REQUEST.pack(SET, *sizes))
    assert ends_within(mad, WAIT_S)
    assert_serves(endpoint)


def test_an_unknown_request_or_one_before_its_turn_ends_who_makes_it(endpoint: Endpoint) -> None:
    unknown, hasty = let_in(endpoint), let_in(endpoint)
    unknown.sendall(struct.pack("!cII", b"X", 1, 0) + b"k")
    hasty.sendall((REQUEST.pack(b"G", 7, 0) + b"nothing") * 2)
    assert ends_within(unknown, WAIT_S) and ends_within(hasty, WAIT_S)
    assert_serves(endpoint)


def test_a_member_that_does_not_read_keeps_nobody_waiting(endpoint: Endpoint) -> None:
    """Its answer is far more than the system takes for it: who sends it off in one go waits for ever."""
    client(endpoint).set("large", bytes(store.MAX_VALUE))
    mad = [let_in(endpoint) for _ in range(4)]
    for one in mad:
        one.sendall(REQUEST.pack(b"G", 11, 0) + b"run/1/large")
    assert_serves(endpoint)
    assert client(endpoint).get("large") == bytes(store.MAX_VALUE)
    assert read(mad[0], ANSWER.size + store.MAX_VALUE)[ANSWER.size:] == bytes(store.MAX_VALUE), "and it may go on"


def test_a_value_that_no_store_takes_is_refused_at_home(endpoint: Endpoint) -> None:
    with pytest.raises(GroupBroken, match="more than it takes"):
        client(endpoint).set("key", bytes(store.MAX_VALUE + 1))


def serve(pipe: Any, limit: int) -> None:
    """A process with few descriptors."""
    endpoint = Endpoint()
    used = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + limit, used + limit))
    taken: list[int] = []
    pipe.send(endpoint.address)
    while (order := pipe.recv()) != "end":
        if order == "exhaust":
            taken = descriptors_exhausted()
        for descriptor in taken if order == "release" else ():
            os.close(descriptor)
        pipe.send(len(taken))


@pytest.fixture
def poor() -> Iterator[tuple[Any, str]]:
    """(its pipe, its store's address) of a process that may have twenty descriptors more than it has."""
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, 20), daemon=True)
    process.start()
    yield pipe, pipe.recv()
    pipe.send("end")
    process.join(WAIT_S)
    assert process.exitcode == 0


def ask(address: str) -> bytes:
    made = StoreClient(address, "run/1", threading.Event(), WAIT_S)
    made.set("key", b"value")
    return made.get("key")


def test_strangers_that_take_all_descriptors_lose_them(poor: tuple[Any, str]) -> None:
    _, address = poor
    port = int(address.rpartition(":")[2])
    left = [*half_open(port, 50), *slow_readers(port, 50)]
    assert ask(address) == b"value"
    assert len(left) == 100


def test_who_finds_no_descriptor_free_waits_for_one(poor: tuple[Any, str]) -> None:
    pipe, address = poor
    pipe.send("exhaust")
    assert pipe.recv() > 10
    found: list[bytes] = []
    asks = threading.Thread(target=lambda: found.append(ask(address)))
    asks.start()
    asks.join(0.3)
    assert not found, "there was a descriptor left"
    pipe.send("release")
    pipe.recv()
    asks.join(WAIT_S)
    assert found == [b"value"]


def test_a_wait_for_a_connection_can_be_aborted() -> None:
    """Nobody accepts, and the backlog is full."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=0)
    port, aborted = listener.getsockname()[1], threading.Event()
    full = [socket.socket() for _ in range(3)]
    for one in full:
        one.setblocking(False)
        one.connect_ex(("127.0.0.1", port))
    threading.Timer(0.1, aborted.set).start()
    started = time.monotonic()
    with pytest.raises(GroupBroken, match="aborted"):
        StoreClient(f"secret@127.0.0.1:{port}", "run/1", aborted, WAIT_S)
    assert time.monotonic() - started < WAIT_S / 2


def test_keys_of_old_generations_go_and_stay_away(endpoint: Endpoint) -> None:
    for generation in (1, 2, 3, 10):
        client(endpoint, f"run/{generation}").set("0", b"card")
    client(endpoint, "other/1").set("0", b"card")
    endpoint.drop_before("run", 3)
    client(endpoint, "run/2").set("late", b"card")
    assert set(endpoint._values) == {b"run/3/0", b"run/10/0", b"other/1/0"}


@pytest.mark.parametrize("card", [b"", b"\xff\xfe", b"one two three four", b"1 2 3", b"99999999999999999999 1 1 4096",
                                  b"-1 0 0 4096",
                                  f"{os.getpid()} 0 0 4096".encode(), b"0 0 0 0", b"1 " * 5000], ids=range(9))
def test_a_malformed_card_breaks_the_group_and_no_member(endpoint: Endpoint, card: bytes) -> None:
    client(endpoint).set("1", card)
    with pytest.raises(GroupBroken, match="Rank 0 of 2"):
        SharedGroup.form(0, 2, endpoint.address, "run/1", threading.Event(), WAIT_S)


def test_a_card_of_a_file_that_is_no_segment_breaks_the_group(endpoint: Endpoint) -> None:
    from elastic.collective.segment import started_at

    reader, writer = os.pipe()
    for n, (descriptor, size) in enumerate([(reader, 4096), (writer, 4096), (0, 1 << 40), (reader, 0)]):
        client(endpoint, f"run/{n}").set("1", f"{os.getpid()} {descriptor} {started_at(os.getpid())} {size}".encode())
        with pytest.raises(GroupBroken, match="Rank 0 of 2"):
            SharedGroup.form(0, 2, endpoint.address, f"run/{n}", threading.Event(), WAIT_S)


def test_who_has_no_descriptor_left_breaks_a_group_and_may_form_the_next(endpoint: Endpoint) -> None:
    code = ("import resource, threading; from elastic.collective.shared import SharedGroup; from elastic.errors import "
            "GroupBroken\nimport os, sys; from tests.support.attacks import descriptors_exhausted\n"
            "def form(): SharedGroup.form(0, 2, sys.argv[1], 'run/1', threading.Event(), 5)\n"
            "resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))\n"
            "for spare in (0, 1):\n"  # none for the connection, none for the segment
            "    taken = descriptors_exhausted()\n"
            "    for descriptor in taken[:spare]: os.close(descriptor)\n"
            "    try: form()\n"
            "    except GroupBroken as error: print(error)\n"
            "    for descriptor in taken[spare:]: os.close(descriptor)\n")
    ended = subprocess.run([sys.executable, "-c", code, endpoint.address], capture_output=True, text=True, timeout=60,
                           cwd=Path(__file__).parents[2], check=True)
    assert ended.stdout.count("Too many open files") == 2, ended.stdout + ended.stderr
