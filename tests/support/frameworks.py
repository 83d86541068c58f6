"""The frameworks under test: how to run a function of arrays through each one's ops and differentiate it.

ELASTIC_TEST_BACKENDS, a comma-separated list, names those that are tested in a process: the others' tests do not run
there, and one that cannot load fails its tests instead of skipping them. Without it all run, as far as their frameworks
are installed.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from elastic.model.backend import Framework

FOLDERS = {"reference": "reference", "torch": "pytorch", "tensorflow": "tensorflow", "mxnet": "mxnet"}
SELECTED = [name for name in os.environ.get("ELASTIC_TEST_BACKENDS", "").split(",") if name]

Run = Callable[[Callable[..., Any], Sequence[np.ndarray], str], tuple[list[np.ndarray], list[np.ndarray]]]


def load(name: str, file: str) -> Any:
    """`backends.<folder>.<file>`, or a skip with the reason, or a failure where the framework is required."""
    if name not in FOLDERS:
        pytest.fail(f"ELASTIC_TEST_BACKENDS names {name!r}, which is not one of {', '.join(FOLDERS)}")
    try:
        return importlib.import_module(f"backends.{FOLDERS[name]}.{file}")
    except ImportError as error:
        if name in SELECTED:
            pytest.fail(f"{name} is required by ELASTIC_TEST_BACKENDS and does not load: {error}")
        pytest.skip(f"{name} does not load: {error}")


def door(name: str) -> Framework:
    """The framework's door, or as `load`."""
    found: Framework = load(name, "backend").framework
    return found


def names(without: str = "") -> list[str]:
    return [name for name in dict.fromkeys([*FOLDERS, *SELECTED]) if name != without]


def settings(**changes: Any) -> SimpleNamespace:
    return SimpleNamespace(**{"device": "cpu", "precision": "float32", "threads": 1, "compile": False} | changes)


def ops_of(name: str, precision: str) -> Any:
    """A framework's kernels on the CPU."""
    module = load(name, "ops")
    if name == "torch":
        import torch

        return module.TorchOps("cpu", getattr(torch, precision))
    kind = {"reference": "ReferenceOps", "tensorflow": "TensorFlowOps", "mxnet": "MXNetOps"}[name]
    return getattr(module, kind)(np.dtype(precision))


def differentiate(name: str, function: Callable[..., Any], arrays: Sequence[np.ndarray], precision: str,
                  ops: Any = None,
                  cotangents: Sequence[np.ndarray] = ()) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The outputs of `function(ops, *arrays)` and the gradients of their sum weighted with `cotangents`."""
    module = load(name, "ops")
    run = {"reference": _reference, "torch": _torch, "tensorflow": _tensorflow, "mxnet": _mxnet}[name]
    return run(module, ops, function, arrays, precision, cotangents)


def _outputs(found: Any) -> list[Any]:
    return list(found) if isinstance(found, tuple) else [found]


def _reference(module: Any, ops: Any, function: Callable[..., Any], arrays: Sequence[np.ndarray], precision: str,
               cotangents: Sequence[np.ndarray]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    from backends.reference.tape import Variable, backward, value_of

    ops = ops or module.ReferenceOps(precision)
    leaves = [Variable(a.astype(precision)) for a in arrays]
    outputs = _outputs(function(ops, *leaves))
    parts = [module.ReferenceOps.sum(ops, module.ReferenceOps.multiply(ops, out, c.astype(precision)))
             for out, c in zip(outputs, cotangents)]
    total = parts[0]
    for part in parts[1:]:
        total = module.ReferenceOps.add(ops, total, part)
    if isinstance(total, Variable):
        backward(total)
    grads = [np.zeros_like(v.value) if v.gradient is None else v.gradient for v in leaves]
    return [np.asarray(value_of(out)) for out in outputs], grads


def _torch(module: Any, ops: Any, function: Callable[..., Any], arrays: Sequence[np.ndarray], precision: str,
           cotangents: Sequence[np.ndarray]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    import torch

    torch.set_num_threads(1)
    dtype = getattr(torch, precision)
    ops = ops or module.TorchOps("cpu", dtype)
    leaves = [torch.tensor(a, dtype=dtype, requires_grad=True) for a in arrays]
    outputs = _outputs(function(ops, *leaves))
    total = sum((out * torch.tensor(c, dtype=dtype)).sum() for out, c in zip(outputs, cotangents))
    if total.requires_grad:
        total.backward()
    grads = [np.zeros(a.shape, precision) if leaf.grad is None else leaf.grad.numpy()
             for a, leaf in zip(arrays, leaves)]
    return [out.detach().numpy() for out in outputs], grads


def _mxnet(module: Any, ops: Any, function: Callable[..., Any], arrays: Sequence[np.ndarray], precision: str,
           cotangents: Sequence[np.ndarray]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    from mxnet import autograd

    ops = ops or module.MXNetOps(np.dtype(precision))
    with load("mxnet", "backend").computing(1):  # as the backend does: one thread at a time
        leaves = [module.to_array(a.astype(precision), ops.dtype) for a in arrays]
        for leaf in leaves:
            leaf.attach_grad()
        with autograd.record():
            outputs = _outputs(function(ops, *leaves))
            total = sum((out * module.to_array(c, ops.dtype)).sum() for out, c in zip(outputs, cotangents))
        total.backward()
        ops.raise_lost()
        return [out.asnumpy() for out in outputs], [leaf.grad.asnumpy() for leaf in leaves]


def _tensorflow(module: Any, ops: Any, function: Callable[..., Any], arrays: Sequence[np.ndarray], precision: str,
                cotangents: Sequence[np.ndarray]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    import tensorflow as tf

    load("tensorflow", "backend").start(1)
    ops = ops or module.TensorFlowOps(precision)
    leaves = [tf.constant(a.astype(precision)) for a in arrays]
    with tf.GradientTape() as tape:
        tape.watch(leaves)
        outputs = _outputs(function(ops, *leaves))
        total = tf.add_n([tf.reduce_sum(out * c.astype(precision)) for out, c in zip(outputs, cotangents)])
    grads = tape.gradient(total, leaves, unconnected_gradients=tf.UnconnectedGradients.ZERO)
    return [out.numpy() for out in outputs], [tf.convert_to_tensor(g).numpy() for g in grads]


def assert_close(found: np.ndarray, wanted: np.ndarray, tolerance: float, what: str = "") -> None:
    """By norm: where a true value is 0 (a key's bias), elements have no relative error. Norms below 0.1 count as 0.1.
    """
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    assert found.shape == wanted.shape, f"{what}: shape {found.shape}, not {wanted.shape}"
    error = np.linalg.norm(found - wanted) / max(np.linalg.norm(wanted), 0.1)
    assert error <= tolerance, f"{what}: relative error {error:.3g} is over {tolerance:g}"
