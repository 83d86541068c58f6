"""Times, bubbles and memory of simulated schedules, against the figures their papers publish and one timeline written by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from elastic.parallel.actions import Action, Name
from elastic.parallel.checker import ScheduleError
from elastic.parallel.schedules import build
from elastic.parallel.simulator import Costs, Span, Timeline, simulate

STAGES = range(2, 9)
# Forward, backward_input, backward_weight: a backward as long as a forward, and twice as long.
BACKWARDS = [(2, 1, 1), (1, 1, 1)]


def run(name: Name, num_stages: int, num_micro_batches: int, pace: tuple[int, int, int], num_chunks: int = 1,
        message: float = 0.0) -> Timeline:
    """The schedule placed for the pace at which it is run."""
    return simulate(build(name, num_stages, num_micro_batches, num_chunks, pace),
                    Costs.equal(num_stages, *pace, message))


@pytest.mark.parametrize("num_stages", STAGES)
@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_the_bubble_of_gpipe_and_1f1b(name: Name, num_stages: int) -> None:
    """(K - 1) / (M + K - 1): Huang et al. 2019, section 2.3; Narayanan et al. 2021, section 2.2.1. Wherever the
    messages were placed for."""
    for num_micro_batches in range(1, 33):
        schedule = build(name, num_stages, num_micro_batches)
        for forward, backward_input, backward_weight in (*BACKWARDS, (10, 9, 8), (1, 5, 3)):
            found = simulate(schedule, Costs.equal(num_stages, forward, backward_input, backward_weight))
            slots = num_micro_batches + num_stages - 1
            assert found.seconds == pytest.approx(slots * (forward + backward_input + backward_weight))
            assert found.bubble == pytest.approx((num_stages - 1) / slots)


@pytest.mark.parametrize("num_stages", STAGES)
def test_the_bubble_of_the_interleaved_schedule(num_stages: int) -> None:
    """1 / V of 1F1B's: (K - 1) / (V M) of the ideal time (Narayanan et al. 2021, section 2.2.2), for multiples of K
    micro-batches."""
    for num_micro_batches in range(num_stages, 33, num_stages):
        for pace in BACKWARDS:
            for num_chunks in (2, 4):
                found = run("interleaved", num_stages, num_micro_batches, pace, num_chunks)
                slots = num_chunks * num_micro_batches + num_stages - 1
                assert found.seconds == pytest.approx(slots * sum(pace) / num_chunks)
                assert found.bubble == pytest.approx((num_stages - 1) / slots)


@pytest.mark.parametrize("num_stages", STAGES)
def test_the_bubble_of_zb_h1(num_stages: int) -> None:
    """(K - 1) (t_f + t_b - t_w), where 1F1B has (K - 1) (t_f + t_b + t_w): Qi et al. 2023, table 2, where t_w <= t_f
    and M >= K."""
    for num_micro_batches in range(num_stages, 33, 3):
        for pace in ((1, 1, 1), (2, 1, 1), (10, 9, 8)):
            forward, backward_input, backward_weight = pace
            idle = (num_stages - 1) * (forward + backward_input - backward_weight)
            assert run("zb-h1", num_stages, num_micro_batches,
                       pace).seconds == pytest.approx(num_micro_batches * sum(pace) + idle)


@pytest.mark.parametrize("num_stages", STAGES)
def test_who_has_the_smaller_bubble(num_stages: int) -> None:
    for num_micro_batches in range(1, 33):
        one, split = (run(name, num_stages, num_micro_batches, (1, 1, 1)).seconds for name in ("1f1b", "zb-h1"))
        assert split < one
        assert run("interleaved", num_stages, num_micro_batches, (1, 1, 1), 2).seconds <= one + 1e-9


@pytest.mark.parametrize("num_stages", STAGES)
def test_the_activations_alive(num_stages: int) -> None:
    """What each schedule's paper says the stages hold, in chunks of one micro-batch."""
    for num_micro_batches in (num_stages, 2 * num_stages, 4 * num_stages):
        peaks = {name: run(name, num_stages, num_micro_batches, (1, 1, 1), chunks).peaks
                 for name, chunks in (("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("zb-h1", 1))}
        assert peaks["gpipe"] == (num_micro_batches,) * num_stages
        assert peaks["1f1b"] == tuple(range(num_stages, 0, -1))
        assert peaks["interleaved"] == tuple(min(2 * num_micro_batches, num_stages + 1 + 2 * s)
                                             for s in reversed(range(num_stages)))
        assert peaks["zb-h1"] == (num_stages,) * num_stages


def test_a_timeline_written_by_hand() -> None:
    """Two stages, two micro-batches, unequal stages, messages of half a second: every start and end."""
    found = simulate(build("1f1b", 2, 2), Costs((1.0, 2.0), (1.0, 2.0), (1.0, 1.0), 0.5))
    expected = {
        0: [("forward", 0, 0.0, 1.0), ("send_activation", 0, 1.0, 1.5), ("forward", 1, 1.5, 2.5),
            ("send_activation", 1, 3.5, 4.0),
            ("receive_gradient", 0, 7.0, 7.5), ("backward", 0, 7.5, 9.5), ("receive_gradient", 1, 12.5, 13.0),
            ("backward", 1, 13.0, 15.0)],
        1: [("receive_activation", 0, 1.0, 1.5), ("forward", 0, 1.5, 3.5), ("receive_activation", 1, 3.5, 4.0),
            ("backward", 0, 4.0, 7.0),
            ("send_gradient", 0, 7.0, 7.5), ("forward", 1, 7.5, 9.5), ("backward", 1, 9.5, 12.5),
            ("send_gradient", 1, 12.5, 13.0)]}
    for stage, rows in expected.items():
        assert [span for span in found.spans if span.stage == stage] == [Span(stage, Action(kind, m), a, b) for kind, m, a, b in rows]
    assert found.seconds == 15.0
    assert found.bubble == pytest.approx(1 - (2 * (1 + 2) + 2 * (2 + 3)) / (2 * 15.0))
    assert found.peaks == (2, 1)


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "zb-h1"])
def test_the_slowest_stage_sets_the_pace(name: Name) -> None:
    """Many micro-batches: its own work and little more; the other stages wait."""
    costs = Costs((1.0, 1.0, 3.0, 1.0), (1.0, 1.0, 3.0, 1.0), (1.0, 1.0, 3.0, 1.0))
    found = simulate(build(name, 4, 32), costs).seconds
    assert 32 * 9.0 < found < 32 * 9.0 + 4 * 9.0


def test_placing_for_another_pace_costs_the_interleaved_schedule_time() -> None:
    """Why `build` asks for the pace: messages placed for a backward of two forwards, run with one of one."""
    costs = Costs.equal(3, 2, 1, 1)
    fits, other = (simulate(build("interleaved", 3, 12, 2, pace), costs).seconds for pace in ((2, 1, 1), (1, 1, 1)))
    assert fits == pytest.approx((2 * 12 + 2) * 2) and other > 1.1 * fits


def test_what_cannot_run_is_not_simulated() -> None:
    schedule = build("gpipe", 2, 2)
    broken = replace(schedule, actions=(schedule.actions[0], schedule.actions[1][:-1]))
    with pytest.raises(ScheduleError, match=r"stage 0, position 6, receive_gradient\(micro-batch 1, chunk 0\): deadlock"):
        simulate(broken, Costs.equal(2, 1, 1, 1))


# Huang et al. 2019, table 2: training throughput of a Transformer by partitions (2, 4, 8), relative to two of them and
# one micro-batch.
PUBLISHED = {1: (1.0, 1.07, 1.3), 4: (1.7, 3.2, 4.8), 32: (1.8, 3.4, 6.3)}
LAYERS_S, MESSAGE_S = 8.0, 0.002  # one batch forward through the whole model, and its activations over one cut


def throughput(num_stages: int, num_micro_batches: int) -> float:
    """Of the same model and batch, cut into stages and micro-batches. Forward is run once more for backward, as GPipe
    does."""
    forward = LAYERS_S / num_stages / num_micro_batches
    costs = Costs.equal(num_stages, forward, 2 * forward, forward, MESSAGE_S * LAYERS_S / num_micro_batches)
    return 1.0 / simulate(build("gpipe", num_stages, num_micro_batches), costs).seconds


def test_the_shape_of_gpipes_published_speedups() -> None:
    """More partitions and more micro-batches are faster, by the published figures where micro-batches fill the
    pipeline.

    With few of them the paper's larger systems gain from larger batches too ("batch size was adjusted to fit memory"),
    which is no matter of the schedule: there the order alone must agree, and with one micro-batch not even that.
    """
    found = {m: [throughput(k, m) / throughput(2, 1) for k in (2, 4, 8)] for m in PUBLISHED}
    assert found[32] == pytest.approx(PUBLISHED[32], rel=0.08)
    for row in (found, PUBLISHED):
        cells = {(m, k): row[m][i] for m in row for i, k in enumerate((2, 4, 8))}
        assert cells[4, 2] < cells[4, 4] < cells[4, 8] and cells[32, 2] < cells[32, 4] < cells[32, 8]
        assert all(cells[1, k] < cells[4, k] < cells[32, k] for k in (2, 4, 8))
        # two saturate first
        assert [cells[32, k] / cells[4, k] for k in (2, 4, 8)] == sorted(cells[32, k] / cells[4, k] for k in (2, 4, 8))
        assert max(cells[1, k] for k in (2, 4, 8)) < 1.5
