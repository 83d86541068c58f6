"""One contract, every kind of group: threads, processes over TCP, processes over shared memory."""

from __future__ import annotations

import itertools
import math
import os
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests.support.group_cases import NUM, leaf, to_rank, values
from tests.support.members import KILLED, Processes, Threads
from tests.support.sampling import sample

TRANSPORTS = ("local", "gloo", "shared")
SOON_S = 2.0
names = (f"group-{os.getpid()}-{number}" for number in itertools.count())


def shared_files() -> set[str]:
    return {name for name in os.listdir("/dev/shm") if name.startswith("elastic-")}


@pytest.fixture(scope="module", params=TRANSPORTS)
def world(request: pytest.FixtureRequest) -> Iterator[Any]:
    before = shared_files()
    world = Threads() if request.param == "local" else Processes(request.param)
    yield world
    world.close()
    assert shared_files() <= before, "shared memory is left behind"
    assert all(not process.is_alive() for process in getattr(world, "processes", {}).values())


def start_all(world: Any, size: int, case: str, *args: Any) -> str:
    name = next(names)
    for rank in range(size):
        world.start(name, rank, rank, size, case, args)
    return name


def run_all(world: Any, size: int, case: str, *args: Any) -> list[Any]:
    name = start_all(world, size, case, *args)
    results = [world.places[rank].result(name) for rank in range(size)]
    assert [kind for kind, _ in results] == ["ok"] * size, results
    return [value for _, value in results]


def wait_formed(world: Any, name: str, size: int) -> None:
    for rank in range(size):
        assert world.places[rank].result(name, ("formed", "failed", "broken")) == ("formed", None)


def assert_broken_soon(world: Any, name: str, members: list[int], started: float) -> list[str]:
    """All raise in time. As the controller does, the word of the first to see it goes to the others."""
    first = threading.Event()
    results: dict[int, tuple[str, Any]] = {}

    def listen(member: int) -> None:
        results[member] = world.places[member].result(name)
        first.set()

    threads = [threading.Thread(target=listen, args=(member,), daemon=True) for member in members]
    for thread in threads:
        thread.start()
    assert first.wait(SOON_S), "nobody noticed"
    for member in members:
        world.abort(name, member)
    for thread in threads:
        thread.join(SOON_S)
    assert time.monotonic() - started < 2 * SOON_S
    assert {kind for kind, _ in results.values()} == {"ok"} and len(results) == len(members), results
    return [value for _, value in results.values()]


@pytest.mark.parametrize("dtype", ["float32", "float64", "int64"])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_every_call_against_numpy(world: Any, size: int, dtype: str) -> None:
    if size == 1 and world.transport != "local":
        pytest.skip("a group of one is SoloGroup's, which the threads use")
    results = run_all(world, size, "every_call", dtype)
    parts = [values(rank, NUM, dtype) for rank in range(size)]
    for rank, found in enumerate(results):
        expected = {"all_reduce": sum(parts), "sum over an axis": sum(parts), "all_gather": np.concatenate(parts),
                    "all_to_all": expected_all_to_all(rank, size, dtype), "started all_reduce": sum(parts),
                    "started all_gather": np.concatenate(parts), "started broadcast": parts[1 % size]}
        expected |= {f"broadcast {root}": parts[root] for root in range(size)}
        if size > 1 and rank in (0, size - 1):
            expected["receive"] = parts[size - 1 - rank]
        if size > 2 and rank > 0:
            expected["subgroup"] = parts[1]
        if size == 4:
            expected["receive in a subgroup"] = parts[(rank + 2) % 4]
        assert set(found) == set(expected)
        for call, array in expected.items():
            np.testing.assert_array_equal(found[call], array, err_msg=f"{call}, rank {rank}", strict=True)


def expected_all_to_all(rank: int, size: int, dtype: str) -> np.ndarray:
    pieces = []
    for peer in range(size):
        counts = to_rank(peer, size)
        start = sum(counts[:rank])
        pieces.append(values(peer, sum(counts), dtype)[start:start + counts[rank]])
    return np.concatenate(pieces)


