"""Own data sets whose items are nested, trained on several workers. Oracles: a plain loop over torch's own collate; flat items elsewhere."""

from __future__ import annotations

import re
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from elastic.data import Sampler
from elastic.recipe import parse
from tests.support.frameworks import load
from tests.support.inprocess import fit, merged

STEPS, BATCH, SHARDS = 6, 8, 4
Target = namedtuple("Target", "y weight")


class Nested:
    """Dicts, a named tuple and lists of bfloat16, complex, float64 and texts."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> Any:
        draw = np.random.default_rng(index)
        return {"inputs": {"x": draw.standard_normal(4).astype(np.float32), "more": [torch.tensor(draw.standard_normal(2), dtype=torch.bfloat16)]},
                "target": Target(float(draw.standard_normal()), np.complex64(draw.standard_normal() * (1 + 1j))), "name": f"row {index}"}


class Failing(Nested):
    """Cannot give the rows that come at step 3."""

    def __getitem__(self, index: int) -> Any:
        if index in (16, 17):
            raise KeyError(f"no row {index}")
        return super().__getitem__(index)


class Uneven(Nested):
    """The first row of step 3 has another shape."""

    def __getitem__(self, index: int) -> Any:
        item = super().__getitem__(index)
        return {**item, "inputs": {**item["inputs"], "more": [torch.zeros(3 if index == 17 else 2)]}}


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(6, 1)

    def loss(self, batch: Any) -> Any:
        assert all(name.startswith("row ") for name in batch["name"])
        x = torch.cat([batch["inputs"]["x"], batch["inputs"]["more"][0].float()], 1)
        off = self.linear(x)[:, 0] - batch["target"].y.float()
        return (off.square() * batch["target"].weight.abs().float()).mean()


def recipe(data: str, framework: str = "torch", model: str = f"{__name__}:Net", **changes: Any) -> Any:
    base = {"run": {"steps": STEPS, "eval_every": 0}, "model": {"kind": model},
            "data": {"kind": data, "batch_size": BATCH, "eval_fraction": 0.0, "shuffle": False}, "backend": {"name": framework},
            "optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.0},
            "elastic": {"max_workers": 2, "logical_shards": SHARDS, "hang_timeout_s": 5.0}}
    return parse(merged(base, changes))


@pytest.mark.parametrize("workers", [1, 2])
def test_nested_items_train_as_a_plain_loop_does(workers: int, tmp_path: Path) -> None:
    result = fit(tmp_path / "run", recipe(f"{__name__}:Nested", elastic={"max_workers": workers}))
    result.assert_sound(STEPS)
    start = fit(tmp_path / "start", recipe(f"{__name__}:Nested", run={"steps": 1}, optimizer={"lr": 0.0})).arrays()
    model, data, sampler = Net(), Nested(), Sampler(40, BATCH, SHARDS, 0, False, steps=STEPS)
    model.load_state_dict({name: torch.tensor(start[f"parameter/{name}"]) for name in ("linear.weight", "linear.bias")})
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        for shard in range(SHARDS):
            rows = sampler.locate(sampler.positions(step, shard))[1]
            (model.loss(default_collate([data[int(row)] for row in rows])) / SHARDS).backward()
        optimizer.step()
    for name, value in model.state_dict().items():
        np.testing.assert_allclose(result.arrays()[f"parameter/{name}"], value.numpy(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("data", "words"), [
    ("Failing", r"item 16 of Failing cannot be had: KeyError: 'no row 16' \(test_own_items.py, line \d+, in __getitem__\); mend the data set"),
    ("Uneven", r"item\['inputs'\]\['more'\]\[0\] is a Tensor of shape \(3,\) in item 17 and a Tensor of shape \(2,\) in item 16")])
def test_an_item_that_fails_on_the_way_is_the_run_s_one_sentence(data: str, words: str, tmp_path: Path) -> None:
    result = fit(tmp_path / "run", recipe(f"{__name__}:{data}"))
    assert result.outcome.status == "failed" and result.steps == [1, 2]
    assert len(re.findall(words, result.outcome.error)) == 1 and "worker after worker" not in result.outcome.error.lower()
    assert not result.named("worker_lost")


@pytest.mark.parametrize("framework", ["tensorflow", "mxnet"])
def test_nested_items_are_the_same_as_flat_ones(framework: str, tmp_path: Path) -> None:
    load(framework, "backend")
    module = f"tests.support.{'keras' if framework == 'tensorflow' else 'gluon'}_models"
    runs = [fit(tmp_path / name, recipe(f"{module}:{name}", framework, f"{module}:{net}"))
            for name, net in zip(("Pairs", "Nests"), ("net", "nested") if framework == "tensorflow" else ("Net", "NestedNet"))]
    flat, nested = ([line["loss"] for line in run.metrics] for run in runs)
    assert flat == nested and len(flat) == STEPS
