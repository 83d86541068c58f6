"""What one step costs on one mesh, in seconds and bytes, by what causes them. Pure.

A replica computes its logical shards one after the other; their micro-batches pass its stages by a schedule, on the
simulator's clock. Collectives follow an alpha-beta model: a latency for every call, bytes over bandwidth. A node's link
is shared by its workers, and so are its cores: a node is not done before its cores could have done the work of all its
workers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from elastic.boxes import size_of
from elastic.collective.reduction import SubtreeSums, all_nodes, out_size
from elastic.mesh import Mesh, rounds, shards_of
from elastic.model.shape_ops import FLOAT, Move
from elastic.parallel import simulator
from elastic.parallel.actions import Name, Schedule
from elastic.parallel.schedules import build
from elastic.state.flat_layout import BLOCK
from elastic.state.ownership import held


@dataclass(frozen=True)
class Cluster:
    """Where it is to run. Bandwidths are a worker's own within a node, a whole node's between nodes, in bytes a second.
    """

    nodes: int
    workers_per_node: int
    intra: float
    inter: float
    latency_s: float
    memory: float  # bytes for each worker
    cores: float = 0.0  # that a node's workers share; 0: each has what it needs
    far_latency_s: float = 0.0  # between nodes; 0: as within
    reduction: float = 0.0  # of the gradients' sum within a node; 0: as any other call

    @property
    def room(self) -> int:
        return self.nodes * self.workers_per_node

    def is_far(self, ranks: Sequence[int]) -> bool:
        return len({rank // self.workers_per_node for rank in ranks}) > 1


@dataclass(frozen=True)
class Task:
    """What every mesh has in common: the run's shards and its optimizer. `shard_rows`: samples of one logical shard."""

    num_shards: int
    shard_rows: int
    num_slots: int
    is_exact: bool = True
    threads: int = 1
    is_sharded: bool = False
    has_twin: bool = False
    update_s: float = 0.0  # for each element
    row_bytes: float = 0.0  # of all rows of embedding tables, once
    has_row_twin: bool = False
    row_memory: float = math.inf  # of a worker: what its rows beyond it take lies on disk


@dataclass(frozen=True)
class Part:
    """What one worker computes at one depth of the pipeline, for one micro-batch."""

    forward_s: float
    backward_s: float
    kept_bytes: int
    again_bytes: int = 0
    out_bytes: int = 0
    moves: tuple[Move, ...] = ()


@dataclass(frozen=True)
class StageState:
    """Elements of the buffers of a stage's busiest worker. `shared`: (workers, elements) of gradients that are summed
    within a replica."""

    size: int
    trainable: int
    gradient: int
    shared: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Candidate:
    """One way to lay the run out. `depths`: one part each; `holdings`: one a stage."""

    mesh: Mesh
    micro_batches: int
    depths: tuple[Part, ...]
    holdings: tuple[StageState, ...]
    schedule: Name = "1f1b"
    num_chunks: int = 1

    def stage(self, stage: int) -> tuple[Part, ...]:
        return self.depths[stage::self.mesh.pipeline]


class Parts:
    @property
    def total(self) -> float:
        return sum(vars(self).values())


@dataclass(frozen=True)
class Seconds(Parts):
    """Of one step, by cause. `cores_s`: longer than it would take if no worker shared its cores."""

    compute: float
    bubble: float = 0.0
    tensor: float = 0.0
    expert: float = 0.0
    messages: float = 0.0
    cores: float = 0.0
    reduction: float = 0.0
    update: float = 0.0

@dataclass(frozen=True)
class Bytes(Parts):
    """Of the busiest worker's memory, by what lies there."""

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    checkpoint: float
    tables: float = 0.0

def step(task: Task, cluster: Cluster, candidate: Candidate) -> Seconds:
    mesh, turns = candidate.mesh, rounds(task.num_shards, candidate.mesh.data)
    schedule, times = scheduled(task, candidate)
    stages = [stage_seconds(cluster, candidate, stage) for stage in range(mesh.pipeline)]
    forward, backward = (tuple(sum(one[way].values()) for one in stages) for way in (0, 1))
    halves = tuple(value / 2 for value in backward)
    message = message_s(cluster, candidate)
    silent = simulator.simulate(schedule, simulator.Costs(forward, halves, halves)).seconds
    whole = simulator.simulate(schedule, simulator.Costs(forward, halves, halves,
                                                         message)).seconds if message else silent
    each = turns * candidate.micro_batches
    slowest = max(range(mesh.pipeline), key=lambda stage: forward[stage] + backward[stage])
    by = {name: each * (stages[slowest][0][name] + stages[slowest][1][name])
          for name in ("compute", "tensor", "expert")}
    crowding = crowded(task, cluster, mesh)
    busy = [each * (one[0]["compute"] + one[1]["compute"]) for one in stages]
    late = cores_s(task, cluster, mesh, busy) - times * whole
    return Seconds(by["compute"], times * silent - sum(by.values()), by["tensor"], by["expert"],
                   times * (whole - silent), max(0.0, late),
                   reduction_s(task, cluster, candidate),
                   crowding * task.update_s * max(updated(task, mesh, one) for one in candidate.holdings))


