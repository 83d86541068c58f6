"""Weight decay by name pattern. Oracle: torch's own optimizers with a group for each parameter."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from backends.reference.backend import framework
from elastic.errors import RecipeError
from elastic.messages import Ballot
from elastic.recipe import dumps, loads, parse
from elastic.state.flat_layout import FlatLayout
from elastic.state.state import State
from elastic.worker.loop import apply_update
from elastic.worker.loop_control import Control
from elastic.worker.training import Member, Placement, Plan, Training
from recommender.dlrm import build

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

MODEL = build({"bottom": [3], "top": [4]}, {"sizes": [5, 6], "num_numeric": 2, "embedding_dim": 3})
DECAYS: dict[str, tuple[Any, tuple[str, ...], Any]] = {  # weight_decay, no_decay, what a parameter's is
    "a number": (0.3, ("*bias",), lambda name: 0.0 if name.endswith("bias") else 0.3),
    "some": ({"embedding": 0.5, "top*": 0.1}, (),
             lambda name: 0.5 if name == "embedding" else 0.1 if name.startswith("top") else 0.0),
    "the first counts": ({"top0.*": 0.4, "*.weight": 0.2, "*": 0.05}, (),
                         lambda name: 0.4 if name.startswith("top0") else 0.2 if name.endswith(".weight") else 0.05),
    "no_decay first of all": ({"*": 0.7}, ("out.*",), lambda name: 0.0 if name.startswith("out.") else 0.7)}


def recipe(decay: Any, no_decay: tuple[str, ...] = (), name: str = "adamw") -> Any:
    return parse({"model": {"kind": "recommender.dlrm"},
                  "data": {"format": "csv", "path": __file__, "label": "y", "numeric": ["x"]},
                  "optimizer": {"name": name, "lr": 0.1, "weight_decay": decay, "no_decay": list(no_decay)}})


@pytest.mark.parametrize("kind", DECAYS)
@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_parameters_decay_as_their_pattern_says(kind: str, name: str) -> None:
    decay, no_decay, wanted = DECAYS[kind]
    asked = recipe(decay, no_decay, name).optimizer
    backend = framework.create(MODEL, SimpleNamespace(device="cpu", precision="float32", threads=1, compile=False))
    state = State(backend, name, no_decay=no_decay, decayed=asked.decayed)
    state.start(3)
    theirs = {n: torch.tensor(np.array(v)) for n, v in state.layout.views(state.param).items()}
    groups = [{"params": [value], "weight_decay": wanted(n)} for n, value in theirs.items()]
    makers = {"sgd": lambda: torch.optim.SGD(groups, 0.1, 0.9), "adam": lambda: torch.optim.Adam(groups, 0.1),
              "adamw": lambda: torch.optim.AdamW(groups, 0.1)}
    optimizer, draw = makers[name](), np.random.default_rng(0)
    training = Training(Plan(5, 2, 0, True, asked.model_dump()), None, lambda step, shard: np.zeros(1))  # type: ignore[arg-type]
    member = Member(training, Placement(backend, state), Control(), print)
    for step in range(1, 6):
        gradient = backend.allocate(state.layout.gradient)
        for n, view in state.layout.views(gradient, state.layout.trainable_names).items():
            view[...] = draw.standard_normal(view.shape)
            theirs[n].grad = torch.tensor(view / 4)
        member.held.gradient = gradient
        apply_update(member, Ballot(step, 2.0, 4.0))
        optimizer.step()
    for n, view in state.layout.views(state.param).items():
        np.testing.assert_allclose(view, theirs[n].numpy(), rtol=2e-5, atol=2e-6, err_msg=n)


def test_a_table_of_decays_survives_the_recipe_s_file() -> None:
    asked = recipe({"*.weight": 0.01, "embedding": 1})
    assert loads(dumps(asked), locate=False).optimizer.weight_decay == {"*.weight": 0.01, "embedding": 1.0}
    assert list(loads(dumps(asked), locate=False).optimizer.weight_decay) == ["*.weight", "embedding"]
    assert recipe(1).optimizer.weight_decay == 1.0


@pytest.mark.parametrize("decay", [-0.1, "much", True, {}, {"*": -1}, {"*": "x"}, {"*": True}, float("nan"), [0.1]])
def test_decays_that_cannot_be_meant_are_one_sentence(decay: Any) -> None:
    with pytest.raises(RecipeError, match="^optimizer.weight_decay = .* cannot work; it must be a number of at least "
                                          "0, or a table") as caught:
        recipe(decay)
    assert "\n" not in str(caught.value)


def test_a_pattern_that_matches_nothing_is_named() -> None:
    with pytest.raises(RecipeError, match=r"optimizer.weight_decay = 'embeding' matches no parameter"):
        FlatLayout(MODEL.parameters, decayed=("embeding", "*"))
