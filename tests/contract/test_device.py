"""What a GPU's machine runs, as far as that shows without one: imports, the benchmark at a small size, and buffers that are tensors."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elastic.chaos import Injector
from elastic.checkpoint.manifest import Manifest
from elastic.collective.solo import SoloGroup
from elastic.controller.checkpoints import Checkpoints
from elastic.messages import Generation, Save
from elastic.state.state import State
from elastic.worker.loop import begin, train
from elastic.worker.loop_control import Control
from elastic.worker.saver import Saver
from elastic.worker.training import Member, Placement, Plan, Training
from tests.support.models import SMALL, VOCAB, rig_of, settings, token_batch
from tests.support.rules import OPTIMIZER
from tests.support.threads import together

torch = pytest.importorskip("torch", reason="torch is not installed")

from backends.pytorch.backend import TorchBackend, framework  # noqa: E402  (they need torch)
from benchmarks.gpu import take_over  # noqa: E402
from benchmarks.peers.torch_gpt import GPT  # noqa: E402
from nlp import gpt  # noqa: E402
from tests.support.own_torch import Net, batch  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
BARE = """
import importlib, sys
refused = {"ray", "pyarrow", "pydantic", "pandas", "tensorflow", "keras", "mxnet", "xxhash", "psutil", "typer", "rich", "safetensors", "moto"}
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, *rest):
        return None if name.partition(".")[0] in refused else self.finder.find_spec(name, *rest)
    def __getattr__(self, key):
        return getattr(self.finder, key)
sys.meta_path[:] = map(Without, sys.meta_path)
from _pytest.outcomes import Skipped
for name in sys.argv[1].split(","):
    try:
        importlib.import_module(name)
    except Skipped:  # there is no GPU here
        pass
    print("imported", name)
import benchmarks.gpu
del sys.argv[1]
benchmarks.gpu.main()
"""


def bare(modules: str, *arguments: str) -> str:
    """What it prints where the modules are imported and the benchmark is run with nothing but torch, NumPy and pytest.
    """
    done = subprocess.run([sys.executable, "-c", BARE, modules, *arguments], cwd=ROOT, capture_output=True, text=True,
                          timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_benchmark_and_the_gpu_s_tests_need_torch_and_numpy_only() -> None:
    modules = ["tests.conftest", "tests.support.models",
               *(f"tests.gpu.{file.stem}" for file in (ROOT / "tests/gpu").glob("test_*.py"))]
    size = {"rounds": 2, "steps": 2, "rows": 2, "layers": 2, "heads": 2, "width": 32, "context": 16, "vocab": 64}
    said = bare(",".join(modules), "--device", "cpu", "--no-compile",
                *(word for key, value in size.items() for word in (f"--{key}", str(value))))
    assert all(f"imported {module}" in said for module in modules)
    assert "A GPT of 0 M parameters (layers 2, heads 2, width 32, context 16, vocabulary 64)" in said
    assert [line.split()[1] for line in said.splitlines() if line.startswith("| ")][2:] == ["ours", "plain"]
    assert "of its tokens a second" in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_the_benchmark_says_so() -> None:
    said = bare("benchmarks.gpu")
    assert "this process sees no CUDA GPU" in said and len(said.splitlines()) == 2


def in_tensors(model: Any) -> TorchBackend:
    """A backend whose buffers are tensors, as on a GPU, on the CPU."""
    backend = framework.create(model, settings())
    backend.allocate = torch.zeros  # type: ignore[method-assign]
    return backend


class Batches:
    def __init__(self, module: bool):
        self.module = module

    def __call__(self, step: int, shard: int) -> Any:
        if self.module:
            return {name: value * (1 + 0.1 * step + shard) for name, value in batch().items()}
        return token_batch(2, seed=10 * step + shard)

    def expect(self, keys: Iterable[tuple[int, int]]) -> None:
        """Nothing is loaded ahead."""


def trained(backends: list[Any], module: bool) -> list[State]:
    """Three steps of four shards by as many members as there are backends."""
    states = [State(backend, "adamw") for backend in backends]

    def member(rank: int, group: Any) -> None:
        states[rank].start(3)
        optimizer = {**OPTIMIZER, "name": "adamw", "lr": 1e-2, "clip_norm": 0.5}
        training = Training(Plan(3, 4, 5, True, optimizer), Batches(module), lambda step, shard: np.arange(2))
        member = Member(training, Placement(backends[rank], states[rank]), Control(), lambda message: None)
        generation = Generation(1, tuple(f"w{i}" for i in range(len(backends))), "", "local", 0)
        train(begin(member, generation, group, Injector((), rank, print, print, lambda fault, same: same)))

    together(len(backends), member)
    return states


def assert_same_state(found: State, wanted: State) -> None:
    assert found.committed == wanted.committed
    for name, array in wanted.arrays().items():
        assert np.array_equal(found.arrays()[name], array, equal_nan=True), name


@pytest.mark.parametrize("module", [False, True], ids=["gpt", "a user's module"])
def test_a_loop_over_tensors_has_the_bits_of_one_over_arrays(module: bool) -> None:
    def model() -> Any:
        return Net() if module else gpt.build(SMALL, {"vocab_size": VOCAB})

    (wanted,) = trained([framework.create(model(), settings())], module)
    assert wanted.committed == 3
    for size in (1, 3):
        for state in trained([in_tensors(model()) for _ in range(size)], module):
            assert isinstance(state.param, torch.Tensor)
            assert_same_state(state, wanted)


def test_a_state_in_tensors_is_saved_and_read_back(tmp_path: Path) -> None:
    (saved,) = trained([in_tensors(Net())], True)
    parts: list[Any] = []
    saver = Saver("w0", str(tmp_path), Manifest(0, 0, 0, 3, ""), 8, parts.append)
    saver.save(saved, Save(1, 3, 0, 1, True), {})
    outcome = Checkpoints(str(tmp_path), 3, "").take(parts[0], 3)
    assert outcome is not None and outcome.event == "checkpoint_committed"
    other = State(in_tensors(Net()), "adamw")
    other.start(9)
    saver.restore(f"{tmp_path}/step-{3:08d}", other, SoloGroup(), lambda number: Control().collective(3, "restore"))
    assert_same_state(other, saved)


def test_the_plain_module_of_the_benchmarks_is_the_same_model() -> None:
    rig = rig_of("torch", gpt.build(SMALL, {"vocab_size": VOCAB}))
    rig.param *= 12  # far from where a model says the same of every token, whatever it computes
    rig.param[:] = np.where(rig.param == 12.0, 1.0, rig.param)  # but not the norms
    module = GPT(SMALL, VOCAB)
    take_over(module, rig.layout.views(rig.param))
    rows = token_batch(3)
    flat, found = rig.gradient(rows)
    loss = module(torch.from_numpy(rows["tokens"].astype(np.int64)))
    loss.backward()
    assert found.loss_sum / found.weight == pytest.approx(loss.item(), rel=1e-5) and loss.item() > 1.1 * np.log(VOCAB)
    wanted = np.sqrt(sum(float(parameter.grad.square().sum()) for parameter in module.parameters()))
    assert np.linalg.norm(flat) / found.weight == pytest.approx(wanted, rel=1e-5)
