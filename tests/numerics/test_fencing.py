"""Fencing (P4): a worker that was stopped, given up and then continued changes nothing."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from elastic.messages import Line, Part, Standing
from elastic.observe.jsonl import read_lines
from tests.support.inprocess import Result, Run, fit, module_recipe
from tests.support.sampling import sample

pytest.importorskip("torch", reason="torch is not installed")

STEPS, LIMIT_S = 16, 30.0


def recipe(**elastic: Any) -> Any:
    return module_recipe("Net", STEPS, elastic={"max_workers": 3, **elastic}, checkpoint={"every_steps": 4})


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Result:
    result = fit(tmp_path_factory.mktemp("one") / "run", recipe(max_workers=1))
    result.assert_sound(STEPS)
    return result


def snapshot(run: Run, names: list[str]) -> dict[str, bytes]:
    """Every byte that the survivors and the run directory hold."""
    out = {}
    for name in names:
        worker = run.fleet.workers[name].worker
        assert worker is not None
        state, held = worker.place.state, worker.held
        flat = {"param": state.param, **state.slots, **state.buffers}
        if held.gradient is not None:
            flat["gradient"] = held.gradient
        out |= {f"{name}/{key}": array.tobytes() for key, array in flat.items()}
        out[f"{name}/committed"] = bytes(str((state.committed, held.step, held.ballot)), "utf-8")
    for path in sorted(run.run_dir.rglob("*")):
        if path.is_file() and not is_leftover(path):
            out[str(path)] = path.read_bytes()
    return out


def is_leftover(path: Path) -> bool:
    """A part that no manifest names: it belongs to no checkpoint, and is cleared away with the next."""
    manifest = path.parent / "manifest.json"
    return ".safetensors" in path.name and not (manifest.exists() and path.name in manifest.read_text())


@pytest.mark.parametrize("phase", sample(["forward", "reduction", "vote", "update", "checkpoint"], 3))
def test_a_continued_worker_changes_not_a_byte(phase: str, oracle: Result, tmp_path: Path) -> None:
    run = Run(tmp_path, recipe(min_workers=3, hang_timeout_s=1.0), [f"stop:1@8/{phase}"], capacity=3)
    run.hooks[5] = lambda run: run.fleet.grow(2)  # no room for a replacement: the survivors will wait, warm
    waiting = threading.Event()

    def on_event(name: str) -> None:
        state = run.controller.state
        words = state.last.values()
        if name in ("waiting", "checkpoint_committed") and words and run.controller.checkpoints.newest >= max(word.committed for word in words):
            waiting.set()  # and whoever had to has written down what they have

    run.run_log.on_event = on_event
    ended: list[Result] = []
    thread = threading.Thread(target=lambda: ended.append(run.fit()), daemon=True)
    thread.start()
    assert waiting.wait(LIMIT_S)
    (lost,) = (e for e in read_lines(tmp_path / "events.jsonl") if e["event"] == "worker_lost")
    stopped, survivors = lost["worker"], list(run.fleet.workers)
    assert stopped not in survivors and len(survivors) == 2
    stale = run.fleet.rims[stopped]
    before = snapshot(run, survivors)

    run.fleet.resume(stopped)
    ghost = next(t for t in run.fleet.threads if t.name == stopped)
    ghost.join(LIMIT_S)
    assert not ghost.is_alive()
    for word in (Standing(stopped, 1, "done", 99), Line(1, "metrics", {"step": 8, "loss": 0.0}),
                 Line(1, "events", {"event": "healed"}),
                 Part(stopped, 1, 99, "{}", 0.0, 0.0), Standing(stopped, 2, "failed", 99, fatal=True, error="ghost")):
        assert run.controller.deliver(stopped, [word]) == -1
    assert snapshot(run, survivors) == before
    assert run.controller.mailbox.empty() or run.controller.state.phase == "waiting"
    assert stopped in run.fleet.fenced and not stale.outbox.is_alive()

    run.fleet.grow(3)
    thread.join(LIMIT_S)
    (result,) = ended
    result.assert_sound(STEPS)
    assert result.sha == oracle.sha
    assert "ghost" not in (tmp_path / "events.jsonl").read_text()
    assert not [path for path in tmp_path.rglob("*.safetensors*") if is_leftover(path)]
