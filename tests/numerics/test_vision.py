"""Image models in whole runs: same bits (P1) whatever happens to the workers, batch norm's statistics among them; they learn."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.support.frameworks import load, names
from tests.support.images import idx_files, vision_recipe
from tests.support.inprocess import Result, fit

torch = pytest.importorskip("torch", reason="torch is not installed")
STEPS = 12


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    folder = tmp_path_factory.mktemp("images")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        yield idx_files(folder)


@pytest.fixture(scope="module", params=[(kind, name) for name in names() for kind in ("vision.resnet", "vision.vit")],
                ids=" ".join)
def oracle(request: pytest.FixtureRequest, files: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Result:
    """One worker, nothing happens."""
    kind, name = request.param
    load(name, "backend")
    result = fit(tmp_path_factory.mktemp("one") / "run",
                 vision_recipe(kind, files, STEPS, backend={"name": name}, elastic={"max_workers": 1}))
    result.assert_sound(STEPS)
    return result


@pytest.mark.parametrize(("workers", "chaos"), [(2, []), (3, []), (3, ["kill:1@5/reduction", "kill:0@7/update"])],
                         ids=str)
def test_same_bits(workers: int, chaos: list[str], oracle: Result, files: dict[str, str], tmp_path: Path) -> None:
    kind, backend = oracle.run.recipe.model.kind, {"name": oracle.run.recipe.backend.name}
    result = fit(tmp_path, vision_recipe(kind, files, STEPS, backend=backend, elastic={"max_workers": workers}), chaos)
    result.assert_sound(STEPS)
    assert result.sha == oracle.sha
    assert [line.get("eval") for line in result.metrics] == [line.get("eval") for line in oracle.metrics]
    assert result.summary["world_sizes"][0] == workers
    assert bool(result.named("worker_lost")) == bool(chaos)


def test_statistics_are_the_mean_of_the_shards(files: dict[str, str], tmp_path: Path) -> None:
    """After one step, worked out by hand: the stem's running mean is 0.1 of the mean of its outputs, equal for equal
    shards."""
    from vision.data import open_dataset

    recipe = vision_recipe("vision.resnet", files, 1, optimizer={"lr": 0.0},
                           data={"crop": 0, "flip": False, "shuffle": False})
    result = fit(tmp_path, recipe)
    result.assert_sound(1)
    arrays = result.arrays()
    dataset = open_dataset(result.run.job.info, "train", 0)
    rows = np.arange(32)
    images = dataset.batch(rows, 0 * rows)["image"]
    weight = torch.from_numpy(np.array(arrays["parameter/stem.weight"])).permute(3, 2, 0, 1)
    out = torch.nn.functional.conv2d(torch.from_numpy(images).permute(0, 3, 1, 2), weight, padding=1).numpy()
    np.testing.assert_allclose(arrays["buffer/stem.norm.mean"], 0.1 * out.mean((0, 2, 3)), atol=1e-6)
    shards = out.transpose(1, 0, 2, 3).reshape(4, 8, -1)
    np.testing.assert_allclose(arrays["buffer/stem.norm.var"], 0.9 + 0.1 * shards.var(2, ddof=1).mean(1), rtol=1e-5)


def test_they_learn(files: dict[str, str], tmp_path: Path) -> None:
    result = fit(tmp_path, vision_recipe("vision.resnet", files, 60, elastic={"max_workers": 2}))
    result.assert_sound(60)
    assert result.summary["eval"]["accuracy"] >= 0.9
    assert result.summary["eval"]["loss"] < 0.5
