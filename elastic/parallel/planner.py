"""What a cluster makes of a run: seconds, memory and traffic of a step for every number of workers, and which number to take. Pure.

A step is the busiest worker's logical shards one after the other, the exchange of gradients by an alpha-beta model (a latency for every
call, bytes over bandwidth), and the update, which every worker does whole. A node's link is shared by its workers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from elastic.collective.reduction import SubtreeSums, all_nodes, out_size
from elastic.mesh import rounds, shards_of, speedup, useful_sizes
from elastic.state import BLOCK

CALLS = 3  # of a step: two for the sum, one for the vote
WORTH = 1.02  # times faster than a smaller group: less does not pay for a worker
FLOAT = 4


@dataclass(frozen=True)
class Cluster:
    """Where it is to run. Bandwidths are a worker's own within a node, a whole node's between nodes, in bytes a second."""

    nodes: int
    workers_per_node: int
    intra: float
    inter: float
    latency_s: float
    memory: float  # bytes for each worker
    cores: int = 0  # that a node's workers share; 0: each has what it needs


@dataclass(frozen=True)
class Task:
    """One step of a run. Elements of its flat buffers, bytes and seconds of one logical shard."""

    parameters: int
    trainable: int
    gradient: int
    num_slots: int
    num_shards: int
    is_exact: bool
    kept_bytes: int
    shard_s: float
    update_s: float
    threads: int = 1


@dataclass(frozen=True)
class Forecast:
    """A step on so many workers. `bound` is the best speed-up that the shards allow, L / ceil(L / W)."""

    workers: int
    rounds: int
    compute_s: float
    exchange_s: float
    update_s: float
    speedup: float
    bound: float
    sent_bytes: float
    memory_bytes: float

    @property
    def step_s(self) -> float:
        return self.compute_s + self.exchange_s + self.update_s


def sent_bytes(task: Task, workers: int) -> float:
    """What the busiest worker sends in a step: its subtree sums to their owners, and its part of the total to everybody."""
    if workers == 1:
        return 0.0
    sums = max(len(nodes) for nodes in all_nodes(workers, task.num_shards)) if task.is_exact else 1
    return (sums + 1) * (workers - 1) / workers * task.gradient * FLOAT


def most_sums(task: Task, workers: int) -> int:
    """Gradient-sized sums that the busiest worker holds at a time."""
    if not task.is_exact:
        return 1
    alive, most = 0, 0

    def take() -> int:
        nonlocal alive, most
        alive += 1
        most = max(most, alive)
        return 0

    def give(buffer: int) -> None:
        nonlocal alive
        alive -= 1

    for rank in range(workers):
        alive, run = 0, shards_of(rank, workers, task.num_shards)
        sums = SubtreeSums(run, task.num_shards, take, give)
        for shard in run:
            sums.begin(shard)
            sums.end(shard)
    return most


def state_bytes(task: Task, workers: int) -> int:
    """A worker's flat buffers: parameters and slots, sums and the total of gradients, its share of a checkpoint."""
    state = task.parameters + task.num_slots * task.trainable
    total = out_size(task.gradient, BLOCK, workers) if workers > 1 else 0
    return FLOAT * (state + most_sums(task, workers) * task.gradient + total + -(-state // workers))


def forecast(task: Task, cluster: Cluster, workers: int) -> Forecast:
    nodes = -(-workers // cluster.workers_per_node)
    beside = min(workers, cluster.workers_per_node)
    crowding = max(1.0, beside * task.threads / cluster.cores) if cluster.cores else 1.0
    sent, turns = sent_bytes(task, workers), rounds(task.num_shards, workers)
    link = cluster.inter / beside if nodes > 1 else cluster.intra / crowding
    exchange_s = CALLS * cluster.latency_s * math.log2(2 * workers) + sent / link if workers > 1 else 0.0
    one_s = task.num_shards * task.shard_s + task.update_s
    found = Forecast(workers, turns, turns * task.shard_s * crowding, exchange_s, task.update_s * crowding, 1.0, speedup(task.num_shards, workers),
                     sent, state_bytes(task, workers) + task.kept_bytes)
    return Forecast(**{**vars(found), "speedup": one_s / found.step_s})


def forecasts(task: Task, cluster: Cluster) -> list[Forecast]:
    """For every number of workers that lowers ceil(L / W), up to what the cluster holds."""
    return [forecast(task, cluster, workers) for workers in useful_sizes(task.num_shards, cluster.nodes * cluster.workers_per_node)]


def choose(found: Sequence[Forecast], cluster: Cluster) -> Forecast | None:
    """The fastest that fits; of those that are as good as equal the smallest. None where nothing fits."""
    best: Forecast | None = None
    for one in found:
        if one.memory_bytes <= cluster.memory and (best is None or best.step_s > WORTH * one.step_s):
            best = one
    return best


def verdict(one: Forecast, best: Forecast | None, cluster: Cluster) -> str:
    """Why this number of workers is taken, or is not."""
    if one.memory_bytes > cluster.memory:
        return f"{(one.memory_bytes - cluster.memory) / 1e9:.2f} GB too much"
    if best is None or one is best:
        return "recommended"
    if one.workers < best.workers:
        return f"{one.step_s / best.step_s:.2f} times slower"
    if one.compute_s >= best.compute_s:
        return f"no faster than {best.workers}: it shares the cores"
    if one.exchange_s - best.exchange_s >= best.compute_s - one.compute_s:
        return f"no faster than {best.workers}: the exchange takes what it saves"
    return f"hardly faster than {best.workers}"


def enough_shards(batch_size: int, workers: int) -> int:
    """The fewest logical shards that feed so many workers evenly; 0 where the batch has none."""
    return next((shards for shards in range(workers, batch_size + 1, workers) if batch_size % shards == 0), 0)
