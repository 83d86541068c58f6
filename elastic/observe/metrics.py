"""What a run comes to: pure functions from its lines to the summary."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

Lines = Sequence[dict[str, Any]]
UNITS = ("tokens",)  # what a domain may count beside samples


def steps_of(metrics: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of committed steps."""
    return [fields for fields in metrics if "eval" not in fields]


def evaluations_of(metrics: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return [fields for fields in metrics if "eval" in fields]


def sessions(events: Lines, metrics: Lines) -> list[tuple[float, float]]:
    """(begin, end) of every period between a start or resume and its last sign of life, Unix seconds."""
    begins = [fields["time"] for fields in events if fields["event"] == "run_started"]
    times = sorted(fields["time"] for fields in itertools.chain(events, steps_of(metrics)))
    if not times:
        return []
    begins = begins or times[:1]
    ends = [*begins[1:], float("inf")]
    return [(begin, max([time for time in times if begin <= time < end], default=begin))
            for begin, end in zip(begins, ends)]


def goodput(events: Lines, metrics: Lines) -> float:
    """The share of the time between each session's first generation and its last commit that went into steps that
    count.

    A step that was redone, a pause, an evaluation and an idle wait are the rest.
    """
    useful = total = 0.0
    formed = [fields["time"] for fields in events if fields["event"] == "generation_started"]
    for begin, end in sessions(events, metrics):
        steps = [fields for fields in steps_of(metrics) if begin <= fields["time"] <= end]
        first = min((time for time in formed if begin <= time <= end), default=begin)
        if steps:
            useful += sum(fields["step_s"] for fields in steps)
            total += max(fields["time"] for fields in steps) - first
    return round(min(1.0, useful / total), 4) if total > 0 else 0.0


def world_sizes(events: Lines) -> list[int]:
    """The group's sizes in order, without repetition of the same one after itself."""
    sizes = [fields["world_size"] for fields in events if fields["event"] == "generation_started"]
    return [size for size, _ in itertools.groupby(sizes)]


def unit_of(metrics: Lines) -> str:
    """What throughput is counted in."""
    return next((unit for fields in steps_of(metrics)[-1:] for unit in UNITS if unit in fields), "samples")


def build_summary(events: Lines, metrics: Lines, status: str, parameters_sha256: str = "", state_sha256: str = "",
                  error: str = "") -> dict[str, Any]:
    """The fields of summary.json; `error` is there only if there is one."""
    steps, evaluations = steps_of(metrics), evaluations_of(metrics)
    recovered = [fields for fields in events if fields["event"] == "recovered"]
    summary = {
        "status": status,
        "steps": steps[-1]["step"] if steps else 0,
        "final_loss": steps[-1]["loss"] if steps else None,
        "eval": evaluations[-1]["eval"] if evaluations else {},
        "parameters_sha256": parameters_sha256,
        "state_sha256": state_sha256,
        "steps_lost": sum(fields["steps_lost"] for fields in recovered),
        "recoveries": len(recovered),
        "wall_s": round(sum(end - begin for begin, end in sessions(events, metrics)), 3),
        "goodput": goodput(events, metrics),
        "world_sizes": world_sizes(events),
    }
    return {**summary, "error": error} if error else summary
