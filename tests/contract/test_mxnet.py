"""What only the MXNet backend has: Gluon blocks, graphs that are recorded once, and a thread count of its own."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from elastic.backend import Spec
from elastic.errors import GroupBroken, UserError
from tests.support.frameworks import assert_close, load
from tests.support.models import Tiny, gpt_rig, rig_of, token_batch
from vision import resnet

load("mxnet", "backend")
import mxnet as mx  # noqa: E402  (after its backend, which sets what MXNet reads when it loads)
from mxnet import autograd, gluon  # noqa: E402

from backends.mxnet.backend import computing  # noqa: E402
from backends.mxnet.turn import turn  # noqa: E402


class Net(gluon.HybridBlock):
    """Batch norm, dropout, two layers that may share their weights."""

    def __init__(self, dropout: float = 0.0, shared: bool = False, hybrid: bool = False):
        super().__init__()
        with self.name_scope():
            self.first = gluon.nn.Dense(4, in_units=4)
            self.second = gluon.nn.Dense(4, in_units=4, params=self.first.params if shared else None)
            self.norm, self.drop = gluon.nn.BatchNorm(in_channels=4), gluon.nn.Dropout(dropout)
        with computing(1, False):
            mx.random.seed(3)
            self.initialize(mx.init.Normal(0.5))
        if hybrid:
            self.hybridize(static_alloc=True)

    def hybrid_forward(self, F: Any, x: Any) -> Any:
        return self.second(F.relu(self.drop(self.norm(self.first(x)))))

    def loss(self, batch: Any) -> Any:
        return (self(batch["x"]) - batch["y"]).square().mean()

    def metrics(self, batch: Any) -> Any:
        return {"error": ((self(batch["x"]) - batch["y"]).abs().sum(), batch["x"].shape[0] * 4)}


class PerRow(Net):
    def loss(self, batch: Any) -> Any:
        return gluon.loss.L2Loss()(self(batch[0]), batch[1])


class Sums(Net):
    def loss(self, batch: Any) -> Any:
        return super().loss(batch) * 24, 12


def batch(rows: int = 6) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {"x": rng.standard_normal((rows, 4)).astype(np.float32), "y": rng.standard_normal((rows, 4))}


def plainly(net: Net, given: Any, times: float = 6.0) -> tuple[float, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(loss, gradients of `times` loss, statistics) by a loop in Gluon alone."""
    with computing(1, False):
        arrays = {name: mx.nd.array(value, dtype="float32") for name, value in given.items()}
        with autograd.record():
            loss = Net.loss(net, arrays)
        loss.backward(mx.nd.full((1,), times))
        named = net._collect_params_with_prefix()
        return (float(loss.asscalar()), {n: p.grad().asnumpy() for n, p in named.items() if p.grad_req != "null"},
                {n: p.data().asnumpy() for n, p in named.items() if p.grad_req == "null"})


