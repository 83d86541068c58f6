"""The schedules by name: GPipe, 1F1B, interleaved, ZB-H1. What each stage computes is written here; `message_order` puts the messages in.

On every chunk the weight gradients of the micro-batches come in ascending order, whatever the schedule: their sum,
added up in place, has the same bits with all of them. (GPipe's own drawing runs backward from the last micro-batch; the
time is the same.)
"""

from __future__ import annotations

from collections.abc import Sequence

from elastic.parallel.actions import Action, Kind, Name, Schedule
from elastic.parallel.message_order import PACE, Pace, place


def build(name: Name, num_stages: int, num_micro_batches: int, num_chunks: int = 1, pace: Pace = PACE) -> Schedule:
    """The schedule called `name`. `pace`: how forward, backward_input and backward_weight compare in time, as whole
    numbers.

    The pace decides only at which points messages pass. GPipe and 1F1B lose nothing at another pace than they are run
    at; the interleaved schedule and ZB-H1 do, for stages that share no moment between two computations wait for each
    other.
    """
    least = 2 if name == "interleaved" else 1
    for key, value, low in (("stages", num_stages, least), ("micro-batches", num_micro_batches, 1),
                            ("chunks", num_chunks, 1)):
        if value < low:
            raise ValueError(f"{name} over {value} {key}: there must be at least {low}.")
    if num_chunks > 1 and name != "interleaved":
        raise ValueError(f"{name} with {num_chunks} chunks a stage: it has one; \"interleaved\" has several.")
    order = {"gpipe": gpipe, "1f1b": one_forward_one_backward, "interleaved": interleaved,
             "zb-h1": zero_bubble_h1}[name]
    orders = [order(stage, num_stages, num_micro_batches, num_chunks) for stage in range(num_stages)]
    return Schedule(name, num_micro_batches, num_chunks, place(orders, num_chunks, pace))


def gpipe(stage: int, num_stages: int, num_micro_batches: int, num_chunks: int) -> list[Action]:
    """All forward, then all backward (Huang et al. 2019, section 2.3)."""
    return passes("forward", num_micro_batches) + passes("backward", num_micro_batches)


def one_forward_one_backward(stage: int, num_stages: int, num_micro_batches: int, num_chunks: int) -> list[Action]:
    """PipeDream-flush: as few forwards ahead as keep the last stage busy (Narayanan et al. 2021, section 2.2.1)."""
    return alternate(passes("forward", num_micro_batches), passes("backward", num_micro_batches),
                     num_stages - stage - 1)


def interleaved(stage: int, num_stages: int, num_micro_batches: int, num_chunks: int) -> list[Action]:
    """1F1B over several chunks a stage: K micro-batches pass a chunk before the next one's turn (Narayanan et al. 2021,
    section 2.2.2).

    The paper asks for a multiple of K micro-batches. Others are made up to one and the surplus is struck out, which
    leaves a schedule that runs: what is left waits for nothing of what is gone.
    """
    groups = [range(low, low + num_stages) for low in range(0, num_micro_batches, num_stages)]
    forward = [Action("forward", m, chunk) for group in groups for chunk in range(num_chunks) for m in group]
    backward = [Action("backward", m, chunk) for group in groups for chunk in reversed(range(num_chunks))
                for m in group]
    order = alternate(forward, backward, 2 * (num_stages - stage - 1) + (num_chunks - 1) * num_stages)
    return [action for action in order if action.micro_batch < num_micro_batches]


def zero_bubble_h1(stage: int, num_stages: int, num_micro_batches: int, num_chunks: int) -> list[Action]:
    """1F1B with the backward pass cut in two; stage s puts s weight gradients off, to fill the end (Qi et al. 2023,
    section 2.1)."""
    order: list[Action] = []
    for action in alternate(passes("forward", num_micro_batches), passes("backward_input", num_micro_batches),
                            num_stages - stage - 1):
        order.append(action)
        if action.kind == "backward_input" and action.micro_batch >= stage:
            order.append(Action("backward_weight", action.micro_batch - stage))
    return order + passes("backward_weight", num_micro_batches)[max(0, num_micro_batches - stage):]


def passes(kind: Kind, num_micro_batches: int) -> list[Action]:
    return [Action(kind, m) for m in range(num_micro_batches)]


def alternate(forward: Sequence[Action], backward: Sequence[Action], ahead: int) -> list[Action]:
    """`ahead` forwards, then forward and backward in turn, then the backwards that are left."""
    ahead = min(ahead, len(forward))
    order = list(forward[:ahead])
    for number, action in enumerate(forward[ahead:]):
        order += [action, backward[number]]
    return order + list(backward[len(forward) - ahead:])
