"""What must hold between keys of a recipe; one key alone (its type, bounds, default) is held by `sections`. Pure; `RecipeError` in one sentence."""

from __future__ import annotations

from typing import Any, Literal

from elastic.errors import RecipeError
from elastic.recipe.embedding import check_embedding, keys_of
from elastic.recipe.fields import refuse_given, shown
from elastic.recipe.images import check_pictured
from elastic.recipe.sections import TABLES, Recipe
from elastic.recipe.tables import check_labelled

STORAGES = ("file", "s3", "gs", "gcs", "hdfs")


def check_model(recipe: Recipe) -> None:
    kind, data = recipe.model.kind, recipe.data
    if ":" in kind and recipe.backend.name == "reference":
        raise RecipeError(f'model.kind = {shown(kind)} is a model of one framework; write backend.name = "torch", '
                          '"tensorflow" or "mxnet", '
                          "whichever it is of.")
    if ":" not in kind and data.kind:
        raise RecipeError(f'data.kind = {shown(data.kind)} does not feed model.kind = {shown(kind)}; write data.format '
                          'and data.path.')


def check_data(recipe: Recipe) -> None:
    data = recipe.data
    if data.format and data.kind:
        raise RecipeError(f"data.kind = {shown(data.kind)} and data.format = {shown(data.format)} exclude each other; "
                          "leave one of them out.")
    if not data.format and not data.kind:
        raise RecipeError('data.format is missing; write data.format = "text", or data.kind = '
                          '"package.module:attribute".')
    if data.format and not data.path:
        raise RecipeError(f"data.path is missing; add it: where the {data.format} lies (a path, a glob or a list).")
    if data.kind and (data.path or data.eval_path):
        raise RecipeError(f"data.path = {shown(data.path or data.eval_path)} has no meaning beside data.kind; "
                          "hand it over in [data.options].")
    if data.options and not data.kind:
        raise RecipeError(f"data.options = {shown(sorted(data.options))} has no meaning without data.kind; leave it "
                          "out.")


def check_tables(recipe: Recipe) -> None:
    """What belongs to tables, and to nothing else."""
    data, run = recipe.data, recipe.run
    if data.text and data.format not in TABLES:
        raise RecipeError(f"data.text = {shown(data.text)} names a column, which only a table has; leave it out.")
    if recipe.model.kind.startswith("nlp.") and data.format in TABLES and not data.text:
        raise RecipeError(f"data.text is missing; model.kind = {shown(recipe.model.kind)} reads a column of text: "
                          "write its name.")
    if not data.is_table:
        refuse_given("data", data, ("columns", "weights", "shuffle_by"),
                     f"for tables of numbers (data.format one of {', '.join(map(shown, TABLES))}, without data.text)")
    if data.format == "csv" and data.shuffle_by == "blocks":
        raise RecipeError('data.shuffle_by = "blocks" is not for CSV, which is converted first; write "rows", or leave '
                          'it out.')
    if data.weights and len(data.weights) != len(data.path):
        raise RecipeError(f"data.weights = {shown(data.weights)} has {len(data.weights)} numbers and data.path "
                          f"{len(data.path)} entries; write one weight for each entry.")
    if data.weights and not run.steps:
        raise RecipeError(f"run.epochs = {run.epochs} has no meaning for sources mixed by data.weights, whose epochs "
                          "differ; write run.steps.")


def check_numbers(recipe: Recipe) -> None:
    run, elastic, optimizer = recipe.run, recipe.elastic, recipe.optimizer
    batch, shards = recipe.data.batch_size, elastic.logical_shards
    if run.steps and run.epochs:
        raise RecipeError(f"run.steps = {run.steps} and run.epochs = {run.epochs} exclude each other; leave one of "
                          "them out.")
    if elastic.min_workers > elastic.max_workers:
        raise RecipeError(f"elastic.min_workers = {elastic.min_workers} is above elastic.max_workers = "
                          f"{elastic.max_workers}; lower the first or raise the second.")
    if batch % shards:
        near = min((n for n in range(1, batch + 1) if batch % n == 0), key=lambda n: abs(n - shards))
        raise RecipeError(f"data.batch_size = {batch} cannot be cut into elastic.logical_shards = {shards} equal "
                          f"shards; write a batch size that is a multiple of {shards}, or logical_shards = {near}.")
    size = recipe.mesh.replica_size
    if elastic.max_workers > shards * size:
        whose = f", and a replica is {size} workers" if size > 1 else ""
        raise RecipeError(f"elastic.max_workers = {elastic.max_workers} is above elastic.logical_shards = {shards}, "
                          f"the most that can share the batch{whose}; write max_workers = {shards * size} or less, or "
                          "a larger data.batch_size.")
    if optimizer.min_lr > optimizer.lr:
        raise RecipeError(f"optimizer.min_lr = {optimizer.min_lr} is above optimizer.lr = {optimizer.lr}; lower it.")


