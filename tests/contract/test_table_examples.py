"""The examples of users' own models over embedding tables: what they look up in the made log, and their loss, by NumPy."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elastic.data.loader import load_batch
from elastic.recipe import parse
from elastic.tables.held import HeldTables
from elastic.workload import Workload, prepare
from tests.support.frameworks import load
from tests.support.inprocess import merged

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
FILES = {"torch": "own_tables_torch", "tensorflow": "own_tables_keras", "mxnet": "own_tables_gluon"}


def arrays_of(backend: str, module: Any) -> Any:
    """What turns a NumPy array into the framework's."""
    if backend == "torch":
        import torch
        return torch.tensor
    return module.tf.constant if backend == "tensorflow" else module.mx.nd.array


def layers_of(backend: str, model: Any) -> list[np.ndarray]:
    """(in, out) and the bias of both layers."""
    if backend == "torch":
        weights = [parameter.detach().numpy() for parameter in model.parameters()]
    elif backend == "tensorflow":
        return [weight.numpy() for weight in model.weights]
    else:
        weights = [parameter.data().asnumpy() for parameter in model.collect_params().values()]
    return [weight.T for weight in weights]


@pytest.mark.parametrize("backend", FILES)
def test_an_example_reads_its_rows(backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    framework = load(backend, "ops")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(EXAMPLES)
    module = importlib.import_module(FILES[backend])
    recipe = parse(merged(module.RECIPE, {"data": {"path": "made:recommender.click_log?rows=3000", "batch_size": 64}}))
    assert recipe.model.kind == f"{FILES[backend]}:Net" and recipe.backend.name == backend
    work = Workload.open(recipe, prepare(recipe))
    assert work.tables is not None and [one.name for one in work.tables.features] == ["history", "item", "user"]
    held = HeldTables(work.tables)
    for store in held.stores.values():
        store.hold(range(work.tables.num_buckets))
    batch = load_batch(work.training, work.sampler, 1, 0)
    rows = {one.name: held.stores[one.table].lookup(batch["bags"][one.name]) for one in work.tables.features}
    array, model = arrays_of(backend, framework), module.Net(16)
    given = {"rows": {name: array(found) for name, found in rows.items()}, "price": array(batch["price"]),
             "click": array(batch["click"].astype(np.int64))}
    loss = model.batch_loss(given) if backend == "tensorflow" else model.loss(given)
    found = float(np.mean(loss.asnumpy() if backend == "mxnet" else loss.detach().numpy() if backend == "torch" else loss.numpy()))

    first, bias, second, end = (layer.astype(np.float64) for layer in layers_of(backend, model))
    user, item, history = rows["user"], rows["item"], rows["history"]
    x = np.concatenate([user * item, item * history, item, batch["price"][:, None]], 1).astype(np.float64)
    score = (np.maximum(x @ first + bias, 0) @ second + end)[:, 0]
    wanted = np.mean(np.logaddexp(0, score) - score * batch["click"])
    assert found == pytest.approx(wanted, rel=1e-5) and np.abs(history).max() > 0
