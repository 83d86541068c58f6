"""What models share: layers computed again for the gradient, with the same result, and smoothed labels."""

from __future__ import annotations

import shutil
from itertools import product
from typing import Any

import numpy as np
import pytest

from elastic.model.shape_ops import MeterOps, Shape
from elastic.parallel.axis import Axis
from elastic.parallel.groups import Mirror
from nlp import bert, gpt
from tests.support.frameworks import assert_close, differentiate, load, names
from tests.support.models import Rig, rig_of
from tests.support.sampling import sample
from vision import vit

RANDOM = np.random.default_rng(0)
LAYERS = {"layers": 3, "heads": 2, "width": 16, "dropout": 0.1}
TOKENS = {"tokens": RANDOM.integers(0, 13, (3, 9)), "row_weight": np.ones(3, np.float32)}
HIDDEN = {"tokens": RANDOM.integers(0, 13, (3, 8)), "places": np.tile([1, 4, 6], (3, 1)),
          "targets": RANDOM.integers(0, 13, (3, 3)),
          "row_weight": np.ones(3, np.float32)}
IMAGES = {"image": RANDOM.standard_normal((3, 8, 8, 2)).astype(np.float32), "label": RANDOM.integers(0, 4, 3),
          "row_weight": np.ones(3, np.float32)}
