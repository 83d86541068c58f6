"""Moving averages of the parameters: a NumPy loop over the checkpoints of every step, the same bits whatever happens, and who uses them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from elastic.checkpoint import manager
from elastic.checkpoint.export import export
from elastic.driver import inference
from elastic.model.initial import initial_values
from elastic.recipe import Recipe
from elastic.workload import open_model, prepare
from tests.support import checkpoints
from tests.support.frameworks import load, names
from tests.support.images import idx_files, vision_recipe
from tests.support.inprocess import Result, fit, gpt_recipe

STEPS, DECAY = 12, 0.7
AVERAGED = {"optimizer": {"ema": DECAY, "clip_norm": 1.0}, "checkpoint": {"every_steps": 1, "keep": STEPS},
            "run": {"eval_every": 5}}
DISTURBED = ("kill:1@3/vote", "kill:0@5/update", "scale:2@7", "kill:1@9/reduction")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def gpt(plays: Path, name: str, steps: int = STEPS, workers: int = 1, **model: Any) -> Recipe:
    return gpt_recipe(plays, steps, backend={"name": name}, elastic={"max_workers": workers}, model=model, **AVERAGED)


def arrays_of(result: Result, step: int) -> dict[str, np.ndarray]:
    return checkpoints.load(*manager.split(result.run.run_dir / "checkpoints" / f"step-{step:08d}"))[0]


def assert_averages(result: Result, last: int = STEPS) -> None:
    """The averages of the last step, from what the model started with and the values of every step, in float64."""
    recipe = result.run.recipe
    model = open_model(recipe, prepare(recipe))
    start = {f"{kind}/{name}": value for kind, specs in (("parameter", model.parameters), ("buffer", model.buffers))
             for name, value in initial_values(specs, recipe.run.seed, {}).items()}
    wanted = {name: value.astype(np.float64) for name, value in start.items()}
    for step in range(1, last + 1):
        now, decay = arrays_of(result, step), min(DECAY, (1 + step) / (10 + step))
        wanted = {name: decay * value + (1 - decay) * now[name] for name, value in wanted.items()}
    found = arrays_of(result, last)
    averages = {name.removeprefix("optimizer/ema/") for name in found if name.startswith("optimizer/ema/")}
    assert averages == {name.partition("/")[2] for name in wanted}
    for name, value in wanted.items():
        mean = found["optimizer/ema/" + name.partition("/")[2]]
        np.testing.assert_allclose(mean, value, rtol=1e-5, atol=1e-6, err_msg=name)
        assert not np.allclose(mean, found[name], rtol=1e-5, atol=1e-6) or not np.ptp(mean), name


@pytest.mark.parametrize("name", names(without="reference"))
def test_one_average_whatever_happens(name: str, plays: Path, tmp_path: Path) -> None:
    load(name, "backend")
    one = fit(tmp_path / "one", gpt(plays, name, dropout=0.1))
    one.assert_sound(STEPS)
    assert_averages(one)
    disturbed = fit(tmp_path / "disturbed", gpt(plays, name, workers=3, dropout=0.1), DISTURBED)
    disturbed.assert_sound(STEPS)
    assert len(disturbed.named("worker_lost")) >= 2
    assert disturbed.sha == one.sha
    assert [line.get("eval") for line in disturbed.metrics] == [line.get("eval") for line in one.metrics]


def test_an_average_passes_from_framework_to_framework(plays: Path, tmp_path: Path) -> None:
    for name in ("torch", "tensorflow", "mxnet"):
        load(name, "backend")
    for steps, name in ((4, "torch"), (8, "tensorflow"), (STEPS, "mxnet")):
        result = fit(tmp_path / "relay", gpt(plays, name, steps))
        assert result.outcome.status == "done", result.outcome.error
    assert_averages(result)


def test_statistics_of_batch_norm_are_averaged_too(tmp_path: Path) -> None:
    load("torch", "backend")
    files = idx_files(tmp_path)

    def trained(workers: int, chaos: tuple[str, ...] = ()) -> Result:
        result = fit(tmp_path / f"{workers}", vision_recipe("vision.resnet", files, STEPS,
                                                            elastic={"max_workers": workers}, **AVERAGED), chaos)
        result.assert_sound(STEPS)
        return result

    one, disturbed = trained(1), trained(3, DISTURBED[:2])
    assert_averages(one)
    assert any(name.startswith("buffer/") for name in one.arrays())
    assert disturbed.sha == one.sha and disturbed.metrics[-1]["eval"] == one.metrics[-1]["eval"]
    assert inference.evaluate(one.run.run_dir) == pytest.approx(one.metrics[-1]["eval"], rel=1e-12)


@pytest.mark.parametrize("name", names())
def test_whoever_uses_the_model_gets_the_averages(name: str, plays: Path, tmp_path: Path) -> None:
    load(name, "backend")
    result = fit(tmp_path / "run", gpt(plays, name, workers=2))
    found = result.arrays()
    means = {key.removeprefix("optimizer/ema/"): value for key, value in found.items()
             if key.startswith("optimizer/ema/")}
    assert inference.evaluate(tmp_path / "run") == result.metrics[-1]["eval"]
    export(str(tmp_path / "run"), "safetensors", str(tmp_path / "out"))
    for weights in (load_file(tmp_path / "out"),
                    manager.read_init(tmp_path / "run" / "checkpoints" / f"step-{STEPS:08d}")):
        assert weights.keys() == means.keys() and all(np.array_equal(weights[key], means[key]) for key in means)
    restored = inference.restore(tmp_path / "run")
    with_means = restored.backend.logits(np.arange(4)[None])
    restored.backend.bind({key: aligned(restored.backend, found[f"parameter/{key}"])
                           for key in restored.backend.parameters}, {})
    assert np.abs(restored.backend.logits(np.arange(4)[None]) - with_means).max() > 1e-4


def aligned(backend: Any, values: np.ndarray) -> Any:
    buffer = backend.allocate(values.size)
    buffer[:] = values.reshape(-1)
    return buffer.reshape(values.shape)


def test_training_itself_does_not_see_them(plays: Path, tmp_path: Path) -> None:
    load("torch", "backend")
    with_means, without = (fit(tmp_path / str(ema),
                               gpt_recipe(plays, STEPS, optimizer={"ema": ema}, elastic={"max_workers": 2}))
                           for ema in (DECAY, 0.0))
    assert with_means.summary["parameters_sha256"] == without.summary["parameters_sha256"]
    assert with_means.sha != without.sha
    assert with_means.metrics[-1]["eval"] != without.metrics[-1]["eval"]
