"""Own data sets whose items are nested, trained on several workers. Oracles: a plain loop over torch's own collate; flat items elsewhere."""

from __future__ import annotations

import importlib
import re
from collections import namedtuple
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from backends.common import mapped
from elastic.data import MapStyle, Sampler
from elastic.driver.trainer import Trainer
from elastic.errors import RecipeError
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
        return {"inputs": {"x": draw.standard_normal(4).astype(np.float32),
                           "more": [torch.tensor(draw.standard_normal(2), dtype=torch.bfloat16)]},
                "target": Target(float(draw.standard_normal()), np.complex64(draw.standard_normal() * (1 + 1j))),
                "name": f"row {index}"}


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
            "data": {"kind": data, "batch_size": BATCH, "eval_fraction": 0.0, "shuffle": False},
            "backend": {"name": framework},
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


MODELS = {"tensorflow": "keras_models net nested", "mxnet": "gluon_models Net NestedNet"}


def named(framework: str) -> tuple[str, str, str]:
    """The module with the data sets, and a model for each of them."""
    backend = load(framework, "backend")
    if framework == "tensorflow":
        backend.start(1)
    module, *models = MODELS[framework].split()
    return f"tests.support.{module}", *(f"tests.support.{module}:{model}" for model in models)


@pytest.mark.parametrize("framework", MODELS)
def test_nested_items_are_the_same_as_flat_ones(framework: str, tmp_path: Path) -> None:
    module, *models = named(framework)
    runs = [fit(tmp_path / name, recipe(f"{module}:{name}", framework, model))
            for name, model in zip(("Pairs", "Nests"), models, strict=True)]
    flat, nested = ([line["loss"] for line in run.metrics] for run in runs)
    assert flat == nested and len(flat) == STEPS


Give = Callable[[Any], Any]
GIVEN: dict[str, Callable[[int, Give], Any]] = {  # items of number i; `give` makes arrays of the framework's own
    "named tuples and texts": lambda i, give: {
        "t": Target([float(i), 2.0], (np.int64(i), [i, i + 1])), "name": f"row {i}", "raw": [("a" * i, b"x")]},
    "kinds of numbers": lambda i, give: (
        i % 2 == 0, np.uint8(i), np.float16(i / 2), np.int64(2**53 + i), {"wide": 0.1 + i, "small": np.int8(-i)}),
    "the framework's own arrays": lambda i, give: [
        give(np.full((2, 1), i, np.float32)), {"count": give(np.full(3, i, np.int32)), "y": np.ones(2) * i}]}


def as_text(word: str | bytes) -> str:
    return word if isinstance(word, str) else word.decode()


def assert_stacked(found: Any, items: list[Any]) -> None:
    """By NumPy, leaf by leaf, in the items' own structure; float64 is float32 by then."""
    first = items[0]
    if isinstance(first, dict):
        assert list(found) == list(first)
        for key in first:
            assert_stacked(found[key], [item[key] for item in items])
    elif isinstance(first, tuple) or (isinstance(first, list)
                                      and not all(isinstance(entry, (int, float)) for entry in first)):
        assert type(found) is type(first) and len(found) == len(first)
        for entry, column in zip(found, zip(*items, strict=True), strict=True):
            assert_stacked(entry, list(column))
    else:
        wanted = np.stack([item.asnumpy() if hasattr(item, "asnumpy") else np.asarray(item) for item in items])
        array = found.numpy() if hasattr(found, "numpy") else found.asnumpy() if hasattr(found, "asnumpy") else found
        if wanted.dtype.kind in "US":
            assert list(map(as_text, array.tolist())) == list(map(as_text, wanted.tolist()))
        else:
            assert array.dtype == (np.float32 if wanted.dtype == np.float64
                                   else wanted.dtype) and np.array_equal(array, wanted.astype(array.dtype))


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("framework", MODELS)
def test_a_model_gets_its_items_leaf_by_leaf(framework: str, given: str) -> None:
    module = importlib.import_module(named(framework)[0])
    backend, adapter = load(framework, "backend"), load(framework, "adapter")
    give: Give = adapter.keras.ops.convert_to_tensor if framework == "tensorflow" else lambda values: adapter.mx.nd.array(values, dtype=values.dtype)
    items = [GIVEN[given](i, give) for i in range(6)]
    source = type("Given", (Nested,), {"__len__": lambda self: 6, "__getitem__": lambda self, i: items[i]})()
    batch = MapStyle(source, collate=backend.framework.collate).batch(np.array([4, 1, 2]), np.zeros(3, np.int64))
    columns = (load(framework, "arrays").columns if framework == "tensorflow"
               else partial(mapped, convert=adapter.GluonModel(module.Net()).array))
    assert_stacked(columns(batch), [items[4], items[1], items[2]])


@pytest.mark.parametrize("framework", ["torch", *MODELS])
def test_a_data_set_that_has_changed_is_not_resumed(framework: str, tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    module, model = (__name__, f"{__name__}:Net") if framework == "torch" else named(framework)[:2]
    name = "Nested" if framework == "torch" else "Pairs"
    source = getattr(importlib.import_module(module), name)
    size = len(source())
    monkeypatch.setattr(source, "key", lambda self: "as it was", raising=False)
    fit(tmp_path, recipe(f"{module}:{name}", framework, model, run={"steps": 2},
                         elastic={"max_workers": 1})).assert_sound(2)
    assert Trainer.resume(tmp_path, ["run.steps=4"]).check()["key"] == f"{size} samples, key() = 'as it was'"
    for method, value, told in (("__len__", size + 8, f"{size + 8} samples,"),
                                ("__len__", size - 1, f"{size - 1} samples,"),
                                ("key", "another", f"{size} samples, key() = 'another'")):
        with monkeypatch.context() as patch:
            patch.setattr(source, method, lambda self, value=value: value)
            with pytest.raises(RecipeError, match=re.escape(f"has {told}") + ".*and this run began with") as caught:
                Trainer.resume(tmp_path, ["run.steps=4"]).check()
        assert "\n" not in str(caught.value)
