"""More members on a node than a segment of shared memory has counters for: another transport is taken, in whatever direction a group crosses that."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from elastic.collective.connect import transport_of
from elastic.collective.segment import MOST_READERS
from elastic.messages import Ready
from elastic.observe.jsonl import read_json, read_lines
from elastic.observe.metrics import steps_of
from elastic.recipe import Recipe, dumps
from tests.support.inprocess import fit, gpt_recipe
from tests.support.sampling import sometimes

WORKERS, STEPS = 64, 8


def members(number: int, node: str = "node", shares: bool = True) -> list[Ready]:
    return [Ready(f"worker-{n}", node, n, "127.0.0.1:1", shares=shares) for n in range(number)]


def test_members_of_one_node_share_memory_as_long_as_they_fit() -> None:
    assert [transport_of(members(n)) for n in (2, MOST_READERS, MOST_READERS + 1)] == ["shared", "shared", "gloo"]
    assert transport_of([*members(2), *members(1, "other")]) == transport_of(members(3, shares=False)) == "gloo"
    assert transport_of(members(3), "cuda") == "nccl"


@pytest.mark.slow
@sometimes("many members", 0.15)
def test_a_group_grows_beyond_what_shared_memory_holds_and_shrinks_again(tmp_path: Path) -> None:
    """64 processes; the oracle is one of two threads that nothing disturbs."""
    text = tmp_path / "a.txt"
    text.write_text("".join(f"{n} times {n} is {n * n}; " for n in range(400)))
    changes = {"backend": {"name": "reference", "threads": 1}, "data": {"batch_size": WORKERS},
               "run": {"eval_every": 0},
               "checkpoint": {"every_steps": 0}}

    def recipe(workers: int, spares: int = 0) -> Recipe:
        elastic = {"max_workers": workers, "spares": spares, "logical_shards": WORKERS, "hang_timeout_s": 60.0}
        return gpt_recipe(text, STEPS, elastic=elastic, **changes)

    oracle = fit(tmp_path / "oracle", recipe(2))
    file = tmp_path / "recipe.toml"
    file.write_text(dumps(recipe(WORKERS, WORKERS // 2)))
    ended = subprocess.run([sys.executable, "-m", "tests.support.forked", str(tmp_path / "run"), str(file),
                            str(WORKERS),
                            f"scale:{WORKERS}@3", "kill:40@5/reduction"],
                           capture_output=True, text=True, timeout=300, check=True, cwd=Path(__file__).parents[2])
    assert ended.stdout.split() == ["done"], ended.stdout + ended.stderr
    formed = [(e["world_size"], e["transport"]) for e in read_lines(tmp_path / "run" / "events.jsonl")
              if e["event"] == "generation_started"]
    assert formed == [(WORKERS // 2, "shared"), (WORKERS, "gloo"), (WORKERS // 2, "shared")], formed
    assert [f["step"] for f in steps_of(read_lines(tmp_path / "run" / "metrics.jsonl"))] == list(range(1, STEPS + 1))
    summary = read_json(tmp_path / "run" / "summary.json")
    assert summary and summary["state_sha256"] == oracle.sha and summary["steps_lost"] == 0