@pytest.mark.parametrize("size", [2, 4])
def test_many_calls_in_a_row(world: Any, size: int) -> None:
    assert len(set(run_all(world, size, "many_calls", 50))) == 1


def test_a_subgroup_of_all_has_calls_of_its_own_beside_the_group_s(world: Any) -> None:
    assert run_all(world, 3, "beside", 200) == [[sum(range(600)), sum(range(1, 601))]] * 3


def tree(leaves: list[np.ndarray]) -> np.ndarray:
    if len(leaves) == 1:
        return leaves[0]
    left = 2 ** (math.ceil(math.log2(len(leaves))) - 1)
    return tree(leaves[:left]) + tree(leaves[left:])


@pytest.mark.parametrize(("num_shards", "size"), [(8, 2), (8, 3), (5, 4), (2, 3)])
def test_exact_sum(world: Any, num_shards: int, size: int) -> None:
    numel, block, steps = 1000, 64, 3
    expected = [tree([leaf(step, shard, numel) for shard in range(num_shards)]).tobytes() for step in range(steps)]
    for result in run_all(world, size, "exact_sum", num_shards, numel, block, 512, steps):
        assert result == expected


@pytest.mark.parametrize("twin", [True, False])
@pytest.mark.parametrize(("num_shards", "cuts"),
                         [(8, [0, 512, 1000]), (8, [0, 384, 704, 1000]), (5, [0, 64, 64, 900, 900])])
def test_exact_sum_of_what_is_kept(world: Any, num_shards: int, cuts: list[int], twin: bool) -> None:
    size, steps = len(cuts) - 1, 3
    expected = [tree([leaf(step, shard, cuts[-1]) for shard in range(num_shards)]) for step in range(steps)]
    for rank, result in enumerate(run_all(world, size, "kept_sum", num_shards, cuts, twin, 256, steps)):
        for whole, (kept, gathered) in zip(expected, result, strict=True):
            parts = [whole[cuts[r]:cuts[r + 1]].tobytes() for r in ([rank, (rank - 1) % size] if twin else [rank])]
            assert (kept, gathered) == (b"".join(parts), whole.tobytes())


@pytest.mark.parametrize("call", sample(["all_reduce", "started", "all_gather", "all_to_all", "broadcast", "barrier",
                                         "receive again"], 3))
def test_a_killed_member_breaks_the_group(world: Any, call: str) -> None:
    members = [0] if call == "receive again" else [0, 2]
    name = start_all(world, len(members) + 1, "enter", call, 1)
    wait_formed(world, name, len(members) + 1)
    assert world.places[1].result(name) == ("ok", "silent")
    started = time.monotonic()
    world.kill(1)
    messages = assert_broken_soon(world, name, members, started)
    assert all("the group" in message for message in messages)


def test_two_killed_at_once(world: Any) -> None:
    name = start_all(world, 4, "wide_sum", 100_000)
    wait_formed(world, name, 4)
    world.kill(0)
    world.kill(2)
    started = time.monotonic()
    kinds = []
    for member in (1, 3):
        kinds.append(world.places[member].result(name, timeout_s=SOON_S)[0])
    assert kinds == ["broken", "broken"] and time.monotonic() - started < 2 * SOON_S


@pytest.mark.parametrize("delivered_to", [[], [0], [0, 2]])
def test_a_member_cut_short_reaches_some(world: Any, delivered_to: list[int]) -> None:
    name = start_all(world, 3, "cut", 1, delivered_to)
    wait_formed(world, name, 3)
    assert world.places[1].result(name)[0] == KILLED
    kinds = {}
    for member in (0, 2):
        kind, found = world.places[member].result(name, timeout_s=SOON_S)
        assert kind == "broken" or found == [1.0, 2.0, 3.0]
        kinds[member] = kind
    if world.transport != "gloo":  # whom gloo reaches is chance
        assert kinds == {member: "ok" if member in delivered_to else "broken" for member in (0, 2)}


