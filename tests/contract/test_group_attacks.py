"""Groups whose members' ports are attacked, those of the library's too: a kill breaks them as ever, and the next one forms and adds up."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack

import numpy as np
import psutil
import pytest

from elastic.collective.gloo import GlooGroup
from elastic.collective.kv_store import Endpoint, StoreClient
from elastic.errors import GroupBroken
from tests.support.attacks import under_attack
from tests.support.group_cases import NUM, values
from tests.support.members import Processes

SIZE, WAIT_S = 3, 20.0


@pytest.fixture(params=["gloo", "shared"])
def world(request: pytest.FixtureRequest) -> Iterator[Processes]:
    world = Processes(request.param)
    yield world
    world.close()


def ports_of(world: Processes) -> list[int]:
    """The store's, and all that members listen at."""
    found = [int(world.endpoint.place.rpartition(":")[2])]
    for member, process in world.processes.items():
        if world.listeners[member].is_alive():
            listening = [c.laddr for c in psutil.Process(process.pid).net_connections("inet")
                         if c.status == psutil.CONN_LISTEN]
            assert {address.ip for address in listening} <= {"127.0.0.1"}
            found += [address.port for address in listening]
    return found


def start(world: Processes, name: str, case: str, *args: object) -> None:
    for rank in range(SIZE):
        world.start(name, rank, rank, SIZE, case, args)


@pytest.mark.parametrize("card", [b"", b"x", b"\xff" * 300, b"0" * 170, b"\x01" + bytes(169), "cut", "longer",
                                  "another kind"])
def test_a_malformed_card_breaks_a_group_over_tcp_and_no_member(card: bytes | str) -> None:
    """Rank 1's. The library alone ends the process."""
    endpoint = Endpoint()
    with pytest.raises(GroupBroken):
        GlooGroup.form(0, 2, endpoint.address, "run/1", threading.Event(), 0.5, "127.0.0.1")  # nobody comes
    ((key, own),) = endpoint._values.items()
    if isinstance(card, str):
        start = 16 + int.from_bytes(own[:8], "little")
        card = {"cut": own[:-9], "longer": own + bytes(8), "another kind": own[:start] + b"\x0a"
                + own[start + 1:]}[card]
    StoreClient(endpoint.address, "run/2", threading.Event(),
                WAIT_S).set(key.decode().removeprefix("run/1/").replace("0/0", "0/1"), card)
    with pytest.raises(GroupBroken, match="malformed"):
        GlooGroup.form(0, 2, endpoint.address, "run/2", threading.Event(), WAIT_S, "127.0.0.1")


def test_a_kill_and_the_next_group_are_as_if_nobody_were_there(world: Processes) -> None:
    start(world, "first", "enter", "all_reduce", 1)
    assert [world.places[rank].result("first", ("formed", "failed", "broken"))[0]
            for rank in range(SIZE)] == ["formed"] * SIZE
    with ExitStack() as held:
        ports = ports_of(world)
        assert len(ports) >= (1 + SIZE if world.transport == "gloo" else 1)
        made = held.enter_context(under_attack(ports))
        assert made > 100
        assert world.places[1].result("first") == ("ok", "silent")
        world.kill(1)
        noticed = [world.places[rank].result("first", timeout_s=5.0) for rank in (0, 2)]
        assert [kind for kind, _ in noticed] == ["ok", "ok"] and all("the group" in str(message)
                                                                     for _, message in noticed)
        start(world, "second", "every_call", "float32")
        held.enter_context(under_attack(ports_of(world)))
        results = [world.places[rank].result("second") for rank in range(SIZE)]
    assert [kind for kind, _ in results] == ["ok"] * SIZE, results
    total = sum(values(rank, NUM, "float32") for rank in range(SIZE))
    for _, found in results:
        np.testing.assert_array_equal(found["all_reduce"], total)
