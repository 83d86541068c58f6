"""Random schedules of what may happen to a run, each a pure function of its seed."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from elastic.chaos import DISK, PHASES
from elastic.recipe import Recipe
from tests.support.inprocess import Hook, Result, Run, module_recipe

STEPS, MOST = 16, 4


@dataclass
class Schedule:
    """What happens when: faults for --chaos, and what a cluster or a user does once a step is on disk."""

    seed: int
    capacity: int
    elastic: dict[str, Any]
    chaos: list[str] = field(default_factory=list)
    deeds: dict[int, tuple[str, Any]] = field(default_factory=dict)  # step -> (name of a hook, its argument)
    is_gentle: bool = False  # rank 0 is spared, so that there is always a copy of the state

    def __str__(self) -> str:
        return f"seed {self.seed}: capacity {self.capacity}, {self.elastic}, chaos {self.chaos}, deeds {self.deeds}"


def schedule(seed: int) -> Schedule:
    """Up to six kills, perhaps a stop (with its continuation), resizes, joins and leaves. Even seeds are gentle."""
    draw = random.Random(seed)
    out = Schedule(seed, draw.randint(1, MOST),
                   {"min_workers": draw.choice([1, 1, 2]), "spares": draw.choice([0, 0, 1, 2])})
    out.is_gentle = seed % 2 == 0
    for _ in range(draw.randint(0, 6)):
        out.chaos.append(f"kill:{draw.randrange(out.is_gentle, MOST)}@{draw.randint(1, STEPS)}/{draw.choice(PHASES)}")
    if draw.random() < 0.4:
        out.elastic["hang_timeout_s"] = 0.5
        rank, step = draw.randrange(1, MOST), draw.randint(1, STEPS - 2)
        out.chaos.append(f"stop:{rank}@{step}/{draw.choice(PHASES)}")
        if draw.random() < 0.7:
            out.chaos.append(f"cont:{rank}@{draw.randint(step + 1, STEPS)}")
    for _ in range(draw.randint(0, 2)):
        out.chaos.append(f"scale:{draw.randint(1, MOST)}@{draw.randint(1, STEPS)}")
    deeds = [("grow", draw.randint(max(out.capacity, 2), MOST + 2)), ("drain", f"node-{draw.randrange(MOST)}"),
             ("scale", draw.randint(1, MOST))]
    for step in draw.sample(range(1, STEPS), draw.randint(0, 3)):
        out.deeds[step] = draw.choice(deeds)
    for _ in range(draw.choice([0, 0, 1, 2])):
        out.chaos.append(f"disk:{draw.randrange(out.is_gentle, MOST)}@{draw.randint(1, STEPS)}/{draw.choice(DISK)}")
    if out.capacity < out.elastic["min_workers"]:
        out.capacity = out.elastic["min_workers"]
    return out


def recipe_of(elastic: Mapping[str, Any]) -> Recipe:
    return module_recipe("Small", STEPS, elastic={"max_workers": MOST, "logical_shards": 8, **elastic},
                         checkpoint={"every_steps": 5}, data={"ledger": True})


def hooks_of(plan: Schedule) -> dict[int, Hook]:
    def hook(name: str, value: Any) -> Hook:
        return lambda run: run.fleet.grow(value) if name == "grow" else getattr(run, name)(value)

    return {step: hook(name, value) for step, (name, value) in plan.deeds.items()}


def play(run_dir: Path, plan: Schedule, recipe: Recipe | None = None) -> Result:
    return Run(run_dir, recipe or recipe_of(plan.elastic), plan.chaos, plan.capacity, nodes=MOST, hooks=hooks_of(plan)).fit()
