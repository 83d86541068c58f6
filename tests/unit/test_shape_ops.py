"""What a model computes and keeps, against what PyTorch really saves for its backward pass, and against formulas by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from elastic.parallel.measure import measure
from nlp import bert, gpt
from recommender import dlrm
from tests.support.batches import Batches
from tests.support.models import rig_of
from vision import resnet, vit

torch = pytest.importorskip("torch", reason="what is kept is compared with what PyTorch keeps")
ROWS = 6
MADE = Batches(ROWS, 31)
LANGUAGE = {"layers": 2, "heads": 2, "width": 32, "context": 16}
TABLE = {"sizes": (10, 5, 5), "num_numeric": 4, "embedding_dim": 8}
PICTURES = {"shape": (8, 8, 1), "num_classes": 10}
CASES = {
    "gpt": (lambda: gpt.build(LANGUAGE, {"vocab_size": 31}), MADE.text),
    "gpt with dropout and biases": (lambda: gpt.build({**LANGUAGE, "dropout": 0.1, "bias": True}, {"vocab_size": 31}),
                                    MADE.text),
    "gpt computed again": (lambda: gpt.build({**LANGUAGE, "recompute": True, "dropout": 0.1}, {"vocab_size": 31}),
                           MADE.text),
    "gpt with smoothed labels": (lambda: gpt.build({**LANGUAGE, "smoothing": 0.1}, {"vocab_size": 31}), MADE.text),
    "gpt with experts": (lambda: gpt.build({**LANGUAGE, "experts": 4, "top": 2}, {"vocab_size": 31}), MADE.text),
    "bert": (lambda: bert.build(LANGUAGE, {"vocab_size": 31}), MADE.hidden),
    "vit": (lambda: vit.build({"layers": 2, "heads": 2, "width": 32, "patch": 2, "mlp": 2}, PICTURES), MADE.images),
    "resnet": (lambda: resnet.build({"blocks": [1, 1], "width": 8, "stem": "small"}, PICTURES), MADE.images),
    "resnet, group norm": (lambda: resnet.build({"blocks": [1, 1], "width": 8, "stem": "large", "norm": "group"},
                                                PICTURES), MADE.images),
    "dlrm": (lambda: dlrm.build({"arch": "dlrm"}, TABLE), MADE.clicks),
    "dcn": (lambda: dlrm.build({"arch": "dcn"}, TABLE), MADE.clicks),
}


def saved_bytes(model: Any, batch: dict[str, np.ndarray]) -> int:
    """Of every storage that PyTorch's graph holds on to, but for parameters, batch and constants, which are there
    before the loss is."""
    rig, held = rig_of("torch", model), dict[int, int]()
    before = {leaf.untyped_storage().data_ptr() for leaf in rig.backend._leaves.values()}
    columns = rig.backend._columns(batch)
    before |= {column.untyped_storage().data_ptr() for column in columns.values()}

    def note(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in before:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss, _, _ = model.loss(rig.backend._ops, rig.backend._leaves, rig.backend._device_state(), columns, 3)
    assert loss.requires_grad  # alive, and all that it holds with it, until here
    return sum(held.values())


@pytest.mark.parametrize("case", CASES)
def test_what_is_kept_is_what_pytorch_keeps(case: str) -> None:
    build, batch_of = CASES[case]
    model = build()
    batch = batch_of(model)
    found, real = measure(model, batch).kept_bytes, saved_bytes(model, batch)
    assert abs(found / real - 1) < 0.05, (found, real)


def test_the_work_of_a_gpt_is_the_formula() -> None:
    """6 operations a parameter and token, the position table left out, and 12 * layers * width * context for attention
    (Chowdhery et al. 2022)."""
    model = gpt.build({"layers": 3, "heads": 4, "width": 64, "context": 32}, {"vocab_size": 101})
    batch = {"tokens": np.zeros((2, 33), np.int64), "row_weight": np.ones(2, np.float32)}
    products = 3 * 12 * 64 * 64 + 101 * 64
    assert measure(model, batch).flops == 2 * 32 * (6 * products + 12 * 3 * 64 * 32)


def test_what_is_computed_again_costs_a_forward_pass_and_keeps_little() -> None:
    def of(recompute: bool) -> Any:
        model = gpt.build({"layers": 3, "heads": 4, "width": 64, "context": 32, "recompute": recompute},
                          {"vocab_size": 101})
        return measure(model, {"tokens": np.zeros((2, 33), np.int64), "row_weight": np.ones(2, np.float32)})

    plain, again = of(False), of(True)
    layers = 3 * 2 * 32 * (2 * 12 * 64 * 64 + 4 * 64 * 32)
    assert again.flops - plain.flops == layers
    assert again.kept_bytes + 3 * again.again_bytes > plain.kept_bytes > again.kept_bytes + again.again_bytes


def test_a_convolution_by_hand() -> None:
    """The first one needs no gradient of the images."""
    model = resnet.build({"blocks": [1], "width": 4, "stem": "small"}, {"shape": (6, 6, 3), "num_classes": 2})
    batch = {"image": np.zeros((5, 6, 6, 3), np.float32), "label": np.zeros(5, np.int64),
             "row_weight": np.ones(5, np.float32)}
    stem, block, head = 5 * 36 * 9 * 3 * 4, 2 * 5 * 36 * 9 * 4 * 4, 5 * 4 * 2
    assert measure(model, batch).flops == 2 * (2 * stem + 3 * block + 3 * head)