# module, keys, facts of the data, batch
MODELS: dict[str, tuple[Any, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "nlp.gpt": (gpt, {**LAYERS, "context": 8}, {"vocab_size": 13}, TOKENS),
    "nlp.bert": (bert, {**LAYERS, "context": 8}, {"vocab_size": 13}, HIDDEN),
    "vision.vit": (vit, {**LAYERS, "patch": 4}, {"shape": [8, 8, 2], "num_classes": 4}, IMAGES)}


FREEZE = ("h0.*", "h1.ln2.*", "wpe", "ln_e*", "patch*", "position")


def rig(name: str, kind: str, freeze: tuple[str, ...] = (), compile: bool = False, **config: Any) -> Rig:
    module, keys, info, _ = MODELS[kind]
    return rig_of(name, module.build({**keys, **config}, info), freeze, compile=compile)


@pytest.mark.parametrize("case", sample(list(product(MODELS, ("whole", "frozen"))), 3), ids="-".join)
@pytest.mark.parametrize("name", names())
def test_a_layer_computed_again_gives_the_same_gradients(name: str, case: tuple[str, str]) -> None:
    load(name, "backend")
    kind, freeze = case[0], FREEZE if case[1] == "frozen" else ()
    batch = MODELS[kind][-1]
    freeze = tuple(pattern for pattern in freeze
                   if any(n.startswith(pattern.strip("*.")) for n in rig(name, kind).layout.names))
    kept, again = (rig(name, kind, freeze, recompute=recompute) for recompute in (False, True))
    for seed in (5, 6):
        (wanted, left), (found, right) = kept.gradient(batch, seed), again.gradient(batch, seed)
        if name == "tensorflow":  # two graphs, which its optimizer of graphs rewrites each as it likes
            assert_close(found, wanted, 1e-6)
        else:
            assert np.array_equal(found, wanted) and left == right
        assert all(np.abs(view).max() > 0 for view in again.by_name(found).values())
    assert again.backend.metrics(batch) == kept.backend.metrics(batch)


class Nowhere(MeterOps):
    """Split in two, and nobody may ask who is who."""

    def part(self, dim: str) -> int:
        raise AssertionError(f"asked for its place along {dim}")


@pytest.mark.parametrize(("dropout", "seed"), [(0.0, 5), (0.1, None)])
def test_without_dropout_a_layer_asks_for_no_place(dropout: float, seed: int | None) -> None:
    """A framework of graphs would trace the model again for every place."""
    model = gpt.build({**LAYERS, "context": 8, "dropout": dropout}, {"vocab_size": 13})
    params = {key: Shape(spec.shape, True) for key, spec in model.parameters.items()}
    ops = Nowhere({"heads": Axis("tensor", Mirror(2, 0))})
    assert model.through(ops, params, None, {"tokens": Shape((3, 9), False)}, seed).shape == (3, 8, 13)
    with pytest.raises(AssertionError, match="along heads"):
        gpt.build({**LAYERS, "context": 8}, {"vocab_size": 13}).through(ops, params, None, {"tokens": Shape((3, 9), False)}, 5)


@pytest.mark.parametrize("name", names())
def test_it_is_computed_again(name: str) -> None:
    calls = []

    def function(ops: Any, x: Any, y: Any) -> Any:
        def inner(x: Any, y: Any) -> Any:
            calls.append(1)
            return ops.multiply(ops.exp(x), y)

        return ops.recompute(inner, x, y)

    arrays = [np.array([0.5, 2.0]), np.array([3.0, -1.0])]
    (out,), gradients = differentiate(name, function, arrays, "float32", cotangents=[np.ones(2)])
    assert len(calls) == (1 if name == "reference" else 2)
    for found, wanted in zip((out, *gradients),
                             (np.exp(arrays[0]) * arrays[1], np.exp(arrays[0]) * arrays[1], np.exp(arrays[0]))):
        np.testing.assert_allclose(found, wanted, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", sample(["nlp.gpt", "vision.vit"], 1))
def test_compiled_with_dropout_and_layers_computed_again(kind: str) -> None:
    """Attention over 20 and 4 places: the compiler's own dropout masks were wrong where the last dim was no multiple of
    its vectors."""
    if not (shutil.which("g++") or shutil.which("c++")):
        pytest.skip("torch.compile needs a C++ compiler on the CPU")
    load("torch", "backend")
    batch = MODELS[kind][-1]
    if kind == "nlp.gpt":
        batch = {**batch, "tokens": RANDOM.integers(0, 13, (3, 21))}
    long = {"context": 20, "layers": 1} if kind == "nlp.gpt" else {"layers": 1}
    wanted, _ = rig("torch", kind, **long).gradient(batch, 7)
    compiled = rig("torch", kind, compile=True, recompute=True, **long)
    for _ in range(2):
        assert_close(compiled.gradient(batch, 7)[0], wanted, 1e-5, kind)
    assert compiled.backend.compilations() == 1


def torch_s_loss(logits: Any, targets: Any, smoothing: float) -> float:
    import torch

    loss = torch.nn.CrossEntropyLoss(label_smoothing=smoothing, reduction="sum")
    return float(loss(torch.tensor(np.asarray(logits, np.float64)).flatten(0, -2),
                      torch.tensor(np.asarray(targets, np.int64)).flatten()))


@pytest.mark.parametrize("name", names())
def test_smoothed_labels_are_torch_s(name: str) -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    load(name, "backend")
    found = rig(name, "nlp.gpt", dropout=0.0, smoothing=0.3)
    found.param *= 9.0  # away from even odds, where smoothing changes nothing
    logits, targets = found.backend.logits(TOKENS["tokens"][:, :-1]), TOKENS["tokens"][:, 1:]
    wanted, plain = torch_s_loss(logits, targets, 0.3), torch_s_loss(logits, targets, 0.0)
    assert abs(wanted / plain - 1) > 0.01
    assert found.gradient(TOKENS)[1].loss_sum == pytest.approx(wanted, rel=1e-5)
    assert found.backend.metrics(TOKENS)["loss"][0] == pytest.approx(plain, rel=1e-5)


def test_bert_s_smoothed_labels_are_torch_s() -> None:
    load("torch", "backend")
    import torch

    from backends.pytorch.ops import TorchOps

    found = rig("torch", "nlp.bert", dropout=0.0, smoothing=0.3)
    found.param *= 9.0
    tensors = {key: torch.tensor(np.array(value)) for key, value in (found.layout.views(found.param) | HIDDEN).items()}
    scores = bert.build(*MODELS["nlp.bert"][1:3]).through(TorchOps(), tensors, None, tensors, None)
    wanted, plain = (torch_s_loss(scores, HIDDEN["targets"], smoothing) for smoothing in (0.3, 0.0))
    assert abs(wanted / plain - 1) > 0.01
    assert found.gradient(HIDDEN)[1].loss_sum == pytest.approx(wanted, rel=1e-5)
    assert found.backend.metrics(HIDDEN)["loss"][0] == pytest.approx(plain, rel=1e-5)
