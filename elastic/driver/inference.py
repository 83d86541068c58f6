"""A checkpoint put to use in this process, without Ray: its evaluation, and text from a language model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from elastic.checkpoint import manager
from elastic.checkpoint.find import read_newest
from elastic.checkpoint.manifest import Manifest
from elastic.checkpoint.state_hash import OPTIMIZER
from elastic.data.loader import eval_batches
from elastic.driver.trust import check_trust
from elastic.errors import BadCheckpoint, UserError
from elastic.model.backend import Backend
from elastic.recipe import Recipe, loads
from elastic.storage.store import Store
from elastic.tables.held import HeldTables
from elastic.tables.of_recipe import tables_of
from elastic.worker.evaluation import figures, measure
from elastic.workload import EVAL_ROWS, create_backend, door, open_data, open_model, open_state, prepare

DEFAULT_PROMPT = "\n"


@dataclass(frozen=True)
class Restored:
    """A model with a checkpoint's parameters, on this process's device."""

    recipe: Recipe
    manifest: Manifest
    info: Mapping[str, Any]  # the data's facts; empty for a data set of the user's
    backend: Backend
    tables: HeldTables | None = None  # with all rows of the checkpoint


def check_checkpoint(path: str | os.PathLike[str]) -> Manifest:
    """Reads every byte of a checkpoint against its hashes; BadCheckpoint names what is wrong."""
    return manager.verify(*manager.split(path))


def restore(path: str | os.PathLike[str], device: str = "auto", trust: bool = False) -> Restored:
    """The model of a checkpoint. BadCheckpoint before anything of a damaged one is used.

    UserError where it would import what `elastic.driver.trust` does not let in; `trust` lets in all.
    """
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")  # before a framework loads: the same bits as the workers'
    (arrays, tables), manifest = read_newest(path, read_all)
    recipe = loads(manifest.recipe, locate=False)
    check_trust(recipe, path, trust)
    recipe = recipe.model_copy(update={"backend": recipe.backend.model_copy(update={"device": device, "compile": False})})
    info = manifest.extra.get("info") or prepare(recipe)
    backend = create_backend(recipe, open_model(recipe, info))
    state = open_state(recipe, backend)
    try:
        state.load(arrays, manifest.step, without=OPTIMIZER)
    except (KeyError, ValueError) as error:
        raise BadCheckpoint(f"{path} holds other arrays than the model of its recipe: {error}.") from error
    return Restored(recipe, manifest, info, backend, tables)


def read_all(store: Store, name: str, manifest: Manifest) -> tuple[dict[str, np.ndarray], HeldTables | None]:
    """The weights, and the embedding tables where there are any, whatever memory they take."""
    weights = manager.read_weights(store, name, manifest)
    found = tables_of(loads(manifest.recipe, locate=False), manifest.extra.get("info") or {}) if manifest.tables else None
    if found is None:
        return weights, None
    tables = HeldTables(replace(found, memory_bytes=0, disk_path=""))
    tables.begin(range(found.num_buckets), (), manifest.step)
    reader = manager.open_tables(store, name, manifest)
    for rows in tables.stores.values():
        reader.fill(rows, tables.held)
    return weights, tables


def evaluate(path: str | os.PathLike[str], trust: bool = False) -> dict[str, float]:
    """The mean of every metric over the recipe's evaluation set, the same numbers as in a run whose replicas are one
    worker each; other degrees add up in another order.
    """
    restored = restore(path, trust=trust)
    recipe = restored.recipe
    _, dataset, _ = open_data(recipe, restored.info)
    if dataset is None:
        raise UserError("The recipe sets nothing aside to evaluate on; set data.eval_fraction or data.eval_path.")
    rows = max(recipe.data.batch_size // recipe.elastic.logical_shards, EVAL_ROWS)
    tally = restored.backend.tally()
    look_up = restored.tables.look_up if restored.tables else lambda batch: batch
    found = [measure(restored.backend, tally, look_up(batch())) for batch in eval_batches(dataset, rows)]
    # a user's module need not give every figure of every batch
    names = sorted({name for part in found for name in part})
    tables = {name: np.array([part.get(name, (0.0, 0.0)) for part in found]) for name in names}
    return figures(tables, tally, tally.counts if tally else np.zeros(0))


def sample(path: str | os.PathLike[str], prompt: str = "", tokens: int = 300, temperature: float = 0.8, seed: int = 0,
           trust: bool = False) -> str:
    """`prompt` and what a language model writes after it. UserError where the model writes no text."""
    if tokens < 0 or temperature < 0:
        raise UserError(f"--tokens {tokens} and --temperature {temperature} must be at least 0.")
    restored = restore(path, trust=trust)
    kind = restored.recipe.model.kind
    if kind != "nlp.gpt":
        raise UserError(f'The model of this checkpoint ("{kind}") writes no text; only nlp.gpt does.')
    text, model = door(kind, "data"), door(kind, "gpt")
    start = text.encode(restored.info, prompt or first_of(text, restored.info))
    written = model.generate(restored.backend.logits, start, tokens, restored.recipe.model.config["context"],
                             temperature, None, seed)
    return prompt + text.decode(restored.info, written)


def first_of(text: Any, info: Mapping[str, Any]) -> str:
    """What to begin with where no prompt is given: a new line, or any token if the vocabulary has none."""
    try:
        text.encode(info, DEFAULT_PROMPT)
    except UserError:
        return text.decode(info, [0])
    return DEFAULT_PROMPT
