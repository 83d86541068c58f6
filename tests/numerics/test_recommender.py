"""Recommenders against formulas written out row by row, all backends against the reference, same bits, and the Adult recipe's AUC."""

from __future__ import annotations

import csv
import functools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from elastic import cli
from elastic.driver.inference import evaluate, restore
from elastic.errors import RecipeError, UserError
from elastic.recipe import dumps, load_recipe
from elastic.workload import open_data, prepare
from recommender.dlrm import build
from tests.support.clicks import clicks, clicks_recipe
from tests.support.frameworks import assert_close, load, names
from tests.support.inprocess import Result, fit
from tests.support.models import Rig, rig_of
from tests.support.sampling import sample, sometimes

torch = pytest.importorskip("torch", reason="torch is not installed")

INFO = {"sizes": [5, 3, 7], "num_numeric": 4, "embedding_dim": 6}
CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"arch": "dlrm", "bottom": [8], "top": [9, 5]}, {}), ({"arch": "dlrm", "top": [9]}, {"num_numeric": 0}),
    ({"arch": "dcn", "top": [7], "layers": 3}, {}), ({"arch": "mf"}, {}),
    ({"arch": "mf", "loss": "squared"}, {"sizes": [5, 3], "num_numeric": 0}),
    ({"arch": "lr"}, {}), ({"arch": "lr"}, {"sizes": []}),
    ({"arch": "dlrm", "top": []}, {"sizes": [9], "num_numeric": 0})]
every_case = pytest.mark.parametrize(("config", "info"), CASES, ids=str)


def rig(name: str, config: dict[str, Any], info: dict[str, Any], **changes: Any) -> Rig:
    found = rig_of(name, build(config, {**INFO, **info}), **changes)
    found.param += np.random.default_rng(5).standard_normal(len(found.param)).astype(np.float32) * np.float32(0.2)
    return found


def batch(info: dict[str, Any], loss: str = "binary", rows: int = 6, real: int = 5) -> dict[str, np.ndarray]:
    facts, random = {**INFO, **info}, np.random.default_rng(1)
    starts = np.cumsum([0, *facts["sizes"]])
    out = {"label": random.integers(0, 2, rows).astype(np.float32) if loss == "binary"
           else random.normal(3, 1, rows).astype(np.float32),
           "row_weight": (np.arange(rows) < real).astype(np.float32)}
    if facts["num_numeric"]:
        out["numeric"] = random.standard_normal((rows, facts["num_numeric"])).astype(np.float32)
    if facts["sizes"]:
        out["categorical"] = np.stack([start + random.integers(0, size, rows)
                                       for start, size in zip(starts, facts["sizes"])], 1).astype(np.int32)
    return out


def score(arch: str, p: dict[str, Any], numbers: Any, places: Any, num_layers: int) -> Any:
    """One row's score by the papers' formulas. `numbers` and `places` may be empty."""
    def dense(name: str, x: Any) -> Any:
        return x @ p[f"{name}.weight"] + p[f"{name}.bias"]

    def mlp(name: str, x: Any) -> Any:
        for i in range(9):
            x = torch.relu(dense(f"{name}{i}", x)) if f"{name}{i}.weight" in p else x
        return x

    if arch == "dlrm":
        low = [mlp("bottom", numbers)] if len(numbers) else []
        vectors = [*low, *(p["embedding"][i] for i in places)]
        dots = [torch.dot(vectors[i], vectors[j])[None] for i in range(len(vectors)) for j in range(i)]
        return dense("out", mlp("top", torch.cat([*low, *(dots or vectors)])))[0]
    if arch == "dcn":
        first = x = torch.cat([numbers, *(p["embedding"][i] for i in places)])
        for i in range(num_layers):
            x = first * dense(f"cross{i}", x) + x
        return dense("out", mlp("top", x))[0]
    total = p["bias"][0] + sum(p["linear.categorical"][i, 0]
                               for i in places) + sum(n * p["linear.numeric"][i, 0] for i, n in enumerate(numbers))
    if arch == "mf":
        vectors = [*(p["embedding"][i] for i in places), *(n * p["factors"][i] for i, n in enumerate(numbers))]
        total = total + sum(torch.dot(vectors[i], vectors[j]) for i in range(len(vectors)) for j in range(i))
    return total


@every_case
def test_the_formulas_of_the_papers(config: dict[str, Any], info: dict[str, Any]) -> None:
    mine, loss = rig("torch", config, info), config.get("loss", "binary")
    rows = batch(info, loss)
    flat, result = mine.gradient(rows)
    p = {name: torch.tensor(np.array(view), dtype=torch.float64, requires_grad=True)
         for name, view in mine.layout.views(mine.param).items()}
    total = torch.zeros((), dtype=torch.float64)
    for i in range(5):
        numbers = torch.tensor(rows["numeric"][i],
                               dtype=torch.float64) if "numeric" in rows else torch.zeros(0, dtype=torch.float64)
        found = score(config["arch"], p, numbers, rows["categorical"][i].tolist() if "categorical" in rows else [],
                      config.get("layers", 0))
        label = torch.tensor(float(rows["label"][i]), dtype=torch.float64)
        squared = (found - label) ** 2
        total = total + (squared if loss == "squared"
                         else torch.nn.functional.binary_cross_entropy_with_logits(found, label))
    total.backward()
    assert result.weight == 5 and result.loss_sum == pytest.approx(total.item(), rel=1e-5)
    for name, view in mine.by_name(flat).items():
        assert_close(view, p[name].grad.numpy(), 1e-5, name)


