"""What a run writes about itself, and whether lies in it are found."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from elastic.errors import BadCheckpoint, UserError
from elastic.humanize import duration, size
from elastic.observe.event_kinds import EVENTS, sentence
from elastic.observe.jsonl import JsonLines, read_lines
from elastic.observe.metrics import build_summary, goodput, sessions, world_sizes
from elastic.observe.progress import Pace, Progress
from elastic.observe.report import gantt, pipeline, write_report
from elastic.observe.status import status_lines
from elastic.observe.verify import verify
from elastic.parallel.schedules import build
from elastic.parallel.simulator import Costs, simulate
from tests.support.run_logs import mismatch

START = 1_000_000.0
Lines = list[dict[str, Any]]


def story() -> tuple[Lines, Lines]:
    """Ten steps of 1 s: three workers, a kill at step 6 that costs a pause of 2 s, then two workers."""
    def event(at: float, name: str, generation: int, step: int, **more: Any) -> dict[str, Any]:
        return {"time": START + at, "event": name, "generation": generation, "step": step, **more}

    def members(number: int) -> dict[str, Any]:
        return {"world_size": number, "mesh": {"data": number, "pipeline": 1, "tensor": 1, "expert": 1},
                "workers": [{"worker": f"w{r}", "rank": r, "node": "n", "pid": 10 + r} for r in range(number)]}

    events = [event(0, "noted", 0, 0, why="Net is made with norm in evaluation mode"), event(0, "run_started", 0, 0),
              event(5, "generation_started", 1, 0, **members(3)),
              event(11.1, "worker_lost", 1, 6, worker="w2", rank=2, cause="killed", detected_s=0.05),
              event(12, "generation_started", 2, 6, **members(2)),
              event(14, "recovered", 2, 7, pause_s=2.0, steps_lost=0),
              event(18, "run_finished", 2, 10)]
    metrics: Lines = []
    for step in range(1, 11):
        late, workers = (2, 2) if step > 6 else (0, 3)
        metrics.append({"step": step, "loss": 5.0 - step / 4, "time": START + 5 + step + late, "step_s": 1.0,
                        "world_size": workers,
                        "generation": 1 if step <= 6 else 2, "samples": 12, "tokens": 768})
        if step % 5 == 0:
            metrics.append({"step": step, "eval": {"loss": 6.0 - step / 4}})
    return events, metrics


def write(run_dir: Path, events: Lines, metrics: Lines) -> None:
    for name, lines in (("events", events), ("metrics", metrics)):
        file = JsonLines(run_dir / f"{name}.jsonl")
        for fields in lines:
            file.append(fields)
        file.close()
    (run_dir / "recipe.toml").write_text("[run]\nsteps = 10\n")
    summary = build_summary(events, metrics, "done", "aa", "bb")
    (run_dir / "summary.json").write_text(json.dumps(summary))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    write(tmp_path, *story())
    return tmp_path


# Lines.

def test_a_line_is_on_disk_at_once_and_a_torn_one_is_none(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    file = JsonLines(path)
    file.append({"step": 1, "loss": np.float32(0.5), "list": (1, 2)})
    assert read_lines(path) == [{"step": 1, "loss": 0.5, "list": [1, 2]}]
    with open(path, "a") as torn:
        torn.write('{"step": 2, "lo')
    assert [fields["step"] for fields in read_lines(path)] == [1]
    again = JsonLines(path)
    again.append({"step": 2})
    assert [fields["step"] for fields in read_lines(path)] == [1, 2]


def test_what_json_cannot_say_is_null(tmp_path: Path) -> None:
    JsonLines(tmp_path / "x.jsonl").append({"loss": math.nan, "deep": {"x": [math.inf]}})
    assert read_lines(tmp_path / "x.jsonl") == [{"loss": None, "deep": {"x": [None]}}]


def test_an_altered_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"a": 1}\nnot json\n{"a": 2}\n')
    with pytest.raises(UserError, match="line 2 is not JSON"):
        read_lines(tmp_path / "x.jsonl")
    assert read_lines(tmp_path / "absent.jsonl") == []


@pytest.mark.parametrize("step", [0, 4, 5, 10, 99])
def test_cut_back_keeps_what_came_before(run_dir: Path, step: int) -> None:
    file = JsonLines(run_dir / "metrics.jsonl")
    before = read_lines(run_dir / "metrics.jsonl")
    file.cut_back(step)
    assert read_lines(run_dir / "metrics.jsonl") == [fields for fields in before if fields["step"] <= step]
    file.append({"step": step + 1})
    assert read_lines(run_dir / "metrics.jsonl")[-1] == {"step": step + 1}


# The summary.

def test_the_summary_of_the_story() -> None:
    summary = build_summary(*story(), "done", "aa", "bb")
    assert summary == {"status": "done", "steps": 10, "final_loss": 2.5, "eval": {"loss": 3.5},
                       "parameters_sha256": "aa", "state_sha256": "bb",
                       "steps_lost": 0, "recoveries": 1, "wall_s": 18.0, "goodput": round(10 / 12, 4),
                       "world_sizes": [3, 2]}


def test_a_run_without_a_step() -> None:
    summary = build_summary([], [], "failed", error="no worker came")
    assert (summary["steps"], summary["final_loss"], summary["eval"], summary["goodput"]) == (0, None, {}, 0.0)
    assert summary["error"] == "no worker came"


def test_the_time_between_two_sessions_does_not_count() -> None:
    events, metrics = story()
    shift = 1000.0
    events += [{"time": START + shift, "event": "run_started", "generation": 2, "step": 10},
               {"time": START + shift + 1, "event": "generation_started", "generation": 3, "step": 10, "world_size": 2,
                "workers": []}]
    metrics.append({**metrics[-2], "step": 11, "time": START + shift + 3, "generation": 3})
    assert sessions(events, metrics) == [(START, START + 18), (START + shift, START + shift + 3)]
    assert build_summary(events, metrics, "done")["wall_s"] == 21.0
    assert goodput(events, metrics) == round(11 / 14, 4)
    assert world_sizes(events) == [3, 2]


# Words and progress.

def test_numbers_that_people_read() -> None:
    assert [duration(s) for s in (0.126, 12.4, 185, 7385)] == ["0.13 s", "12 s", "3:05 min", "2:03:05 h"]
    assert [size(b) for b in (5, 13_600_000, 2e12)] == ["5 B", "13.6 MB", "2.0 TB"]


def test_every_event_of_the_contract_has_a_sentence() -> None:
    named = {"run_started", "generation_started", "worker_lost", "worker_joined", "healed", "resized", "recovered",
             "rewound",
             "checkpoint_committed", "checkpoint_rejected", "node_draining", "hang", "controller_restarted",
             "run_finished",
             "run_failed"}
    assert named <= set(EVENTS)
    assert sentence({"event": "worker_lost", "worker": "w2", "rank": 2, "cause": "killed", "detected_s": 0.05}) == (
        "worker lost (rank 2, w2): killed, noticed after 0.05 s")
    assert sentence({"event": "resized", "pause_s": 0.1}) == "resized pause_s 0.1000"
    assert sentence({"event": "rewound", "from": 3, "to": 3}) == "goes on from step 3"
    assert sentence({"event": "rewound", "from": 4, "to": 3}) == "rewound from step 4 to step 3"
    assert sentence({"event": "step_failed", "worker": "w1", "error": "no"}) == "a step failed on w1: no"
    assert sentence({"event": "unheard_of", "step": 3, "why": "x"}) == "unheard_of why x"


def test_an_event_is_held_against_the_table() -> None:
    everywhere = {"time": 1.0, "generation": 1, "step": 3}
    recovered = {**everywhere, "event": "recovered", "pause_s": 1.0, "steps_lost": 0}
    assert not mismatch(recovered) and not mismatch({**recovered, "mesh": {"data": 2}})
    assert mismatch({**everywhere, "event": "recovered", "pause_s": 1.0, "step_lost": 0}) == (
        "event recovered: lacks ['steps_lost'], has ['step_lost'] beside its fields")
    assert mismatch({**everywhere, "event": "unheard_of"}) == "event unheard_of: unknown"
    assert "lacks ['time']" in mismatch({name: value for name, value in recovered.items() if name != "time"})


def test_the_live_line() -> None:
    pace = Pace(100)
    assert pace.line() == "waiting for the first step"
    for step in range(1, 11):
        pace.add({"step": step, "loss": 2.5, "time": START + step, "step_s": 1.0, "world_size": 3, "generation": 4,
                  "samples": 12, "tokens": 768})
    assert pace.line() == "step 10/100 · loss 2.5000 · 768 tokens/s · 3 workers · generation 4 · 1:30 min left"


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_prints_a_line_for_every_event(terminal: bool) -> None:
    out = io.StringIO()
    events, metrics = story()
    with Progress(10, Console(file=out, force_terminal=terminal, width=160, color_system=None)) as progress:
        for event in events:
            progress.on_event(event)
        for fields in metrics:
            (progress.on_eval if "eval" in fields else progress.on_step)(fields)
    text = out.getvalue()
    assert all(sentence(event) in text for event in events)
    assert "step 10: evaluation loss 3.5000" in text and "step 10/10 · loss 2.5000" in text
    assert terminal == ("\x1b[" in text)


def test_status_of_a_run_that_has_ended_and_of_one_that_lives(run_dir: Path) -> None:
    lines = status_lines(run_dir)
    assert lines[0] == "done" and "workers 3 -> 2" in lines[2]
    (run_dir / "summary.json").unlink()
    assert status_lines(run_dir, START + 20)[:2] == ["running",
                                                     "step 10/10 · loss 2.5000 · 640 tokens/s · 2 workers · generation 2"]
    assert re.match(r"no sign of life for \d+ s: it may be dead", status_lines(run_dir, START + 2000)[0])
    with pytest.raises(UserError, match="is no run directory"):
        status_lines(run_dir / "absent")


# The report.

def test_the_report_opens_offline_and_marks_every_event(run_dir: Path) -> None:
    page = write_report(run_dir).read_text()
    assert 'src="http' not in page and "<link" not in page
    for event in read_lines(run_dir / "events.jsonl"):
        assert f'"name":"{event["event"]}"' in page
    assert "worker lost (rank 2, w2): killed, noticed after 0.05 s" in page and "state_sha256" in page


def test_a_report_of_a_run_without_a_line(tmp_path: Path) -> None:
    assert "running" in write_report(tmp_path).read_text()


def test_a_pipelines_picture_has_a_bar_for_every_action_where_it_happens() -> None:
    schedule = build("interleaved", 2, 4, 2)
    timeline = simulate(schedule, Costs.equal(2, 1.0, 1.0, 1.0, 0.25))
    chart = gantt(timeline.rows(), "interleaved")
    bars = {(stage, bar.name, where, begin, begin + length) for bar in chart.data
            for stage, where, begin, length in zip(bar.y, bar.customdata, bar.base, bar.x, strict=True)}
    assert bars == {(f"stage {s.stage}", s.action.kind,
                     f"{s.action.kind} of micro-batch {s.action.micro_batch}, chunk {s.action.chunk}, on stage "
                     f"{s.stage}", s.start, s.end)
                    for s in timeline.spans}
    assert len(bars) == sum(len(actions) for actions in schedule.actions)
    assert chart.layout.yaxis.categoryarray == ("stage 1", "stage 0")
    page = chart.to_html(include_plotlyjs=True)
    assert 'src="http' not in page and "forward of micro-batch 3, chunk 1, on stage 1" in page


# The check.

def sound(path: Path) -> None:
    """A checkpoint without fault."""


def test_a_sound_run_has_no_problem(run_dir: Path) -> None:
    assert verify(run_dir, sound).problems == []


@pytest.mark.parametrize("late_s", [-3600.0, 3600.0])
def test_clocks_prove_nothing(tmp_path: Path, late_s: float) -> None:
    """Workers date steps, the controller dates events, and their nodes need not agree on the hour."""
    events, metrics = story()
    for fields in metrics[:7]:
        if "time" in fields:
            fields["time"] += late_s
    write(tmp_path, events, metrics)
    assert verify(tmp_path, sound).problems == []


def drop(lines: Lines, **match: Any) -> None:
    lines[:] = [fields for fields in lines if any(fields.get(key) != value for key, value in match.items())]


Lie = Callable[[Lines, Lines], Any]
LIES: list[tuple[Lie, str]] = [
    (lambda e, m: drop(m, step=4), "step 5 where step 4 should be"),
    (lambda e, m: m.insert(3, dict(m[3])), "step 4 where step 5 should be"),
    (lambda e, m: m.insert(0, m.pop(3)), "step 4 where step 1 should be"),
    (lambda e, m: m[0].update(loss=None), "step 1 has no finite loss"),
    (lambda e, m: m.append({"step": 10, "eval": {"loss": 1.0}}), "two evaluations of step 10"),
    (lambda e, m: m.append({"step": 15, "eval": {"loss": 1.0}}), "an evaluation of step 15, which is not committed"),
    (lambda e, m: e[4].update(generation=1), "generation 1 starts after generation 1"),
    (lambda e, m: e.pop(4), "belongs to generation 2, which no event started"),
    (lambda e, m: m[-2].update(generation=1), "step 10 of generation 1 comes after one of generation 2"),
    (lambda e, m: m[0].update(world_size=9), "step 1 names 9 workers, its generation 1 has 3"),
    (lambda e, m: e.insert(6, e.pop(4)), "recovered of generation 2 comes before the start of that generation"),
    (lambda e, m: e[4].update(written=7), "generation 2 starts at step 6, and step 7 was written before"),
    (lambda e, m: e[4].update(step=5), "step 6 of generation 1 comes after the start of generation 2"),
    (lambda e, m: e[2].update(step=1), "step 1 comes before the start of its generation 1"),
    (lambda e, m: e[4].update(step=8), "step 7 comes before the start of its generation 2"),
    (lambda e, m: e[2]["workers"].pop(), "generation 1 has ranks [0, 1] and world size 3"),
]


@pytest.mark.parametrize(("lie", "told"), LIES, ids=[told for _, told in LIES])
def test_every_lie_is_found(tmp_path: Path, lie: Lie, told: str) -> None:
    events, metrics = story()
    lie(events, metrics)
    write(tmp_path, events, metrics)
    assert any(told in problem for problem in verify(tmp_path, sound).problems)


@pytest.mark.parametrize("key", ["steps", "final_loss", "eval", "steps_lost", "recoveries", "world_sizes",
                                 "state_sha256", "status"])
def test_a_summary_that_says_otherwise(run_dir: Path, key: str) -> None:
    summary = json.loads((run_dir / "summary.json").read_text())
    (run_dir / "summary.json").write_text(json.dumps({**summary, key: ""}))
    assert any(f"summary.json: {key} is" in problem for problem in verify(run_dir, sound).problems)


def test_bad_checkpoints_and_altered_files_are_problems(run_dir: Path) -> None:
    for name in ("step-00000005", "step-00000010", "step-00000015"):
        (run_dir / "checkpoints" / name).mkdir(parents=True)
    for name in ("step-00000005", "step-00000010"):
        (run_dir / "checkpoints" / name / "manifest.json").write_text("{}")

    def check(path: Path) -> None:
        if path.name == "step-00000010":
            raise BadCheckpoint("a byte is wrong")

    verdict = verify(run_dir, check)
    assert verdict.problems == ["checkpoints/step-00000010: a byte is wrong"]
    assert "1 whole checkpoint, every hash checked" in verdict.facts
    (run_dir / "events.jsonl").write_text("altered\n{}\n")
    assert "line 1 is not JSON" in verify(run_dir, sound).problems[0]


def test_many_problems_of_a_kind_are_counted(tmp_path: Path) -> None:
    events, metrics = story()
    for fields in metrics:
        fields["generation"] = 7
    write(tmp_path, events, metrics)
    assert "... and 5 more of this kind" in verify(tmp_path, sound).problems


def test_the_report_of_a_pipeline_shows_its_schedule(tmp_path: Path) -> None:
    line = {"time": 1.0, "event": "generation_started", "generation": 1, "step": 0, "world_size": 4, "workers": [],
            "mesh": {"data": 2, "pipeline": 2, "tensor": 1, "expert": 1}}
    (tmp_path / "events.jsonl").write_text(json.dumps(line) + "\n")
    (tmp_path / "recipe.toml").write_text('[model]\nkind = "nlp.gpt"\n[data]\nformat = "text"\npath = "x"\nbatch_size '
                                          '= 16\n'
                                          "[elastic]\nmax_workers = 4\nlogical_shards = 4\n[mesh]\npipeline = "
                                          "2\nmicro_batches = 2\n")
    rows, title = pipeline(tmp_path, [line])
    assert "1f1b: 2 stages that take alike, 4 micro-batches; bubble 20%" in title  # (K - 1) / (M + K - 1)
    assert {row["stage"] for row in rows} == {0, 1} and {row["micro_batch"] for row in rows} == {0, 1, 2, 3}
    assert "bubble 20%" in write_report(tmp_path).read_text()
