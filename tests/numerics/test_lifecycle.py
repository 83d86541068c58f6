"""What happens around the training on threads: joins, drains, waits, interrupts, resumption, errors of the model itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support import modules
from tests.support.inprocess import Result, Run, fit, module_recipe

pytest.importorskip("torch", reason="torch is not installed")

STEPS = 80  # a hook acts some steps after the one it waits for: lines travel with the pulse


def recipe(module: str = "Small", steps: int = STEPS, **changes: Any) -> Any:
    return module_recipe(module, steps, checkpoint={"every_steps": 25}, **changes)


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Result:
    result = fit(tmp_path_factory.mktemp("one") / "run", recipe(elastic={"max_workers": 1}))
    result.assert_sound(STEPS)
    return result


def test_a_node_that_joins_is_used(oracle: Result, tmp_path: Path) -> None:
    result = fit(tmp_path, recipe(), capacity=1, hooks={4: lambda run: run.fleet.grow(4)})
    result.assert_sound(STEPS)
    assert result.sha == oracle.sha
    sizes = result.summary["world_sizes"]
    assert sizes[0] == 1 and sizes[-1] > 1
    assert result.named("healed")[0]["from"] == "worker-0" and result.named("healed")[0]["bytes"] > 0
    assert result.named("resized") and not result.named("recovered")


def test_workers_of_a_drained_node_leave_without_a_loss(oracle: Result, tmp_path: Path) -> None:
    result = fit(tmp_path, recipe(), nodes=2, hooks={5: lambda run: run.drain("node-0")})
    result.assert_sound(STEPS)
    assert result.sha == oracle.sha
    assert not result.named("worker_lost") and not result.named("recovered") and result.named("node_draining")


@pytest.mark.parametrize("most", [1, 2])
def test_a_whole_group_hands_over_to_another(most: int, oracle: Result, tmp_path: Path) -> None:
    hook = {5: lambda run: run.drain(*[f"node-{n}" for n in range(most)])}
    result = fit(tmp_path, recipe(elastic={"max_workers": most}), capacity=2 * most, nodes=2 * most, hooks=hook)
    result.assert_sound(STEPS)
    assert result.sha == oracle.sha
    first, *_, last = ({w["worker"] for w in e["workers"]} for e in result.named("generation_started"))
    assert len(first) == len(last) == most and not first & last
    assert not result.named("rewound") and not result.named("worker_lost")


def test_below_min_workers_it_waits_and_goes_on(oracle: Result, tmp_path: Path) -> None:
    run = Run(tmp_path, recipe(elastic={"max_workers": 3, "min_workers": 3}), ["kill:2@8/vote"], capacity=3)
    run.hooks[5] = lambda run: run.fleet.grow(2)
    run.run_log.on_event = lambda name: run.fleet.grow(3) if name == "waiting" else None
    result = run.fit()
    result.assert_sound(STEPS)
    assert result.sha == oracle.sha
    assert [(e["ready"], e["needed"]) for e in result.named("waiting")] == [(2, 3)]
    assert result.summary["world_sizes"] == [3]


def test_interrupted_in_the_middle_of_a_resize(oracle: Result, tmp_path: Path) -> None:
    def both(run: Run) -> None:
        run.scale(2)
        run.interrupt()

    first = fit(tmp_path, recipe(), hooks={7: both})
    assert first.outcome.status == "interrupted"
    assert (tmp_path / "checkpoints" / f"step-{first.summary['steps']:08d}" / "manifest.json").exists()
    second = fit(tmp_path, recipe())
    second.assert_sound(STEPS)
    assert second.sha == oracle.sha


def test_the_lines_of_a_rank_0_that_heals_and_falls_are_not_lost(oracle: Result, tmp_path: Path) -> None:
    """The joiner has the state, and the only one who knew the last lines is gone."""
    for phase in ("forward", "backward", "reduction"):
        chaos = ["kill:0@8/update", f"kill:0@9/{phase}", "kill:0@10/update"]
        result = fit(tmp_path / phase, recipe(elastic={"max_workers": 2, "spares": 4}), chaos)
        result.assert_sound(STEPS)
        assert result.sha == oracle.sha


def test_rank_0_falls_while_it_writes_the_last_checkpoint(oracle: Result, tmp_path: Path) -> None:
    run = Run(tmp_path, recipe(elastic={"max_workers": 2}))
    run.hooks[STEPS] = lambda run: run.controller.give_up_on(run.controller.state.group[0], "killed")
    result = run.fit()
    result.assert_sound(STEPS)
    assert result.sha == oracle.sha and len(result.named("worker_lost")) == 1


def test_an_error_that_does_not_come_again_is_survived(tmp_path: Path) -> None:
    modules.Trap.caught.clear()
    model = {"row": 70, "what": "hiccup", "once": True}
    result = fit(tmp_path / "many", recipe("Trap", model=model, elastic={"max_workers": 3}))
    result.assert_sound(STEPS)
    assert len(result.named("step_failed")) == 1 and not result.named("worker_lost")
    assert result.sha == fit(tmp_path / "one", recipe("Trap", model=model, elastic={"max_workers": 1})).sha


def test_a_state_torn_by_its_update_is_healed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from backends.pytorch.backend import TorchBackend

    options = {"optimizer": {"no_decay": ["*bias"], "weight_decay": 0.1}}
    one = fit(tmp_path / "one", recipe(elastic={"max_workers": 1}, **options))
    update, torn = TorchBackend.update, []

    def failing(self: Any, rule: Any, *arguments: Any) -> None:
        if rule.step == 40 and not rule.weight_decay and not torn:  # the first segment is done, the second is not
            torn.append(self)
            raise MemoryError("no room")
        update(self, rule, *arguments)

    monkeypatch.setattr(TorchBackend, "update", failing)
    result = fit(tmp_path / "three", recipe(elastic={"max_workers": 3}, **options))
    result.assert_sound(STEPS)
    assert torn and result.sha == one.sha
    assert [e["error"].partition(" (")[0] for e in result.named("step_failed")] == ["MemoryError: no room"]
    assert len(result.named("healed")) == 1 and not result.named("worker_lost")
