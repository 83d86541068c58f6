"""A pipeline schedule as data: what each stage does with which micro-batch, in which order.

A stage is one worker of the pipeline axis and holds `num_chunks` chunks of the model: chunk c of stage s of K lies at
depth c K + s, so activations go from stage to stage and from the last one back to the first, one chunk further. A
message is a send on one stage and a receive on the other, and blocks both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal["forward", "backward", "backward_input", "backward_weight",
               "send_activation", "receive_activation", "send_gradient", "receive_gradient"]
Name = Literal["gpipe", "1f1b", "interleaved", "zb-h1"]
NAMES: tuple[Name, ...] = get_args(Name)


@dataclass(frozen=True)
class Action:
    """`backward` is input and weight gradients in one; the two may come apart instead. `chunk` is the stage's own
    chunk, in a message too."""

    kind: Kind
    micro_batch: int
    chunk: int = 0

    @property
    def is_message(self) -> bool:
        return self.kind.startswith(("send", "receive"))

    def __str__(self) -> str:
        return f"{self.kind}(micro-batch {self.micro_batch}, chunk {self.chunk})"


Actions = tuple[Action, ...]


@dataclass(frozen=True)
class Schedule:
    """`actions[s]` is what stage s does, in order."""

    name: Name
    num_micro_batches: int
    num_chunks: int
    actions: tuple[Actions, ...]

    @property
    def num_stages(self) -> int:
        return len(self.actions)

    @property
    def num_depths(self) -> int:
        return self.num_stages * self.num_chunks

    def depth(self, stage: int, chunk: int) -> int:
        return chunk * self.num_stages + stage

    def peer(self, stage: int, action: Action) -> int:
        """The stage at the other end of a message."""
        onward = action.kind in ("send_activation", "receive_gradient")
        return (stage + (1 if onward else -1)) % self.num_stages

    def counterpart(self, stage: int, action: Action) -> Action:
        """What the peer's action must be for a message to pass."""
        verb, _, what = action.kind.partition("_")
        step = 1 if action.kind in ("send_activation", "receive_gradient") else -1
        kind: Kind = f"{'receive' if verb == 'send' else 'send'}_{what}"  # type: ignore[assignment]
        return Action(kind, action.micro_batch, (self.depth(stage, action.chunk) + step) // self.num_stages)


def in_flight(actions: Actions) -> list[int]:
    """After each action of one stage: how many (micro-batch, chunk) pairs have gone forward and still lack a gradient.
    """
    held, counts = 0, []
    for action in actions:
        held += {"forward": 1, "backward": -1, "backward_weight": -1}.get(action.kind, 0)
        counts.append(held)
    return counts
