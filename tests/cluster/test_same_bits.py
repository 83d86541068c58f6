"""P1, P2, P3 on real processes: whatever happens to the workers, one state comes out, and the survivors keep theirs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.runs import assert_sound, assert_survivors_kept, events, train

pytestmark = pytest.mark.usefixtures("cluster")


@pytest.fixture(scope="module")
def bits(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The state of one worker whom nobody disturbs."""
    result = train(tmp_path_factory.mktemp("undisturbed") / "run", 1)
    assert result.status == "done", result.error
    assert result.summary["recoveries"] == 0
    return result.summary["state_sha256"]


@pytest.mark.parametrize("workers", [2, 3, 4])
def test_any_number_of_workers(bits: str, tmp_path: Path, workers: int) -> None:
    result = train(tmp_path / "run", workers)
    assert_sound(result, bits)
    assert result.summary["world_sizes"] == [workers]


@pytest.mark.parametrize("phase", ["forward", "backward", "reduction", "vote", "update", "checkpoint"])
def test_a_kill_in_each_phase(bits: str, tmp_path: Path, phase: str) -> None:
    result = train(tmp_path / "run", 3, [f"kill:1@40/{phase}"])
    assert_sound(result, bits)
    assert_survivors_kept(result)
    assert [e["fault"] for e in events(result, "chaos")] == [f"kill:1@40/{phase}"]
    assert [e["rank"] for e in events(result, "worker_lost")] == [1]


@pytest.mark.parametrize("faults", [["kill:0@30"], ["kill:0@30/vote"], ["kill:0@40/checkpoint"], ["kill:1@30", "kill:2@30"],
                                    ["kill:1@30/reduction", "kill:0@31"]], ids="+".join)
def test_rank_0_and_several_at_once(bits: str, tmp_path: Path, faults: list[str]) -> None:
    result = train(tmp_path / "run", 3, faults)
    assert_sound(result, bits)
    assert_survivors_kept(result)
    assert len(events(result, "worker_lost")) == len(faults)


@pytest.mark.parametrize("rank", [0, 2])
def test_a_kill_during_recovery(bits: str, tmp_path: Path, rank: int) -> None:
    """A spare joins at once; the second kill strikes while it is healed: rank 0 is its source, rank 2 the spare itself."""
    result = train(tmp_path / "run", 3, ["kill:1@30", f"kill:{rank}@30/heal"], elastic={"spares": 1})
    assert_sound(result, bits)
    assert_survivors_kept(result)
    assert len(events(result, "worker_lost")) == 2


def test_live_scaling(bits: str, tmp_path: Path) -> None:
    """2 -> 4 -> 1 -> 3. Spares are warm already, so that each size is reached at its step."""
    result = train(tmp_path / "run", 4, ["scale:2@1", "scale:4@30", "scale:1@60", "scale:3@90"], elastic={"spares": 4})
    assert_sound(result, bits)
    assert_survivors_kept(result)
    assert result.summary["world_sizes"][-4:] == [2, 4, 1, 3]
    assert not events(result, "worker_lost")


def test_fast_reduction_gives_up_the_bits(cluster: None, tmp_path: Path) -> None:
    """The negative control: without the canonical order the bits do depend on the number of workers."""
    hashes = {train(tmp_path / f"run{n}", n, elastic={"reduction": "fast"}).summary["state_sha256"] for n in (1, 2, 3)}
    assert len(hashes) >= 2


@pytest.mark.slow
def test_survivors_compile_nothing_again(cluster: None, tmp_path: Path) -> None:
    """P3: with torch.compile, a survivor's count of compilations is the same in every generation."""
    result = train(tmp_path / "run", 2, ["kill:1@20"], backend={"compile": True}, model={"layers": 1}, run={"steps": 40, "eval_every": 0},
                   elastic={"spares": 1})
    assert result.status == "done", result.error
    assert_survivors_kept(result)
    counts: dict[str, set[int]] = {}
    for generation in events(result, "generation_started"):
        for worker in generation["workers"]:
            counts.setdefault(worker["worker"], set()).add(worker["compilations"])
    assert len(counts) == 3
    assert all(len(found) == 1 and found.pop() >= 1 for found in counts.values())
