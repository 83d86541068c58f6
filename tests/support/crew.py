"""Training on a mesh without a controller: one thread a worker, from a recipe and a generation to each worker's end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np

from elastic import workload
from elastic.chaos import Injector
from elastic.checkpoint.state_hash import hashes_of
from elastic.mesh import Mesh
from elastic.messages import Generation, Line
from elastic.recipe import Recipe
from elastic.state.relayout import whole_arrays
from elastic.worker import training
from elastic.worker.build import build_training, place_on
from elastic.worker.context import StepContext
from elastic.worker.loop import begin, train
from elastic.worker.loop_control import Control
from elastic.workload import Workload
from tests.support.threads import together

LIMIT_S = 120.0


@dataclass
class Trained:
    """What one run came to: by step, and the whole model at its end as every worker put it together."""

    losses: list[float]
    evaluations: list[dict[str, float]]
    first_gradient: dict[str, np.ndarray]  # of step 1, reduced, by parameter, whole
    arrays: dict[str, np.ndarray]
    hashes: set[str]
    counts: list[Counter[str]]  # bytes of collectives, by rank


class Member(training.Member):
    """One worker. `gradient` is its part of the first step's, before anything is applied."""

    context: StepContext

    def __init__(self, recipe: Recipe, info: Mapping[str, Any], mesh: Mesh, rank: int):
        self.sent: list[Any] = []
        workload = Workload.open(recipe, info)
        super().__init__(build_training(recipe, workload), place_on(recipe, workload, mesh, mesh.coordinate(rank)),
                         Control(), self.sent.append)
        self.rank, state = rank, self.place.state
        state.own_as(mesh.coordinate(rank).data, mesh.data)
        state.start(recipe.run.seed)
        self.gradient: dict[str, np.ndarray] = {}
        update = self.place.backend.update

        def noted(*arguments: Any) -> None:
            if not self.gradient and not state.num_blocks:
                self.gradient = {name: np.array(view)
                                 for name, view in state.layout.views(self.held.gradient,
                                                                      state.layout.trainable_names).items()}
            update(*arguments)

        self.place.backend.update = noted  # type: ignore[method-assign]

    def live(self, generation: Generation, group: Any) -> dict[str, np.ndarray]:
        self.context = begin(self, generation, group,
                             Injector((), self.rank, lambda spec: None, lambda fault: None, lambda fault, group: group))
        train(self.context)
        groups = self.context.groups
        wholes = whole_arrays(self.place.state, groups.replica, lambda number: nullcontext(), groups.data)
        return {name: np.array(array) for name, array in wholes}


def train_on(recipe: Recipe, mesh: Mesh) -> Trained:
    """All steps of a recipe, whose [mesh] must have the degrees of `mesh`. Whatever a worker raises is raised here."""
    info = workload.prepare(recipe)
    members = [Member(recipe, info, mesh, rank) for rank in range(mesh.world_size)]
    generation = Generation(1, tuple(f"w{r}" for r in range(mesh.world_size)), "", "local", 0, checkpointed=1 << 40,
                            mesh=(mesh.data, mesh.pipeline, mesh.tensor, mesh.expert),
                            held=tuple(member.place.state.holding.blocks for member in members))
    found = together(len(members), lambda rank, group: members[rank].live(generation, group), LIMIT_S)
    lines = [line.fields for line in members[0].sent if isinstance(line, Line) and line.file == "metrics"]
    return Trained([fields["loss"] for fields in lines if "loss" in fields],
                   [fields["eval"] for fields in lines if "eval" in fields],
                   assembled(members), found[0], {hashes_of(arrays.items(), 0)[1] for arrays in found},
                   [member.context.groups.counts for member in members])


def assembled(members: Sequence[Member]) -> dict[str, np.ndarray]:
    """The first gradients of replica 0, whole: each part from its owner."""
    first = members[0].place
    if first.portion is None or first.state.num_blocks:
        return first_of(members, 0)
    layout, out = first.portion.layout, {}
    for name, spec in layout.parameters.items():
        whole = np.full(spec.shape, np.nan)
        for coordinate in layout.owners(name):
            box = layout.box(name, coordinate)
            whole[tuple(slice(s, s + c) for s, c in zip(box.start, box.count,
                                                        strict=True))] = first_of(members, layout.mesh.rank(coordinate))[name]
        out[name] = whole
    return out


def first_of(members: Sequence[Member], rank: int) -> dict[str, np.ndarray]:
    return members[rank].gradient