@pytest.mark.parametrize("hybrid", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_gradients_and_statistics_are_the_block_s_own(hybrid: bool, shared: bool) -> None:
    wanted, slopes, statistics = plainly(Net(shared=shared), batch())
    rig = rig_of("mxnet", Net(shared=shared, hybrid=hybrid))
    before = {name: value.copy() for name, value in rig.state.items()}
    (flat, result), (again, other) = rig.gradient(batch()), rig.gradient(batch())
    assert np.array_equal(flat, again)
    assert (result.loss_sum, result.weight) == (pytest.approx(6 * wanted, rel=1e-6), 6.0)
    found = rig.by_name(flat)
    assert ("second.weight" in found) is not shared
    for name, values in found.items():
        assert_close(values, slopes[name], 5e-5, name)
    assert set(result.buffers) == set(statistics) == {"norm.running_mean", "norm.running_var"}
    for name, values in result.buffers.items():
        assert_close(values, statistics[name], 1e-6, name)
        assert np.array_equal(values, other.buffers[name])  # a redone step counts once
        assert np.array_equal(rig.state[name], before[name])
        assert not np.array_equal(values, before[name])


@pytest.mark.parametrize("hybrid", [False, True])
def test_evaluation_leaves_everything_as_it_was(hybrid: bool) -> None:
    rig = rig_of("mxnet", Net(dropout=0.5, hybrid=hybrid))
    param, state = rig.param.copy(), {name: value.copy() for name, value in rig.state.items()}
    first = rig.backend.metrics(batch())
    rig.gradient(batch())
    assert rig.backend.metrics(batch()) == first
    assert set(first) == {"loss", "error"} and first["error"][1] == 24
    assert np.array_equal(rig.param, param) and all(np.array_equal(rig.state[name], value) for name, value in state.items())


class Convolved(Net):
    """Layers whose kernels keep their weights in an order of their own where they predict."""

    def __init__(self) -> None:
        super().__init__()
        with self.name_scope():
            self.image = gluon.nn.Conv2D(32, 3, in_channels=16)
        with computing(1, False):
            self.image.initialize()

    def loss(self, batch: Any) -> Any:
        return self.image(batch["image"]).square().mean() + super().loss(batch)


def test_a_convolution_leaves_its_weights_in_place() -> None:
    given = {**batch(), "image": np.random.default_rng(1).standard_normal((6, 16, 8, 8)).astype(np.float32)}
    rig = rig_of("mxnet", Convolved())
    param, (one, _) = rig.param.copy(), rig.gradient(given)
    first, second = rig.backend.metrics(given), rig.backend.metrics(given)
    assert first == second and np.array_equal(rig.param, param)
    assert np.array_equal(rig.gradient(given)[0], one)


def test_one_loss_a_row_and_sums_with_weights() -> None:
    x, y = batch()["x"], batch()["y"].astype(np.float32)
    with computing(1, False):
        each = gluon.loss.L2Loss()(Net()(mx.nd.array(x)), mx.nd.array(y)).asnumpy()
    seen = rig_of("mxnet", PerRow()).backend._model._sum(mx.nd.array(each), 6)
    assert (float(seen[0].asscalar()), seen[1]) == (pytest.approx(float(each.sum()), rel=1e-6), 6.0)
    assert rig_of("mxnet", PerRow()).gradient((x, y))[1].weight == 6.0
    assert rig_of("mxnet", Sums()).gradient(batch())[1].weight == 12.0


def test_no_rows_count_for_nothing() -> None:
    rig = rig_of("mxnet", Net())
    flat, result = rig.gradient({name: value[:0] for name, value in batch().items()})
    assert (result.loss_sum, result.weight, flat.any()) == (0.0, 0.0, False)
    assert all(np.array_equal(result.buffers[name], value) for name, value in rig.state.items())


@pytest.mark.parametrize("hybrid", [False, True])
def test_dropout_in_threads_of_one_process_follows_the_seed(hybrid: bool) -> None:
    wanted = [rig_of("mxnet", Net(0.5, hybrid=hybrid)).gradient(batch(), seed)[0] for seed in range(3)]
    assert not np.array_equal(wanted[0], wanted[1])
    rigs = [rig_of("mxnet", Net(0.5, hybrid=hybrid)) for _ in range(3)]
    found: list[list[Any]] = [[] for _ in range(3)]
    random.seed(5)

    def work(i: int) -> None:
        found[i] = [rigs[i].gradient(batch(), i)[0] for _ in range(10)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert random.random() == random.Random(5).random()
    for i in range(3):
        assert len(found[i]) == 10 and all(np.array_equal(flat, wanted[i]) for flat in found[i])


class Lazy(Net):
    def __init__(self) -> None:
        super().__init__()
        self.first = gluon.nn.Dense(4)
        self.first.initialize()


class Growing(Net):
    def loss(self, batch: Any) -> Any:
        self.more = gluon.nn.Dense(1, in_units=4)
        self.more.initialize()
        return super().loss(batch)


class Reshaping(Net):
    def loss(self, batch: Any) -> Any:
        found = super().loss(batch)
        self.first.weight._data = [mx.nd.zeros((5, 4))]
        return found


class Vector(Net):
    def loss(self, batch: Any) -> Any:
        return self(batch["x"])


class Detached(Net):
    def loss(self, batch: Any) -> Any:
        return self(batch["x"]).detach().mean()


@pytest.mark.parametrize(("make", "words"), [
    (gluon.nn.Dense, "loss"), (Lazy, "first.weight of Lazy has no values"), (Growing, "makes parameters while it runs"),
    (Reshaping, "first.weight another shape"), (Vector, "shape"), (Detached, "trainable")])
def test_blocks_that_cannot_be_trained_are_named(make: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        rig_of("mxnet", make(1) if make is gluon.nn.Dense else make()).gradient(batch())


def test_a_batch_that_does_not_fit_is_one_sentence() -> None:
    with pytest.raises(UserError, match="Net cannot be called") as told:
        rig_of("mxnet", Net()).gradient({"x": np.ones((6, 5), np.float32), "y": np.ones((6, 4))})
    assert "\n" not in str(told.value)


def test_a_model_of_another_framework_is_named() -> None:
    with pytest.raises(UserError, match="no Gluon block"):
        load("mxnet", "backend").adapt(object())


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
    model = resnet.build({"blocks": [1, 1], "width": 4, "norm": norm, "groups": 2}, {"shape": [8, 8, 2], "num_classes": 4})
    rng = np.random.default_rng(0)
    given = {"image": rng.standard_normal((6, 8, 8, 2)), "label": rng.integers(0, 4, 6), "row_weight": np.ones(6)}
    (a, left), (b, right) = (rig_of(name, model, precision="float64").gradient(given) for name in ("mxnet", "reference"))
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
    backend.create(build({"layers": 1, "heads": 1, "width": 4, "context": 4}, {"vocab_size": 3}),
                   SimpleNamespace(device="cpu", precision="float32", threads=1, compile=False))
assert any("imported before backends.mxnet" in str(w.message) for w in told)
"""


def test_a_late_import_is_told() -> None:
    env = {name: value for name, value in os.environ.items() if name != "MXNET_ENGINE_TYPE"}
    child = subprocess.run([sys.executable, "-c", LATE], capture_output=True, text=True, timeout=120, env=env)
    assert child.returncode == 0, child.stderr


class Patches:
    """A convolution, and a norm over the channels of each place."""

    parameters = {"filters": Spec((2, 2, 3, 12), scale=0.5), "norm": Spec((12,), init="ones"), "shift": Spec((12,), scale=0.5)}
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
    """An axis of two whose other worker always sends what this one sends. The collective numbered `lost` finds nobody."""

    size, rank = 2, 0

    def __init__(self, lost: int = -1):
        self.calls, self.lost = 0, lost

    def sum(self, x: np.ndarray) -> np.ndarray:
        assert not turn._depth  # a worker in another thread could come
        self.calls += 1
        if self.calls - 1 == self.lost:
            raise GroupBroken("lost rank 1")
        return x + x

    def max(self, x: np.ndarray) -> np.ndarray:
        return x.copy()


@pytest.mark.parametrize("recompute", [False, True])
def test_a_peer_lost_in_any_collective_is_told_and_the_next_generation_goes_on(recompute: bool) -> None:
    model = Tiny(0.3, recompute)
    model.parameters = {name: replace(spec, shape=tuple({"d_ff": 6, "vocab": 7}.get(dim, length) for dim, length in zip(spec.dims, spec.shape)))
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
    taken: list[int] = []

    def other() -> None:
        with turn:
            taken.append(turn._depth)

    with computing(1), turn:
        thread = threading.Thread(target=other)
        thread.start()
        assert not taken
        with turn.aside():
            thread.join(60)
            assert taken == [1]
        assert turn._depth == 2
    with turn.aside():  # by who holds nothing
        pass
    assert turn._depth == 0
