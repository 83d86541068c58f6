"""What a run needs before it starts. Oracles: tensors counted by hand, and the machine's memory as a number that a test chooses."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from elastic.data.collate import Collated
from elastic.errors import UserError
from elastic.mesh import Mesh
from elastic.planning import candidates as meshes
from elastic.planning import memory as door
from elastic.planning.memory import check_memory, measured, num_bytes, on_gpu, preview
from elastic.recipe import Recipe, parse
from elastic.workload import Workload, prepare

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

WIDTH, HIDDEN = 64, 512


class Rows:
    """Some rows of numbers."""

    def __len__(self) -> int:
        return 500

    def __getitem__(self, index: int) -> Any:
        return {"x": np.full(WIDTH, index, np.float32), "y": [np.float32(1)]}


class Wide(torch.nn.Module):
    """Two hidden layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(WIDTH, HIDDEN), torch.nn.ReLU(),
                                          torch.nn.Linear(HIDDEN, HIDDEN), torch.nn.ReLU(),
                                          torch.nn.Linear(HIDDEN, 1))

    def loss(self, batch: Any) -> Any:
        return (self.layers(batch["x"])[:, 0] - batch["y"][0]).square().mean()


class Broken(Wide):
    def loss(self, batch: Any) -> Any:
        return self.layers(batch["nothing"])


def own(rows: int, model: str = "Wide", **elastic: Any) -> Recipe:
    return parse({"run": {"steps": 1}, "model": {"kind": f"{__name__}:{model}"},
                  "data": {"kind": f"{__name__}:Rows", "batch_size": 2 * rows},
                  "elastic": {"max_workers": 1, "logical_shards": 2, **elastic}, "backend": {"device": "cpu"}})


def text(folder: Path, rows: int, **model: Any) -> Recipe:
    (folder / "t.txt").write_text("to be or not to be. " * 200)
    return parse({"model": {"kind": "nlp.gpt", "layers": 2, "heads": 2, "width": 32, "context": 16, **model},
                  "backend": {"device": "cpu"},
                  "data": {"format": "text", "path": str(folder / "t.txt"), "batch_size": 2 * rows,
                           "eval_fraction": 0.0},
                  "elastic": {"max_workers": 2, "logical_shards": 2}})


def opened(recipe: Recipe) -> tuple[Recipe, Workload]:
    return recipe, Workload.open(recipe, prepare(recipe))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def with_memory(monkeypatch: pytest.MonkeyPatch, gigabytes: float) -> None:
    monkeypatch.setattr(door.psutil, "virtual_memory", lambda: SimpleNamespace(total=gigabytes * 1e9))


@pytest.mark.parametrize("rows", [20_000, 200_000, 2_000_000])
def test_a_large_shard_of_an_own_module_is_told_from_a_part_of_it(rows: int) -> None:
    found = preview(*opened(own(rows)))
    kept = 4 * rows * (WIDTH + 4 * HIDDEN)  # the input; before and after each relu
    # gradients of activations, items and workspace besides; freed memory may hide some
    assert 0.4 * kept < found.shard_bytes < 3 * kept


def test_a_small_shard_is_not_tried() -> None:
    assert preview(*opened(own(8, "Broken"))).shard_bytes == 0


def test_an_error_in_the_trial_is_the_user_s_with_its_line() -> None:
    with pytest.raises(UserError, match=r"model.kind: 1 rows cannot be trained on \(KeyError: 'nothing' \(test_memory.py, line \d+, in loss\)\)"):
        preview(*opened(own(5_000, "Broken")))


def test_a_part_of_a_shard_has_as_many_rows_in_nested_columns_too() -> None:
    """Or a trial would compute with other rows than it is asked for, or with none."""
    recipe, work = opened(own(8))
    asked, timed = measured(recipe, work)
    layout = meshes.lay(asked.model, Mesh(1, 1, 1, 1), asked.rules, asked.balance)
    assert all(part.forward_s > 0 for rows in (4, 8) for part in timed.depths(layout, rows))


def test_a_shipped_model_s_activations_grow_with_its_rows_and_layers(tmp_path: Path) -> None:
    def of(rows: int, **model: Any) -> int:
        recipe = text(tmp_path, rows, **model)
        return preview(*opened(recipe)).shard_bytes

    few, many, deep = of(10), of(1000), of(1000, layers=4)
    assert many == pytest.approx(100 * few, rel=1e-3)
    # width 32, context 16, float32: at least q, k, v, the attention's result, two norms' inputs and the wide one
    layer = (deep - many) / 2
    assert 1000 * 16 * 4 * 32 * (3 + 1 + 2 + 4) < layer < 1000 * 16 * 4 * 32 * 40


@pytest.mark.parametrize("kind", ["shipped", "own"])
def test_a_batch_that_cannot_fit_is_one_sentence(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = text(tmp_path, 100_000) if kind == "shipped" else own(1_000_000)
    found = preview(*opened(recipe))
    with_memory(monkeypatch, 4.0)
    with pytest.raises(UserError, match=r"^data.batch_size = \d+: \d workers of .* GB each for the activations of \d+ rows, .*lower it") as caught:
        check_memory(found, recipe)
    assert "\n" not in str(caught.value)
    with_memory(monkeypatch, 1000.0)
    check_memory(found, recipe)


def test_a_model_that_cannot_fit_is_told_by_its_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = text(tmp_path, 1, width=4096)
    with_memory(monkeypatch, 4.0)
    with pytest.raises(UserError, match="^elastic.max_workers = 2: 2 workers"):
        check_memory(preview(*opened(recipe)), recipe)


def test_activations_on_a_gpu_are_not_this_machine_s() -> None:
    assert on_gpu(parse({"model": {"kind": f"{__name__}:Wide"}, "data": {"kind": f"{__name__}:Rows"},
                         "backend": {"device": "cuda"}}))
    assert not on_gpu(own(1))
    assert num_bytes({"a": [np.zeros(3), (np.zeros(2, np.int8),)],
                      "b": ["text"]}) == 26 == num_bytes(Collated(np.zeros(26, np.int8), 2))
