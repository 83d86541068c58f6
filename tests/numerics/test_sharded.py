"""The optimizer's state shared out over the workers, each block with a twin: the bits of a run in which everybody keeps all, and nothing lost."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from elastic.recipe import Recipe
from elastic.state.flat_layout import BLOCK
from tests.support.frameworks import load, names
from tests.support.inprocess import Result, Run, fit, gpt_recipe
from tests.support.oracle import undisturbed
from tests.support.sampling import sample

STEPS = 8
WIDE = {"layers": 1, "heads": 2, "width": 160, "context": 4}  # its trainable parameters take BLOCKS blocks
BLOCKS = 6
PHASES = ("forward", "reduction", "vote", "update", "gather", "checkpoint")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def recipe(plays: Path, workers: int, sharded: bool = True, twin: bool = True, steps: int = STEPS,
           framework: str = "torch",
           every: int = 4, **options: Any) -> Recipe:
    return gpt_recipe(plays, steps, model=WIDE, backend={"name": framework}, elastic={"max_workers": workers},
                      run={"eval_every": 5},
                      checkpoint={"every_steps": every}, data={"eval_fraction": 0.001},
                      optimizer={"sharded": sharded, "twin": twin, "clip_norm": 0.5, "ema": 0.7, **options})


def alone(plays: Path, **options: Any) -> Result:
    """One worker that keeps everything."""
    return undisturbed(recipe(plays, 1, sharded=False, **options))


def assert_same(found: Result, wanted: Result, steps_lost: int = 0) -> None:
    found.assert_sound(wanted.summary["steps"], steps_lost)
    assert found.sha == wanted.sha
    assert [line["eval"] for line in found.metrics
            if "eval" in line] == [line["eval"] for line in wanted.metrics if "eval" in line]


def saved_before(result: Result, event: dict[str, Any]) -> int:
    """The step of the newest checkpoint at that moment; a save is beside the training, so it is not always the step that was due."""
    return max((each["step"] for each in result.events[:result.events.index(event)] if each["event"] == "checkpoint_committed"), default=0)


@pytest.mark.parametrize("framework", names())
def test_every_number_of_workers_gives_the_bits_of_one_that_holds_all(framework: str, plays: Path,
                                                                      tmp_path: Path) -> None:
    load(framework, "backend")
    wanted = alone(plays, framework=framework)
    for workers, twin in ((1, True), (2, True), (2, False), (3, True), (4, True),
                          (4, False)) if framework == "torch" else ((3, True),):
        assert_same(fit(tmp_path / f"{workers}{twin}", recipe(plays, workers, twin=twin, framework=framework)), wanted)


@pytest.mark.parametrize("phase", sample(PHASES, 3))
def test_a_lost_worker_costs_no_step(phase: str, plays: Path, tmp_path: Path) -> None:
    """Every rank falls once, in each phase."""
    wanted = alone(plays)
    for rank in range(3):
        result = fit(tmp_path / str(rank), recipe(plays, 3), (f"kill:{rank}@4/{phase}",))
        assert_same(result, wanted)
        assert len(result.named("worker_lost")) == 1
        assert sum(event["blocks"] for event in result.named("twin_used")) > 0
        assert not result.named("rewound") and not result.named("checkpoint_rejected")
        assert [event["path"] for event in result.named("loaded")] == []


@pytest.mark.parametrize("rank", sample(range(4), 2))
def test_who_falls_while_the_state_moves_costs_no_step(rank: int, plays: Path, tmp_path: Path) -> None:
    """Three become four; old holders and the one that has just come fall in the midst of it."""
    run = Run(tmp_path / "run", recipe(plays, 4, steps=12), ("scale:3@1", f"kill:{rank}@5/heal"),
              hooks={5: lambda run: run.scale(4)})
    result = run.fit()
    assert_same(result, alone(plays, steps=12))
    assert len(result.named("worker_lost")) == 1 and not result.named("rewound")


def test_two_that_are_not_neighbours_may_fall_at_once(plays: Path, tmp_path: Path) -> None:
    result = fit(tmp_path / "run", recipe(plays, 4), ("kill:0@3/gather", "kill:2@3/gather"))
    assert_same(result, alone(plays))
    assert not result.named("rewound")


def test_keeper_and_twin_that_fall_at_once_take_the_run_back_to_a_checkpoint(plays: Path, tmp_path: Path) -> None:
    result = fit(tmp_path / "run", recipe(plays, 4), ("kill:1@6/update", "kill:2@6/update"))
    (rewound,) = result.named("rewound")
    assert_same(result, alone(plays), steps_lost=rewound["from"] - rewound["to"])
    assert (rewound["from"], rewound["to"]) == (6, saved_before(result, rewound))


def test_without_a_twin_a_lost_worker_takes_the_run_back_to_a_checkpoint(plays: Path, tmp_path: Path) -> None:
    result = fit(tmp_path / "run", recipe(plays, 3, twin=False), ("kill:1@7/forward",))
    (rewound,) = result.named("rewound")
    assert_same(result, alone(plays), steps_lost=rewound["from"] - rewound["to"])
    assert (rewound["from"], rewound["to"]) == (6, saved_before(result, rewound))
    assert not result.named("twin_used")


@pytest.mark.parametrize("twin", [True, False])
def test_a_run_that_grows_and_shrinks_moves_its_state(twin: bool, plays: Path, tmp_path: Path) -> None:
    def grow_from_one(run: Run, step: int = 10) -> None:
        if len(run.controller.state.group) == 1:
            run.scale(3)
        else:  # it shrinks member by member
            run.hooks[step + 1] = partial(grow_from_one, step=step + 1)

    hooks = {2: lambda run: run.scale(4), 6: lambda run: run.scale(1), 10: grow_from_one}
    options = {"steps": 24, "every": 0}
    given = recipe(plays, 4, twin=twin, **options)
    # who joins is ready before the run is over
    warm = given.model_copy(update={"elastic": given.elastic.model_copy(update={"spares": 3})})
    result = Run(tmp_path / "run", warm, ("scale:2@1",), hooks=hooks).fit()
    assert_same(result, alone(plays, **options))
    sizes = [event["world_size"] for event in result.named("generation_started")]
    assert 4 in sizes and 1 in sizes and sizes[-1] == 3
    moved = result.named("optimizer_resharded")
    assert moved and all(event["bytes"] > 0 and event["seconds"] >= 0 for event in moved)
    assert not result.named("rewound")
    assert bool(result.named("loaded")) == (not twin), "with a twin nothing goes by way of a checkpoint"


@pytest.mark.parametrize(("before", "after"),
                         [((3, True), (1, False)), ((2, False), (3, True)), ((4, True), (3, True))])
def test_a_checkpoint_passes_from_one_keeping_to_another(before: tuple[int, bool], after: tuple[int, bool], plays: Path,
                                                         tmp_path: Path) -> None:
    options = {"clip_norm": 0.0, "ema": 0.7}
    for steps, (workers, sharded) in ((4, before), (STEPS, after)):
        result = fit(tmp_path / "relay", recipe(plays, workers, sharded, steps=steps, schedule="constant",
                                                warmup_steps=0, **options))
        assert result.outcome.status == "done", result.outcome.error
    wanted = fit(tmp_path / "alone", recipe(plays, 1, sharded=False, schedule="constant", warmup_steps=0, **options))
    assert result.sha == wanted.sha


@pytest.mark.parametrize("workers", [1, 2, 3, 4])
def test_a_worker_holds_slots_for_what_it_keeps_and_no_more(workers: int, plays: Path, tmp_path: Path) -> None:
    held: dict[str, list[int]] = {}

    def look(run: Run) -> None:
        for name, rim in run.fleet.workers.items():
            assert rim.worker is not None
            held[name] = [buffer.nbytes for buffer in rim.worker.place.state.slots.values()]

    fit(tmp_path / "run", recipe(plays, workers), hooks={3: look}).assert_sound(STEPS)
    assert len(held) == workers and all(len(sizes) == 3 for sizes in held.values()), "two moments and an average"
    slots = [sizes[0] / (4 * BLOCK) for sizes in held.values()]
    assert sum(slots) == BLOCKS * min(2, workers), "every block has two holders"
    assert max(slots) <= -(-BLOCKS // workers) * min(2, workers)