def test_generations_leave_no_file_or_mapping_behind(world: Any) -> None:
    if world.transport == "local":
        pytest.skip("threads have none")
    counts = []
    for _ in range(3):
        for _ in range(4):
            run_all(world, 3, "every_call", "float32")
        time.sleep(0.2 if world.transport == "gloo" else 0)  # its sockets close in a thread
        counts.append(run_all(world, 3, "census"))
    assert max(counts[2]) <= max(counts[1]) + 3, counts  # four generations with pairs and subgroups hold far more


def test_a_group_dropped_at_once_has_still_formed_for_all(world: Any) -> None:
    for _ in range(10):
        assert run_all(world, 3, "nothing") == ["formed"] * 3


@pytest.mark.parametrize("silent", [1, -1])
@pytest.mark.parametrize("call", ["all_reduce", "all_gather"])
def test_abort_between_start_and_finish(world: Any, call: str, silent: int) -> None:
    """Whether the peers have started or not, nobody's buffers count: `finish` raises, and every later call."""
    for rank, said in enumerate(run_all(world, 2, "started", call, silent)):
        assert len(said) == (0 if rank == silent else 3) and all("the group was aborted" in one for one in said)


def test_a_started_call_is_one_wait(world: Any) -> None:
    assert run_all(world, 2, "one_wait") == [[0, 1, [2.0, 2.0, 2.0]]] * 2


@pytest.mark.parametrize("call", ["all_reduce", "all_gather", "all_gather beside", "barrier", "receive", "started"])
def test_abort_wakes_a_waiter(world: Any, call: str) -> None:
    name = start_all(world, 2, "enter", call, 1)
    wait_formed(world, name, 2)
    assert world.places[1].result(name) == ("ok", "silent")
    with pytest.raises(AssertionError, match="no word"):
        world.places[0].result(name, timeout_s=0.3)  # it does wait: nobody has told it anything yet
    world.abort(name, 0)
    kind, message = world.places[0].result(name, timeout_s=SOON_S)
    assert kind == "ok" and "aborted" in message


def test_abort_while_forming(world: Any) -> None:
    if world.transport == "local":
        pytest.skip("threads form without waiting")
    name = next(names)
    world.start(name, 0, 0, 2, "nothing")
    with pytest.raises(AssertionError, match="no word"):
        world.places[0].result(name, timeout_s=0.5)
    world.abort(name, 0)
    kind, message = world.places[0].result(name, timeout_s=SOON_S)
    assert kind == "broken" and "was aborted" in message


def test_no_store_at_the_address(world: Any) -> None:
    if world.transport == "local":
        pytest.skip("threads have no store")
    name = next(names)
    world.start(name, 0, 0, 2, "nothing", (), 1.0, "127.0.0.1:9")
    kind, message = world.places[0].result(name)
    assert kind == "broken" and name in message


def test_a_stopped_member_that_goes_on_changes_nothing(world: Any) -> None:
    numel = 3_000_000
    name = start_all(world, 3, "wide_sum", numel)
    wait_formed(world, name, 3)
    world.stop(2)
    for member in (0, 1):
        with pytest.raises(AssertionError, match="no word"):
            world.places[member].result(name, timeout_s=0.3)  # a stopped peer is no dead one: they wait
    for member in (0, 1):
        world.abort(name, member)
    for member in (0, 1):
        assert world.places[member].result(name, timeout_s=SOON_S)[0] == "broken"
    after = next(names)
    for rank in (0, 1):
        world.start(after, rank, rank, 2, "hold", (numel,))
    for rank in (0, 1):
        assert world.places[rank].result(after) == ("ok", "held")
    world.cont(2, name)
    world.abort(name, 2)
    assert world.places[2].result(name)[0] in ("broken", KILLED)
    again = next(names)
    for rank in (0, 1):
        world.start(again, rank, rank, 2, "look", (numel,))
    for rank in (0, 1):
        assert world.places[rank].result(again) == ("ok", ["same", "same", "2.0"])
