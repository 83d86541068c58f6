"""The directory of a run of one step, as it would be left, without a run."""

from __future__ import annotations

import json
from pathlib import Path

from elastic.recipe import dumps, parse


def make_run(tmp_path: Path, location: str) -> Path:
    """One step, one worker, and two checkpoints elsewhere."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    recipe = parse({"run": {"steps": 1}, "model": {"kind": "nlp.gpt"},
                    "data": {"format": "text", "path": str(tmp_path / "plays.txt")},
                    "checkpoint": {"path": location}}, locate=False)
    (run_dir / "recipe.toml").write_text(dumps(recipe))
    started = {"time": 1.0, "event": "generation_started", "generation": 1, "step": 0, "world_size": 1,
               "workers": [{"rank": 0}]}
    (run_dir / "events.jsonl").write_text(json.dumps(started) + "\n")
    line = {"step": 1, "loss": 1.0, "time": 2.0, "step_s": 1.0, "world_size": 1, "generation": 1, "samples": 4}
    (run_dir / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    return run_dir
