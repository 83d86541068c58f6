"""Every kind of event in events.jsonl, which `controller/run_log.py` writes: its fields, and the line that a person reads. Pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from elastic.humanize import count, duration, numbers, size

Fields = dict[str, Any]
EVERYWHERE = {"time", "event", "generation", "step"}
GOOD, BAD, PLAIN = "green", "red", "cyan"


class Kind(NamedTuple):
    """One kind of event. `fields` are those beside EVERYWHERE; one with a ? is not always there."""

    fields: str
    sentence: Callable[[Fields], str]
    tone: str = PLAIN  # its colour in a terminal
    colour: str = "#444"  # its mark in the report


def names(value: str | list[str]) -> str:
    """One worker or several."""
    return value if isinstance(value, str) else ", ".join(value)


def _lost(e: Fields) -> str:
    rank = e.get("rank")
    whose = f"rank {rank}, {e['worker']}" if rank is not None and rank >= 0 else e["worker"]
    seen = f", noticed after {duration(e['detected_s'])}" if e.get("detected_s") else ""
    return f"worker lost ({whose}): {e['cause']}{seen}"


def _degrees(mesh: Fields) -> str:
    """A mesh by its axes longer than 1."""
    return " x ".join(f"{axis} {length}" for axis, length in mesh.items() if length > 1) or "one worker"


def _moved(e: Fields) -> str:
    return f"{size(e['bytes'])} in {duration(e['seconds'])}"


EVENTS: dict[str, Kind] = {
    "run_started": Kind("run num_steps pid", lambda e: "run started"),
    "mesh_chosen": Kind("why", lambda e: e["why"]),
    "noted": Kind("why", lambda e: e["why"]),
    "generation_started": Kind("world_size transport mesh written workers", lambda e:
                               f"generation {e['generation']}: {count(e['world_size'], 'worker')} from step "
                               f"{e['step'] + 1}", PLAIN, "#1f77b4"),
    "worker_lost": Kind("worker rank cause detected_s", _lost, BAD, "#d62728"),
    "worker_joined": Kind("worker node pid", lambda e: f"worker joined: {e['worker']} is warm on node {e['node'][:8]}",
                          GOOD, "#2ca02c"),
    "healed": Kind("from to bytes seconds", lambda e: f"healed {names(e['to'])} from {e['from']}: {_moved(e)}", PLAIN,
                   "#17becf"),
    "relaid": Kind("from to bytes seconds", lambda e: f"state resharded, from {_degrees(e['from'])} to "
                                                      f"{_degrees(e['to'])}: {_moved(e)}", GOOD),
    "twin_used": Kind("blocks", lambda e: f"the optimizer's state of {count(e['blocks'], 'block')} comes from twins of "
                                          "lost workers"),
    "optimizer_resharded": Kind("bytes seconds", lambda e: f"the optimizer's state is resharded: {_moved(e)}"),
    "tables_resharded": Kind("buckets bytes seconds steps",
                             lambda e: f"rows of {count(e['buckets'], 'bucket')} have moved beside the training: {_moved(e)}"),
    "resized": Kind("pause_s from to mesh?", lambda e: f"resized from {e['from']} to {count(e['to'], 'worker')}, pause "
                                                       f"{duration(e['pause_s'])}",
                    GOOD, "#2ca02c"),
    "recovered": Kind("pause_s steps_lost mesh?",
                      lambda e: f"recovered: pause {duration(e['pause_s'])}, {count(e['steps_lost'], 'step')} lost",
                      GOOD, "#2ca02c"),
    "rewound": Kind("from to", lambda e: f"rewound from step {e['from']} to step {e['to']}" if e["from"] != e["to"] else
                    f"goes on from step {e['to']}", "yellow", "#ff7f0e"),
    "step_failed": Kind("worker error", lambda e: f"a step failed on {e['worker']}: {e['error']}", BAD),
    "checkpoint_committed": Kind("path bytes stall_s seconds",
                                 lambda e: f"checkpoint {e['path'].rsplit('/', 1)[-1]}: {_moved(e)}, training stalled "
                                 f"for {duration(e['stall_s'])}", PLAIN, "#7f7f7f"),
    "checkpoint_rejected": Kind("path reason", lambda e: f"checkpoint {e['path']} is not used: {e['reason']}", BAD,
                                "#d62728"),
    "checkpoint_skipped": Kind("", lambda e: "checkpoint left out: the one before is still being written"),
    "loaded": Kind("path bytes read_bytes seconds", lambda e: f"loaded {e['path'].rsplit('/', 1)[-1]}: {_moved(e)}"),
    "node_draining": Kind("nodes", lambda e: f"nodes will leave: {names(e['nodes'])}", "yellow"),
    "hang": Kind("worker phase silent_s", lambda e: f"no sign of life from {e['worker']} (in "
                                                    f"{e.get('phase', 'a step')})", BAD, "#d62728"),
    "waiting": Kind("ready needed", lambda e: f"waiting for workers: {e['ready']} of at least {e['needed']} are ready",
                    "yellow"),
    "lines_missing": Kind("first last", lambda e: f"the lines of the steps {e['first']} to {e['last']} are not there yet"),
    "chaos": Kind("fault worker", lambda e: f"fault injected: {e['fault']}", "magenta", "#9467bd"),
    "controller_restarted": Kind("pid phase", lambda e: "the controller was replaced; training goes on"),
    "run_finished": Kind("status", lambda e: "run interrupted" if e.get("status") == "interrupted" else "run finished",
                         GOOD),
    "run_failed": Kind("error", lambda e: f"run failed: {e['error']}", BAD, "#d62728"),
}
UNKNOWN = Kind("", lambda e: f"{e['event']} "
                             f"{numbers({key: value for key, value in e.items() if key not in EVERYWHERE})}".strip())


def kind_of(event: Fields) -> Kind:
    return EVENTS.get(event["event"], UNKNOWN)


def sentence(event: Fields) -> str:
    """Any event, known or not, as one line."""
    try:
        return kind_of(event).sentence(event)
    except (KeyError, TypeError, ValueError):  # a run of another version may have other fields: show what it has
        return UNKNOWN.sentence(event)
