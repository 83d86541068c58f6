"""Users' own modules on the PyTorch backend: any batch, any loss, and nothing that a redone step could count twice."""

from __future__ import annotations

import random
import threading
from typing import Any

import numpy as np
import pytest

from elastic.errors import UserError
from tests.support.frameworks import assert_close
from tests.support.models import rig_of

torch = pytest.importorskip("torch", reason="torch is not installed")
nn, F = torch.nn, torch.nn.functional

from backends.pytorch.adapter import seeded  # noqa: E402  (it needs torch)
from tests.support.own_torch import Net, Sums, batch  # noqa: E402


def torch_batch() -> dict[str, Any]:
    return {name: torch.tensor(value, dtype=torch.float32) for name, value in batch().items()}


def test_gradients_are_the_module_s_own() -> None:
    plain = Net()
    rig = rig_of("torch", Net())
    loss = plain.loss(torch_batch())
    (loss * 6).backward()
    flat, result = rig.gradient(batch())
    assert result.weight == 6.0
    assert result.loss_sum == pytest.approx(loss.item() * 6, rel=1e-6)
    wanted = dict(plain.named_parameters())
    assert set(rig.by_name(flat)) == set(wanted)
    for name, found in rig.by_name(flat).items():
        assert_close(found, wanted[name].grad.numpy(), 5e-5, name)  # a bias before a batch norm has true gradient 0


