"""report.html: loss, throughput and world size over time with every event marked, in one file that opens offline."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from elastic.errors import UserError
from elastic.mesh import rounds
from elastic.observe.event_kinds import EVENTS, kind_of, sentence
from elastic.observe.metrics import Lines, evaluations_of, sessions, steps_of, unit_of
from elastic.observe.run_files import lines_of, recipe_of, summary_of
from elastic.parallel.schedules import build
from elastic.parallel.simulator import Costs, simulate
from elastic.storage.atomic import write_atomically

MAX_POINTS = 4000
MOST = 16  # micro-batches drawn: more are too narrow to tell apart
MAX_RATES = 300  # of throughput: single steps are mostly noise
ACTIONS = {"forward": "#1f77b4", "backward": "#2ca02c", "backward_input": "#2ca02c", "backward_weight": "#9467bd"}
MESSAGE = "#7f7f7f"
DISTURBING = ("worker_lost", "worker_joined", "resized", "rewound", "hang", "run_failed")
STYLE = """body{font-family:system-ui,sans-serif;max-width:1200px;margin:24px auto;padding:0 16px;color:#222}
table{border-collapse:collapse;font-size:14px}td{padding:3px 18px 3px 0;vertical-align:top}td:first-child{color:#777}
h1{font-size:22px}h2{font-size:17px;margin-top:28px}code{font-size:12px;overflow-wrap:anywhere}"""


class Clock:
    """Unix seconds -> seconds at work: the time between a session's end and the next one's start does not count."""

    def __init__(self, events: Lines, metrics: Lines):
        self.spans = sessions(events, metrics)

    def at(self, time: float) -> float:
        return round(sum((min(time, end) - begin for begin, end in self.spans if begin <= time), 0.0), 3)


def write_report(run_dir: str | Path) -> Path:
    """Writes report.html from the run directory's own lines, and of a pipeline one step as its schedule has it. Returns
    its path."""
    run_dir = Path(run_dir)
    events, metrics = lines_of(run_dir)
    path = run_dir / "report.html"
    write_atomically(path, page(run_dir.name, summary_of(run_dir) or {"status": "running"}, events, metrics,
                                *pipeline(run_dir, events)))
    return path


def pipeline(run_dir: Path, events: Lines) -> tuple[list[dict[str, Any]], str]:
    """The timeline of one step of the last generation, with stages that take alike, and its title; none without stages.
    """
    meshes = [event["mesh"] for event in events if event["event"] == "generation_started" and "mesh" in event]
    if not meshes or meshes[-1]["pipeline"] < 2:
        return [], ""
    try:
        recipe = recipe_of(run_dir)
    except (OSError, UserError):
        return [], ""
    mesh, stages = recipe.mesh, meshes[-1]["pipeline"]
    is_interleaved = mesh.schedule == "interleaved"
    count = mesh.micro_batches * (1 if is_interleaved else rounds(recipe.elastic.logical_shards, meshes[-1]["data"]))
    timeline = simulate(build(mesh.schedule, stages, min(count, MOST), mesh.chunks if is_interleaved else 1),
                        Costs.equal(stages, 1.0, 1.0, 1.0))
    what = "a logical shard" if is_interleaved else "a step"
    drawn = f", of which {MOST} are drawn" if count > MOST else ""
    title = (f"The pipeline of {what} by its schedule, {mesh.schedule}: {stages} stages that take alike, "
             f"{count} micro-batches{drawn}; bubble {timeline.bubble:.0%}")
    return timeline.rows(), title


def page(name: str, summary: dict[str, Any], events: Lines, metrics: Lines, timeline: Lines = (),
         caption: str = "") -> str:
    """The whole document; plotly's own script is within it."""
    chart = figure(events, metrics).to_html(full_html=False, include_plotlyjs=True, config={"displaylogo": False})
    rows = "".join(f"<tr><td>{html.escape(key)}</td><td><code>{html.escape(json.dumps(value))}</code></td></tr>"
                   for key, value in summary.items())
    clock = Clock(events, metrics)
    lines = "".join(f"<tr><td>{clock.at(e['time']):.2f} s</td><td>step "
                    f"{e['step']}</td><td>{html.escape(sentence(e))}</td></tr>"
                    for e in events)
    if timeline:
        chart += gantt(timeline, caption).to_html(full_html=False, include_plotlyjs=False,
                                                  config={"displaylogo": False})
    title = html.escape(name)
    return ('<!doctype html><html lang="en"><head><meta '
            f'charset="utf-8"><title>{title}</title><style>{STYLE}</style></head><body>'
            f"<h1>{title}</h1><table>{rows}</table>{chart}<h2>Events</h2><table>{lines}</table></body></html>\n")


def figure(events: Lines, metrics: Lines) -> go.Figure:
    """Four rows over one time axis: loss, throughput, world size, events by name."""
    unit, clock = unit_of(metrics), Clock(events, metrics)
    chart = make_subplots(rows=4, cols=1, shared_xaxes=True, vertical_spacing=0.04,
                          row_heights=[0.36, 0.22, 0.16, 0.26],
                          subplot_titles=("loss", f"{unit} per second, pauses included", "workers", "events"))
    steps = steps_of(metrics)
    add_loss(chart, clock, thinned(steps), evaluations_of(metrics), {step["step"]: step["time"] for step in steps})
    add_throughput(chart, clock, steps, unit)
    add_world_size(chart, clock, events, steps)
    add_events(chart, clock, events)
    chart.update_layout(height=860, template="plotly_white", hovermode="closest",
                        margin={"l": 60, "r": 20, "t": 40, "b": 40},
                        legend={"orientation": "h", "y": 1.08})
    chart.update_xaxes(title_text="seconds at work", row=4, col=1)
    chart.update_yaxes(rangemode="tozero", row=2, col=1)
    chart.update_yaxes(rangemode="tozero", row=3, col=1)
    return chart


def thinned(steps: Lines) -> Lines:
    """At most MAX_POINTS of them, the last one included."""
    stride = -(-len(steps) // MAX_POINTS) or 1
    return [*steps[:-1:stride], *steps[-1:]]


def add_loss(chart: go.Figure, clock: Clock, steps: Lines, evaluations: Lines, times: dict[int, float]) -> None:
    chart.add_trace(go.Scatter(x=[clock.at(s["time"]) for s in steps], y=[s["loss"] for s in steps], mode="lines",
                               name="training loss",
                               line={"width": 1.2}, text=[f"step {s['step']}" for s in steps],
                               hovertemplate="%{text}: %{y:.4f}"), 1, 1)
    seen = [e for e in evaluations if e["step"] in times and "loss" in e["eval"]]
    if seen:
        chart.add_trace(go.Scatter(x=[clock.at(times[e["step"]]) for e in seen], y=[e["eval"]["loss"] for e in seen],
                                   name="evaluation loss",
                                   mode="lines+markers", text=[f"step {e['step']}" for e in seen],
                                   hovertemplate="%{text}: %{y:.4f}"), 1, 1)


def add_throughput(chart: go.Figure, clock: Clock, steps: Lines, unit: str) -> None:
    """From commit to commit, so that a pause shows as a dip; over groups of steps."""
    at = [clock.at(step["time"]) for step in steps]
    stride = -(-len(steps) // MAX_RATES) or 1
    cuts = range(stride, len(steps), stride)
    rates = [sum(step[unit] for step in steps[i - stride + 1:i + 1]) / max(at[i] - at[i - stride], 1e-3) for i in cuts]
    chart.add_trace(go.Scatter(x=[at[i] for i in cuts], y=rates, mode="lines", name=f"{unit}/s",
                               line={"width": 1, "color": "#8c564b"},
                               text=[f"step {steps[i]['step']}" for i in cuts], hovertemplate="%{text}: %{y:.0f}/s"), 2,
                    1)


def add_world_size(chart: go.Figure, clock: Clock, events: Lines, steps: Lines) -> None:
    formed = [e for e in events if e["event"] == "generation_started"]
    x, y = [clock.at(e["time"]) for e in formed], [e["world_size"] for e in formed]
    if formed and steps:
        x, y = [*x, clock.at(steps[-1]["time"])], [*y, y[-1]]
    chart.add_trace(go.Scatter(x=x, y=y, mode="lines", line={"shape": "hv", "color": "#1f77b4"}, name="workers",
                               hovertemplate="%{y} workers"), 3, 1)


def add_events(chart: go.Figure, clock: Clock, events: Lines) -> None:
    """A mark for every event in its own row, and a line through the curves at those that disturb."""
    for name in dict.fromkeys(e["event"] for e in events):
        some = [e for e in events if e["event"] == name]
        chart.add_trace(go.Scatter(x=[clock.at(e["time"]) for e in some], y=[name] * len(some), mode="markers",
                                   showlegend=False,
                                   marker={"color": kind_of(some[0]).colour, "size": 9, "symbol": "diamond"}, name=name,
                                   text=[f"step {e['step']}: {sentence(e)}" for e in some],
                                   hovertemplate="%{text}<extra></extra>"), 4, 1)
    chart.update_layout(shapes=[{"type": "line", "xref": "x", "yref": "paper", "x0": clock.at(e["time"]),
                                 "x1": clock.at(e["time"]),
                                 "y0": 0, "y1": 1, "line": {"color": EVENTS[e["event"]].colour, "width": 1,
                                                            "dash": "dot"}, "opacity": 0.5}
                                for e in events if e["event"] in DISTURBING])


def gantt(rows: Lines, title: str) -> go.Figure:
    """A pipeline's timeline, a bar an action, the first stage on top. A row: stage, kind, micro_batch, chunk, start,
    end (seconds)."""
    chart = go.Figure()
    for kind in dict.fromkeys(row["kind"] for row in rows):
        some = [row for row in rows if row["kind"] == kind]
        where = [f"{kind} of micro-batch {row['micro_batch']}, chunk {row['chunk']}, on stage {row['stage']}"
                 for row in some]
        chart.add_trace(go.Bar(
            y=[f"stage {row['stage']}" for row in some], base=[row["start"] for row in some],
            x=[row["end"] - row["start"] for row in some],
            orientation="h", name=kind, text=[row["micro_batch"] for row in some], textposition="inside",
            insidetextanchor="middle",
            marker={"color": ACTIONS.get(kind, MESSAGE), "opacity": [1 / (1 + row["chunk"] / 2) for row in some]},
            customdata=where, hovertemplate="%{customdata}: %{base:.4g} s, takes %{x:.4g} s<extra></extra>"))
    stages = [f"stage {stage}" for stage in sorted({row["stage"] for row in rows})]
    chart.update_layout(template="plotly_white", title=title, barmode="overlay", bargap=0.15, height=160
                        + 40 * len(stages),
                        legend={"orientation": "h", "y": -0.25})
    chart.update_yaxes(categoryorder="array", categoryarray=stages[::-1])
    chart.update_xaxes(title_text="seconds")
    return chart
