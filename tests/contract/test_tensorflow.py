"""What holds of the TensorFlow backend alone: one trace, no other framework, threads fixed for the process."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from elastic.errors import UserError
from tests.support.frameworks import load
from tests.support.models import gpt_rig, token_batch

pytest.importorskip("tensorflow", reason="tensorflow is not installed")


def test_a_step_is_traced_once_whatever_the_seed_the_parameters_and_the_buffers() -> None:
    rig = gpt_rig("tensorflow", config={"dropout": 0.2})
    first, _ = rig.gradient(token_batch(), seed=0)
    for seed in (1, 2**63, 2**64 - 1):
        rig.param += np.float32(0.01)
        assert not np.array_equal(rig.gradient(token_batch(seed=seed % 7), seed)[0], first)
    rig.backend.bind(rig.layout.views(rig.param), rig.state)
    rig.gradient(token_batch(), seed=5)
    assert rig.backend.compilations() == 1
    rig.backend.metrics(token_batch())
    rig.backend.metrics(token_batch(seed=9))
    rig.backend.logits(token_batch()["tokens"][:, :-1])
    assert rig.backend.compilations() == 2


def test_a_compiled_step_gives_the_same_gradient() -> None:
    wanted, _ = gpt_rig("tensorflow").gradient(token_batch())
    rig = gpt_rig("tensorflow", compile=True)
    found, again = rig.gradient(token_batch())[0], rig.gradient(token_batch())[0]
    assert np.array_equal(found, again)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_threads_are_fixed_for_the_process() -> None:
    gpt_rig("tensorflow").gradient(token_batch())
    with pytest.raises(UserError, match=r"backend.threads = 2 .* already computed in this process"):
        gpt_rig("tensorflow", threads=2)


@pytest.mark.parametrize(("changes", "words"), [
    ({"device": "cuda"}, 'device = .cuda.* "torch" for a GPU'), ({"precision": "bfloat16"}, "precision")])
def test_impossible_settings_are_named(changes: dict[str, str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        gpt_rig("tensorflow", **changes)


def test_no_trainable_parameter_behind_the_loss() -> None:
    backend = load("tensorflow", "backend")
    rig = gpt_rig("tensorflow")
    rig.backend._model.loss = lambda ops, params, state, batch, seed: (ops.constant(1.0), ops.sum(batch["row_weight"]),
                                                                       {})
    assert isinstance(rig.backend, backend.TensorFlowBackend)
    with pytest.raises(UserError, match="without any trainable parameter"):
        rig.gradient(token_batch())


def test_its_process_loads_no_other_framework() -> None:
    script = ("import sys\nimport elastic.workload\nassert 'tensorflow' not in sys.modules and 'keras' not in "
              "sys.modules\nimport backends.tensorflow.backend, elastic.collective.shared, "
              "elastic.worker.worker\nassert 'tensorflow' in sys.modules\nothers = {'torch', 'mxnet', 'jax', 'ray'} & "
              "set(sys.modules)\nassert not others, others")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
