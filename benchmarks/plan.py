"""The planner's ranking against what steps really take, on this machine.

    python -m benchmarks.plan [--rounds 2] [--steps 30] [--workers 4]

Every mesh that the planner can choose trains the same small GPT on real processes, under `elastic train --address
local`; the recipes differ in [mesh] and in the number of workers alone. The machine is calibrated first. A figure is
the lowest over rounds of the median step, the first steps left out; what counts is how far the planner's choice is from
the best that was measured: at most 10 %.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from benchmarks.kit import results
from benchmarks.kit.processes import python, run
from elastic import workload
from elastic.errors import RunFailed
from elastic.planning.calibration import calibrate
from elastic.planning.plan import Plan, Size, cluster_of
from elastic.planning.search import Forecast, choose
from elastic.planning.tables import named
from elastic.recipe import Recipe, load_recipe
from elastic.workload import Workload

RECIPE = "nlp/gpt_shakespeare"
SETTINGS = ("model.layers=4", "model.width=128", "model.heads=4", "model.context=64", "data.batch_size=16",
            "elastic.logical_shards=4",
            "run.eval_every=0", "checkpoint.every_steps=0", "data.eval_fraction=0.0")
FIRST = 8  # steps left out
BAR = 1.10  # times the best


def keys(one: Forecast) -> list[str]:
    """What sets a mesh's recipe apart."""
    mesh = one.mesh
    return [*(f"mesh.{axis}={getattr(mesh, axis)}" for axis in ("pipeline", "tensor", "expert")),
            f"mesh.micro_batches={one.candidate.micro_batches}",
            f"elastic.max_workers={mesh.world_size}", f"elastic.min_workers={mesh.world_size}"]


def measured(one: Forecast, settings: list[str], steps: int, folder: Path) -> float:
    """The median step of one run, in seconds."""
    sets = [word for pair in [*settings, *keys(one), f"run.steps={steps}"] for word in ("--set", pair)]
    run(python("elastic.cli", "train", RECIPE, "--run-dir", folder, *sets), folder.with_suffix(".log"))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    taken = [line["step_s"] for line in lines if "step_s" in line][FIRST:]
    if not taken:
        raise RunFailed(f"{folder} has no steps.")
    return statistics.median(taken)


def planned(recipe: Recipe, workers: int) -> tuple[Plan, list[Forecast]]:
    """The plan, and of every mesh its forecast; three workers of four are nobody's question."""
    info = workload.prepare(recipe)
    for line in calibrate(recipe, info, workers).lines():
        print(line, flush=True)
    plan = Plan.make(recipe, Workload.open(recipe, info), cluster_of(recipe, Size(0, workers)))
    return plan, [one for one in plan.found if workers % one.workers == 0]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--workers", type=int, default=4)
    options = parser.parse_args()
    settings = list(SETTINGS)
    plan, found = planned(load_recipe(RECIPE, [*settings, f"elastic.max_workers={options.workers}", "mesh=auto"]),
                          options.workers)
    taken: dict[Forecast, list[float]] = {one: [] for one in found}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(options.rounds):
            for number, one in enumerate(found):
                taken[one].append(measured(one, settings, options.steps, Path(folder) / f"{turn}-{number}"))
                print(f"{named(one.mesh)}: {taken[one][-1] * 1e3:.1f} ms, forecast {one.step_s * 1e3:.1f}", flush=True)
    chosen, best = choose(found, plan.cluster), min(found, key=lambda one: min(taken[one]))
    assert chosen is not None
    order = sorted(found, key=lambda one: min(taken[one]))
    rows = [[named(one.mesh), str(one.candidate.micro_batches), f"{min(taken[one]) * 1e3:.1f}",
             f"{one.step_s * 1e3:.1f}",
             f"{one.step_s / min(taken[one]):.2f}", "chosen" if one is chosen else ""] for one in order]
    gap = min(taken[chosen]) / min(taken[best])
    words = (f"Chosen: {named(chosen.mesh)}; best measured: {named(best.mesh)}. The choice takes {gap:.2f} times the "
             f"best; the bar is {BAR:.2f}: {'kept' if gap <= BAR else 'NOT kept'}. Of all pairs of meshes the forecast "
             f"orders {pairs(found, taken):.0%} as measured.")
    head = ["mesh", "micro-batches", "measured, ms", "forecast, ms", "forecast / measured", ""]
    results.write("plan", "The planner's choice",
                  [__doc__.split("\n\n")[2].replace("\n", " "), results.table(head, rows), words])


def pairs(found: list[Forecast], taken: dict[Forecast, list[float]]) -> float:
    """The share of pairs whose order is the measured one."""
    both = [(a, b) for i, a in enumerate(found) for b in found[:i]]
    return sum((a.step_s < b.step_s) == (min(taken[a]) < min(taken[b])) for a, b in both) / len(both)


if __name__ == "__main__":
    main()
