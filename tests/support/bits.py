"""The bits of a fixed list of recipes: `python -m tests.support.bits FILE` writes down each one's state_sha256, or compares with what FILE has.

What a change of the house may not change: every domain and framework, each axis of the mesh, a sharded optimizer,
averages, the ledger, own modules, and a kill in the middle. Hashes hold on one kind of processor: its BLAS decides the
last bits.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from elastic.recipe import Recipe
from tests.support.clicks import clicks, clicks_recipe
from tests.support.images import idx_files, vision_recipe
from tests.support.inprocess import fit, gpt_recipe, module_recipe

FRAMEWORKS = ("reference", "torch", "tensorflow", "mxnet")
STEPS = 10
KILL = ("kill:1@4/vote",)
TWO, THREE = {"max_workers": 2}, {"max_workers": 3}


def on_mesh(replicas: int, **degrees: Any) -> dict[str, Any]:
    size = int(np.prod([value for key, value in degrees.items() if key in ("tensor", "pipeline", "expert")]))
    return {"mesh": degrees, "elastic": {"min_workers": size, "max_workers": size * replicas}}


EXPERTS = {"experts": 4, "top": 2, "capacity": 2.0, "balance": 0.1, "heads": 2, "layers": 2}
TEXTS: dict[str, dict[str, Any]] = {
    "gpt": {"elastic": TWO, "model": {"dropout": 0.1}},
    "gpt with a clip, averages and the ledger": {"elastic": THREE, "optimizer": {"clip_norm": 1.0, "ema": 0.9},
                                                 "data": {"ledger": True}},
    "gpt, fast": {"elastic": {**TWO, "reduction": "fast"}},
    "gpt, sharded": {"elastic": THREE, "optimizer": {"sharded": True}},
    "gpt, tensor": on_mesh(1, tensor=2), "gpt, pipeline": {**on_mesh(2, pipeline=2), "model": {"layers": 2}},
    "gpt, experts": {**on_mesh(1, expert=2), "model": EXPERTS},
    "gpt, sgd": {"elastic": TWO, "optimizer": {"name": "sgd", "momentum": 0.9, "lr": 0.1}},
    "bert": {"elastic": TWO, "model": {"kind": "nlp.bert"}},
}
OWN = {"torch": [("tests.support.modules", "Net", "Rows"), ("tests.support.modules", "Small", "Augmented")],
       "tensorflow": [("tests.support.keras_models", "net", "Pairs")],
       "mxnet": [("tests.support.gluon_models", "Net", "Pairs")]}


def recipes(framework: str, folder: Path) -> Iterator[tuple[str, Recipe]]:
    backend = {"backend": {"name": framework}}
    text = folder / "text.txt"
    text.write_text(" ".join(np.random.default_rng(0).choice(["to", "be", "or", "not", "that", "is"], 1500)))
    for name, changes in TEXTS.items():
        yield name, gpt_recipe(text, STEPS, **backend, **changes)
    images = idx_files(folder)
    yield "vit", vision_recipe("vision.vit", images, STEPS, **backend)
    yield "resnet", vision_recipe("vision.resnet", images, STEPS, **backend)
    yield "dlrm", clicks_recipe(clicks(folder / "clicks.csv"), **backend)
    for module, model, rows in OWN.get(framework, ()):
        yield model, module_recipe(model, STEPS, run={"eval_every": 5}, model={"kind": f"{module}:{model}"}, **backend,
                                   data={"kind": f"{module}:{rows}", "eval_fraction": 0.2}, elastic=THREE)


def measured(framework: str) -> dict[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        found = {}
        for number, (name, recipe) in enumerate(recipes(framework, Path(folder))):
            alike = recipe.elastic.reduction == "exact" and recipe.elastic.max_workers > max(1, recipe.elastic.min_workers)
            kills = KILL if alike else ()
            result = fit(Path(folder) / f"run-{number}", recipe, kills)
            found[name] = result.sha if result.outcome.status == "done" else result.outcome.error
        return found


def main(arguments: list[str]) -> int:
    if arguments[0] == "--of":
        print(json.dumps(measured(arguments[1])))
        return 0
    found = {}
    for framework in FRAMEWORKS:  # each in a process of its own
        told = subprocess.run([sys.executable, "-m", "tests.support.bits", "--of", framework], check=True,
                              capture_output=True, text=True).stdout
        found[framework] = json.loads(told.splitlines()[-1])
    file = Path(arguments[0])
    if not file.exists():
        file.write_text(json.dumps(found, indent=1) + "\n")
        print(f"{sum(map(len, found.values()))} hashes are in {file}")
        return 0
    wanted = json.loads(file.read_text())
    unlike = [f"{framework}: {name}" for framework in {**wanted, **found}
              for name in {**wanted.get(framework, {}), **found.get(framework, {})}
              if wanted.get(framework, {}).get(name) != found.get(framework, {}).get(name)]
    print("\n".join(["not the same:", *unlike]) if unlike
          else f"the same {sum(map(len, found.values()))} hashes as in {file}")
    return bool(unlike)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
