"""An MLP cut into stages that run every schedule, against the uncut MLP in float64, and bit for bit against the uncut MLP in micro-batches."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest

from elastic.collective.local import Hub, Killed, LocalGroup
from elastic.collective.solo import SoloGroup
from elastic.errors import GroupBroken
from elastic.parallel.actions import NAMES, Name
from elastic.parallel.executor import Executor
from elastic.parallel.schedules import build
from tests.support.threads import together

WIDTHS = (6, 12, 10, 8, 12, 6, 10, 8, 5)  # eight layers
ROWS = 48
CHUNKS = {"gpipe": 1, "1f1b": 1, "interleaved": 2, "zb-h1": 1}
WAIT_S = 20.0


def zeros(size: int) -> np.ndarray:
    return np.zeros(size, np.float32)


@cache
def problem() -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Weights, inputs, targets."""
    random = np.random.default_rng(7)
    weights = [random.normal(0, 0.5, shape).astype(np.float32) for shape in zip(WIDTHS, WIDTHS[1:])]
    return weights, random.normal(size=(ROWS,
                                        WIDTHS[0])).astype(np.float32), random.normal(size=(ROWS, WIDTHS[-1])).astype(np.float32)


def uncut(weights: Sequence[np.ndarray]) -> tuple[float, list[np.ndarray]]:
    """The loss sum and its gradients in float64, all rows at once: tanh layers, half the squared distance."""
    _, inputs, targets = problem()
    values = [inputs.astype(np.float64)]
    for weight in weights:
        values.append(np.tanh(values[-1] @ weight))
    delta, gradients = values[-1] - targets, []
    for below, above, weight in reversed(list(zip(values, values[1:], weights))):
        local = delta * (1 - above ** 2)
        gradients.append(below.T @ local)
        delta = local @ weight.T
    return 0.5 * float(((values[-1] - targets) ** 2).sum()), gradients[::-1]


class MLP:
    """One stage's layers in float32: chunk c has those at depth c K + stage."""

    def __init__(self, stage: int, num_stages: int, num_chunks: int, num_micro_batches: int):
        weights, inputs, targets = problem()
        self.each = len(weights) // (num_stages * num_chunks)
        self.layers = {chunk: range((chunk * num_stages + stage) * self.each,
                                    (chunk * num_stages + stage + 1) * self.each)
                       for chunk in range(num_chunks)}
        self.weights, self.last = weights, len(weights)
        self.inputs, self.targets = (np.split(rows, num_micro_batches) for rows in (inputs, targets))
        self.gradients = {layer: np.zeros_like(weights[layer]) for layers in self.layers.values() for layer in layers}
        self.losses: dict[int, float] = {}
        self.values: dict[tuple[int, int], list[np.ndarray]] = {}
        self.locals: dict[tuple[int, int], list[np.ndarray]] = {}

    def forward(self, chunk: int, micro_batch: int, inputs: np.ndarray | None) -> np.ndarray | None:
        layers = self.layers[chunk]
        values = [self.inputs[micro_batch] if inputs is None else inputs.reshape(-1, WIDTHS[layers.start])]
        for layer in layers:
            values.append(np.tanh(values[-1] @ self.weights[layer]))
        self.values[micro_batch, chunk] = values
        if layers.stop == self.last:
            self.losses[micro_batch] = 0.5 * float(((values[-1] - self.targets[micro_batch]) ** 2).sum())
            return None
        return values[-1].ravel()

    def backward_input(self, chunk: int, micro_batch: int, output_gradients: np.ndarray | None) -> np.ndarray | None:
        layers, values = self.layers[chunk], self.values[micro_batch, chunk]
        delta = values[-1] - self.targets[micro_batch] if output_gradients is None else output_gradients.reshape(values[-1].shape)
        found = []
        for layer, above in zip(reversed(layers), reversed(values)):
            found.append(delta * (1 - above ** 2))
            delta = found[-1] @ self.weights[layer].T
        self.locals[micro_batch, chunk] = found
        return delta.ravel() if layers.start else None

    def backward_weight(self, chunk: int, micro_batch: int) -> None:
        values = self.values.pop((micro_batch, chunk))
        for layer, below, local in zip(reversed(self.layers[chunk]), values[-2::-1],
                                       self.locals.pop((micro_batch, chunk))):
            self.gradients[layer] += below.T @ local

    def backward(self, chunk: int, micro_batch: int, output_gradients: np.ndarray | None) -> np.ndarray | None:
        found = self.backward_input(chunk, micro_batch, output_gradients)
        self.backward_weight(chunk, micro_batch)
        return found


class Meeting:
    """Point to point as the groups of processes have it: a broadcast in a group of two, which holds the sender too."""

    def __init__(self, group: LocalGroup):
        self.group, self.rank, self.size = group, group.rank, group.size

    def pair(self, peer: int) -> LocalGroup:
        return self.group.subgroup((min(self.rank, peer), max(self.rank, peer)))

    def send(self, buffer: np.ndarray, to: int) -> None:
        self.pair(to).broadcast(buffer, int(self.rank > to))

    def receive(self, buffer: np.ndarray, source: int) -> None:
        self.pair(source).broadcast(buffer, int(source > self.rank))


