"""P1, P2, P3 on real processes: whatever happens to the workers, one state comes out, and the survivors keep theirs.

Faults of one kind follow each other in one run: it waits after each until it has all its workers again.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from elastic.chaos import parse
from elastic.driver.trainer import Trainer
from tests.support.inprocess import module_recipe
from tests.support.oracle import undisturbed
from tests.support.runs import STEPS, assert_fired, assert_sound, assert_survivors_kept, bits, events, train
from tests.support.sampling import sample, sometimes

pytestmark = pytest.mark.usefixtures("cluster")

PHASES = [f"kill:1@{step}/{phase}" for step, phase in enumerate(["forward", "backward", "reduction", "vote", "update",
                                                                 "checkpoint"], 6)]
PHASES[-1] = "kill:1@16/checkpoint"
SEVERAL = [["kill:0@6"], ["kill:0@10/vote"], ["kill:0@16/checkpoint"], ["kill:1@24", "kill:2@24"],
           ["kill:1@32/reduction", "kill:0@33"]]


@pytest.mark.parametrize("faults", [sample(PHASES, 2), [fault for each in sample(SEVERAL, 2) for fault in each]],
                         ids=["phases", "several"])
def test_kills_one_after_the_other(tmp_path: Path, faults: list[str]) -> None:
    result = train(tmp_path / "run", 3, faults, elastic={"min_workers": 3})
    assert_sound(result, bits())
    assert_survivors_kept(result)
    assert_fired(result, faults)
    ranks = [e["rank"] for e in events(result, "worker_lost")]  # of two at once either may be noticed first
    assert sorted(ranks) == sorted(parse(fault).number for fault in faults)


@sometimes("kills during a recovery", 0.6)
def test_kills_during_a_recovery(tmp_path: Path) -> None:
    """A spare joins; the second kill strikes while it is healed: rank 0 is its source, rank 2 the spare itself."""
    faults = [fault for pair in sample([["kill:1@10", "kill:0@10/heal"], ["kill:1@30", "kill:2@30/heal"]], 1)
              for fault in pair]
    result = train(tmp_path / "run", 3, faults, elastic={"spares": 1, "min_workers": 3})
    assert_sound(result, bits())
    assert_survivors_kept(result)
    assert_fired(result, faults)
    assert len(events(result, "worker_lost")) == len(faults)


@sometimes("live scaling", 0.6)
def test_live_scaling(tmp_path: Path) -> None:
    """2 -> 3 -> 1 -> 2. Spares are warm already, so that each size is reached at its step."""
    given = module_recipe("Held", STEPS, model={"by": str(tmp_path / "held")}, checkpoint={"every_steps": 16},
                          data={"batch_size": 12},
                          elastic={"max_workers": 3, "spares": 1, "logical_shards": 6, "hang_timeout_s": 20.0})
    oracle = undisturbed(given)
    (tmp_path / "held").touch()  # each resize comes before the next is asked for
    result = Trainer(given, tmp_path / "run", "local", ["scale:2@1", "scale:3@12", "scale:1@24", "scale:2@36"]).fit()
    assert_sound(result, oracle.sha)
    assert_survivors_kept(result)
    assert result.summary["world_sizes"][-4:] == [2, 3, 1, 2]
    assert not events(result, "worker_lost")


def test_survivors_compile_nothing_again(tmp_path: Path) -> None:
    """P3: with torch.compile, a survivor's count of compilations is the same in every generation."""
    given = module_recipe("Small", 16, backend={"compile": True},
                          elastic={"max_workers": 2, "min_workers": 2, "hang_timeout_s": 20.0})
    result = Trainer(given, tmp_path / "run", "local", ["kill:1@8"]).fit()
    assert result.status == "done", result.error
    assert_survivors_kept(result)
    counts: dict[str, set[int]] = {}
    for generation in events(result, "generation_started"):
        for worker in generation["workers"]:
            counts.setdefault(worker["worker"], set()).add(worker["compilations"])
    assert len(counts) == 3
    assert all(len(found) == 1 and found.pop() >= 1 for found in counts.values())
