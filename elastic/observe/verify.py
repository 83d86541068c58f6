"""Does a run directory tell one consistent story? Pure checks over its lines; a checkpoint's own check is passed in."""

from __future__ import annotations

import itertools
import math
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from elastic.errors import BadCheckpoint, UserError
from elastic.humanize import count
from elastic.observe.ledger_files import FOLDER, prove
from elastic.observe.metrics import Lines, build_summary, evaluations_of, steps_of
from elastic.observe.run_files import RECIPE, lines_of, summary_of

MAX_NAMED = 5  # of one kind of problem; the rest is counted
CheckCheckpoint = Callable[[Any], Any]  # raises BadCheckpoint


@dataclass
class Verdict:
    """`problems` is empty for a sound run. `facts` says what was looked at."""

    problems: list[str] = field(default_factory=list)
    facts: list[str] = field(default_factory=list)


def verify(run_dir: str | Path, check_checkpoint: CheckCheckpoint, checkpoints: Mapping[str, Any]
           | None = None) -> Verdict:
    """Steps, generations, evaluations, summary, and every checkpoint that has a manifest: those in `run_dir`, or these,
    by name."""
    run_dir = Path(run_dir)
    if checkpoints is None:
        checkpoints = {f"checkpoints/{m.parent.name}": m.parent
                       for m in sorted(run_dir.glob("checkpoints/*/manifest.json"))}
    verdict = Verdict()
    try:
        (events, metrics), summary = lines_of(run_dir), summary_of(run_dir)
    except UserError as error:
        return Verdict([str(error)])
    steps = steps_of(metrics)
    verdict.problems += limited(step_problems(steps, first_step(events))) + limited(evaluation_problems(steps, evaluations_of(metrics)))
    verdict.problems += limited(generation_problems(events)) + limited(membership_problems(events, steps))
    verdict.facts.append(f"{len(steps)} steps, each once; {count(len(evaluations_of(metrics)), 'evaluation')}")
    verdict.facts.append(count(sum(e["event"] == "generation_started" for e in events), "generation"))
    if asks_for_ledger(run_dir):
        problems, facts = prove(run_dir, steps)
        verdict.problems += limited(problems)
        verdict.facts += facts
    verdict.problems += checkpoint_problems(checkpoints, check_checkpoint, verdict.facts)
    if summary is not None:
        verdict.problems += summary_problems(summary, events, metrics)
        verdict.facts.append("summary.json agrees with the lines")
    else:
        verdict.facts.append("no summary.json: the run has not ended, or was cut off")
    return verdict


def asks_for_ledger(run_dir: Path) -> bool:
    try:
        return bool(tomllib.loads((run_dir / RECIPE).read_text(encoding="utf-8"))["data"].get("ledger"))
    except (OSError, KeyError, ValueError):
        return (run_dir / FOLDER).exists()


def limited(problems: Sequence[str]) -> list[str]:
    more = len(problems) - MAX_NAMED
    return [*problems[:MAX_NAMED], *([f"... and {more} more of this kind"] if more > 0 else [])]


def first_step(events: Lines) -> int:
    """1, or the one after the checkpoint at which a directory's lines begin: its run had another one before."""
    began = bool(events) and events[0]["event"] == "rewound"
    return 1 + (min(e["to"] for e in events if e["event"] == "rewound") if began else 0)


def step_problems(steps: Lines, first: int = 1) -> list[str]:
    """Steps run on from the first one, each once."""
    problems, expected = [], first
    for line in steps:
        if line["step"] != expected:
            problems.append(f"metrics.jsonl: step {line['step']} where step {expected} should be")
        if line["loss"] is None or not math.isfinite(line["loss"]):
            problems.append(f"metrics.jsonl: step {line['step']} has no finite loss")
        expected = line["step"] + 1
    return problems


