"""report.html of a run: what its own lines say, and of a pipeline one step as its schedule has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from elastic.errors import UserError
from elastic.mesh import rounds
from elastic.observe import report
from elastic.observe.events import read_lines
from elastic.parallel.schedules import build
from elastic.parallel.simulator import Costs, simulate
from elastic.recipe import loads

MOST = 16  # micro-batches drawn: more are too narrow to tell apart


def write_report(run_dir: str | Path) -> Path:
    """Writes report.html and returns its path."""
    return report.write_report(run_dir, *pipeline(Path(run_dir)))


def pipeline(run_dir: Path) -> tuple[list[dict[str, Any]], str]:
    """The timeline of one step of the last generation, with stages that take alike, and its title; none without stages."""
    meshes = [event["mesh"] for event in read_lines(run_dir / "events.jsonl") if event["event"] == "generation_started" and "mesh" in event]
    if not meshes or meshes[-1]["pipeline"] < 2:
        return [], ""
    try:
        recipe = loads((run_dir / "recipe.toml").read_text(encoding="utf-8"), locate=False)
    except (OSError, UserError):
        return [], ""
    mesh, stages = recipe.mesh, meshes[-1]["pipeline"]
    is_interleaved = mesh.schedule == "interleaved"
    count = mesh.micro_batches * (1 if is_interleaved else rounds(recipe.elastic.logical_shards, meshes[-1]["data"]))
    timeline = simulate(build(mesh.schedule, stages, min(count, MOST), mesh.chunks if is_interleaved else 1), Costs.equal(stages, 1.0, 1.0, 1.0))
    what = "a logical shard" if is_interleaved else "a step"
    drawn = f", of which {MOST} are drawn" if count > MOST else ""
    title = (f"The pipeline of {what} by its schedule, {mesh.schedule}: {stages} stages that take alike, "
             f"{count} micro-batches{drawn}; bubble {timeline.bubble:.0%}")
    return timeline.rows(), title
