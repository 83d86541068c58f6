"""One generation's training by hand: a model of one number, a group of threads, no worker and no controller."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest

from elastic.chaos import Injector
from elastic.collective.local import Hub
from elastic.collective.solo import SoloGroup
from elastic.errors import GroupBroken, NonFiniteLoss
from elastic.messages import STOP, STOP_AND_SAVE, Ballot, Generation, Line, Save
from elastic.state.state import State
from elastic.worker import training as module
from elastic.worker.gradients import shard_seed
from elastic.worker.loop import apply_update, begin, train
from elastic.worker.loop_control import Control
from elastic.worker.training import Placement, Plan, Training
from tests.support.numbers import Backend
from tests.support.rules import OPTIMIZER

SHARDS, STEPS = 4, 6


class Loader:
    """The value of shard s in step k is 10 k + s."""

    def __init__(self, change: Callable[[int, int], float] = lambda step, shard: 10.0 * step + shard):
        self.change = change

    def __call__(self, step: int, shard: int) -> dict[str, float]:
        return {"value": self.change(step, shard)}

    def expect(self, keys: Iterable[tuple[int, int]]) -> None:
        """Nothing is loaded ahead."""


class Member(module.Member):
    """One without a worker, with everything that it posts and saves."""

    def __init__(self, loader: Loader | None = None, optimizer: dict[str, Any] | None = None, **plan: Any):
        self.posted: list[Any] = []
        self.saved: list[tuple[int, int, bool]] = []
        backend = Backend()
        state = State(backend, "sgd")
        state.start(0)
        training = Training(Plan(**{"num_steps": STEPS, "num_shards": SHARDS, "seed": 5, "exact": True,
                                    "optimizer": {**OPTIMIZER, **(optimizer or {})}, **plan}), loader or Loader(),
                            lambda step, shard: np.array([(step - 1) * SHARDS + shard]),
                            [lambda: {"value": 3.0}, lambda: {"value": 5.0}])
        super().__init__(training, Placement(backend, state), Control(), self.posted.append)

    def save(self, order: Save) -> None:
        self.saved.append((order.generation, order.step, order.wait))

    @property
    def w(self) -> float:
        return float(self.place.state.param[0])

    def train(self, group: Any, generation: Generation) -> str:
        self.control.enter(generation.number)
        self.control.attach(group)
        silent = Injector((), group.rank, lambda spec: None, lambda fault: None, lambda fault, g: g)
        return train(begin(self, generation, group, silent))

    def metrics(self) -> list[dict[str, Any]]:
        return [m.fields for m in self.posted if isinstance(m, Line) and m.file == "metrics" and "eval" not in m.fields]


def generation_of(size: int, number: int = 1, **fields: Any) -> Generation:
    return Generation(number, tuple(f"w{r}" for r in range(size)), "", "local", **{"committed": 0, **fields})


def run_all(members: list[Member], generation: Generation) -> list[Any]:
    """What each member's training returns or raises."""
    hub, out = Hub(), {}

    def body(rank: int) -> None:
        group = hub.form(generation.number, rank, len(members))
        try:
            out[rank] = members[rank].train(group, generation)
        except Exception as error:
            group.abort()
            out[rank] = error

    threads = [threading.Thread(target=body, args=(rank,), daemon=True) for rank in range(len(members))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(out) == len(members), "a member hangs"
    return [out[rank] for rank in range(len(members))]


def expected(steps: int) -> float:
    """By hand: the mean gradient of a step is the sum over its shards over its weight."""
    return -sum((4 * 10 * k + 0 + 1 + 2 + 3) / 8 for k in range(1, steps + 1))


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_a_run_by_hand(size: int) -> None:
    members = [Member(eval_every=3, checkpoint_every=4) for _ in range(size)]
    assert run_all(members, generation_of(size)) == ["done"] * size
    assert {m.w for m in members} == {np.float32(expected(STEPS))}
    assert [(f["step"], f["loss"], f["world_size"], f["samples"]) for f in members[0].metrics()] == [
        (k, (40 * k + 6) / 8, size, SHARDS) for k in range(1, STEPS + 1)]
    evaluations = [m.fields for m in members[0].posted if "eval" in m.fields]
    assert evaluations == [{"step": 3, "eval": {"loss": 4.0}}, {"step": 6, "eval": {"loss": 4.0}}]
    assert all(m.saved == [(1, 4, False), (1, 6, True)] for m in members)
    assert all(not m.posted for m in members[1:])
    assert all([f["step"] for f in m.unwritten if "eval" not in f] == list(range(1, STEPS + 1)) for m in members)


@pytest.mark.parametrize(("codes", "saves"), [((0, STOP, 0), False), ((STOP, STOP_AND_SAVE, 0), True)])
def test_one_member_s_stop_request_stops_all_at_the_same_step(codes: tuple[int, ...], saves: bool) -> None:
    members = [Member() for _ in codes]
    for member, code in zip(members, codes):
        if code:
            member.control.request_stop(1, code)
    assert run_all(members, generation_of(3)) == ["stopped"] * 3
    assert [m.place.state.committed for m in members] == [1, 1, 1]
    assert all(m.saved == ([(1, 1, True)] if saves else []) for m in members)
    assert all(m.held.ballot == Ballot(1, 46.0, 8.0, max(codes)) for m in members)


def test_a_stop_at_the_last_step_is_the_end() -> None:
    member = Member(num_steps=1)
    member.control.request_stop(1, STOP)
    assert run_all([member], generation_of(1)) == ["done"]


def test_what_is_saved_already_is_not_saved_again() -> None:
    member = Member(num_steps=0)
    assert run_all([member], generation_of(1)) == ["done"] and member.saved == []
    member = Member()
    member.place.state.committed = STEPS
    assert run_all([member], generation_of(1, committed=STEPS, checkpointed=STEPS - 1)) == ["done"]
    assert member.saved == [(1, STEPS, True)]


def test_a_member_that_missed_the_vote_applies_what_it_holds() -> None:
    seen, missed = Member(), Member()
    for member in (seen, missed):
        member.held.gradient = np.zeros(member.place.state.layout.gradient, np.float32)
        member.held.gradient[0] = 46.0
        member.held.step = 1
    ballot = Ballot(1, 46.0, 8.0)
    apply_update(seen, ballot)
    assert run_all([seen, missed], generation_of(2, number=2, committed=1, ballot=ballot)) == ["done", "done"]
    assert seen.w == missed.w == np.float32(expected(STEPS))


def test_nobody_saw_the_vote_and_the_step_is_redone_from_scratch() -> None:
    members = [Member(), Member()]
    for member in members:
        member.held.gradient, member.held.step = np.full(member.place.state.layout.gradient, 99.0, np.float32), 1
    assert run_all(members, generation_of(2, number=2)) == ["done", "done"]
    assert {m.w for m in members} == {np.float32(expected(STEPS))}


def test_a_joiner_is_healed_and_the_others_do_not_wait_for_it() -> None:
    members = [Member() for _ in range(3)]
    assert run_all(members[:2], generation_of(2)) == ["done", "done"]
    for member in members:
        member.training.plan = Plan(**{**member.training.plan.__dict__, "num_steps": STEPS + 2})
    members[2].place.state.committed = -1
    members[2].place.state.param[:] = 7.0
    assert run_all(members, generation_of(3, number=2, committed=STEPS, healers=((1, (2,)),))) == ["done"] * 3
    assert {m.w for m in members} == {np.float32(expected(STEPS + 2))}
    healed = [m.fields for member in members for m in member.posted if m.fields.get("event") == "healed"]
    assert [(f["from"], f["to"], f["step"]) for f in healed] == [("w1", ["w2"], STEPS)]


def test_nothing_is_changed_before_the_vote() -> None:
    """One member has no data for step 3: the other must stand at 2, untouched."""
    def lost(step: int, shard: int) -> float:
        if step == 3:
            raise OSError("the disk is gone")
        return 10.0 * step + shard

    good, bad = Member(), Member(Loader(lost))
    broken, failed = run_all([good, bad], generation_of(2))
    assert isinstance(broken, GroupBroken) and isinstance(failed, OSError)
    assert [m.place.state.committed for m in (good, bad)] == [2, 2]
    assert good.w == bad.w == np.float32(expected(2))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_lost_number_is_named_and_changes_nothing(value: float) -> None:
    members = [Member(Loader(lambda step, shard: value if (step, shard) == (3, 2) else 10.0 * step + shard))
               for _ in range(2)]
    for found in run_all(members, generation_of(2)):
        assert isinstance(found, NonFiniteLoss) and "step 3, logical shard 2, sample positions 10;" in str(found)
    assert {m.w for m in members} == {np.float32(expected(2))}


def test_an_update_that_fails_half_way_leaves_the_state_torn() -> None:
    member = Member()
    update = member.place.backend.update

    def failing(*arguments: Any) -> None:
        update(*arguments)
        if member.w == np.float32(expected(3)):
            raise MemoryError

    member.place.backend.update = failing
    (found,) = run_all([member], generation_of(1))
    assert isinstance(found, MemoryError)
    assert member.place.state.committed == -1 and member.held.ballot is not None and member.held.ballot.step == 3


def test_clipping_is_by_the_norm_of_the_mean_gradient() -> None:
    member = Member(num_steps=1, optimizer={"clip_norm": 0.5})
    assert run_all([member], generation_of(1)) == ["done"]
    assert member.w == pytest.approx(-0.5)
    loose = Member(num_steps=1, optimizer={"clip_norm": 100.0})
    assert run_all([loose], generation_of(1)) == ["done"]
    assert loose.w == np.float32(expected(1))


def test_lines_that_are_on_disk_are_forgotten() -> None:
    member = Member(eval_every=2)
    member.control.enter(1)
    wanted = iter([0, 0, 2, 2, 4, 4])

    def change(step: int, shard: int) -> float:
        if shard == 0:
            member.control.written = next(wanted)
        return 1.0

    member.training.load_batch = Loader(change)
    assert member.train(SoloGroup(), generation_of(1)) == "done"
    assert [("eval" in f, f["step"]) for f in member.unwritten] == [(True, 4), (False, 5), (False, 6), (True, 6)]


def test_what_is_asked_for_again_while_a_line_is_sent_comes_with_the_next() -> None:
    class Late(threading.Event):
        """Set by somebody else right after it was looked at."""

        def is_set(self) -> bool:
            found = super().is_set()
            self.set()
            return found

    member = Member(num_steps=3)
    member.control.repeat, member.training.eval_batches = Late(), []
    assert member.train(SoloGroup(), generation_of(1)) == "done"
    assert [fields["step"] for fields in member.metrics()] == [1, 1, 2, 3]


def test_seeds_depend_on_seed_step_and_shard_alone_and_fit_a_signed_word() -> None:
    seeds = {(a, b, c): shard_seed(a, b, c) for a in (0, 1, 2**62) for b in (1, 2, 300) for c in range(8)}
    assert len(set(seeds.values())) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds.values())
    assert shard_seed(0, 1, 0) == seeds[0, 1,
                                        0] == int(np.random.SeedSequence([0, 1, 0]).generate_state(1, np.uint64)[0]) // 2