def evaluation_problems(steps: Lines, evaluations: Lines) -> list[str]:
    """An evaluation belongs to a committed step, and a step has at most one."""
    last, seen, problems = steps[-1]["step"] if steps else 0, set[int](), []
    for line in evaluations:
        if line["step"] in seen:
            problems.append(f"metrics.jsonl: two evaluations of step {line['step']}")
        if line["step"] > last:
            problems.append(f"metrics.jsonl: an evaluation of step {line['step']}, which is not committed")
        seen.add(line["step"])
    return problems


def generation_problems(events: Lines) -> list[str]:
    """Generations only grow, and a generation's events come after its start. The order of the lines says so, and no
    date."""
    problems, current = [], events[0]["generation"] if first_step(events) > 1 else 0
    for line in events:
        number = line["generation"]
        if line["event"] != "generation_started":
            if number > current:
                problems.append(f"events.jsonl: {line['event']} of generation {number} comes before the start of that "
                                "generation")
            continue
        workers = line["workers"]
        if number <= current:
            problems.append(f"events.jsonl: generation {number} starts after generation {current}")
        if workers and [w["rank"] for w in workers] != list(range(line["world_size"])):
            problems.append(f"events.jsonl: generation {number} has ranks {[w['rank'] for w in workers]} and world "
                            f"size {line['world_size']}")
        if line.get("written", 0) > line["step"]:
            problems.append(f"events.jsonl: generation {number} starts at step {line['step']}, and step "
                            f"{line['written']} was written before")
        current = max(current, number)
    return problems


def membership_problems(events: Lines, steps: Lines) -> list[str]:
    """Every step lies between the start of its generation and that of the next, by the steps at which they started, and
    generations of steps do not fall. What workers date is left alone: their clocks are not the controller's."""
    started = {e["generation"]: e for e in events if e["event"] == "generation_started"}
    after = dict(itertools.pairwise(sorted(started)))
    problems, current = [], 0
    for line in steps:
        step, number = line["step"], line["generation"]
        start = started.get(number)
        if start is None:
            problems.append(f"step {step} belongs to generation {number}, which no event started")
            continue
        if number < current:
            problems.append(f"step {step} of generation {number} comes after one of generation {current}")
        if line["world_size"] != start["world_size"]:
            problems.append(f"step {step} names {line['world_size']} workers, its generation {number} has "
                            f"{start['world_size']}")
        if step <= start["step"]:
            problems.append(f"step {step} comes before the start of its generation {number}")
        if number in after and step > started[after[number]]["step"]:
            problems.append(f"step {step} of generation {number} comes after the start of generation {after[number]}")
        current = max(current, number)
    return problems


def checkpoint_problems(checkpoints: Mapping[str, Any], check_checkpoint: CheckCheckpoint,
                        facts: list[str]) -> list[str]:
    """Every checkpoint with a manifest is whole. One without is absent, not wrong."""
    problems, good = [], 0
    for name, path in checkpoints.items():
        try:
            check_checkpoint(path)
            good += 1
        except BadCheckpoint as error:
            problems.append(f"{name}: {error}")
    facts.append(f"{count(good, 'whole checkpoint')}, every hash checked")
    return problems


def summary_problems(summary: dict[str, Any], events: Lines, metrics: Lines) -> list[str]:
    """What the summary says follows from the lines; goodput and wall_s are left to rounding."""
    expected = build_summary(events, metrics, summary.get("status", ""))
    problems = [f"summary.json: {key} is {summary.get(key)}, the lines say {expected[key]}"
                for key in ("steps", "final_loss", "eval", "steps_lost", "recoveries", "world_sizes")
                if summary.get(key) != expected[key]]
    if summary.get("status") not in ("done", "failed", "interrupted"):
        problems.append(f"summary.json: status is {summary.get('status')!r}")
    if summary.get("status") == "done":
        problems += [f"summary.json: {key} is missing" for key in ("parameters_sha256", "state_sha256")
                     if not summary.get(key)]
    return problems
