"""The PyTorch backend on a GPU against itself on the CPU. Needs torch, NumPy and pytest only."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
if not torch.cuda.is_available():
    pytest.skip("there is no CUDA GPU here", allow_module_level=True)

from backends.pytorch.backend import framework  # noqa: E402
from benchmarks.gpu import Batches, ours  # noqa: E402
from elastic.collective import nccl  # noqa: E402
from elastic.model.backend import SLOTS, UpdateRule  # noqa: E402
from elastic.state.state import State  # noqa: E402
from nlp.gpt import build  # noqa: E402
from tests.support.frameworks import assert_close, settings  # noqa: E402
from tests.support.models import SMALL, VOCAB, gpt_rig, rig_of, token_batch  # noqa: E402

pytestmark = pytest.mark.gpu
BLOCK = 1024
RULES = [UpdateRule(name, 1e-2, 0.1, 1 / 7, 1, 0.9, 0.99, 1e-8, 0.9) for name in SLOTS]


def numpy(x: Any) -> np.ndarray:
    return x.detach().cpu().numpy()


def test_buffers_are_on_the_device() -> None:
    buffer = gpt_rig("torch", device="cuda").backend.allocate(100)
    assert buffer.device.type == "cuda" and buffer.dtype == torch.float32 and buffer.shape == (100,)
    assert not buffer.any() and buffer.data_ptr() % 64 == 0


@pytest.mark.parametrize("config", [{}, {"bias": True, "dropout": 0.2}], ids=str)
def test_gradients_agree_with_the_cpu(config: dict[str, Any]) -> None:
    rigs = [gpt_rig("torch", config=config, device=device) for device in ("cuda", "cpu")]
    (found, left), (wanted, right) = (rig.gradient(token_batch(4, real=3), seed=2) for rig in rigs)
    assert left.weight == right.weight
    assert left.loss_sum == pytest.approx(right.loss_sum, rel=1e-5)
    assert_close(numpy(found), wanted, 1e-5)
    again, _ = rigs[0].gradient(token_batch(4, real=3), seed=2)
    assert torch.equal(found, again)


def test_bfloat16_keeps_float32_masters() -> None:
    rig, full = gpt_rig("torch", device="cuda", precision="bfloat16"), gpt_rig("torch", device="cuda")
    flat, result = rig.gradient(token_batch())
    wanted, exact = full.gradient(token_batch())
    assert flat.dtype == rig.param.dtype == torch.float32
    assert result.loss_sum == pytest.approx(exact.loss_sum, rel=1e-2)
    assert_close(numpy(flat), numpy(wanted), 5e-2)
    assert not torch.equal(flat, wanted)


def stepped(device: str, rule: UpdateRule, cut_at: tuple[int, ...] = ()) -> dict[str, np.ndarray]:
    backend, size = gpt_rig("torch", device=device).backend, 5 * BLOCK + 333
    rng = np.random.default_rng(1)
    arrays = {key: backend.allocate(size) for key in ("param", *SLOTS[rule.name])}
    values = [rng.standard_normal(size).astype(np.float32) for _ in range(2)]
    grad = backend.allocate(size)
    for buffer, value in zip((arrays["param"], grad), values):
        buffer[:] = torch.from_numpy(value).to(device) if device == "cuda" else value
    for low, high in zip((0, *cut_at), (*cut_at, size)):
        slots = {slot: arrays[slot][low:high] for slot in SLOTS[rule.name]}
        backend.update(rule, arrays["param"][low:high], grad[low:high], slots, BLOCK)
    return {key: numpy(a) if device == "cuda" else a for key, a in arrays.items()}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_updates_agree_with_the_cpu_and_do_not_depend_on_the_ranges(rule: UpdateRule) -> None:
    whole, wanted = stepped("cuda", rule), stepped("cpu", rule)
    for key in whole:
        assert_close(whole[key], wanted[key], 1e-6, key)
    for cut_at in ((BLOCK,), (2 * BLOCK, 3 * BLOCK)):
        parts = stepped("cuda", rule, cut_at)
        assert all(np.array_equal(whole[key], parts[key]) for key in whole)


def test_squared_norms() -> None:
    backend = gpt_rig("torch", device="cuda").backend
    grad = backend.allocate(3 * BLOCK + 5)
    grad[:] = torch.randn(len(grad), device="cuda")
    found = backend.squared_norms(grad, BLOCK)
    wanted = [float(part.double().square().sum()) for part in grad.split(BLOCK)]
    np.testing.assert_allclose(found, wanted, rtol=1e-12)
    assert np.array_equal(backend.squared_norms(grad[BLOCK:], BLOCK), found[1:])


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.5),
                                          torch.nn.Linear(8, 1))

    def loss(self, batch: Any) -> Any:
        return self.layers(batch["x"]).square().mean()


def test_a_user_s_module() -> None:
    rig = rig_of("torch", Net(), device="cuda")
    batch = {"x": np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)}
    (one, first), (two, again) = rig.gradient(batch, 3), rig.gradient(batch, 3)
    assert torch.equal(one, two) and one.abs().sum() > 0
    assert first.weight == 6.0 and first.loss_sum == again.loss_sum
    assert int(first.buffers["layers.1.num_batches_tracked"]) == 1


def trained(compiled: bool) -> State:
    backend = framework.create(build(SMALL, {"vocab_size": VOCAB}),
                               settings(device="cuda", precision="bfloat16", compile=compiled))
    state = State(backend, "adamw")
    state.start(3)
    ours(state, Batches(4, SMALL["context"], VOCAB), torch.device("cuda"))(5)
    return state


@pytest.mark.skipif(not nccl.usable(), reason="torch was built without NCCL")
@pytest.mark.parametrize("compiled", [False, True], ids=["as it is", "compiled"])
def test_the_loop_over_nccl_repeats_to_the_bit(compiled: bool) -> None:
    one, again = trained(compiled), trained(compiled)
    assert one.committed == again.committed == 5 and one.param.device.type == "cuda"
    for name, array in one.arrays().items():
        assert np.array_equal(array, again.arrays()[name]), name
