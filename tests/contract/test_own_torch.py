"""What only users' torch modules have: generators of three libraries, buffers of integers and infinities, and a module left as it was."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elastic.errors import UserError
from tests.support.models import rig_of

torch = pytest.importorskip("torch", reason="torch is not installed")

from backends.pytorch.adapter import seeded  # noqa: E402  (it needs torch)
from tests.support.own_torch import Net, batch  # noqa: E402


def test_the_module_itself_is_not_written_to() -> None:
    module = Net()
    rig = rig_of("torch", module)
    buffers = rig.gradient(batch())[1].buffers
    assert set(buffers) == {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked", "calls", "mask"}
    assert int(buffers["calls"]) == int(buffers["norm.num_batches_tracked"]) == 1
    assert int(module.calls) == 0 and not module.norm.running_mean.any()


def test_starting_values_are_the_module_s() -> None:
    module = Net()
    rig = rig_of("torch", module)
    for name, value in module.named_parameters():
        assert np.array_equal(rig.layout.views(rig.param)[name], value.detach().numpy())
    assert rig.state["calls"].dtype == np.int64 and np.isinf(rig.state["mask"][2])


class Drawing(torch.nn.Module):
    """Draws from NumPy's and Python's generators."""

    def __init__(self) -> None:
        super().__init__()
        self.line = torch.nn.Linear(4, 4)

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
        return super().loss(batch), 1.0, "more"


class Bare(Net):
    def metrics(self, batch: Any) -> Any:
        return {"close": self(batch["x"])}


def test_what_is_no_sum_and_weight_is_one_sentence() -> None:
    with pytest.raises(UserError, match=r"loss\(batch\) must give \(sum, weight\), one number each, not \(an array of shape \(\), float, str\)"):
        rig_of("torch", Triple()).gradient(batch())
    with pytest.raises(UserError, match=r"metrics\(batch\)\['close'\] must give \(sum, weight\)"):
        rig_of("torch", Bare()).backend.metrics(batch())


STARTS = """
import sys
from pathlib import Path

from tests.support.inprocess import fit, gpt_recipe, module_recipe

here = Path(sys.argv[1])
(here / "a.txt").write_text("to be or not to be " * 200)
for name, recipe in (("own", module_recipe("Small", 3)), ("gpt", gpt_recipe(here / "a.txt", 3))):
    fit(here / name, recipe).assert_sound(3)
import torch

assert torch.are_deterministic_algorithms_enabled()
print(*(name for name in ("torch._dynamo", "torch._inductor", "sympy") if name in sys.modules))
"""


def test_no_worker_loads_a_compiler_that_nobody_asked_for(tmp_path: Path) -> None:
    """Its import takes longer than the rest of a start."""
    done = subprocess.run([sys.executable, "-c", STARTS, str(tmp_path)], capture_output=True, text=True, timeout=120,
                          cwd=Path(__file__).parents[2])
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr + done.stdout
