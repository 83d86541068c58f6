"""Modules and data sets that people bring (transformers with recomputation, collated texts, graphs, sounds, boxes) against plain torch: equal, over
one worker and over two with a kill, or refused in a sentence before the first step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.frameworks import assert_close
from tests.support.inprocess import Result, fit, module_recipe

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

from backends.pytorch.backend import construct  # noqa: E402  (it needs torch)
from tests.support import foreign_torch, plain_torch  # noqa: E402

HERE = "tests.support.foreign_torch"
STEPS, BATCH, SHARDS = 6, 8, 2
RATE = {"sgd": 0.05, "adamw": 0.003}
TOLERANCE = {"sgd": 1e-6, "adamw": 1e-5}
EQUAL = {"GPT2": "Sentences", "BERT": "Masked", "T5": "Pairs", "Llama": "Rows", "ViT": "Pictures", "Whisper": "Speech", "SimCLR": "Points",
         "Bag": "Bags", "CTC": "Utterances", "VAE": "Points", "MeanTeacher": "Points", "GraphNet": "Graphs", "Detector": "Boxes", "VQ": "Points",
         "Quantiles": "Wide", "Experts": "Points", "Mixup": "Points", "GAN": "Points", "Plain": "Stream", "Moco": "Points"}


def run(folder: Path, model: str, data: str, workers: int = 1, optimizer: str = "sgd", chaos: tuple[str, ...] = (), shards: int = SHARDS) -> Result:
    rule = {"name": optimizer, "lr": RATE[optimizer], "weight_decay": 0.0} | ({"momentum": 0.0} if optimizer == "sgd" else {})
    return fit(folder, module_recipe(
        "", STEPS, model={"kind": f"{HERE}:{model}"}, data={"kind": f"{HERE}:{data}", "batch_size": BATCH, "shuffle": False}, optimizer=rule,
        elastic={"max_workers": workers, "logical_shards": shards, "spares": len(chaos)}, checkpoint={"every_steps": 0}), chaos)


def oracle(model: str, data: str, optimizer: str, shards: int = SHARDS) -> dict[str, np.ndarray]:
    made, rows = (construct(getattr(foreign_torch, name), {}, 0) for name in (model, data))
    return plain_torch.train(made, rows, STEPS, BATCH, shards, optimizer, RATE[optimizer])


def assert_same(result: Result, wanted: dict[str, np.ndarray], tolerance: float) -> None:
    result.assert_sound(STEPS)
    found = {name.partition("/")[2]: array for name, array in result.arrays().items() if not name.startswith("optimizer/")}
    assert set(found) == set(wanted)
    for name, values in wanted.items():
        assert_close(found[name].astype(np.float64), values.astype(np.float64), tolerance, name)


@pytest.mark.parametrize("model", EQUAL)
def test_it_trains_as_in_plain_torch(tmp_path: Path, model: str) -> None:
    one = run(tmp_path / "1", model, EQUAL[model])
    assert_same(one, oracle(model, EQUAL[model], "sgd"), TOLERANCE["sgd"])
    adamw = run(tmp_path / "adamw", model, EQUAL[model], optimizer="adamw")
    assert_same(adamw, oracle(model, EQUAL[model], "adamw"), TOLERANCE["adamw"])
    two = run(tmp_path / "2", model, EQUAL[model], 2, "adamw", ("kill:1@3/reduction",))
    two.assert_sound(STEPS)
    assert two.sha == adamw.sha and two.named("worker_lost")
