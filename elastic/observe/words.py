"""An event as one line that a person reads. Pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from elastic.humanize import count, duration, numbers, size

Fields = dict[str, Any]
GOOD, BAD, PLAIN = "green", "red", "cyan"
TONE = {"worker_lost": BAD, "hang": BAD, "run_failed": BAD, "checkpoint_rejected": BAD, "step_failed": BAD, "rewound": "yellow",
        "waiting": "yellow", "node_draining": "yellow", "straggler": "yellow", "chaos": "magenta", "recovered": GOOD,
        "resized": GOOD, "relaid": GOOD, "run_finished": GOOD, "worker_joined": GOOD}


def names(value: str | list[str]) -> str:
    """One worker or several."""
    return value if isinstance(value, str) else ", ".join(value)


def _lost(e: Fields) -> str:
    rank = e.get("rank")
    whose = f"rank {rank}, {e['worker']}" if rank is not None and rank >= 0 else e["worker"]
    seen = f", noticed after {duration(e['detected_s'])}" if e.get("detected_s") else ""
    return f"worker lost ({whose}): {e['cause']}{seen}"


def lying(mesh: Fields) -> str:
    """A mesh by its axes longer than 1."""
    return " x ".join(f"{axis} {length}" for axis, length in mesh.items() if length > 1) or "one worker"


SENTENCES: dict[str, Callable[[Fields], str]] = {
    "run_started": lambda e: "run started",
    "mesh_chosen": lambda e: e["why"],
    "noted": lambda e: e["why"],
    "generation_started": lambda e: f"generation {e['generation']}: {count(e['world_size'], 'worker')} from step {e['step'] + 1}",
    "worker_lost": _lost,
    "worker_joined": lambda e: f"worker joined: {e['worker']} is warm on node {e['node'][:8]}",
    "healed": lambda e: f"healed {names(e['to'])} from {e['from']}: {size(e['bytes'])} in {duration(e['seconds'])}",
    "relaid": lambda e: f"state laid anew, from {lying(e['from'])} to {lying(e['to'])}: {size(e['bytes'])} in {duration(e['seconds'])}",
    "twin_used": lambda e: f"the optimizer's state of {count(e['blocks'], 'block')} comes from twins of lost workers",
    "optimizer_resharded": lambda e: f"the optimizer's state has moved to new keepers: {size(e['bytes'])} in {duration(e['seconds'])}",
    "resized": lambda e: f"resized from {e['from']} to {count(e['to'], 'worker')}, pause {duration(e['pause_s'])}",
    "recovered": lambda e: f"recovered: pause {duration(e['pause_s'])}, {count(e['steps_lost'], 'step')} lost",
    "rewound": lambda e: f"rewound from step {e['from']} to step {e['to']}" if e["from"] != e["to"] else f"goes on from step {e['to']}",
    "step_failed": lambda e: f"a step failed on {e['worker']}: {e['error']}",
    "checkpoint_committed": lambda e: f"checkpoint {e['path'].rsplit('/', 1)[-1]}: {size(e['bytes'])} in {duration(e['seconds'])}, "
                                      f"training stalled for {duration(e['stall_s'])}",
    "checkpoint_rejected": lambda e: f"checkpoint {e['path']} is not used: {e['reason']}",
    "checkpoint_skipped": lambda e: "checkpoint left out: the one before is still being written",
    "loaded": lambda e: f"loaded {e['path'].rsplit('/', 1)[-1]}: {size(e['bytes'])} in {duration(e['seconds'])}",
    "node_draining": lambda e: f"nodes will leave: {names(e['nodes'])}",
    "straggler": lambda e: f"straggler: {e.get('worker', '')}",
    "hang": lambda e: f"no sign of life from {e['worker']} (in {e.get('phase', 'a step')})",
    "waiting": lambda e: f"waiting for workers: {e['ready']} of at least {e['needed']} are ready",
    "chaos": lambda e: f"fault injected: {e['fault']}",
    "controller_restarted": lambda e: "the controller was replaced; training goes on",
    "run_finished": lambda e: "run interrupted" if e.get("status") == "interrupted" else "run finished",
    "run_failed": lambda e: f"run failed: {e['error']}",
}


def sentence(event: Fields) -> str:
    """Any event, known or not, as one line."""
    name = event["event"]
    try:
        return SENTENCES[name](event)
    except (KeyError, TypeError, ValueError):  # an event with other fields than these: show what it has
        rest = {key: value for key, value in event.items() if key not in ("time", "event", "generation", "step")}
        return f"{name} {numbers(rest)}".strip()


def tone(event: Fields) -> str:
    """A colour by what the event means to the run."""
    return TONE.get(event["event"], PLAIN)