@pytest.mark.parametrize("name", names(without="reference"))
@every_case
def test_backends_agree_with_the_reference(name: str, config: dict[str, Any], info: dict[str, Any]) -> None:
    config = {**config, "dropout": 0.2}
    found, wanted = (rig(each, config, info) for each in (name, "reference"))
    rows = batch(info, config.get("loss", "binary"))
    (a, left), (b, right) = found.gradient(rows, seed=9), wanted.gradient(rows, seed=9)
    assert left.loss_sum == pytest.approx(right.loss_sum, rel=1e-5) and left.weight == right.weight
    assert_close(a, b, 2e-5)
    mine, theirs = found.backend.metrics(rows), wanted.backend.metrics(rows)
    assert mine.keys() == theirs.keys()
    for key in theirs:
        assert_close(np.asarray(mine[key][0]), np.asarray(theirs[key][0]), 2e-5, key)


@pytest.mark.parametrize(("config", "words"), [
    ({"arch": "svm"}, "model.arch"), ({"top": [0]}, "model.top"), ({"bottom": 3}, "model.bottom"),
    ({"layers": 0}, "model.layers"),
    ({"dropout": 1.0}, "model.dropout"), ({"loss": "hinge"}, "model.loss"), ({"depth": 3}, "model.depth")])
def test_bad_numbers_are_named(config: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        build(config, INFO)
    with pytest.raises(RecipeError, match="data.categorical is missing"):
        build({}, {**INFO, "sizes": []})


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("framework", names(without="reference"))
def test_same_bits_for_any_workers_and_a_kill(framework: str, tmp_path: Path) -> None:
    load(framework, "backend")
    file = clicks(tmp_path / "clicks.csv")

    def run(name: str, workers: int, chaos: tuple[str, ...] = ()) -> Result:
        result = fit(tmp_path / name, clicks_recipe(file, backend={"name": framework},
                                                    elastic={"max_workers": workers}), chaos)
        result.assert_sound(10)  # 315 rows, the last step has fillers
        return result

    one = run("one", 1)
    figures = [line["eval"] for line in one.metrics if "eval" in line]
    assert {"auc", "loss", "normalized_entropy", "base_rate", "recall_at_2",
            "ndcg_at_2"} == set(figures[-1]) and 0 < figures[-1]["auc"] < 1
    for other in (run("two", 2), run("three", 3), run("killed", 3, ("kill:1@7/reduction",))):
        assert other.sha == one.sha
        assert [line["eval"] for line in other.metrics if "eval" in line] == figures


def test_a_checkpoint_gives_the_figures_of_its_run(tmp_path: Path) -> None:
    """Under the squared loss too, where the label is any number."""
    for loss, figures in (("binary", {"auc", "loss", "normalized_entropy", "base_rate"}),
                          ("squared", {"loss", "mae", "rmse", "rows"})):
        figures |= {"ndcg_at_2", "recall_at_2"} if loss == "binary" else {"ndcg_at_2"}
        recipe = clicks_recipe(clicks(tmp_path / "clicks.csv"), model={"arch": "mf", "loss": loss},
                               elastic={"max_workers": 2})
        result = fit(tmp_path / loss, recipe)
        result.assert_sound(10)
        found = result.metrics[-1]["eval"]
        assert set(found) == figures and evaluate(tmp_path / loss / "checkpoints" / "step-00000010") == found
    assert found["rows"] == 35 and found["rmse"] == pytest.approx(np.sqrt(found["loss"]))


def test_an_export_says_what_the_rows_of_a_table_stand_for(tmp_path: Path) -> None:
    """Against the file itself, read with the standard library; also where the cache is gone."""
    file = clicks(tmp_path / "clicks.csv")
    fit(tmp_path / "run", clicks_recipe(file, elastic={"max_workers": 1})).assert_sound(10)
    with open(file, newline="") as text:
        rows = list(csv.DictReader(text))
    trained = rows[:len(rows) - int(len(rows) * 0.1)]
    users = list(dict.fromkeys(row["user"] for row in rows if row["user"] in {row["user"] for row in trained}))
    for out in ("a", "b"):
        assert cli.run(["export", str(tmp_path / "run"), "--format", "safetensors", "--out", str(tmp_path / out)]) == 0
        with safe_open(tmp_path / out, "numpy") as found:
            facts = json.loads(found.metadata()["facts"])
        assert facts["vocabularies"] == {"user": {user: row for row, user in enumerate(users)}}
        prices = np.array([float(row["price"]) for row in trained])
        assert facts["mean"] == pytest.approx([prices.mean()],
                                              abs=1e-6) and facts["scale"] == pytest.approx([1 / prices.std()], rel=1e-5)
        shutil.rmtree(tmp_path / "cache")
    assert cli.run(["export", str(tmp_path / "run"), "--format", "torch", "--out", str(tmp_path / "c")]) == 0
    assert torch.load(tmp_path / "c", weights_only=True).facts["vocabularies"]["user"]["u1"] >= 0


def test_another_machine_s_data_must_be_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = clicks_recipe(clicks(tmp_path / "clicks.csv"))
    info = prepare(recipe)
    Path(info["train_file"]).unlink()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    assert open_data(recipe, info)[0].num_samples == 315
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "third"))
    clicks(tmp_path / "clicks.csv", 349)
    with pytest.raises(UserError, match="holds other data on this machine"):
        open_data(recipe, info)


