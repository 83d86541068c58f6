"""Which mesh to take: every legal one for a cluster with its forecast, the best, and why each of the others is not. Pure.

What the model costs is asked of `Work`, by degrees and rows: it may count operations or time them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

from elastic.errors import RecipeError
from elastic.humanize import size
from elastic.mesh import Mesh, speedup, useful_sizes
from elastic.parallel.actions import Name
from elastic.parallel.layout import Layout
from elastic.planning import candidates as meshes
from elastic.planning import costs
from elastic.planning.costs import Bytes, Candidate, Cluster, Part, Seconds, Task

WORTH = 1.02  # times faster than a smaller group: less does not pay for a worker


class Work(Protocol):
    """What the work of a worker costs."""

    def depths(self, layout: Layout, rows: int) -> tuple[Part, ...]:
        """At each depth of the pipeline, for one micro-batch of `rows` samples, the part of one place along the tensor
        and expert axes."""


@dataclass(frozen=True)
class Forecast:
    """A step on one mesh. `bound` is the best speed-up that the shards allow, L / ceil(L / data)."""

    candidate: Candidate
    seconds: Seconds
    memory: Bytes
    bound: float
    far: tuple[str, ...] = ()  # axes whose lines leave their node

    @property
    def mesh(self) -> Mesh:
        return self.candidate.mesh

    @property
    def workers(self) -> int:
        return self.mesh.world_size

    @property
    def step_s(self) -> float:
        return self.seconds.total

    @property
    def size(self) -> tuple[int, int, int]:
        """What is the simpler choice of equals."""
        return self.workers, self.mesh.replica_size, self.candidate.micro_batches


@dataclass(frozen=True)
class Question:
    """A run to be planned. `micro_batches` 0: the best number is to be found."""

    model: Any
    task: Task
    rules: meshes.Rules = field(default_factory=meshes.Rules)
    balance: Mapping[str, float] | None = None  # what the pieces cost, to cut stages by
    schedule: Name = "1f1b"
    micro_batches: int = 1


def forecast(task: Task, cluster: Cluster, candidate: Candidate) -> Forecast:
    mesh = candidate.mesh
    far = tuple(axis for axis in ("tensor", "expert", "pipeline", "data") if getattr(mesh, axis) > 1
                and costs.is_far(cluster, mesh, axis))
    return Forecast(candidate, costs.step(task, cluster, candidate), costs.memory(task, candidate),
                    speedup(task.num_shards, mesh.data), far)


def forecasts(question: Question, cluster: Cluster, work: Work) -> list[Forecast]:
    """Of every layout of a replica the best number of micro-batches, on every useful number of replicas that has room.
    """
    task, found = question.task, []
    for layout in meshes.replicas(question.model, cluster.room, task.shard_rows, question.rules, question.balance):
        for data in useful_sizes(task.num_shards, cluster.room // layout.mesh.replica_size):
            turns = [forecast(task, cluster, candidate) for candidate in candidates(question, layout, data, work)]
            if turns:
                found.append(best_of(turns, cluster))
    return found


def candidates(question: Question, layout: Layout, data: int, work: Work) -> Iterator[Candidate]:
    rows, shape = question.task.shard_rows, layout.mesh
    try:
        held = meshes.holdings(layout, question.model, question.rules)
    except RecipeError:  # a stage on which everything is frozen
        return
    mesh = Mesh(data, shape.pipeline, shape.tensor, shape.expert)
    for number in meshes.micro_batches(rows, shape):
        if question.micro_batches in (0, number) and not (question.rules.is_whole and number > 1):
            yield Candidate(mesh, number, work.depths(layout, rows // shape.expert // number), held, question.schedule,
                            layout.num_chunks)


def best_of(found: Sequence[Forecast], cluster: Cluster) -> Forecast:
    """The choice among them, or where nothing fits what needs least memory."""
    return choose(found, cluster) or min(found, key=lambda one: one.memory.total)


def choose(found: Iterable[Forecast], cluster: Cluster) -> Forecast | None:
    """The fastest that fits; of those that are as good as equal the smallest. None where nothing fits."""
    fits = [one for one in found if one.memory.total <= cluster.memory]
    fastest = min((one.step_s for one in fits), default=0.0)
    return min((one for one in fits if one.step_s <= WORTH * fastest), key=lambda one: (*one.size, one.step_s),
               default=None)


def ranked(found: Sequence[Forecast], best: Forecast | None, cluster: Cluster) -> list[Forecast]:
    """Best first; what does not fit comes last, the least lack first."""
    return sorted(found, key=lambda one: (one is not best, over(one, cluster) > 0, over(one, cluster) or one.step_s,
                                          one.size))


def over(one: Forecast, cluster: Cluster) -> float:
    """Bytes that a worker lacks."""
    return max(0.0, one.memory.total - cluster.memory)


WHY = {"compute": "fewer workers compute, or less evenly", "bubble": "the bubble", "tensor": "tensor traffic",
       "expert": "the exchange between experts", "messages": "what stages send", "cores": "it shares the cores",
       "reduction": "the sum of gradients", "update": "the update"}
AXIS = {"tensor": "tensor", "expert": "expert", "messages": "pipeline", "reduction": "data"}


def verdict(one: Forecast, best: Forecast | None, cluster: Cluster) -> str:
    """Why this mesh is taken, or is not: what costs it most against the best."""
    if lack := over(one, cluster):
        return f"{size(lack)} too much"
    if best is None or one is best:
        return "recommended"
    if one.step_s <= best.step_s * WORTH:
        return f"hardly faster than the {best.workers} recommended" if one.workers > best.workers else "as good as equal"
    lost = {each.name: getattr(one.seconds, each.name) - getattr(best.seconds, each.name) for each in fields(Seconds)}
    worst = max(lost, key=lambda name: lost[name])
    slow = " over slow links" if AXIS.get(worst) in one.far else ""
    return f"{one.step_s / best.step_s:.2f} times slower: {WHY[worst]}{slow}"


def enough_shards(batch_size: int, workers: int) -> int:
    """The fewest logical shards that feed so many workers evenly; 0 where the batch has none."""
    return next((shards for shards in range(workers, batch_size + 1, workers) if batch_size % shards == 0), 0)
