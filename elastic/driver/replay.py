"""`elastic verify`: does a run directory tell one story, and does an undisturbed run give the same bits?"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from elastic.checkpoint.hashing import hashes
from elastic.checkpoint.manager import MANIFEST, committed, folder_of, read_manifest
from elastic.driver.inference import check_checkpoint
from elastic.driver.rundir import checkpoints_of, data_of, newest_of
from elastic.driver.trust import check_trust
from elastic.errors import RunFailed, UserError
from elastic.observe.run_files import RECIPE, lines_of, recipe_of, summary_of
from elastic.observe.verify import Verdict, verify
from elastic.recipe import load_recipe
from elastic.storage.remote import join, shown
from elastic.storage.store import Store

WHOLE = {"pipeline": 1, "tensor": 1, "expert": 1}


def undisturbed(workers: int) -> tuple[str, ...]:
    """What makes a run of a recipe its own oracle: one replica, that nobody joins or leaves, and checkpoints of its
    own."""
    return (f"elastic.min_workers={workers}", f"elastic.max_workers={workers}", "elastic.spares=0",
            'checkpoint.path=""')


def verify_run(run_dir: Path) -> Verdict:
    """Steps, generations, summary and every hash. UserError where there is no run."""
    recipe = recipe_of(run_dir)
    location = recipe.checkpoint.path
    verdict = verify(run_dir, check_checkpoint, elsewhere(location) if location else None)
    summary = summary_of(run_dir) or {}
    if not verdict.problems and summary.get("status") == "done":
        compare_hashes(verdict, summary, checkpoints_of(recipe, run_dir))
    return verdict


def compare_hashes(verdict: Verdict, summary: Mapping[str, Any], location: str) -> None:
    """The last checkpoint holds the bits that the summary names."""
    store, name = Store.open(location), folder_of(summary.get("steps", 0))
    if store.size(f"{name}/{MANIFEST}") is None:
        return
    found = dict(zip(("parameters_sha256", "state_sha256"), hashes(store, name, read_manifest(store, name))))
    apart = [f"{name}: its files have the {key} {value}, and summary.json says {summary[key]}"
             for key, value in found.items() if summary[key] != value]
    verdict.problems += apart
    if not apart:
        verdict.facts.append(f"{name} has the hashes of summary.json")


def elsewhere(location: str) -> dict[str, str]:
    """The checkpoints of a run that writes them to a place of their own, by the name to show."""
    try:
        names = [name for _, name in committed(Store.open(location))]
    except OSError as error:
        why = " ".join(str(error).split())[:300]
        raise UserError(f'checkpoint.path = "{shown(location)}" cannot be read ({why}); mend the storage or its keys, '
                        'then verify again.') from error
    return {shown(join(location, name)): join(location, name) for name in names}


def replay(run_dir: Path, address: str = "local", trust: bool = False) -> Verdict:
    """Trains the same recipe again with one worker that nobody disturbs, and compares the bits. UserError where that
    has nothing to say, as of data that are not those the run began with."""
    from elastic.driver.trainer import Trainer  # Ray, which hashes and lines need none of

    trained = recipe_of(run_dir)
    mesh = trained.mesh
    recipe = load_recipe(run_dir / RECIPE, undisturbed(mesh.replica_size))
    check_trust(recipe, run_dir, trust)
    summary = summary_of(run_dir) or {}
    if summary.get("status") != "done":
        raise UserError(f"The run in {run_dir} has not ended; `elastic resume {run_dir}` first, then replay it.")
    if recipe.elastic.reduction != "exact":
        raise UserError('elastic.reduction = "fast" promises no bits; there is nothing to compare a replay with.')
    meshes = [e.get("mesh", WHOLE) for e in lines_of(run_dir)[0] if e["event"] == "generation_started"]
    if any(lain[axis] != getattr(mesh, axis) for lain in meshes for axis in WHOLE):
        raise UserError(f"The run in {run_dir} has trained on meshes of other degrees than its recipe's, which add up "
                        "in another order; there is nothing to compare a replay with.")
    with tempfile.TemporaryDirectory(prefix="elastic-replay-") as folder:
        data = data_of(newest_of(checkpoints_of(trained, run_dir)))
        result = Trainer(recipe, Path(folder) / "run", address, data=data).fit()
    if result.status != "done":
        raise RunFailed(f"The replay ended as {result.status}: {result.error}")
    verdict, where = Verdict(), "one worker" if mesh.replica_size == 1 else f"one replica of {mesh.replica_size} workers"
    for key in ("parameters_sha256", "state_sha256"):
        was, now = summary.get(key), result.summary[key]
        if was == now:
            verdict.facts.append(f"replayed undisturbed on {where}: the same {key}, {now[:16]}...")
        else:
            verdict.problems.append(f"replayed undisturbed on {where}: {key} is {now}, the run has {was}")
    return verdict