def check_mesh(recipe: Recipe) -> None:
    """Whole replicas, and rows that divide among those who share a logical shard."""
    mesh, elastic, batch = recipe.mesh, recipe.elastic, recipe.data.batch_size
    size, shards = mesh.replica_size, elastic.logical_shards
    product = f"mesh.pipeline x mesh.tensor x mesh.expert = {mesh.pipeline} x {mesh.tensor} x {mesh.expert}"
    if size > elastic.max_workers:
        raise RecipeError(f"{product} needs {size} workers, and elastic.max_workers = {elastic.max_workers}; write "
                          f"max_workers = {size} or more, or a smaller mesh.")
    for key, value in (("max_workers", elastic.max_workers), ("min_workers", elastic.min_workers)):
        if value > size and value % size:
            raise RecipeError(f"elastic.{key} = {value} is not in whole replicas of {size} workers ({product}); "
                              f"write {key} = {value - value % size} or {value - value % size + size}.")
    rows = batch // shards
    if rows % mesh.expert:
        raise RecipeError(f"mesh.expert = {mesh.expert} does not divide the {rows} rows of a logical shard "
                          f"(data.batch_size = {batch} over elastic.logical_shards = {shards}); write a batch_size "
                          f"that is a multiple of {shards * mesh.expert}.")
    if rows // mesh.expert % mesh.micro_batches:
        experts = f" over mesh.expert = {mesh.expert}" if mesh.expert > 1 else ""
        whose = f"data.batch_size = {batch} over elastic.logical_shards = {shards}{experts}"
        raise RecipeError(f"mesh.micro_batches = {mesh.micro_batches} does not divide the {rows // mesh.expert} rows "
                          f"of a logical shard ({whose}); write a batch_size that is a multiple of "
                          f"{shards * mesh.expert * mesh.micro_batches}, or fewer micro_batches.")
    if mesh.schedule == "interleaved" and mesh.pipeline < 2:
        raise RecipeError('mesh.schedule = "interleaved" needs at least two stages, and mesh.pipeline = '
                          f'{mesh.pipeline}; write mesh.pipeline = 2 '
                          "or more, or leave mesh.schedule out.")
    if mesh.schedule != "interleaved":
        refuse_given("mesh", mesh, ("chunks",), 'under mesh.schedule = "interleaved"')


ONE_CYCLE = ("pct_start", "div_factor", "final_div_factor")
BY_SCHEDULE = {"step": ("milestones", "gamma"), "one-cycle": ONE_CYCLE}


def check_schedule(recipe: Recipe) -> None:
    """The keys that one schedule alone reads."""
    optimizer = recipe.optimizer
    for schedule, keys in BY_SCHEDULE.items():
        if optimizer.schedule != schedule:
            refuse_given("optimizer", optimizer, keys, f"under optimizer.schedule = {shown(schedule)}")
    if optimizer.schedule == "step" and not optimizer.milestones:
        raise RecipeError('optimizer.milestones is missing; optimizer.schedule = "step" needs the steps after which '
                          'the rate falls, as [1000, 1500].')
    for key in ("warmup_steps", "min_lr"):
        if optimizer.schedule == "one-cycle" and getattr(optimizer, key):
            raise RecipeError(f'optimizer.{key} = {getattr(optimizer, key)} has no meaning under optimizer.schedule = '
                              '"one-cycle"; '
                              f"leave it out, and set {', '.join(ONE_CYCLE)}.")


CPU = {"device": ("auto", "cpu"), "precision": ("float32",)}
SERVED: dict[str, dict[str, tuple[Any, ...]]] = {  # torch serves every value
    "reference": {**CPU, "compile": (False,), "threads": (1,)}, "tensorflow": CPU, "mxnet": CPU}


