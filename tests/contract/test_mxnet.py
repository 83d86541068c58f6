"""What only the MXNet backend has: graphs that are recorded once, and a thread count of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from elastic.errors import GroupBroken, UserError
from elastic.model.backend import Spec
from tests.support.frameworks import assert_close, load
from tests.support.models import Tiny, gpt_rig, rig_of, token_batch
from vision import resnet

load("mxnet", "backend")

from backends.mxnet.backend import computing  # noqa: E402
from backends.mxnet.turn import aside, turn  # noqa: E402


def test_recorded_once_for_each_set_of_shapes() -> None:
    rig = gpt_rig("mxnet", config={"dropout": 0.2})
    for seed in range(3):
        rig.gradient(token_batch(seed=seed), seed)
    assert rig.backend.compilations() == 1
    rig.gradient(token_batch(rows=2))
    rig.gradient(token_batch())
    assert rig.backend.compilations() == 2


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_a_graph_of_images_in_float64_is_the_reference_s(norm: str) -> None:
    """In the graph images keep their channels first from kernel to kernel."""
    model = resnet.build({"blocks": [1, 1], "width": 4, "norm": norm, "groups": 2},
                         {"shape": [8, 8, 2], "num_classes": 4})
    rng = np.random.default_rng(0)
    given = {"image": rng.standard_normal((6, 8, 8, 2)), "label": rng.integers(0, 4, 6), "row_weight": np.ones(6)}
    (a, left), (b, right) = (rig_of(name, model, precision="float64").gradient(given)
                             for name in ("mxnet", "reference"))
    assert left.loss_sum == pytest.approx(right.loss_sum, rel=1e-12)
    assert np.linalg.norm(a - b) <= 1e-9 * np.linalg.norm(b)
    for name, value in right.buffers.items():
        assert_close(left.buffers[name], value, 1e-6, name)


def test_no_parameter_left_to_train_is_named() -> None:
    with pytest.raises(UserError, match="model.freeze"):
        gpt_rig("mxnet", freeze=("*",)).gradient(token_batch())


LATE = """
import warnings, numpy
numpy.bool = numpy.bool_
import mxnet
from types import SimpleNamespace
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    from backends.mxnet import backend
    from nlp.gpt import build
    backend.framework.create(build({"layers": 1, "heads": 1, "width": 4, "context": 4}, {"vocab_size": 3}),
                   SimpleNamespace(device="cpu", precision="float32", threads=1, compile=False))
assert any("imported before backends.mxnet" in str(w.message) for w in told)
"""


def test_a_late_import_is_told() -> None:
    env = {name: value for name, value in os.environ.items() if name != "MXNET_ENGINE_TYPE"}
    child = subprocess.run([sys.executable, "-c", LATE], capture_output=True, text=True, timeout=120, env=env)
    assert child.returncode == 0, child.stderr


class Patches:
    """A convolution, and a norm over the channels of each place."""

    parameters = {"filters": Spec((2, 2, 3, 12), scale=0.5), "norm": Spec((12,), init="ones"),
                  "shift": Spec((12,), scale=0.5)}
    buffers: dict[str, Spec] = {}

    def loss(self, ops: Any, params: Any, state: Any, batch: Any, seed: int) -> Any:
        found = ops.layer_norm(ops.conv2d(batch["image"], params["filters"], stride=2), params["norm"], params["shift"])
        return ops.sum(ops.multiply(found, ops.gelu(found))), 1.0, {}


@pytest.mark.parametrize("size", [2, 6, 10])  # places: 5, 45, 125
def test_a_norm_behind_a_convolution_is_the_reference_s(size: int) -> None:
    """The kernel of the norm is that of batch norms, which knows the layouts of convolutions."""
    found, wanted = (rig_of(name, Patches()) for name in ("mxnet", "reference"))
    images = {"image": np.random.default_rng(0).standard_normal((5, size, size, 3)).astype(np.float32)}
    (a, left), (b, right) = found.gradient(images), wanted.gradient(images)
    assert left.loss_sum == pytest.approx(right.loss_sum, rel=1e-5)
    assert_close(a, b, 1e-5)


class Echo:
    """An axis of two whose other worker always sends what this one sends. The collective numbered `lost` finds nobody.
    """

    size, rank = 2, 0

    def __init__(self, lost: int = -1):
        self.calls, self.lost = 0, lost

    def sum(self, x: np.ndarray) -> np.ndarray:
        assert not turn._is_owned()  # a worker in another thread could come
        self.calls += 1
        if self.calls - 1 == self.lost:
            raise GroupBroken("lost rank 1")
        return x + x

    def max(self, x: np.ndarray) -> np.ndarray:
        return x.copy()


@pytest.mark.parametrize("recompute", [False, True])
def test_a_peer_lost_in_any_collective_is_told_and_the_next_generation_goes_on(recompute: bool) -> None:
    model = Tiny(0.3, recompute)
    model.parameters = {name: replace(spec, shape=tuple({"d_ff": 6, "vocab": 7}.get(dim, length)
                                                        for dim, length in zip(spec.dims, spec.shape)))
                        for name, spec in model.parameters.items()}
    rig = rig_of("mxnet", model)

    def run(axis: Echo) -> np.ndarray:
        rig.backend.connect({"d_ff": axis, "vocab": axis})
        return rig.gradient(model.batch(1))[0]

    first = Echo()
    wanted, recorded = run(first), rig.backend.compilations()
    assert first.calls == (9 if recompute else 7)  # four forward, three back; computed again, two more
    for lost in range(first.calls):
        with pytest.raises(GroupBroken, match="lost rank 1"):
            run(Echo(lost))
        again = Echo()
        assert np.array_equal(run(again), wanted) and again.calls == first.calls
    assert rig.backend.compilations() == recorded


def test_who_steps_aside_lets_go_of_every_entry() -> None:
    taken: list[bool] = []

    def other() -> None:
        with turn:
            taken.append(True)

    with computing(1), turn:
        thread = threading.Thread(target=other)
        thread.start()
        assert not taken
        with aside():
            thread.join(60)
            assert taken and not turn._is_owned()
        assert turn._is_owned()
    assert not turn._is_owned()  # as often as it was taken, or leaving `with` would have raised
    with aside():  # by who holds nothing
        pass
    assert not turn._is_owned()
