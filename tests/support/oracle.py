"""Undisturbed runs to compare with, each trained once in a process, on threads."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

from elastic.recipe import Recipe, dumps, loads
from tests.support.inprocess import Result, fit

FOLDER = tempfile.TemporaryDirectory(prefix="undisturbed-")


def undisturbed(recipe: Recipe) -> Result:
    """One replica that keeps everything and that nothing happens to."""
    mesh = recipe.mesh
    size = mesh.pipeline * mesh.tensor * mesh.expert
    alone = recipe.elastic.model_copy(update={"min_workers": size, "max_workers": size, "spares": 0})
    whole = recipe.optimizer.model_copy(update={"sharded": False})
    here = recipe.checkpoint.model_copy(update={"path": ""})
    data = recipe.data.model_copy(update={"ledger": False})
    return _trained(dumps(recipe.model_copy(update={"elastic": alone, "optimizer": whole, "checkpoint": here,
                                                    "data": data})))


@cache
def _trained(text: str) -> Result:
    recipe = loads(text, locate=False)
    result = fit(Path(tempfile.mkdtemp(dir=FOLDER.name)) / "run", recipe)
    assert result.outcome.status == "done", result.outcome.error
    assert result.summary["recoveries"] == 0 and len(result.summary["world_sizes"]) == 1
    return result