def check_backend(recipe: Recipe) -> None:
    backend = recipe.backend
    for key, served in SERVED.get(backend.name, {}).items():
        value = getattr(backend, key)
        if value not in served:
            raise RecipeError(f"backend.{key} = {shown(value)} is not for backend.name = {shown(backend.name)}; write "
                              f"{shown(served[-1])}.")


SMALLER = ("loss", "perplexity", "logloss", "normalized_entropy", "mae", "rmse")
LARGER = ("accuracy", "top5", "auc")
BEST_OF: dict[str, Literal["min", "max"]] = {**dict.fromkeys(SMALLER, "min"), **dict.fromkeys(LARGER, "max")}


def best_mode(recipe: Recipe) -> Literal["min", "max"] | None:
    """Which value of `checkpoint.best` is the best: as the recipe says, or as the platform's own figures are meant.
    None where nobody says.

    Of a model of one's own only the loss is known, whatever its metrics are called.
    """
    name, top = recipe.checkpoint.best.removeprefix("eval."), recipe.data.top
    if recipe.checkpoint.best_mode or name == "loss":
        return recipe.checkpoint.best_mode or "min"
    if ":" in recipe.model.kind:
        return None
    return "max" if name in (f"recall_at_{top}", f"ndcg_at_{top}") else BEST_OF.get(name)


def check_checkpoint(recipe: Recipe) -> None:
    path, best = recipe.checkpoint.path, recipe.checkpoint.best
    if best and best_mode(recipe) is None:
        raise RecipeError(f"checkpoint.best = {shown(best)} does not say whether less is better; add "
                          "checkpoint.best_mode = \"min\" or \"max\".")
    if recipe.checkpoint.best_mode and not best:
        raise RecipeError(f"checkpoint.best_mode = {shown(recipe.checkpoint.best_mode)} has no meaning without "
                          "checkpoint.best; leave it out.")
    scheme, mark, rest = path.partition("://")
    if mark and (scheme not in STORAGES or not rest.strip("/")):
        raise RecipeError(f"checkpoint.path = {shown(path)} is no place for checkpoints; write a path, or a URI such "
                          f"as s3://BUCKET/PATH ({', '.join(STORAGES)}).")


def check(recipe: Recipe) -> None:
    """Everything that a single key cannot tell."""
    for look in (check_data, check_tables, check_labelled, check_pictured, check_model, check_numbers, check_mesh,
                 check_schedule, check_backend, check_checkpoint, check_embedding):
        look(recipe)


# what the state and the order of the data follow from
FIXED = ("run.seed", "model.*", "data.*", "elastic.logical_shards", "optimizer.name", "optimizer.ema", "tables.*",
         "embedding.buckets")
# how it is computed, where things lie; data is known by its content
FREE = ("model.init", "model.recompute", "data.path", "data.eval_path")


def all_keys(recipe: Recipe) -> dict[str, Any]:
    """By section.key, what is not written down too."""
    sections = {name: getattr(recipe, name).model_dump() for name in Recipe.model_fields if name != "tables"}
    found = {f"{name}.{key}": value for name, section in sections.items() for key, value in section.items()}
    return {**found, "data.tables": recipe.data.tables,
            **keys_of({name: table.model_dump() for name, table in recipe.tables.items()})}


def check_resumed(before: Recipe, after: Recipe) -> None:
    """RecipeError where a run would go on with another state or another order of its data. Where columns lie may be
    said of a run that left it open: what its checkpoint holds must fit."""
    old, new = (all_keys(recipe) for recipe in (before, after))
    if "auto" in (old["data.tables"], new["data.tables"]):
        old["data.tables"] = new["data.tables"]
    for key in sorted({*old, *new}):
        fixed = key in FIXED or f"{key.partition('.')[0]}.*" in FIXED
        if fixed and key not in FREE and old.get(key) != new.get(key):
            now, then = ("nothing" if value is None else shown(value) for value in (new.get(key), old.get(key)))
            raise RecipeError(f"{key} = {now} is not what this run began with, {then}; leave it as it was, or start a "
                              "new run, with a checkpoint as its model.init.")
