"""What members do in the contract tests of groups. Each case gets a formed group and what its member keeps for ever."""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import numpy as np

from elastic.collective import reduction
from elastic.collective.local import LocalGroup, die
from elastic.collective.reduction import Scratch, SubtreeSums, out_size
from elastic.errors import GroupBroken
from elastic.mesh import shards_of
from elastic.parallel.axis import Axis
from elastic.parallel.groups import Watched

STARTED = ("all_reduce", "all_gather", "broadcast")  # the last is done in `finish` on every transport
NUM = 13  # odd, and no multiple of any group's size


def values(rank: int, count: int, dtype: str) -> np.ndarray:
    """Small whole numbers: their sums are exact in every dtype and order."""
    return np.random.default_rng([rank, count]).integers(-50, 50, count).astype(dtype)


def to_rank(rank: int, size: int) -> list[int]:
    """How much `rank` sends to each: uneven, sometimes nothing."""
    return [(2 * rank + 3 * peer) % 4 for peer in range(size)]


def every_call(group: Any, keep: dict[str, Any], dtype: str) -> dict[str, np.ndarray]:
    rank, size = group.rank, group.size
    found = {}
    mine = values(rank, NUM, dtype)
    found["all_reduce"] = mine.copy()
    group.all_reduce(found["all_reduce"])
    found["sum over an axis"] = Axis("tensor", group).sum(mine)
    found["all_gather"] = np.zeros(NUM * size, dtype)
    group.all_gather(found["all_gather"], mine)
    for call in STARTED:
        found[f"started {call}"] = np.zeros(NUM * size, dtype) if call == "all_gather" else mine.copy()
        pending = group.start(call, found[f"started {call}"],
                              *([mine] if call == "all_gather" else [1 % size] if call == "broadcast" else []))
        (np.ones((32, 32)) @ np.ones((32, 32))).sum()
        pending.finish()
    counts, out_counts = to_rank(rank, size), [to_rank(peer, size)[rank] for peer in range(size)]
    found["all_to_all"] = np.zeros(sum(out_counts), dtype)
    group.all_to_all(found["all_to_all"], out_counts, values(rank, sum(counts), dtype), counts)
    for root in range(size):
        found[f"broadcast {root}"] = values(rank, NUM, dtype)
        group.broadcast(found[f"broadcast {root}"], root)
    group.barrier()
    if size > 1 and rank in (0, size - 1):
        peer = size - 1 - rank
        found["receive"] = np.zeros(NUM, dtype)
        for turn in (0, size - 1):
            group.send(mine, peer) if rank == turn else group.receive(found["receive"], peer)
    if size > 2 and rank > 0:
        found["subgroup"] = mine.copy()
        group.subgroup(range(1, size)).broadcast(found["subgroup"], 0)
    if size == 4:  # two groups side by side, whose members have the same ranks in them
        line = group.subgroup((rank % 2, rank % 2 + 2))
        found["receive in a subgroup"] = np.zeros(NUM, dtype)
        for turn in (0, 1):
            line.send(mine, 1 - turn) if line.rank == turn else line.receive(found["receive in a subgroup"], turn)
    assert mine.tolist() == values(rank, NUM, dtype).tolist(), "a call changed what it only had to send"
    return found


def many_calls(group: Any, keep: dict[str, Any], rounds: int) -> float:
    """Small and large calls in turn, with members out of step."""
    total = 0.0
    random = np.random.default_rng(group.rank)
    for turn in range(rounds):
        for _ in range(int(random.integers(0, 3000))):
            total += 0.0
        votes = np.zeros(4 * group.size)
        group.all_gather(votes, np.full(4, float(turn * group.size + group.rank)))
        assert votes[::4].tolist() == [float(turn * group.size + r) for r in range(group.size)]
        wide = np.full(20_000 + turn, 1.0, np.float32)
        found = Axis("tensor", group).sum(wide)
        assert (wide == 1.0).all() and (found == group.size).all()
        group.all_reduce(wide)
        assert (wide == group.size).all()
        group.broadcast(wide[:turn + 1], turn % group.size)
        total += float(votes.sum())
    return total


