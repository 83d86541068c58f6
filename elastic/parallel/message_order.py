"""Where the messages stand between a schedule's computations.

A message blocks both its ends, so a send that stands right behind its computation makes the sender wait for a receiver
that is busy with something else, and two neighbours that both send first wait for ever. Here the computations run on a
clock, and a message passes at the first moment at which both its ends are between two computations. All that happens
has one order in time; each stage's list is its part of that order. So the lists never deadlock: whatever is earliest of
what is left can always go on, for all before it is done.
"""

from __future__ import annotations

from collections.abc import Sequence

from elastic.parallel.actions import Action, Actions

# of forward, backward_input and backward_weight; whole numbers, for moments must coincide exactly
Pace = tuple[int, int, int]
PACE: Pace = (1, 1, 1)
Item = tuple[str, int, int]  # "activation" or "gradient", micro-batch, depth of the chunk that needs it


def place(orders: Sequence[Sequence[Action]], num_chunks: int, pace: Pace = PACE) -> tuple[Actions, ...]:
    """Each stage's computations with the messages among them. `ValueError` if the computations wait for each other in a
    circle."""
    if min(pace) < 1:
        raise ValueError(f"pace = {pace}: forward, backward_input and backward_weight must take at least 1.")
    clock = Clock(orders, num_chunks, pace)
    while clock.start():
        clock.advance()
        clock.pass_messages()
    left = [(stage, order[clock.next[stage]]) for stage, order in enumerate(orders) if clock.next[stage] < len(order)]
    if left:
        raise ValueError("the order deadlocks: "
                         + "; ".join(f"stage {stage} waits to do {action}" for stage, action in left) + ".")
    return tuple(tuple(actions) for actions in clock.placed)


class Clock:
    """The stages at work."""

    def __init__(self, orders: Sequence[Sequence[Action]], num_chunks: int, pace: Pace):
        self.orders, self.stages, self.last = orders, len(orders), len(orders) * num_chunks - 1
        self.ticks = {"forward": pace[0], "backward_input": pace[1], "backward_weight": pace[2], "backward": pace[1]
                      + pace[2]}
        self.placed: list[list[Action]] = [[] for _ in orders]
        self.next = [0] * len(orders)
        self.busy: dict[int, int] = {}  # stage -> when it is done
        self.now = 0
        self.here: set[Item] = set()
        self.made: list[Item] = []  # and not passed on yet

    def start(self) -> bool:
        """Every free stage whose next computation has what it needs begins it; whether any is at work now."""
        for stage, order in enumerate(self.orders):
            if stage in self.busy or self.next[stage] == len(order):
                continue
            action = order[self.next[stage]]
            depth = action.chunk * self.stages + stage
            if action.kind == "forward":
                ready = not depth or ("activation", action.micro_batch, depth) in self.here
            else:
                ready = action.kind == "backward_weight" or depth == self.last or ("gradient", action.micro_batch, depth) in self.here
            if ready:
                self.placed[stage].append(action)
                self.next[stage] += 1
                self.busy[stage] = self.now + self.ticks[action.kind]
        return bool(self.busy)

    def advance(self) -> None:
        """To the next moment at which a computation ends."""
        self.now = min(self.busy.values())
        for stage in [stage for stage, end in self.busy.items() if end == self.now]:
            del self.busy[stage]
            action = self.placed[stage][-1]
            depth = action.chunk * self.stages + stage
            if action.kind == "forward" and depth < self.last:
                self.made.append(("activation", action.micro_batch, depth + 1))
            if action.kind in ("backward", "backward_input") and depth:
                self.made.append(("gradient", action.micro_batch, depth - 1))

    def pass_messages(self) -> None:
        """What can pass now: gradients, those that come from farthest up first, then activations, the deepest first.

        So a stage hands on what it has just made before it takes more, and no chain of neighbours waits for its end.
        """
        waiting = []
        for item in sorted(self.made, key=urgency):
            what, micro_batch, depth = item
            source = depth - 1 if what == "activation" else depth + 1
            if source % self.stages in self.busy or depth % self.stages in self.busy:
                waiting.append(item)
                continue
            self.here.add(item)
            for verb, at in (("send", source), ("receive", depth)):
                self.placed[at % self.stages].append(Action(f"{verb}_{what}", micro_batch, at // self.stages))  # type: ignore[arg-type]
        self.made = waiting


def urgency(item: Item) -> tuple[bool, int, int]:
    what, micro_batch, depth = item
    return what == "activation", depth if what == "gradient" else -depth, micro_batch
