"""What a person sees while training: one live line, and a line for every event; plain lines where there is no terminal."""

from __future__ import annotations

import time
from collections import deque
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from elastic.humanize import count, duration, numbers
from elastic.observe.event_kinds import kind_of, sentence
from elastic.observe.metrics import unit_of

WINDOW = 50  # steps that speed is averaged over
PACE = " · loss "  # in each line of `Pace`
PLAIN_EVERY_S = 5.0  # between two step lines where there is no terminal


class Pace:
    """Speed and time left, from the latest committed steps."""

    def __init__(self, num_steps: int | None):
        self.num_steps = num_steps
        self.recent: deque[dict[str, Any]] = deque(maxlen=WINDOW)

    def add(self, step: dict[str, Any]) -> None:
        self.recent.append(step)

    @property
    def span_s(self) -> float:
        """Seconds that the steps in the window took, pauses between them included."""
        first, last = self.recent[0], self.recent[-1]
        return max(last["time"] - first["time"] + first["step_s"], 1e-9)

    def line(self) -> str:
        """step 120/2000 · loss 2.3140 · 18200 tokens/s · 3 workers · generation 2 · 1:12 min left"""
        if not self.recent:
            return "waiting for the first step"
        last = self.recent[-1]
        of = f"/{self.num_steps}" if self.num_steps else ""
        unit = unit_of([last])
        rate = sum(step[unit] for step in self.recent) / self.span_s
        parts = [f"step {last['step']}{of}", f"loss {last['loss']:.4f}", f"{rate:.0f} {unit}/s",
                 count(last["world_size"], "worker"),
                 f"generation {last['generation']}"]
        if self.num_steps and last["step"] < self.num_steps:
            parts.append(f"{duration((self.num_steps - last['step']) * self.span_s / len(self.recent))} left")
        return " · ".join(parts)


class Progress:
    """`with Progress(steps) as p: trainer.fit(p.on_step, p.on_eval, p.on_event)`."""

    def __init__(self, num_steps: int | None = None, console: Console | None = None):
        self.console = console or Console()
        self.pace = Pace(num_steps)
        self.live = Live(Text(""), console=self.console, refresh_per_second=4,
                         transient=True) if self.console.is_terminal else None
        self.printed_s = 0.0
        self.shown = 0

    def __enter__(self) -> Progress:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType
                 | None) -> None:
        if self.live:
            self.live.stop()
        if self.pace.recent and self.pace.recent[-1]["step"] != self.shown:
            self._say(self.pace.line())

    def on_step(self, step: dict[str, Any]) -> None:
        self.pace.add(step)
        if self.live:
            self.live.update(Text(self.pace.line(), style="bold", no_wrap=True, overflow="ellipsis"))
        elif time.monotonic() - self.printed_s >= PLAIN_EVERY_S:
            self.printed_s = time.monotonic()
            self.shown = step["step"]
            self._say(self.pace.line())

    def on_eval(self, fields: dict[str, Any]) -> None:
        self._say(f"step {fields['step']}: evaluation {numbers(fields['eval'])}", "bold green")

    def on_event(self, event: dict[str, Any]) -> None:
        num_steps = event.get("num_steps")
        if num_steps:
            self.pace.num_steps = num_steps
        self._say(f"step {event.get('step', 0)}: {sentence(event)}", kind_of(event).tone)

    def on_text(self, text: str) -> None:
        """A line that another process's progress has printed."""
        if self.live and PACE in text:
            self.live.update(Text(text, style="bold", no_wrap=True, overflow="ellipsis"))
        else:
            self._say(text)

    def _say(self, text: str, style: str = "") -> None:
        self.console.print(Text(text, style=style), soft_wrap=True)