def stage_seconds(cluster: Cluster, candidate: Candidate, stage: int) -> tuple[dict[str, float], dict[str, float]]:
    """One micro-batch forward and backward on a stage, by cause."""
    ways = []
    for is_forward in (True, False):
        found = {"compute": 0.0, "tensor": 0.0, "expert": 0.0}
        for part in candidate.stage(stage):
            found["compute"] += part.forward_s if is_forward else part.backward_s
            for move in part.moves:
                if move.is_forward == is_forward:
                    axis, _, kind = move.key.partition(".")
                    found[axis] += collective_s(cluster, candidate.mesh, axis, kind, move.bytes)
        ways.append(found)
    return ways[0], ways[1]


# bytes that a member of n sends, as a multiple of what it gives to the call; and the calls of the group below
MOVED = {
    "all_reduce": (lambda n: 2 * (n - 1) / n, lambda n: 1 if n == 2 else 2),
    "all_gather": (lambda n: n - 1, lambda n: 1),
    "all_to_all": (lambda n: (n - 1) / n, lambda n: 1), "reduce_scatter": (lambda n: (n - 1) / n, lambda n: 1)}


def collective_s(cluster: Cluster, mesh: Mesh, axis: str, kind: str, size: float) -> float:
    """One collective along an axis."""
    n, (share, calls) = getattr(mesh, axis), MOVED[kind]
    return calls(n) * latency(cluster, mesh, axis) * math.log2(2 * n) + share(n) * size / link(cluster, mesh, axis)


@lru_cache(maxsize=4096)
def is_far(cluster: Cluster, mesh: Mesh, axis: str) -> bool:
    """Whether some line along the axis leaves its node."""
    return any(cluster.is_far(mesh.axis_ranks(rank, axis)) for rank in range(mesh.world_size))


def latency(cluster: Cluster, mesh: Mesh, axis: str) -> float:
    return cluster.far_latency_s or cluster.latency_s if is_far(cluster, mesh, axis) else cluster.latency_s


def link(cluster: Cluster, mesh: Mesh, axis: str, intra: float = 0.0) -> float:
    """Bytes a second of a worker along an axis, while all workers do the same; `intra` in place of the cluster's own,
    if any."""
    beside = min(mesh.world_size, cluster.workers_per_node)
    return cluster.inter / beside if is_far(cluster, mesh, axis) else (intra
                                                                       or cluster.intra) / crowded(None, cluster, mesh)


def crowded(task: Task | None, cluster: Cluster, mesh: Mesh) -> float:
    """How many times as long something takes that all workers of a node do at once."""
    beside = min(mesh.world_size, cluster.workers_per_node) * (task.threads if task else 1)
    return max(1.0, beside / cluster.cores) if cluster.cores else 1.0


def cores_s(task: Task, cluster: Cluster, mesh: Mesh, busy: Sequence[float]) -> float:
    """What the cores of the busiest node need for all that its workers compute; `busy`: of a worker, by stage."""
    if not cluster.cores:
        return 0.0
    nodes: dict[int, float] = {}
    for rank in range(mesh.world_size):
        node = rank // cluster.workers_per_node
        nodes[node] = nodes.get(node, 0.0) + busy[mesh.coordinate(rank).pipeline]
    return max(nodes.values()) * task.threads / cluster.cores


def message_s(cluster: Cluster, candidate: Candidate) -> float:
    """The slowest message between two stages."""
    if candidate.mesh.pipeline == 1:
        return 0.0
    size = max(part.out_bytes for part in candidate.depths[:-1])
    return latency(cluster, candidate.mesh, "pipeline") + size / link(cluster, candidate.mesh, "pipeline")


def scheduled(task: Task, candidate: Candidate) -> tuple[Schedule, int]:
    """What a replica runs in a step, and how many times: one schedule over all of its shards, but for the interleaved
    one a shard at a time."""
    name: Name = "1f1b" if candidate.mesh.pipeline == 1 else candidate.schedule
    turns = rounds(task.num_shards, candidate.mesh.data)
    per, times = (1, turns) if name == "interleaved" or candidate.mesh.pipeline == 1 else (turns, 1)
    return built(name, candidate.mesh.pipeline, per * candidate.micro_batches, candidate.num_chunks), times


