"""What a run over shapes alone says that workers exchange, against what the axes of a real pass count, byte for byte."""

from __future__ import annotations

from collections import Counter
from itertools import product
from typing import Any

import numpy as np
import pytest

from elastic.mesh import Mesh
from elastic.parallel import measure
from elastic.parallel.axis import Axis
from elastic.parallel.layout import Layout, Portion
from nlp import bert, gpt
from recommender import dlrm
from tests.support.batches import Batches
from tests.support.frameworks import names
from tests.support.models import Tiny, rig_of
from tests.support.sampling import sample
from tests.support.threads import together
from vision import vit

ROWS = 3
LANGUAGE = {"layers": 2, "heads": 4, "width": 16, "context": 8}
MADE = Batches(ROWS, 13)

CASES: dict[str, tuple[Any, Any, Mesh]] = {
    "tiny, a vocabulary that does not divide": (Tiny, lambda model: model.batch(1), Mesh(1, tensor=2)),
    "tiny over four": (Tiny, lambda model: model.batch(1), Mesh(1, tensor=4)),
    "gpt": (lambda: gpt.build(LANGUAGE, {"vocab_size": 13}), MADE.text, Mesh(1, tensor=2)),
    "gpt, smoothed, with biases": (lambda: gpt.build({**LANGUAGE, "smoothing": 0.1, "bias": True}, {"vocab_size": 13}),
                                   MADE.text, Mesh(1, tensor=4)),
    "gpt with experts on two workers": (lambda: gpt.build({**LANGUAGE, "experts": 4}, {"vocab_size": 13}), MADE.text,
                                        Mesh(1, expert=2)),
    "gpt with experts, both axes": (lambda: gpt.build({**LANGUAGE, "experts": 4, "top": 2}, {"vocab_size": 13}),
                                    MADE.text,
                                    Mesh(1, tensor=2, expert=2)),
    "bert": (lambda: bert.build(LANGUAGE, {"vocab_size": 13}), MADE.hidden, Mesh(1, tensor=2)),
    "vit": (lambda: vit.build({"layers": 2, "heads": 2, "width": 16, "patch": 2, "mlp": 2},
                              {"shape": (8, 8, 1), "num_classes": 10}), MADE.images,
            Mesh(1, tensor=2)),
    "dlrm": (lambda: dlrm.build({"arch": "dlrm"}, {"sizes": (10, 5, 6), "num_numeric": 4, "embedding_dim": 8}),
             MADE.clicks, Mesh(1, tensor=2)),
}


def counted(name: str, model: Any, batch: dict[str, np.ndarray], layout: Layout) -> list[Counter[str]]:
    """Each worker's own counts of one pass, forward and backward."""
    size = layout.mesh.replica_size

    def worker(rank: int, group: Any) -> Counter[str]:
        coordinate = layout.mesh.coordinate(rank)
        counts: Counter[str] = Counter()
        axes = {axis: Axis(axis, group.subgroup(layout.mesh.axis_ranks(rank, axis)), counts)
                for axis in ("tensor", "expert")}
        rig = rig_of(name, Portion(model, layout, coordinate))
        if not hasattr(rig.backend, "connect"):
            pytest.skip(f"the {name} backend cannot run a model in pieces yet")
        rig.backend.connect({dim: axes[axis] for dim, axis in layout.dims.items()})
        rig.gradient(batch)
        return counts

    return together(size, worker)


@pytest.mark.parametrize(("name", "case"), sample(list(product(names(), CASES)), 8))
def test_the_bytes_of_a_real_pass(name: str, case: str) -> None:
    build, batch_of, mesh = CASES[case]
    model = build()
    batch, layout = batch_of(model), Layout(model, mesh)
    for rank, counts in enumerate(counted(name, model, batch, layout)):
        found = measure.together(list(measure.pieces(model, batch, layout, mesh.coordinate(rank)).values()))
        assert sum(counts.values()) > 0
        assert {key: sum(move.bytes for move in found.moves if move.key == key)
                for key in {move.key for move in found.moves}} == dict(counts)


@pytest.mark.parametrize("name", names())
def test_what_is_computed_again_is_exchanged_again(name: str) -> None:
    """At most: the oracle keeps everything, and PyTorch stops where the gradient needs no more."""
    plain, again = (gpt.build({**LANGUAGE, "recompute": recompute}, {"vocab_size": 13}) for recompute in (False, True))
    batch, layout = MADE.text(again), Layout(again, Mesh(1, tensor=2))
    bounds = []
    for model in (plain, again):
        found = measure.together(list(measure.pieces(model, batch, layout, layout.mesh.coordinate(0)).values()))
        bounds.append(sum(move.bytes for move in found.moves))
    assert bounds[0] <= sum(counted(name, again, batch, layout)[0].values()) <= bounds[1]
