"""When everything of a schedule happens, given what it costs: how long a step takes, how much of it is a bubble, what is in flight."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from elastic.parallel.actions import Action, Schedule, in_flight
from elastic.parallel.checker import happenings


@dataclass(frozen=True)
class Costs:
    """Seconds per micro-batch, one figure a stage, over all of its chunks together (a chunk takes an equal share); and
    of one message.

    A backward pass in one piece takes `backward_input` + `backward_weight`.
    """

    forward: tuple[float, ...]
    backward_input: tuple[float, ...]
    backward_weight: tuple[float, ...]
    message: float = 0.0

    @classmethod
    def equal(cls, num_stages: int, forward: float, backward_input: float, backward_weight: float,
              message: float = 0.0) -> Costs:
        """The same figures for every stage."""
        return cls((forward,) * num_stages, (backward_input,) * num_stages, (backward_weight,) * num_stages, message)

    def seconds(self, stage: int, action: Action, num_chunks: int) -> float:
        if action.is_message:
            return self.message
        seconds = self.forward[stage] if action.kind == "forward" else 0.0
        if action.kind in ("backward", "backward_input"):
            seconds += self.backward_input[stage]
        if action.kind in ("backward", "backward_weight"):
            seconds += self.backward_weight[stage]
        return seconds / num_chunks


@dataclass(frozen=True)
class Span:
    """One action of one stage on the clock, in seconds. A message's span is the time in which it moves, the wait for
    its other end left out."""

    stage: int
    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """`bubble` is the share of the stages' time that is not computation; `peaks[s]` the most chunks' activations alive
    on stage s."""

    spans: tuple[Span, ...]
    seconds: float
    bubble: float
    peaks: tuple[int, ...]

    def rows(self) -> list[dict[str, Any]]:
        """The spans as plain values, as `observe.report.gantt` draws them."""
        return [{"stage": span.stage, **asdict(span.action), "start": span.start, "end": span.end}
                for span in self.spans]


def simulate(schedule: Schedule, costs: Costs) -> Timeline:
    """The clock of every stage from 0. A message starts when both of its ends have come to it and holds both;
    `ScheduleError` if it cannot run."""
    clocks, spans, work = [0.0] * schedule.num_stages, [], 0.0
    for ends in happenings(schedule):
        start = max([clocks[stage] for stage, _ in ends])
        for stage, position in ends:
            action = schedule.actions[stage][position]
            seconds = costs.seconds(stage, action, schedule.num_chunks)
            clocks[stage] = start + seconds
            spans.append(Span(stage, action, start, clocks[stage]))
            work += 0.0 if action.is_message else seconds
    total = max(clocks)
    bubble = 1.0 - work / (total * schedule.num_stages) if total else 0.0
    return Timeline(tuple(spans), total, bubble,
                    tuple(max(in_flight(actions), default=0) for actions in schedule.actions))
