"""Modules and data sets that people bring (transformers with recomputation, collated texts, graphs, sounds, boxes) against plain torch: equal, over
one worker and over two with a kill, or refused in a sentence before the first step."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elastic.errors import UserError
from elastic.recipe import Recipe
from elastic.workload import Workload, check_items
from tests.support.frameworks import assert_close
from tests.support.inprocess import Result, fit, module_recipe
from tests.support.sampling import sample

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

from backends.pytorch.backend import framework  # noqa: E402  (it needs torch)
from tests.support import foreign_habits, foreign_torch, foreign_transformers, plain_torch  # noqa: E402

HOMES = (foreign_transformers, foreign_torch, foreign_habits)
STEPS, BATCH, SHARDS = 6, 8, 2
EPS = 1e-3  # a key's bias, or one before a batch norm, has a gradient of rounding errors alone
RATE = {"sgd": 0.05, "adamw": 0.003}
TOLERANCE = {"sgd": 1e-6, "adamw": 1e-5}
EQUAL = {"GPT2": "Sentences", "BERT": "Masked", "T5": "Pairs", "Llama": "Rows", "ViT": "Pictures", "Whisper": "Speech",
         "SimCLR": "Points",
         "Bag": "Bags", "CTC": "Utterances", "VAE": "Points", "MeanTeacher": "Points", "GraphNet": "Graphs",
         "Detector": "Boxes",
         "VQ": "Points", "Quantiles": "Wide", "Experts": "Points", "Mixup": "Points", "Queue": "Points",
         "Scrawl": "Points"}
WHOLE = {"T5": "Pairs", "GraphNet": "Graphs", "Quantiles": "Wide", "Plain": "Points", "GPT2Sum": "Sentences",
         "BagSum": "Bags",
         "DetectorSum": "Boxes"}
REFUSED = {"CLIP": "writes to its parameter logit_scale in place", "LazyVAE": r"no values in encoder\.0\.weight yet",
           "WarmVAE": "its attribute seen",
           "ToldVAE": r"must give one number or \(sum, weight\), not dict",
           "TwoVAE": "with a weight that has a gradient",
           "GAN": r"the \.grad of its parameter critic\.weight",
           "Adversarial": r"the \.grad of its parameter net\.0\.weight",
           "Tidy": r"the \.grad of its parameter net\.0\.weight",
           "Stateful": "remembers something in its attribute last"}
ROWS_REFUSED = {"Stream": "has no __len__",
                "OwnDraws": r"something else when the same items are asked for again \(batch\['x'\]\)",
                "Drifting": "writes into what it keeps",
                "Collater": "has a method collater, which is not called; name it collate_fn"}


def home(name: str) -> Any:
    return next(module for module in HOMES if name in vars(module))


def recipe(model: str, data: str, workers: int = 1, optimizer: str = "sgd", shards: int = SHARDS,
           spares: int = 0) -> Recipe:
    rule = {"name": optimizer, "lr": RATE[optimizer], "weight_decay": 0.0,
            "eps": EPS} | ({"momentum": 0.0} if optimizer == "sgd" else {})
    return module_recipe(
        "", STEPS, model={"kind": f"{home(model).__name__}:{model}"}, optimizer=rule,
        data={"kind": f"{home(data).__name__}:{data}", "batch_size": BATCH, "shuffle": False},
        elastic={"max_workers": workers, "logical_shards": shards, "spares": spares}, checkpoint={"every_steps": 0})


def run(folder: Path, model: str, data: str, workers: int = 1, optimizer: str = "sgd", chaos: tuple[str, ...] = (),
        shards: int = SHARDS) -> Result:
    return fit(folder, recipe(model, data, workers, optimizer, shards, len(chaos)), chaos)


def oracle(model: str, data: str, optimizer: str, shards: int = SHARDS) -> dict[str, np.ndarray]:
    made, rows = (framework.construct(getattr(home(name), name), {}, 0) for name in (model, data))
    return plain_torch.train(made, rows, STEPS, BATCH, shards, optimizer, RATE[optimizer], eps=EPS)


def assert_same(result: Result, wanted: dict[str, np.ndarray], tolerance: float) -> None:
    result.assert_sound(STEPS)
    found = {name.partition("/")[2]: array for name, array in result.arrays().items()
             if not name.startswith("optimizer/")}
    assert set(found) == set(wanted)
    for name, values in wanted.items():
        assert_close(found[name].astype(np.float64), values.astype(np.float64), tolerance, name)


@pytest.mark.parametrize("model", sample(list(EQUAL), 12))
def test_it_trains_as_in_plain_torch(tmp_path: Path, model: str) -> None:
    one = run(tmp_path / "1", model, EQUAL[model])
    assert_same(one, oracle(model, EQUAL[model], "sgd"), TOLERANCE["sgd"])
    adamw = run(tmp_path / "adamw", model, EQUAL[model], optimizer="adamw")
    assert_same(adamw, oracle(model, EQUAL[model], "adamw"), TOLERANCE["adamw"])
    two = run(tmp_path / "2", model, EQUAL[model], 2, "adamw", ("kill:1@3/reduction",))
    two.assert_sound(STEPS)
    assert two.sha == adamw.sha and two.named("worker_lost")


@pytest.mark.parametrize("model", sample(list(WHOLE), 3))
def test_means_over_rows_and_sums_with_weights_are_a_loop_over_whole_batches(tmp_path: Path, model: str) -> None:
    result = run(tmp_path, model, WHOLE[model], 2, shards=4)
    assert_same(result, oracle(model, WHOLE[model], "sgd", shards=1), 1e-6)


@pytest.mark.parametrize("model", REFUSED)
def test_a_module_is_refused_in_a_sentence_before_the_first_step(tmp_path: Path, model: str) -> None:
    result = run(tmp_path, model, "Points", 2)
    assert result.outcome.status == "failed" and not result.steps and not result.named("worker_lost")
    assert_sentence(result.outcome.error, "model.kind: ", REFUSED[model])


@pytest.mark.parametrize("data", ROWS_REFUSED)
def test_a_data_set_is_refused_in_a_sentence_before_a_worker_starts(data: str) -> None:
    with pytest.raises(UserError) as told:
        check_items(Workload.open(recipe("Plain", data), {}))
    assert_sentence(str(told.value), "data.kind: ", ROWS_REFUSED[data])


def assert_sentence(told: str, begins: str, words: str) -> None:
    assert told.startswith(begins) and re.search(words, told), told
    assert "\n" not in told and told.endswith(".") and ". " not in told and len(told) < 500, told


def test_what_a_collate_fn_makes_is_evaluated_too(tmp_path: Path) -> None:
    asked = recipe("BagSum", "Bags")
    asked = asked.model_copy(update={"data": asked.data.model_copy(update={"eval_fraction": 0.25})})
    result = fit(tmp_path, asked)
    made, rows = framework.construct(foreign_torch.BagSum, {}, 0), framework.construct(foreign_torch.Bags, {}, 0)
    arrays = result.arrays()
    made.load_state_dict({name: torch.tensor(arrays.get(f"parameter/{name}", arrays.get(f"buffer/{name}")))
                          for name in made.state_dict()})
    total, weight = made.eval().loss(rows.collate_fn([rows[i] for i in range(36, 48)]))
    assert result.metrics[-1]["eval"]["loss"] == pytest.approx(float(total / weight), rel=1e-6)