def beside(group: Any, keep: dict[str, Any], rounds: int) -> list[float]:
    """Calls of a subgroup of all members on a thread of their own, while the group has others."""
    line, size = group.subgroup(range(group.size)), group.size
    sums = np.zeros(2)

    def gather(group: Any, at: int) -> None:
        for turn in range(rounds):
            found = np.zeros(size)
            group.all_gather(found, np.full(1, float(turn * size + group.rank + at)))
            assert found.tolist() == [float(turn * size + rank + at) for rank in range(size)]
            sums[at] += found.sum()

    thread = threading.Thread(target=gather, args=(line, 1))
    thread.start()
    gather(group, 0)
    thread.join()
    return sums.tolist()


def exact_sum(group: Any, keep: dict[str, Any], num_shards: int, numel: int, block: int, chunk: int,
              steps: int) -> list[bytes]:
    """The canonical reduction as the loop does it, in buffers of the group's own where it has some."""
    allocate = group.allocate
    out, scratch, free = allocate(out_size(numel, block,
                                           group.size)), Scratch(lambda n: np.zeros(n, np.float32), chunk), []
    found = []
    for step in range(steps):
        def take() -> np.ndarray:
            buffer = free.pop() if free else allocate(numel)
            buffer[:] = 0
            return buffer

        run = shards_of(group.rank, group.size, num_shards)
        sums = SubtreeSums(run, num_shards, take, free.append)
        for shard in run:
            buffer = sums.begin(shard)
            buffer += leaf(step, shard, numel)
            sums.end(shard)
        found.append(group.reduce_tree(sums.nodes(), num_shards, out, numel, block, scratch)[:numel].tobytes())
        free += [buffer for _, buffer in sums.nodes()]
    return found


def kept_sum(group: Any, keep: dict[str, Any], num_shards: int, cuts: list[int], twin: bool, chunk: int,
             steps: int) -> list[tuple[bytes, bytes]]:
    """The same sum, of which this member keeps two ranges; then all put their own together."""
    allocate, numel = group.allocate, cuts[-1]
    out, whole, scratch = allocate(numel), np.zeros(numel,
                                                    np.float32), Scratch(lambda n: np.zeros(n, np.float32), chunk)
    found = []
    for step in range(steps):
        run = shards_of(group.rank, group.size, num_shards)
        sums = SubtreeSums(run, num_shards, lambda: allocate(numel), lambda _: None)
        for shard in run:
            buffer = sums.begin(shard)
            buffer += leaf(step, shard, numel)
            sums.end(shard)
        mine = group.reduce_held(sums.nodes(), num_shards, out, cuts, twin, scratch)
        count = sum(cuts[r + 1] - cuts[r] for r in {group.rank, (group.rank - twin) % group.size})
        low, high = cuts[group.rank], cuts[group.rank + 1]
        whole[low:high] = mine[:high - low]
        kept = mine[:count].tobytes()
        reduction.gather_owned(group, whole, cuts, scratch)
        found.append((kept, whole.tobytes()))
    return found


def leaf(step: int, shard: int, numel: int) -> np.ndarray:
    random = np.random.default_rng([step, shard])
    return (random.choice([-1.0, 1.0], numel) * 10.0 ** random.uniform(-15, 15, numel)).astype(np.float32)


def enter(group: Any, keep: dict[str, Any], call: str, silent: int = -1) -> str:
    """One call in which rank `silent` does not take part; then the same again, which must fail at once."""
    if call == "receive again":  # they have met before
        group.send(np.ones(12, np.float32), 0) if group.rank == silent else group.receive(np.ones(12, np.float32), silent)
    line = group.subgroup(range(group.size)) if call == "all_gather beside" else group
    if group.rank == silent:
        keep["idle"] = group, line
        return "silent"
    for _ in range(2):
        try:
            one(line, call)
        except GroupBroken as error:
            message = str(error)
        else:
            return "completed"
    return message


