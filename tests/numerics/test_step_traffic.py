"""What `elastic plan --show-layout` says that a step's collectives carry, against the counters of real steps on the same mesh."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from elastic import workload
from elastic.mesh import Mesh
from elastic.planning import candidates as meshes
from elastic.planning.memory import example, question
from elastic.planning.profile import Counted
from elastic.planning.tables import traffic
from elastic.recipe import parse
from elastic.workload import Workload
from tests.support.crew import train_on

STEPS = 2
CASES: dict[str, tuple[Mesh, dict[str, Any], dict[str, Any]]] = {
    "tensor": (Mesh(2, tensor=2), {}, {}),
    "tensor under a pipeline in micro-batches": (Mesh(1, pipeline=2, tensor=2), {}, {"micro_batches": 2}),
    "interleaved": (Mesh(1, pipeline=2), {}, {"schedule": "interleaved", "micro_batches": 2}),
    "experts": (Mesh(1, expert=2), {"experts": 4, "top": 2}, {}),
}


@pytest.mark.parametrize("name", ["reference", "torch"])
@pytest.mark.parametrize("case", CASES)
def test_a_steps_bytes(case: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question\n" * 40)
    mesh, model, keys = CASES[case]
    recipe = parse({"run": {"steps": STEPS}, "model": {"kind": "nlp.gpt", "layers": 2, "heads": 2, "width": 16,
                                                       "context": 8, **model},
                    "data": {"format": "text", "path": str(tmp_path / "text.txt"), "batch_size": 8,
                             "eval_fraction": 0.0},
                    "elastic": {"min_workers": mesh.world_size, "max_workers": mesh.world_size, "logical_shards": 2},
                    "mesh": {"pipeline": mesh.pipeline, "tensor": mesh.tensor, "expert": mesh.expert, **keys},
                    "backend": {"name": name}})
    opened = Workload.open(recipe, workload.prepare(recipe))
    batch = example(opened)
    asked, work = question(recipe, opened.model, opened.balance), Counted(opened.model, batch, 0.0)
    layout = meshes.lay(opened.model, mesh, asked.rules, asked.balance)
    for rank, counts in enumerate(train_on(recipe, mesh).counts):
        said = {what: STEPS * moved for what, _, moved in traffic(asked, layout, work, mesh.coordinate(rank),
                                                                  recipe.mesh.micro_batches)}
        counted = {key: moved for key, moved in said.items() if key.partition(".")[0] in ("tensor", "expert", "shared")}
        assert counted == dict(counts) and (counts or mesh.tensor == 1)