def test_buffers_come_back_and_a_redone_step_counts_once() -> None:
    plain, module = Net(), Net()
    plain.loss(torch_batch())
    rig = rig_of("torch", module)
    before = {name: value.copy() for name, value in rig.state.items()}
    (one, first), (two, again) = rig.gradient(batch()), rig.gradient(batch())
    assert np.array_equal(one, two)
    assert set(first.buffers) == {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked", "calls", "mask"}
    for name, wanted in plain.named_buffers():
        assert_close(np.nan_to_num(first.buffers[name]), np.nan_to_num(wanted.numpy()), 1e-6, name)
        assert np.array_equal(first.buffers[name], again.buffers[name])
        assert np.array_equal(rig.state[name], before[name])
    assert int(first.buffers["calls"]) == int(first.buffers["norm.num_batches_tracked"]) == 1
    assert int(module.calls) == 0 and not module.norm.running_mean.any()


def test_committed_buffers_are_what_the_next_step_starts_from() -> None:
    rig = rig_of("torch", Net())
    _, result = rig.gradient(batch())
    for name, value in result.buffers.items():
        rig.state[name][...] = value
    assert int(rig.gradient(batch())[1].buffers["calls"]) == 2
    seen = rig.backend.metrics(batch())
    plain = Net()
    plain.loss(torch_batch())
    plain.eval()
    assert seen["loss"][0] / seen["loss"][1] == pytest.approx(plain.loss(torch_batch()).item(), rel=1e-5)
    assert seen["close"][1] == 6 and 0 <= seen["close"][0] <= 6


def test_tied_parameters_appear_once() -> None:
    plain = Net(tied=True)
    (plain.loss(torch_batch()) * 6).backward()
    rig = rig_of("torch", Net(tied=True))
    assert "second.weight" not in rig.backend.parameters and "first.weight" in rig.backend.parameters
    flat, _ = rig.gradient(batch())
    assert_close(rig.by_name(flat)["first.weight"], plain.first.weight.grad.numpy(), 1e-5)


def test_sum_and_weight_with_a_tuple_batch() -> None:
    plain = Sums()
    loss, weight = plain.loss(tuple(torch_batch().values()))
    flat, result = rig_of("torch", Sums()).gradient(tuple(batch().values()))
    assert (result.weight, weight) == (12.0, 12)
    assert result.loss_sum == pytest.approx(loss.item(), rel=1e-6)
    loss.backward()
    assert np.linalg.norm(flat) == pytest.approx(
        np.sqrt(sum(float(p.grad.square().sum()) for p in plain.parameters())), rel=1e-5)


def test_no_rows_count_for_nothing() -> None:
    rig = rig_of("torch", Net())
    flat, result = rig.gradient({name: value[:0] for name, value in batch().items()})
    assert (result.loss_sum, result.weight, flat.any()) == (0.0, 0.0, False)
    assert all(np.array_equal(result.buffers[name], value) for name, value in rig.state.items())


def test_dropout_follows_the_seed_and_leaves_the_process_generator_alone() -> None:
    rig = rig_of("torch", Net(dropout=0.5))
    torch.manual_seed(11)
    wanted = torch.rand(3)
    torch.manual_seed(11)
    one, two, other = (rig.gradient(batch(), seed)[0] for seed in (1, 1, 2**63 + 5))
    assert np.array_equal(one, two) and not np.array_equal(one, other)
    assert torch.equal(torch.rand(3), wanted)


def test_dropout_in_threads_of_one_process() -> None:
    wanted = [rig_of("torch", Net(dropout=0.5)).gradient(batch(), seed)[0] for seed in range(4)]
    rigs = [rig_of("torch", Net(dropout=0.5)) for _ in range(4)]
    found: list[list[Any]] = [[] for _ in range(4)]

    def work(i: int) -> None:
        found[i] = [rigs[i].gradient(batch(), i)[0] for _ in range(20)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(4):
        assert len(found[i]) == 20 and all(np.array_equal(flat, wanted[i]) for flat in found[i])


def test_starting_values_are_the_module_s() -> None:
    module = Net()
    rig = rig_of("torch", module)
    for name, value in module.named_parameters():
        assert np.array_equal(rig.layout.views(rig.param)[name], value.detach().numpy())
    assert rig.state["calls"].dtype == np.int64 and np.isinf(rig.state["mask"][2])


class NoLoss(nn.Module):
    pass


class Empty(nn.Module):
    def loss(self, batch: Any) -> Any:
        return batch["x"].sum()


class Vector(Net):
    def loss(self, batch: Any) -> Any:
        return self(batch["x"])


class Detached(Net):
    def loss(self, batch: Any) -> Any:
        return self(batch["x"]).sum().detach()


@pytest.mark.parametrize(("make", "words"), [
    (NoLoss, "loss"), (Empty, "no parameters"), (lambda: Net().double(), "float32"), (Vector, "shape"), (Detached, "trainable")])
def test_modules_that_cannot_be_trained_are_named(make: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        rig_of("torch", make()).gradient(batch())


class Drawing(nn.Module):
    """Draws from NumPy's and Python's generators."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(4, 4)

    def loss(self, batch: Any) -> Any:
        return self.line(batch["x"]).square().mean() * (1 + np.random.rand() + random.random() + torch.rand(()))


def test_whatever_a_module_draws_is_a_function_of_the_seed_and_disturbs_nobody() -> None:
    rig = rig_of("torch", Drawing())
    np.random.seed(5)
    torch.manual_seed(5)
    wanted = np.random.rand(), torch.rand(()).item()
    np.random.seed(5)
    torch.manual_seed(5)
    one, same, other = (rig.gradient(batch(), seed)[0] for seed in (1, 1, 2**63 - 1))
    assert np.array_equal(one, same) and not np.array_equal(one, other)
    assert (np.random.rand(), torch.rand(()).item()) == wanted


def test_nobody_else_draws_between_a_module_s_forward_and_its_end() -> None:
    """A recomputation in the backward pass sets torch's generator and draws again."""
    entered, left = threading.Event(), []

    class Slow(Drawing):
        def loss(self, batch: Any) -> Any:
            found = super().loss(batch)
            found.register_hook(lambda grad: (entered.set(), thread.join(0.3), left.append(thread.is_alive()))[0])
            return found

    def draw() -> None:
        assert entered.wait(10)
        with seeded(3):
            torch.rand(())

    thread = threading.Thread(target=draw)
    thread.start()
    rig_of("torch", Slow()).gradient(batch())
    thread.join(10)
    assert left == [True] and not thread.is_alive()


class Triple(Net):
    def loss(self, batch: Any) -> Any:
        return F.mse_loss(self(batch["x"]), batch["y"]), 1.0, "more"


class Bare(Net):
    def metrics(self, batch: Any) -> Any:
        return {"close": self(batch["x"])}


def test_what_is_no_sum_and_weight_is_one_sentence() -> None:
    with pytest.raises(UserError, match=r"loss\(batch\) must give \(sum, weight\), one number each, not \(an array of shape \(\), float, str\)"):
        rig_of("torch", Triple()).gradient(batch())
    with pytest.raises(UserError, match=r"metrics\(batch\)\['close'\] must give \(sum, weight\)"):
        rig_of("torch", Bare()).backend.metrics(batch())