def one(group: Any, call: str) -> None:
    call, size, wide = call.split()[0], group.size, np.ones(12, np.float32)
    peer = next(rank for rank in (1, 0) if rank != group.rank)
    {"all_reduce": lambda: group.all_reduce(wide),
     "started": lambda: group.start("all_reduce", wide).finish(),
     "all_gather": lambda: group.all_gather(np.zeros(12 * size, np.float32), wide),
     "all_to_all": lambda: group.all_to_all(np.zeros(2 * size, np.float32), [2] * size, wide[:2 * size], [2] * size),
     "broadcast": lambda: group.broadcast(wide, 1),
     "receive": lambda: group.receive(wide, peer),
     "barrier": group.barrier}[call]()


def started(group: Any, keep: dict[str, Any], call: str, silent: int) -> list[str]:
    """What a watched group says of calls after it was aborted between the start of one and its end; rank `silent`
    starts nothing."""
    if group.rank == silent:
        keep["idle"] = group
        return []
    wide, broken = np.ones(12, np.float32), list[GroupBroken]()
    watched = Watched(group, nullcontext, broken)
    pending = watched.start(call, *([np.zeros(12 * group.size, np.float32), wide] if call == "all_gather" else [wide]))
    group.abort()
    for use in (pending.finish, lambda: watched.all_reduce(wide), lambda: watched.start(call, wide)):
        with suppress(GroupBroken):
            use()
    return list(map(str, broken))


def one_wait(group: Any, keep: dict[str, Any]) -> list[Any]:
    """How often a watched group is seen to wait once a call was started, and once it was finished; and its result."""
    waits = list[str]()

    @contextmanager
    def watch() -> Iterator[None]:
        waits.append("wait")
        yield

    wide = np.ones(3, np.float32)
    pending = Watched(group, watch, []).start("all_reduce", wide)
    begun = len(waits)
    pending.finish()
    return [begun, len(waits), wide.tolist()]


def wide_sum(group: Any, keep: dict[str, Any], numel: int) -> bytes:
    """Sums wide buffers for ever: whoever is stopped is stopped inside."""
    while True:
        keep["wide"] = np.full(numel, 1.0 + group.rank, np.float32)
        group.all_reduce(keep["wide"])


def hold(group: Any, keep: dict[str, Any], numel: int) -> str:
    """Fills buffers in a new group and keeps them and the group."""
    keep["mine"] = [group.allocate(numel), np.zeros(numel, np.float32)]
    for buffer in keep["mine"]:
        buffer[:] = np.arange(numel, dtype=np.float32)
        group.broadcast(buffer, 0)
    keep["group"] = group
    return "held"


def look(group: Any, keep: dict[str, Any], numel: int) -> list[str]:
    """What became of the kept buffers, and whether the kept group still works."""
    total = np.ones(numel, np.float32)
    keep["group"].all_reduce(total)
    expected = np.arange(numel, dtype=np.float32).tobytes()
    return ["same" if b.tobytes() == expected else "changed" for b in keep["mine"]] + [str(float(total.mean()))]


def cut(group: Any, keep: dict[str, Any], doomed: int, delivered_to: list[int]) -> list[float]:
    """Rank `doomed` dies in the midst of a small all-gather."""
    if group.rank == doomed:
        group.cut_short(delivered_to, die if isinstance(group, LocalGroup)
                        else lambda: os.kill(os.getpid(), signal.SIGKILL))
    out = np.zeros(group.size)
    group.all_gather(out, np.array([1.0 + group.rank]))
    return out.tolist()


def census(group: Any, keep: dict[str, Any]) -> int:
    """Open files and shared mappings of this process."""
    gc.collect()
    with open("/proc/self/maps") as maps:
        return len(os.listdir("/proc/self/fd")) + sum("memfd:" in line or "/dev/shm" in line for line in maps)


def nothing(group: Any, keep: dict[str, Any]) -> str:
    return "formed"
