"""Modules that cannot be trained faithfully are refused by name before the first step, or where it shows; nothing is quietly wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elastic.checkpoint.manager import split
from elastic.errors import UserError
from tests.support.checkpoints import load
from tests.support.frameworks import assert_close
from tests.support.inprocess import Result, fit, module_recipe
from tests.support.models import Rig, rig_of

torch = pytest.importorskip("torch", reason="torch is not installed")

from backends.pytorch.backend import framework  # noqa: E402  (it needs torch)
from tests.support import odd_modules, torch_modules  # noqa: E402

REFUSED = [
    ("MaxNorm", r"writes to its parameter emb\.weight in place"),
    ("Clamped", r"writes to its parameter head\.weight in place"),
    ("Hidden", r"writes to its parameter head\.weight in place"), ("OwnGenerator", r"a generator of its own, gen;"),
    ("NumPyGenerator", r"a generator of its own, draw;"), ("Counting", r"its attribute calls "),
    ("Remembering", r"its attribute mean "),
    ("History", r"its attribute seen\['losses'\]\[0\] "), ("Worldly", r"another loss when it is called again"),
    ("ClipHook", r"parameter head\.weight .* hook on its gradient that is not linear"),
    ("AfterHook", "register_post_accumulate_grad_hook"),
    ("HookEachTime", "puts a hook on a parameter each time"), ("Unlinear", r"gradient of body\.\w+ that is not linear"),
    ("Viewing", r"keeps in parts\['rows'\]\[0\] a view of the parameter body\.weight"),
    ("Doubled", r"two parameters, (twin|head\.weight) and"),
    ("Growing", r"its buffer seen float32 of shape \(6, 4\)"), ("Turning", r"its buffer count float32 .* int64"),
    ("Lazily", "buffer mean in loss"),
    ("Unmade", r"no values in head\.weight yet"), ("SparseBuffer", "keeps links as torch.sparse_coo"),
    ("Toggling", r"changes requires_grad of body\.weight"), ("Swapping", r"its parameter head\.weight other memory"),
    ("Untying", r"ties two to one and gives one of them another"),
]


def batch(rows: int = 6) -> dict[str, np.ndarray]:
    data = torch_modules.Rows(rows)
    return {"x": data.x, "y": data.y, "id": data.id}


def rehearsed(module: Any, **changes: Any) -> tuple[Rig, Any]:
    rig = rig_of("torch", module, **changes)
    return rig, rig.backend.rehearse(batch(), lambda: rig.by_name(rig.backend.allocate(rig.layout.trainable)))


@pytest.mark.parametrize(("module", "words"), REFUSED)
def test_it_is_refused_in_one_sentence_that_names_it(module: str, words: str) -> None:
    torch.manual_seed(0)
    with pytest.raises(UserError, match=words) as caught:
        rehearsed(getattr(odd_modules, module)())
    assert str(caught.value).startswith("model.kind: ") and "\n" not in str(caught.value) and str(caught.value).count(". ") == 0


def test_a_rehearsal_leaves_everything_as_it_was() -> None:
    for module, moved, apart in (("Slow", ("slow.weight", "slow.bias"), False), ("Sparse", (), True),
                                 ("Reentrant", (), True), ("Base", (), False),
                                 ("Brain", (), False), ("OldSpectral", (), False), ("Noted", (), False)):
        made = framework.construct(getattr(torch_modules, module), {}, 0)
        plain = framework.construct(getattr(torch_modules, module), {}, 0)
        rig, habits = rehearsed(made)
        assert (habits.moved, habits.apart) == (moved, apart), module
        for (name, found), (_, wanted) in zip([*made.named_parameters(), *made.named_buffers()],
                                              [*plain.named_parameters(), *plain.named_buffers()]):
            assert torch.equal(found, wanted), (module, name)
            assert found.grad is None


def test_a_module_that_was_there_before_is_refused() -> None:
    kept = torch_modules.Base()
    with pytest.raises(UserError, match="Base that was there before"):
        framework.construct(odd_modules.same, {}, 0)
    made = framework.construct(lambda: kept, {}, 0)
    with pytest.raises(UserError, match="a new one in each call"):
        framework.construct(lambda: made, {}, 0)


def run(folder: Path, module: str, workers: int = 2, size: int = 32, eval_fraction: float = 0.0, every: int = 1,
        home: Any = odd_modules) -> Result:
    data = {"kind": "tests.support.torch_modules:Rows", "options": {"size": size}, "batch_size": 8, "shuffle": False,
            "eval_fraction": eval_fraction}
    return fit(folder, module_recipe(
        "Small", None, run={"epochs": 1}, model={"kind": f"{home.__name__}:{module}"}, data=data,
        checkpoint={"every_steps": every, "keep": 9},
        elastic={"max_workers": workers, "logical_shards": 2},
        optimizer={"name": "sgd", "lr": 0.05, "weight_decay": 0.0, "momentum": 0.0}))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_write_that_shows_late_is_refused_before_its_vote(tmp_path: Path, workers: int) -> None:
    result = run(tmp_path, "Late", workers)
    assert result.outcome.status == "failed" and "writes to its parameter head.weight in place" in str(result.outcome.error)
    assert result.steps == [1, 2]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(("module", "name", "every", "last"), [
    ("Quiet", "head.weight", 0, 2), ("QuietPart", "wide", 1, 2), ("QuietPart", "wide", 4, 3),
    ("QuietEvaluation", "head.bias", 0, 4)])
def test_a_write_that_no_counter_sees_is_refused_before_its_vote_or_before_it_is_saved(
        tmp_path: Path, module: str, name: str, every: int, last: int, workers: int) -> None:
    result = run(tmp_path, module, workers, every=every, size=40, eval_fraction=0.2 if module == "QuietEvaluation"
                 else 0.0)
    told = str(result.outcome.error)
    assert result.outcome.status == "failed" and f"changes its parameter {name} while it computes (seen at step " in told, told
    assert result.steps == list(range(1, last + 1))
    # by a worker that had not begun what the other saw
    for file in [] if every == 1 else (tmp_path / "checkpoints").glob("step-*/manifest.json"):
        whole = run(tmp_path / "unwritten", "Base", 1, size=40, eval_fraction=0.2 if module == "QuietEvaluation"
                    else 0.0)
        found, wanted = (load(*split(folder))[0][f"parameter/{name}"] for folder in (
            file.parent, whole.run.run_dir / "checkpoints" / file.parent.name))
        assert workers > 1 and np.array_equal(found, wanted), "what was written to is saved"


@pytest.mark.parametrize(("module", "words"), [
    ("MaxNorm", "emb.weight"), ("Growing", "buffer seen"),
    ("Leaping", "buffer total, of whole numbers, changes by 123456789"),
    ("Broken", r"KeyError: 'z' (odd_modules.py, line")])
def test_the_user_s_error_is_the_run_s_at_once(tmp_path: Path, module: str, words: str) -> None:
    result = run(tmp_path, module)
    assert result.outcome.status == "failed" and words in str(result.outcome.error) and "Worker after worker" not in str(result.outcome.error)
    assert not result.steps and not result.named("worker_lost")


@pytest.mark.parametrize(("module", "words"),
                         [("Norm", "Expected more than 1 value"), ("Paired", "odd_modules.py, line"),
                                               ("Ranked", "out of range"), ("Squeezed", "input: [3], target: [1]")])
def test_a_last_shard_of_one_row_is_refused_before_the_first_step(tmp_path: Path, module: str, words: str) -> None:
    result = run(tmp_path / "one", module, size=25)
    assert result.outcome.status == "failed" and "leaves 1 of a logical shard's 4 samples to logical shard 0" in str(result.outcome.error)
    assert words in str(result.outcome.error) and not result.steps
    run(tmp_path / "two", module, size=26).assert_sound(4)


def test_a_last_batch_of_an_evaluation_is_refused_before_the_first_step(tmp_path: Path) -> None:
    result = run(tmp_path / "odd", "EvenEvaluated", size=66, eval_fraction=0.5)
    assert result.outcome.status == "failed" and "last batch of the evaluation has 1 rows where the others have 32" in str(result.outcome.error)
    assert "odd_modules.py, line" in str(result.outcome.error) and not result.steps
    run(tmp_path / "even", "EvenEvaluated", size=68, eval_fraction=0.5).assert_sound(5)


def test_a_gradient_within_an_evaluation(tmp_path: Path) -> None:
    result = run(tmp_path / "slope", "Slope", eval_fraction=0.25)
    assert result.outcome.status == "failed" and "torch.enable_grad()" in str(result.outcome.error) and not result.steps
    run(tmp_path / "none", "Slope").assert_sound(4)
    allowed = run(tmp_path / "allowed", "Sloped", eval_fraction=0.25, home=torch_modules)
    allowed.assert_sound(3)
    plain, rows, arrays = torch_modules.Sloped().eval(), torch_modules.Rows(32), allowed.arrays()
    plain.load_state_dict({name: torch.tensor(arrays[f"parameter/{name}"]) for name in plain.state_dict()})
    wanted = plain.loss({"x": torch.tensor(rows.x[24:]), "y": torch.tensor(rows.y[24:])})
    assert allowed.metrics[-1]["eval"]["loss"] == pytest.approx(wanted.item(), rel=1e-6)


@pytest.mark.parametrize("module", ["Base", "Pops", "Sloped", "EvalNorm", "Seen", "Switching", "Sampling"])
def test_an_evaluation_is_plain_torch_s_and_moves_nothing(module: str) -> None:
    def asked(method: str) -> Any:
        plain = framework.construct(getattr(torch_modules, module), {}, 0).eval()
        torch.manual_seed(0)
        with torch.no_grad():
            return getattr(plain, method)({name: torch.tensor(values) for name, values in batch().items()})

    made = framework.construct(getattr(torch_modules, module), {}, 0)
    rig, _ = rehearsed(made)
    wanted = {"loss": asked("loss").item(), **({name: (total / weight).item()
                                                for name, (total, weight) in asked("metrics").items()}
                                               if hasattr(made, "metrics") else {})}
    gradient, modes = rig.gradient(batch())[0], [part.training for part in made.modules()]
    held = {name: values.copy() for name, values in rig.state.items()}
    for _ in range(2):
        assert {name: total / weight for name, (total, weight) in rig.backend.metrics(batch()).items()} == pytest.approx(wanted, rel=1e-6)
    assert [part.training for part in made.modules()] == modes and all(np.array_equal(rig.state[name], held[name])
                                                                       for name in held)
    assert np.array_equal(rig.gradient(batch())[0], gradient)


def test_a_module_made_in_evaluation_mode_is_noted() -> None:
    note, = framework.adapt(framework.construct(torch_modules.EvalNorm, {}, 0)).notes
    assert "EvalNorm is made with norm in evaluation mode" in note and not framework.adapt(torch_modules.Base()).notes


def test_compiled_once_over_averages_and_seeds_and_never_again_and_again() -> None:
    if __import__("shutil").which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler on the CPU")
    made = framework.construct(torch_modules.Penalised, {}, 0)
    rig, _ = rehearsed(made, compile=True)
    count, views = rig.backend.compilations(), rig.layout.views(rig.param)
    other = rig.layout.views(rig.backend.allocate(rig.layout.size))
    for seed in range(3):
        rig.backend.bind(other, rig.state)
        rig.backend.metrics(batch())
        rig.backend.bind(views, rig.state)
        found = rig.gradient(batch(), seed)[0]
    assert rig.backend.compilations() == count > 0
    assert_close(found, rig_of("torch", framework.construct(torch_modules.Penalised, {}, 0)).gradient(batch())[0], 1e-5)
    with torch._dynamo.config.patch(recompile_limit=2), pytest.raises(UserError, match="again and again"):
        for rows in range(2, 8):
            rig.gradient(batch(rows))
