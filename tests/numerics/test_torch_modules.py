"""Users' own torch modules against plain torch: 20 steps, on 1, 2 and 3 workers with a kill; one result over workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elastic.checkpoint.export import export
from elastic.driver.inference import evaluate
from tests.support.frameworks import assert_close
from tests.support.inprocess import Result, fit, module_recipe
from tests.support.sampling import sample

torch = pytest.importorskip("torch", reason="torch is not installed")

from backends.pytorch.arrays import as_numpy  # noqa: E402
from backends.pytorch.backend import framework  # noqa: E402  (it needs torch)
from tests.support import plain_torch, torch_modules  # noqa: E402

STEPS, BATCH, SHARDS = 20, 12, 3
HERE = "tests.support.torch_modules"
TOLERANCE = {"sgd": 1e-6, "adamw": 1e-5}
RATE = {"sgd": 0.05, "adamw": 0.01}
FAITHFUL = ["Base", "Frozen", "Recomputed", "Reentrant", "Hooked", "Masked", "Penalised", "Spectral", "Weighed",
            "OldWeighed", "OldSpectral", "Tied",
            "Recurrent", "Custom", "Sparse", "Rotary", "Brain", "Slow", "Noted", "EvalNorm", "Pops", "Sloped"]


def run(folder: Path, module: str, workers: int, optimizer: str = "sgd", chaos: tuple[str, ...] = (),
        keys: dict[str, Any] | None = None,
        **changes: Any) -> Result:
    changes = {name: dict(section) for name, section in changes.items()}
    changes["model"] = {"kind": f"{HERE}:{module}"} | changes.get("model", {})
    changes["data"] = {"kind": f"{HERE}:Rows", "batch_size": BATCH, "shuffle": False} | changes.get("data", {})
    changes["elastic"] = {"max_workers": workers, "logical_shards": SHARDS,
                          "spares": len(chaos)} | changes.get("elastic", {})
    changes["optimizer"] = {"name": optimizer, "lr": RATE[optimizer], "weight_decay": 0.0} | (keys or {})
    if optimizer == "sgd":
        changes["optimizer"] |= {"momentum": 0.0}
    return fit(folder, module_recipe("Small", STEPS, **changes), chaos)


def oracle(module: str, optimizer: str, **how: Any) -> dict[str, np.ndarray]:
    made = framework.construct(getattr(torch_modules, module), {}, 0)
    return plain_torch.train(made, torch_modules.Rows(), STEPS, BATCH, SHARDS, optimizer, RATE[optimizer], **how)


def assert_same(result: Result, wanted: dict[str, np.ndarray], tolerance: float) -> None:
    arrays = result.arrays()
    found = {name.partition("/")[2]: array for name, array in arrays.items() if not name.startswith("optimizer/")}
    assert set(found) == set(wanted)
    for name, values in wanted.items():
        kind = np.complex128 if values.dtype.kind == "c" else np.float64
        if kind == np.complex128:
            assert np.abs(found[name] - values).max() <= tolerance, name
        else:
            assert_close(found[name].astype(np.float64), values, tolerance, name)


WIDELY = sample(list(FAITHFUL), 14)  # on two and three workers, too


@pytest.mark.parametrize("module", FAITHFUL)
def test_it_trains_as_in_plain_torch(tmp_path: Path, module: str) -> None:
    one = run(tmp_path / "1", module, 1)
    one.assert_sound(STEPS)
    assert_same(one, oracle(module, "sgd"), TOLERANCE["sgd"])
    if module not in WIDELY:
        return
    two, three = run(tmp_path / "2", module, 2), run(tmp_path / "3", module, 3, chaos=("kill:1@7/reduction",))
    assert two.sha == one.sha
    three.assert_sound(STEPS)
    assert three.sha == one.sha and three.named("worker_lost")


@pytest.mark.parametrize("module", sample(list(FAITHFUL), 6))
def test_adamw_as_in_plain_torch(tmp_path: Path, module: str) -> None:
    result = run(tmp_path, module, 2, "adamw")
    assert_same(result, oracle(module, "adamw"), TOLERANCE["adamw"])


def test_freeze_adds_to_what_the_module_freezes_and_thaw_overrules(tmp_path: Path) -> None:
    added = run(tmp_path / "freeze", "Frozen", 2, model={"freeze": ["head.bias"]})
    assert_same(added, oracle("Frozen", "sgd", frozen=["head.bias"]), 1e-6)
    thawed = run(tmp_path / "thaw", "Frozen", 2, model={"freeze": ["head.bias"], "thaw": ["body.weight", "head.bias"]})
    assert_same(thawed, oracle("Frozen", "sgd", thawed=["body.weight"]), 1e-6)
    begun = framework.construct(torch_modules.Frozen, {}, 0).body.bias.detach().numpy()
    assert np.array_equal(thawed.arrays()["parameter/body.bias"],
                          begun), "what the module freezes and nobody thaws stays to the bit"


@pytest.mark.parametrize("module", ["Slow", "Rotary", "Brain"])
def test_what_moves_with_the_shards_is_saved_healed_and_averaged_to_the_bit(tmp_path: Path, module: str) -> None:
    one = run(tmp_path / "one", module, 1, optimizer="adamw", keys={"ema": 0.9})
    other = run(tmp_path / "sharded", module, 3, optimizer="adamw", chaos=("kill:0@9/vote",),
                keys={"ema": 0.9, "sharded": True})
    other.assert_sound(STEPS)
    assert other.sha == one.sha
    kinds = {name: array.dtype.name for name, array in one.arrays().items()}
    for name, tensor in framework.construct(getattr(torch_modules, module), {}, 0).named_buffers():
        assert kinds[f"buffer/{name}"] == kinds[f"optimizer/ema/{name}"] == str(tensor.dtype).removeprefix("torch.")
    export(str(tmp_path / "one"), "torch", str(tmp_path / "out.pt"))
    made = framework.construct(getattr(torch_modules, module), {}, 0)
    made.load_state_dict(torch.load(tmp_path / "out.pt", weights_only=True), strict=True)
    arrays = one.arrays()
    for name, tensor in made.state_dict().items():  # the averages, where there are some
        assert as_numpy(tensor).tobytes() == arrays.get(f"optimizer/ema/{name}",
                                                        arrays.get(f"parameter/{name}")).tobytes(), name


def test_a_checkpoint_is_evaluated_without_moving_what_it_holds(tmp_path: Path) -> None:
    result = run(tmp_path, "Slow", 2, data={"eval_fraction": 0.2})
    seen = [evaluate(str(result.run.run_dir)) for _ in range(2)]
    assert seen[0] == seen[1] == result.metrics[-1]["eval"]
