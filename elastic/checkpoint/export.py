"""A checkpoint's parameters in forms that others read: safetensors, a torch state dict, a Hugging Face folder; and its
embedding tables as Parquet."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from elastic.checkpoint.export_tables import write_parquet
from elastic.checkpoint.find import read_newest
from elastic.checkpoint.manifest import Manifest
from elastic.checkpoint.safetensors import apart
from elastic.checkpoint.state_hash import BUFFER, PARAMETER
from elastic.errors import UserError
from elastic.recipe import loads
from elastic.storage.atomic import beside

TABLES = "parquet"
Arrays = Mapping[str, np.ndarray]
# of the data's facts, what means something here alone
PLACES = ("folder", "train_file", "eval_file", "blocks", "splits", "names")


@dataclass(frozen=True)
class Taken:
    """What is exported: parameters and buffers by name, and a state dict's keys, each with the array that it stands
    for."""

    arrays: Arrays
    names: Mapping[str, str]
    manifest: Manifest


def export(path: str, form: str, out: str) -> tuple[int, int]:
    """Writes the parameters of a checkpoint (see `find`) to `out`, which must not exist yet and appears whole; returns
    its step and how many.

    Buffers go with them, and what the data are to the model (vocabularies, means, names of classes), except to Hugging
    Face. A torch state dict loads strictly into the module. Rows of embedding tables go to "parquet" alone, and nothing
    else does: a folder of a file a table, whose number it returns.

    UserError for a form, a place or a model that cannot serve; BadCheckpoint before anything of a damaged one is
    written.
    """
    write = FORMS.get(form)
    if write is None and form != TABLES:
        raise UserError(f"--format {form} must be one of {', '.join(FORMS)}, {TABLES}.")
    target = free(out)
    if write is None:
        return written(out, target, lambda: write_parquet(path, target))
    arrays, manifest = read_newest(path)
    kept = {key.partition("/")[2]: array for key, array in arrays.items() if key.startswith((PARAMETER, BUFFER))}
    names = manifest.extra.get("info", {}).get("names") or {name: name for name in kept}
    taken = Taken(kept, {key: name for key, name in names.items() if name in kept}, manifest)

    def write_beside() -> tuple[int, int]:
        with beside(target) as unfinished:
            write(taken, unfinished)
            free(out)
        return manifest.step, sum(key.startswith(PARAMETER) for key in arrays)

    return written(out, target, write_beside)


def written(out: str, target: Path, write: Callable[[], tuple[int, int]]) -> tuple[int, int]:
    """UserError where the place refuses it."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        return write()
    except OSError as error:
        raise UserError(f"--out {out} cannot be written ({error.strerror or error}); name another place.") from error


def free(out: str) -> Path:
    if not out or "://" in out:
        raise UserError(f"--out {out!r} must be a path on this machine.")
    target = Path(os.path.abspath(out))
    if os.path.lexists(target):
        raise UserError(f"--out {out} exists already; name another place or remove it.")
    return target


def facts_of(manifest: Manifest) -> dict[str, Any]:
    """The recipe, and what the run knew of the data. Vocabularies, too long for a checkpoint, come from the cache, or
    from the data anew."""
    info = manifest.extra.get("info", {})
    facts = {"recipe": manifest.recipe, **{key: value for key, value in info.items() if key not in PLACES}}
    if "first_codes" in info:
        recipe = loads(manifest.recipe, locate=False)
        facts["vocabularies"] = importlib.import_module("recommender.data").vocabularies_of(
            info, recipe.data, recipe.model.config, recipe.tables)
    return facts


def write_safetensors(taken: Taken, path: Path) -> None:
    """Every array once, under the first of its names that a state dict has; the facts in the header, as JSON."""
    once = {name: key for key, name in reversed(list(taken.names.items()))}
    arrays, noted = apart({key: taken.arrays[name] for name, key in once.items()})
    path.write_bytes(save(arrays, {"facts": json.dumps(facts_of(taken.manifest)), **noted}))


def write_torch(taken: Taken, path: Path) -> None:
    try:
        framework = importlib.import_module("backends.pytorch.export")
    except ImportError as error:
        raise UserError(f"--format torch needs PyTorch ({error}); see `elastic doctor`, or take --format safetensors.") from error
    framework.save_state_dict(taken.arrays, taken.names, facts_of(taken.manifest), path)


def write_hugging_face(taken: Taken, path: Path) -> None:
    model = loads(taken.manifest.recipe, locate=False).model
    if model.kind != "nlp.gpt":
        raise UserError(f'--format hf is for the model nlp.gpt, and this checkpoint is of "{model.kind}"; take '
                        '--format safetensors or torch.')
    importlib.import_module("nlp.hugging_face").write(model.config, taken.arrays, path)


FORMS: dict[str, Callable[[Taken, Path], None]] = {"safetensors": write_safetensors, "torch": write_torch,
                                                   "hf": write_hugging_face}
