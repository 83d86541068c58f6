"""Whole runs on a mesh, workers as threads: every model on every framework trains as it does on one worker, and says the same of itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elastic.mesh import Mesh
from elastic.recipe import Recipe, parse
from tests.support.clicks import clicks, clicks_recipe
from tests.support.crew import Trained, train_on
from tests.support.frameworks import load, names
from tests.support.images import idx_files, vision_recipe
from tests.support.inprocess import merged
from tests.support.sampling import sample

STEPS = 10
TEXT = {"layers": 2, "heads": 4, "width": 8, "context": 8}
MODELS: dict[str, dict[str, Any]] = {
    "gpt": {"kind": "nlp.gpt", **TEXT, "layers": 3, "smoothing": 0.1}, "bert": {"kind": "nlp.bert", **TEXT},
    "experts": {"kind": "nlp.gpt", **TEXT, "experts": 4, "top": 2, "capacity": 2.0, "balance": 0.1},
    "vit": {"kind": "vision.vit", "layers": 2, "heads": 4, "width": 8, "patch": 4},
    "dlrm": {"kind": "recommender.dlrm", "bottom": [8], "top": [12, 6]}}
FULL, STAGES = Mesh(1, pipeline=2, tensor=2), Mesh(1, pipeline=4)
ALL = [Mesh(2), Mesh(4), Mesh(1, tensor=2), Mesh(1, tensor=4), Mesh(2, tensor=2), Mesh(1, pipeline=2), STAGES,
       Mesh(2, pipeline=2), FULL]
KEYS: dict[Any, dict[str, Any]] = {("gpt", FULL): {"micro_batches": 2}, ("bert", FULL): {"schedule": "gpipe"},
                                   ("dlrm", FULL): {"schedule": "zb-h1", "micro_batches": 2}}
CASES = [(kind, mesh) for kind in ("gpt", "bert", "vit", "dlrm") for mesh in ALL] + [
    ("experts", mesh) for mesh in (Mesh(1, expert=2), Mesh(2, expert=2), Mesh(1, tensor=2, expert=2),
                                   Mesh(1, pipeline=2, expert=2))]
ALWAYS = [("gpt", FULL), ("gpt", Mesh(2, tensor=2)), ("experts", Mesh(1, expert=2)), ("dlrm", FULL)]


def cases() -> Iterator[tuple[str, str, Mesh]]:
    """NumPy and torch train everything; of the others the larger meshes do: test_mesh_parity.py has their kernels, and
    the engine is the same."""
    for framework in names():
        few = framework in ("tensorflow", "mxnet")
        all_of_it = [(kind, mesh) for kind, mesh in CASES if not few or kind in ("gpt", "experts")
                     or mesh in (FULL, STAGES, Mesh(1, tensor=4))]
        yield from ((framework, kind, mesh) for kind, mesh in sample(all_of_it, 2 if few else 6, ALWAYS[:1] if few
                                                                     else ALWAYS))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


def recipe_for(folder: Path, framework: str, kind: str, mesh: Mesh) -> Recipe:
    model = MODELS[kind]
    changes: dict[str, Any] = {
        "run": {"steps": STEPS, "eval_every": STEPS}, "model": model, "backend": {"name": framework},
        "optimizer": {"name": "sgd", "lr": 0.1},
        "mesh": {"tensor": mesh.tensor, "pipeline": mesh.pipeline, "expert": mesh.expert, **KEYS.get((kind, mesh), {})},
        "data": {"batch_size": 16},
        "elastic": {"logical_shards": 4, "min_workers": mesh.replica_size, "max_workers": mesh.world_size}}
    if kind == "vit":
        (folder / "images").mkdir(exist_ok=True)
        return vision_recipe("vision.vit", idx_files(folder / "images"), STEPS, **changes)
    if kind == "dlrm":
        return clicks_recipe(clicks(folder / "clicks.csv"), **merged(changes, {"run": {"epochs": None}}))
    text = folder / "text.txt"
    text.write_text("".join(np.random.default_rng(0).choice(list("etaoin "), 3000)))
    return parse(merged({"data": {"format": "text", "path": [str(text)]}}, changes))


def trained(folder: Path, framework: str, kind: str, mesh: Mesh) -> Trained:
    recipe = recipe_for(folder, framework, kind, mesh)
    wide = recipe.backend.model_copy(update={"precision": "float64"})  # which no recipe can ask for
    return train_on(recipe.model_copy(update={"backend": wide}), mesh)


@pytest.fixture(autouse=True)
def cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))


ALONE: dict[Any, Trained] = {}


def assert_trains_alike(framework: str, kind: str, mesh: Mesh, folder: Path) -> None:
    if (framework, kind) not in ALONE:
        ALONE[framework, kind] = trained(folder, framework, kind, Mesh(1))
    wanted, found = ALONE[framework, kind], trained(folder, framework, kind, mesh)
    assert len(found.losses) == STEPS and np.ptp(wanted.losses) > 1e-3 and len(found.hashes) == 1
    of_losses, of_gradients = 1e-8, 1e-9
    np.testing.assert_allclose(found.losses, wanted.losses, rtol=of_losses)
    scale = np.sqrt(sum(np.sum(np.square(value, dtype=np.float64)) for value in wanted.first_gradient.values()))
    for name, gradient in wanted.first_gradient.items():
        assert np.linalg.norm(found.first_gradient[name] - gradient) <= of_gradients * scale, name
    for name, array in wanted.arrays.items():
        np.testing.assert_allclose(found.arrays[name], array, rtol=10 * of_losses, atol=of_losses, err_msg=name)
    assert found.evaluations[-1] == pytest.approx(wanted.evaluations[-1], rel=10 * of_losses)


@pytest.mark.parametrize(("framework", "kind", "mesh"), list(cases()), ids=lambda value: str(value).replace(" ", ""))
def test_a_mesh_trains_as_one_worker(framework: str, kind: str, mesh: Mesh, folder: Path) -> None:
    load(framework, "backend")
    assert_trains_alike(framework, kind, mesh, folder)


@pytest.mark.parametrize(("kind", "mesh"), [("gpt", FULL), ("experts", Mesh(1, expert=2))])
def test_gradients_that_are_not_added_up_over_their_holders_are_seen(kind: str, mesh: Mesh, folder: Path,
                                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the embedding that is the head as well, and of what each member of an expert axis found for its rows."""
    assert_trains_alike("reference", kind, mesh, folder)
    monkeypatch.setattr("elastic.worker.loop.sum_shared", lambda *arguments: None)
    with pytest.raises(AssertionError):
        assert_trains_alike("reference", kind, mesh, folder)