def sizes_of(num_depths: int, num_micro_batches: int) -> list[int]:
    each = len(problem()[0]) // num_depths
    return [ROWS // num_micro_batches * WIDTHS[each * depth] for depth in range(1, num_depths)]


def train(name: Name, num_stages: int, num_micro_batches: int, runs: int = 1) -> tuple[float, list[np.ndarray]]:
    """Loss sum and gradients, gathered from the stages; of the last of several runs with the same executors."""
    chunks = CHUNKS[name]
    schedule = build(name, num_stages, num_micro_batches, chunks)

    def body(rank: int, group: Any) -> MLP:
        group = Meeting(group) if num_stages > 1 else SoloGroup(threading.Event())
        executor = Executor(schedule, group, sizes_of(schedule.num_depths, num_micro_batches), zeros)
        for _ in range(runs):
            stage = MLP(rank, num_stages, chunks, num_micro_batches)
            executor.run(stage)
        assert not stage.values and not stage.locals
        return stage

    stages = together(num_stages, body)
    found = {layer: gradient for stage in stages for layer, gradient in stage.gradients.items()}
    losses = stages[-1].losses
    return sum(losses[m] for m in range(num_micro_batches)), [found[layer] for layer in range(len(WIDTHS) - 1)]


def test_the_uncut_gradients_are_those_of_the_loss() -> None:
    """The oracle itself, against differences of the loss."""
    weights = [weight.astype(np.float64) for weight in problem()[0]]
    _, gradients = uncut(weights)
    for layer in (0, 4, 7):
        moved = [weight.copy() for weight in weights]
        moved[layer][1, 2] += 1e-6
        up = uncut(moved)[0]
        moved[layer][1, 2] -= 2e-6
        assert (up - uncut(moved)[0]) / 2e-6 == pytest.approx(gradients[layer][1, 2], rel=1e-5)


@pytest.mark.parametrize("num_micro_batches", [1, 4, 8])
@pytest.mark.parametrize("num_stages", [2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_a_cut_model_has_the_uncut_ones_gradients(name: Name, num_stages: int, num_micro_batches: int) -> None:
    loss, gradients = train(name, num_stages, num_micro_batches, runs=2)
    whole_loss, whole = uncut(problem()[0])
    assert loss == pytest.approx(whole_loss, rel=1e-6)
    for found, expected in zip(gradients, whole):
        assert np.linalg.norm(found - expected) < 2e-6 * np.linalg.norm(expected)
    same_loss, same = train("gpipe", 1, num_micro_batches)
    assert loss == same_loss
    for found, expected in zip(gradients, same):
        np.testing.assert_array_equal(found, expected, strict=True)


def test_micro_batches_are_another_sum() -> None:
    """Bits do depend on the number of micro-batches, so the comparison of bits can fail."""
    assert any((a != b).any() for a, b in zip(train("1f1b", 2, 4)[1], train("1f1b", 2, 8)[1]))


def test_a_lost_stage_ends_the_others() -> None:
    hub, schedule = Hub(), build("1f1b", 4, 8)

    class Mortal(MLP):
        def backward_input(self, chunk: int, micro_batch: int, output_gradients: np.ndarray
                           | None) -> np.ndarray | None:
            if self.layers[0].start == 4 and micro_batch == 3:
                hub.kill(2)
            return super().backward_input(chunk, micro_batch, output_gradients)

    def body(rank: int) -> str:
        executor = Executor(schedule, Meeting(hub.form(1, rank, 4)), sizes_of(4, 8), zeros)  # type: ignore[arg-type]
        try:
            executor.run(Mortal(rank, 4, 1, 8))
        except GroupBroken:
            return "broken"
        except Killed:
            return "killed"
        return "done"

    assert together(4, lambda rank, _: body(rank)) == ["broken", "broken", "killed", "broken"]


def test_what_does_not_fit_is_one_sentence() -> None:
    group: Any = Hub().form(1, 0, 2)
    with pytest.raises(ValueError, match="a schedule of 4 stages on a group of 2"):
        Executor(build("1f1b", 4, 2), group, [1, 1, 1], zeros)
    with pytest.raises(ValueError, match="2 sizes for 4 chunks of the model: there must be 3"):
        Executor(build("interleaved", 2, 2, 2), group, [1, 1], zeros)
    wrong = sizes_of(2, 4)[0] + 1
    with pytest.raises(ValueError, match=rf"chunk 0 of the model made an array of shape \({wrong - 1},\) for chunk 1: .* of {wrong} elements"):
        Executor(build("1f1b", 2, 4), group, [wrong], zeros).run(MLP(0, 2, 1, 4))
