"""Where a run is, read from its files alone: the same words for a live run and one that has ended."""

from __future__ import annotations

import time
import tomllib
from pathlib import Path
from typing import Any

from elastic.humanize import duration, numbers
from elastic.observe.event_kinds import sentence
from elastic.observe.metrics import Lines, build_summary, evaluations_of, steps_of
from elastic.observe.progress import WINDOW, Pace
from elastic.observe.run_files import lines_of, recipe_text, summary_of

LATEST = 5  # events shown
QUIET_S = 60.0  # without any line, a run that has no summary may be dead


def status_lines(run_dir: str | Path, now_s: float | None = None) -> list[str]:
    """What `elastic status` prints. UserError where there is no run."""
    run_dir = Path(run_dir)
    recipe = recipe_text(run_dir)
    (events, metrics), ended = lines_of(run_dir), summary_of(run_dir)
    lines = ended_lines(ended) if ended else live_lines(run_dir, recipe, events, metrics, time.time() if now_s is None
                                                        else now_s)
    checkpoints = sorted(path.parent.name for path in run_dir.glob("checkpoints/*/manifest.json"))
    if not (run_dir / "checkpoints").exists():  # they lie elsewhere: what the events say of them
        checkpoints = sorted({e["path"].rpartition("/")[2] for e in events if e["event"] == "checkpoint_committed"})
    lines.append(f"checkpoints: {', '.join(checkpoints) or 'none'}")
    return [*lines, "latest events:", *(f"  step {event['step']}: {sentence(event)}" for event in events[-LATEST:])]


def ended_lines(summary: dict[str, Any]) -> list[str]:
    head = {"failed": f"failed: {summary.get('error', '')}",
            "interrupted": "interrupted, to be resumed"}.get(summary["status"], "done")
    return [head, f"steps {summary['steps']}, loss {summary['final_loss']}, evaluation "
                  f"{numbers(summary['eval']) or 'none'}",
            f"took {duration(summary['wall_s'])}, goodput {summary['goodput']:.1%}, recoveries "
            f"{summary['recoveries']}, steps lost {summary['steps_lost']}, workers "
            f"{' -> '.join(map(str, summary['world_sizes']))}"]


def live_lines(run_dir: Path, recipe: str, events: Lines, metrics: Lines, now_s: float) -> list[str]:
    steps, evaluations = steps_of(metrics), evaluations_of(metrics)
    latest = max([fields["time"] for fields in (*events[-1:], *steps[-1:])], default=0.0)
    told = [event["num_steps"] for event in events if event["event"] == "run_started" and "num_steps" in event]
    pace = Pace(told[-1] if told else tomllib.loads(recipe)["run"].get("steps"))
    for step in steps[-WINDOW:]:
        pace.add(step)
    quiet = now_s - latest
    head = "running" if quiet < QUIET_S else f"no sign of life for {quiet:.0f} s: it may be dead; `elastic resume {run_dir}` goes on"
    summary = build_summary(events, metrics, "running")
    return [head, pace.line(), f"evaluation {numbers(evaluations[-1]['eval']) if evaluations else 'none'}, recoveries "
            f"{summary['recoveries']}, steps lost {summary['steps_lost']}, goodput {summary['goodput']:.1%}"]
