"""The key-value store at which processes meet."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from elastic.collective.kv_store import Endpoint, StoreClient
from elastic.errors import GroupBroken


@pytest.fixture(scope="module")
def endpoint() -> Iterator[Endpoint]:
    yield Endpoint()


def client(endpoint: Endpoint, prefix: str, aborted: threading.Event | None = None,
           timeout_s: float = 20.0) -> StoreClient:
    return StoreClient(endpoint.address, prefix, aborted or threading.Event(), timeout_s)


def test_a_value_is_there_for_all_who_ask_under_its_prefix(endpoint: Endpoint) -> None:
    one, two, other = client(endpoint, "a"), client(endpoint, "a"), client(endpoint, "b")
    one.set("key", b"\0value" * 50_000)
    assert two.get("key") == one.clone().get("key") == b"\0value" * 50_000
    assert two.check("key") and not other.check("key")
    one.set("key", b"")
    assert two.get("key") == b""


def test_get_waits_for_the_value(endpoint: Endpoint) -> None:
    found: list[bytes] = []
    threads = [threading.Thread(target=lambda: found.append(client(endpoint, "wait").get("late"))) for _ in range(5)]
    for thread in threads:
        thread.start()
    writer = client(endpoint, "wait")
    assert found == []
    writer.set("late", b"now")
    for thread in threads:
        thread.join(10)
    assert found == [b"now"] * 5


def test_a_wait_can_be_aborted_and_the_store_goes_on(endpoint: Endpoint) -> None:
    aborted = threading.Event()
    left = client(endpoint, "left", aborted)
    threading.Timer(0.05, aborted.set).start()
    with pytest.raises(GroupBroken, match="waiting for nothing was aborted"):
        left.get("nothing")
    del left
    other = client(endpoint, "left")
    other.set("nothing", b"x")
    assert other.get("nothing") == b"x"


def test_a_wait_has_an_end(endpoint: Endpoint) -> None:
    with pytest.raises(GroupBroken, match=r"no key within 0\.1 s"):
        client(endpoint, "end", timeout_s=0.1).get("key")


def test_nobody_there() -> None:
    with pytest.raises(GroupBroken, match="cannot be reached"):
        StoreClient("127.0.0.1:9", "a", threading.Event(), 5)