def test_the_command_refuses_bad_rows_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, recipe = clicks(tmp_path / "clicks.csv"), tmp_path / "recipe.toml"
    recipe.write_text(dumps(clicks_recipe(file)))
    assert cli.run(["train", str(recipe), "--check"]) == 0
    good = file.read_text()
    bad = [("3,u1,i1,0.5", [], "holds 3.0 in row 350"), ("1,u1,,0.5", [], 'the column "item" of'),
           ("1,u1,i1,", [], "no value in row 350"),
           ("1,someone,i1,0.5", ["data.oov=error"], "holds 'someone' in row 350"), ("1,u1", [], "cannot be read"),
           ("1,u1,i1,much", [], 'the column "price" of')]
    for row, sets, words in bad:
        file.write_text(good + row + "\n")
        capsys.readouterr()
        assert cli.run(["train", str(recipe), "--check", *(word for pair in sets for word in ("--set", pair))]) == 2
        said = capsys.readouterr()
        assert words in said.err and said.err.count("\n") == 1 and "Traceback" not in said.err + said.out


Adult = Callable[..., Result]
CATEGORIES = ["workclass", "education", "marital_status", "occupation", "relationship", "race", "sex", "native_country"]
IN_A_TABLE = [f"tables.categories.columns={json.dumps(CATEGORIES)}", "tables.categories.optimizer=adam"]


@pytest.fixture(scope="module")
def adult(DATA: Path, tmp_path_factory: pytest.TempPathFactory) -> Adult:
    """(backend, overrides) -> one pass of one worker, each once."""
    @functools.cache
    def train(name: str, *overrides: str) -> Result:
        recipe = load_recipe("recommender/adult_dlrm",
                             [f"data.path={DATA}/adult/adult.data", f"data.eval_path={DATA}/adult/adult.test",
                              f"backend.name={name}", "elastic.max_workers=1", *overrides])
        result = fit(tmp_path_factory.mktemp("adult"), recipe)
        result.assert_sound(-(-32_561 // 128))
        return result

    return train


@pytest.mark.slow
def test_adult_in_one_pass(adult: Adult) -> None:
    """PERSIA publishes 0.8929. The AUC of the counts is that of scikit-learn on the same scores."""
    result = adult("torch")
    found = result.metrics[-1]["eval"]
    assert found["auc"] >= 0.89
    assert found["base_rate"] == pytest.approx(3_846 / 16_281)
    sklearn = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    labels, scores = scored(result)
    assert found["auc"] == pytest.approx(sklearn.roc_auc_score(labels, scores), abs=1e-6)
    assert found["loss"] == pytest.approx(sklearn.log_loss(labels, 1 / (1 + np.exp(-scores))), rel=1e-5)


@pytest.mark.slow
@sometimes("Adult in tables", 0.3)
@pytest.mark.parametrize("name", sample(names(without="reference"), 1))
def test_adult_with_its_categories_in_a_table_learns_as_with_a_dense_embedding(name: str, adult: Adult) -> None:
    load(name, "backend")
    pytest.importorskip("numba", reason="numba, which computes rows, is not installed")
    dense, rows = (adult(name, *overrides).metrics[-1]["eval"]["auc"] for overrides in ((), IN_A_TABLE))
    assert rows >= 0.89 and rows == pytest.approx(dense, abs=0.002)


def scored(result: Result) -> tuple[np.ndarray, np.ndarray]:
    """Labels and scores of all rows to evaluate on, by the final checkpoint."""
    restored = restore(os.fspath(result.run.run_dir / "checkpoints" / f"step-{result.summary['steps']:08d}"))
    dataset = open_data(restored.recipe, restored.info)[1]
    assert dataset is not None
    every = np.arange(dataset.num_samples)
    rows = {**dataset.batch(every, every), "row_weight": np.ones(len(every), np.float32)}
    return rows["label"], restored.backend.metrics(rows)["score"][0]