built = lru_cache(maxsize=1024)(build)


def reduction_s(task: Task, cluster: Cluster, candidate: Candidate) -> float:
    """The sum of gradients over the replicas, what a replica sums within itself, and the vote."""
    mesh = candidate.mesh
    if mesh.world_size == 1:
        return 0.0
    far = cluster.is_far(range(mesh.world_size))
    seconds = (cluster.far_latency_s or cluster.latency_s if far
               else cluster.latency_s) * math.log2(2 * mesh.world_size)
    if mesh.data > 1:
        seconds += 2 * latency(cluster, mesh, "data") * math.log2(2 * mesh.data)
        seconds += max(sent_bytes(task, mesh.data, one.gradient)
                       for one in candidate.holdings) / link(cluster, mesh, "data", cluster.reduction)
    axis = "pipeline" if mesh.pipeline > 1 else "expert"
    return seconds + max(sum(2 * latency(cluster, mesh, axis)
                             + 2 * (n - 1) / n * elements * FLOAT / link(cluster, mesh, axis)
                             for n, elements in one.shared) for one in candidate.holdings)


def sent_bytes(task: Task, data: int, gradient: int) -> float:
    """What the busiest of `data` replicas' workers sends: its subtree sums to their owners, and its part of the total
    to everybody.

    With a sharded optimizer that part is of the new parameters, and a twin gets what its partner gets.
    """
    if data == 1:
        return 0.0
    sums = max(len(nodes) for nodes in all_nodes(data, task.num_shards)) if task.is_exact else 1
    twin = 1 / data if task.is_sharded and task.has_twin else 0.0
    return ((sums + 1) * (data - 1) / data + twin) * gradient * FLOAT


def updated(task: Task, mesh: Mesh, holding: StageState) -> int:
    """Elements that a worker updates, and has optimizer state for; of members that share it, the one with most."""
    if not task.is_sharded or mesh.data == 1:
        return holding.trainable
    blocks = holding.trainable // BLOCK
    return BLOCK * max(size_of(held(rank, mesh.data, blocks, task.has_twin)) for rank in range(mesh.data))


def memory(task: Task, candidate: Candidate) -> Bytes:
    """Of the worker that needs most."""
    peaks = simulator.simulate(scheduled(task, candidate)[0],
                               simulator.Costs.equal(candidate.mesh.pipeline, 1.0, 1.0, 1.0)).peaks
    return max((stage_memory(task, candidate, stage, peaks[stage]) for stage in range(candidate.mesh.pipeline)),
               key=lambda one: one.total)


def stage_memory(task: Task, candidate: Candidate, stage: int, peak: int) -> Bytes:
    """`peak`: chunks' activations alive at a time. What comes in is held with them."""
    mesh, holding, parts = candidate.mesh, candidate.holdings[stage], candidate.stage(stage)
    slots = task.num_slots * updated(task, mesh, holding)
    total = out_size(holding.gradient, BLOCK, mesh.data) if mesh.data > 1 else 0
    come = sum(candidate.depths[depth - 1].out_bytes for depth in range(stage, len(candidate.depths), mesh.pipeline)
               if depth)
    kept = come + sum(part.kept_bytes for part in parts)
    sums = most_sums(task.num_shards, task.is_exact, mesh.data, candidate.micro_batches > 1)
    return Bytes(FLOAT * holding.size, FLOAT * (sums * holding.gradient + total), FLOAT * slots,
                 peak * kept / candidate.num_chunks + max(part.again_bytes for part in parts),
                 FLOAT * math.ceil((holding.size + slots) / mesh.data),
                 min(task.row_memory, owned_bytes(task.row_bytes, mesh.data, task.has_row_twin)))


def owned_bytes(total: float, owners: int, has_twin: bool) -> float:
    """What an owner holds of so many bytes of rows, its own and as a twin."""
    return total * (1 + (has_twin and owners > 1)) / owners


@lru_cache(maxsize=1024)
def most_sums(num_shards: int, is_exact: bool, data: int, several: bool) -> int:
    """Gradient-sized sums that the busiest worker holds at a time; a shard of several micro-batches is summed by itself
    first."""
    if not is_exact:
        return 1
    made: list[int] = []  # as the loop has it: where no buffer is free
    free: list[int] = []

    def take() -> int:
        if not free:
            made.append(0)
            return 0
        return free.pop()

    for rank in range(data):
        free[:], run = made, shards_of(rank, data, num_shards)
        sums = SubtreeSums(run, num_shards, take, free.append, several)
        for shard in run:
            sums.begin(shard)
            sums.end(shard)
    return len(made)
