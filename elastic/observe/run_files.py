"""A run's directory for those who read it: its recipe, its lines, its summary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from elastic.errors import UserError
from elastic.observe.jsonl import read_json, read_lines
from elastic.recipe import Recipe, loads

RECIPE = "recipe.toml"
LIVE = "live.json"  # while the run lives: where its Ray is


def recipe_text(run_dir: Path) -> str:
    """UserError where there is no run."""
    try:
        return (run_dir / RECIPE).read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{run_dir} is no run directory: it has no {RECIPE}; give the directory that `elastic train` "
                        "named.") from None


def recipe_of(run_dir: Path) -> Recipe:
    """As it stands there, wherever its paths lead."""
    return loads(recipe_text(run_dir), locate=False)


def lines_of(run_dir: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(events, metrics)."""
    return read_lines(run_dir / "events.jsonl"), read_lines(run_dir / "metrics.jsonl")


def summary_of(run_dir: Path) -> dict[str, Any] | None:
    """How the run ended; None while it has not. A resumption takes the old summary away before it starts."""
    return read_json(run_dir / "summary.json")


def is_seen(run_dir: Path, run_id: str) -> bool:
    """Whether the directory of a live run is to be seen from this node: another's folder may lie at the same path."""
    try:
        return (read_json(run_dir / LIVE) or {}).get("run_id") == run_id
    except (UserError, OSError):
        return False
