"""A checkpoint put to use: evaluation and text, from the NumPy reference backend, without Ray."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from elastic import workload
from elastic.checkpoint.manifest import Manifest
from elastic.controller.checkpoints import Checkpoints
from elastic.driver import inference
from elastic.errors import BadCheckpoint, UserError
from elastic.messages import Part, Save
from elastic.recipe import Recipe, dumps, parse
from elastic.worker.evaluation import figures
from elastic.worker.saver import Saver


@pytest.fixture
def recipe(plays: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return parse({"run": {"steps": 4, "seed": 7}, "backend": {"name": "reference"},
                  "model": {"kind": "nlp.gpt", "layers": 1, "heads": 2, "width": 16, "context": 8},
                  "data": {"format": "text", "path": shutil.copy(plays, tmp_path), "batch_size": 4}})


def test_a_figure_without_weight_is_no_number() -> None:
    """As a share of rows of a kind that the evaluation set has none of."""
    found = figures({"loss": np.array([[3.0, 2.0], [5.0, 2.0]]), "recall": np.zeros((2, 2))}, None, np.zeros(0))
    assert found["loss"] == 2.0 and math.isnan(found["recall"])


def save(recipe: Recipe, root: Path, step: int) -> Path:
    """A checkpoint of the starting values."""
    info = workload.prepare(recipe)
    backend = workload.create_backend(recipe, workload.open_model(recipe, info))
    state = workload.open_state(recipe, backend)
    state.start(recipe.run.seed)
    parts: list[Part] = []
    root.mkdir(parents=True, exist_ok=True)
    head = Manifest(0, 0, 0, recipe.run.seed, dumps(recipe), extra={"info": info})
    Saver("w0", str(root), head, recipe.data.batch_size, parts.append).save(state, Save(1, step, wait=True), {})
    found = Checkpoints(str(root), 3, "").take(parts[0], step)
    assert found is not None and not found.error
    return Path(found.path)


def test_an_untrained_model_knows_nothing(recipe: Recipe, tmp_path: Path) -> None:
    """The loss of a model that gives every character the same chance is the logarithm of their number."""
    path = save(recipe, tmp_path / "run" / "checkpoints", 4)
    vocab_size = workload.prepare(recipe)["vocab_size"]
    assert inference.evaluate(path)["loss"] == pytest.approx(math.log(vocab_size), abs=0.05)


def test_text_is_a_function_of_prompt_and_seed(recipe: Recipe, tmp_path: Path, plays: Path) -> None:
    save(recipe, tmp_path / "run" / "checkpoints", 4)
    first = inference.sample(tmp_path / "run", "KING", 20, 0.8, 1)
    assert first.startswith("KING") and len(first) == 24
    assert set(first) <= set(plays.read_text())
    assert first == inference.sample(tmp_path / "run", "KING", 20, 0.8,
                                     1) != inference.sample(tmp_path / "run", "KING", 20, 0.8, 2)
    assert len(inference.sample(tmp_path / "run", "", 5, 0.0)) == 5
    Path(recipe.data.path[0]).unlink()
    assert first == inference.sample(tmp_path / "run", "KING", 20, 0.8, 1), "text needs the checkpoint alone"


def test_a_run_directory_means_its_newest_good_checkpoint(recipe: Recipe, tmp_path: Path) -> None:
    root = tmp_path / "run" / "checkpoints"
    older, newer = save(recipe, root, 2), save(recipe, root, 4)
    assert inference.restore(tmp_path / "run").manifest.step == inference.restore(newer / "manifest.json").manifest.step == 4
    Checkpoints(str(root), 3, "").flip_a_byte()
    assert inference.restore(tmp_path / "run").manifest.step == 2
    with pytest.raises(BadCheckpoint):
        inference.check_checkpoint(newer)
    with pytest.raises(BadCheckpoint):
        inference.restore(newer)
    assert inference.check_checkpoint(older).step == 2


def test_what_cannot_be_done(recipe: Recipe, tmp_path: Path) -> None:
    path = save(recipe, tmp_path / "run" / "checkpoints", 4)
    with pytest.raises(UserError, match="no good checkpoint at"):
        inference.evaluate(tmp_path / "absent")
    with pytest.raises(UserError, match="no good checkpoint"):
        inference.evaluate(tmp_path)
    with pytest.raises(UserError, match="must be at least 0"):
        inference.sample(path, "KING", -1)
    with pytest.raises(UserError):
        inference.sample(path, "\N{SNOWMAN}", 3)


def test_restored_parameters_are_the_saved_ones(recipe: Recipe, tmp_path: Path) -> None:
    restored = inference.restore(save(recipe, tmp_path / "run" / "checkpoints", 4))
    again = inference.restore(tmp_path / "run")
    tokens = np.arange(6).reshape(1, 6)
    assert np.array_equal(restored.backend.logits(tokens), again.backend.logits(tokens))  # type: ignore[attr-defined]
    assert restored.manifest.step == 4 and restored.recipe.model == recipe.model
