"""From a recipe to what a worker trains with: model, data and backend are found by name, so no arrow points up."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from typing import Any

from elastic.checkpoint.manager import read_start
from elastic.data import table
from elastic.data.cache import cache_dir
from elastic.data.dataset import Dataset, MapStyle
from elastic.data.loader import eval_batches, load_batch
from elastic.data.sampler import Sampler
from elastic.errors import RecipeError, UserError
from elastic.mesh import Mesh
from elastic.model.backend import Backend, Framework, is_neutral
from elastic.model.user_code import check_home, place_of
from elastic.parallel.layout import Layout, Portion
from elastic.parallel.measure import costs_of
from elastic.recipe import Recipe
from elastic.recipe.embedding import obstacles
from elastic.state.flat_layout import FlatLayout, is_frozen
from elastic.state.state import State
from elastic.tables.features import Tables
from elastic.tables.of_recipe import tables_of
from elastic.tables.placing import own_places
from elastic.tables.untrained import with_starting_rows

BACKENDS = {"torch": "backends.pytorch.backend", "tensorflow": "backends.tensorflow.backend",
            "mxnet": "backends.mxnet.backend", "reference": "backends.reference.backend"}


def framework(recipe: Recipe) -> Framework:
    """The door of the recipe's backend, with all set that must be before a user's own model computes. UserError where
    it cannot be imported."""
    try:
        found: Framework = importlib.import_module(BACKENDS[recipe.backend.name]).framework
    except ImportError as error:
        raise UserError(f"backend.name = {recipe.backend.name!r} cannot be imported ({error}); see `elastic doctor`.") from error
    found.before_models(recipe.backend)
    return found


def attribute(key: str, name: str) -> Any:
    """A user's "package.module:attribute"."""
    module, _, path = name.partition(":")
    try:
        return attrgetter(path)(importlib.import_module(module))
    except ModuleNotFoundError as error:
        if error.name and error.name.partition(".")[0] != module.partition(".")[0]:
            raise RecipeError(f"{key} = {name!r} needs the module {error.name}, which is not installed here; install it, or for a "
                              "submitted run put it into the pip list of --runtime-env.") from error
        raise RecipeError(unimportable(key, name, error)) from error
    except Exception as error:
        raise RecipeError(unimportable(key, name, error)) from error


def unimportable(key: str, name: str, error: Exception) -> str:
    return (f"{key} = {name!r} cannot be imported ({type(error).__name__}: {error}); it must be package.module:attribute, "
            "importable from the current directory.")


def call_user(key: str, function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    try:
        return function(**arguments)
    except UserError:
        raise
    except Exception as error:
        raise RecipeError(f"{key}: calling it with {dict(arguments)} failed ({type(error).__name__}: "
                          f"{error}{place_of(error)}); mend it or its keys.") from error


def door(kind: str, name: str) -> Any:
    """The module `name` of a kind's domain: "nlp.gpt" and "data" give nlp.data, and so does a user's own kind, whose
    text is nlp's."""
    return importlib.import_module(f"{'nlp' if ':' in kind else kind.split('.')[0]}.{name}")


def prepare(recipe: Recipe) -> dict[str, Any]:
    """What the data's door finds out before the run: vocabulary, files, sizes. `RecipeError` where the data cannot
    serve."""
    if recipe.data.kind:
        return {}
    if recipe.data.is_table:
        return table.prepare(recipe.data, cache_dir(), own_places(recipe) if recipe.tables else None)
    domain, given = door(recipe.model.kind, "data"), (recipe.data, recipe.model.config, cache_dir())
    if not recipe.model.kind.startswith("recommender."):
        return domain.prepare(*given)
    return domain.prepare(*given, recipe.tables, not any(obstacles(recipe)))


def open_data(recipe: Recipe, info: Mapping[str, Any]) -> tuple[Dataset, Dataset | None, str]:
    """The training set, the evaluation set if there is one, and the unit that weights count ("tokens") or ""."""
    if recipe.data.kind:
        own, factory = framework(recipe), attribute("data.kind", recipe.data.kind)
        seed = recipe.run.seed
        source = call_user("data.kind", lambda **keys: own.construct(factory, keys, seed), recipe.data.options)
        whole = MapStyle(source, seed, own.seeded, own.collate)
        if whole.own and recipe.backend.name != "torch":
            raise RecipeError(f'data.kind: {type(source).__name__} has a collate_fn, which backend.name = '
                              f'"{recipe.backend.name}" does not call; '
                              "give items of one shape, padded and with their lengths or weights beside them, and take "
                              "it out.")
        if info.get("key", whole.key) != whole.key:
            raise UserError(f"data.kind = {recipe.data.kind!r} has {whole.key} here, and {info['key']} where the run "
                            "began; give it the same data on every machine.")
        return *whole.split(recipe.data.eval_fraction), ""
    if recipe.data.is_table:
        return *table.open_tables(info, recipe.data, cache_dir(), recipe.run.seed), ""
    domain = door(recipe.model.kind, "data")
    facts = dict(info) if Path(info["train_file"]).exists() else prepare(recipe)  # another node, another cache
    if facts.get("key") != info.get("key"):
        raise UserError(f"data.path = {list(recipe.data.path)} holds other data on this machine than on the one that "
                        "started the run; copy it there.")
    training = domain.open_dataset(facts, "train", recipe.run.seed)
    evaluation = domain.open_dataset(facts, "eval", recipe.run.seed)
    return training, evaluation if evaluation.num_samples else None, domain.UNIT


@dataclass
class Workload:
    """A recipe's model and data, opened."""

    model: Any  # elastic.model.backend.Model, or a user's own module of the framework at hand
    training: Dataset
    evaluation: Dataset | None
    sampler: Sampler
    unit: str
    # a torch module's keys of its state dict, each with the array's first name
    names: Mapping[str, str] = field(default_factory=dict)
    tables: Tables | None = None  # embedding tables, where the recipe has any

    @classmethod
    def open(cls, recipe: Recipe, info: Mapping[str, Any]) -> Workload:
        training, evaluation, unit = open_data(recipe, info)
        sampler = Sampler(training.num_samples, recipe.data.batch_size, recipe.elastic.logical_shards, recipe.run.seed,
                          recipe.data.shuffle, recipe.run.epochs, recipe.run.steps, training.order)
        model = open_model(recipe, info)
        own = recipe.backend.name == "torch" and ":" in recipe.model.kind
        names = importlib.import_module("backends.pytorch.export").names(model) if own else {}
        return cls(model, training, evaluation, sampler, unit, names, tables_of(recipe, info))

    def facts(self, info: Mapping[str, Any]) -> dict[str, Any]:
        """The data's facts, with what is known once a data set and a model of the user's own are open."""
        return {**info, **({"key": self.training.key} if self.training.key else {}),
                **({"names": dict(self.names)} if self.names else {})}

    @cached_property
    def balance(self) -> Mapping[str, float] | None:
        """What each piece of the model costs, to balance stages by: counted on one shard, so the same on every worker.
        """
        return costs_of(self.model, self.looked_up(load_batch(self.training, self.sampler, 1, 0)))

    def looked_up(self, batch: Any) -> Any:
        """A batch as a backend gets it before the first commit: for whoever counts, times or tries."""
        return with_starting_rows(self.tables, batch)


def open_model(recipe: Recipe, info: Mapping[str, Any]) -> Any:
    model, kind = recipe.model, recipe.model.kind
    if ":" not in kind:
        return importlib.import_module(kind).build(model.config, info)
    construct = framework(recipe).construct
    factory = attribute("model.kind", kind)
    found = call_user("model.kind", lambda **keys: construct(factory, keys, recipe.run.seed), model.config)
    check_home(kind, found, recipe.backend.name)
    return found


def check_items(opened: Workload) -> None:
    """A user's own data set gives the first rows of both splits, and the same again. UserError before a worker starts.
    """
    if isinstance(opened.training, MapStyle):
        epochs, indices = opened.sampler.locate(opened.sampler.positions(1, 0))
        opened.training.check_repeats(indices[indices >= 0], epochs[indices >= 0])
        if opened.evaluation:
            eval_batches(opened.evaluation, 1)[0]()


def check_best(recipe: Recipe, opened: Workload) -> None:
    """RecipeError where a checkpoint is to be kept by a figure, and nothing is evaluated."""
    best = recipe.checkpoint.best
    if opened.evaluation is None and best not in ("", type(recipe.checkpoint).model_fields["best"].default):
        raise RecipeError(f'checkpoint.best = "{best}" is a figure of evaluations, and nothing is set aside to '
                          'evaluate on; set data.eval_fraction, '
                          "or leave checkpoint.best out.")


def check_model(recipe: Recipe, model: Any) -> tuple[str, ...]:
    """What patterns, starting weights and the mesh say, against the model's own names and shapes. UserError before a
    worker starts.

    Returns what a user's own model should have said about it.
    """
    notes: tuple[str, ...] = ()
    if not is_neutral(model):
        model = framework(recipe).adapt(model)
        notes = model.notes
    FlatLayout(model.parameters, model.buffers, recipe.model.freeze, recipe.optimizer.no_decay,
               decayed=recipe.optimizer.decayed,
               thaw=recipe.model.thaw)
    read_start(recipe.model.init, model.parameters)
    whole = [name for name, spec in model.parameters.items() if spec.whole]
    if whole and recipe.optimizer.sharded:
        raise RecipeError(f"optimizer.sharded = true cuts parameter {whole[0]}, which has a constraint that needs all "
                          "of it; write optimizer.sharded = false, or take the constraint out.")
    layout = lay_out(recipe, model, mesh_of(recipe))
    for stage in range(layout.mesh.pipeline):
        if layout.mesh.pipeline > 1 and all(
                is_frozen(name, model.parameters[name], recipe.model.freeze, recipe.model.thaw)
                for name in layout.held(stage)):
            raise RecipeError(f"model.freeze leaves nothing to train on stage {stage} of mesh.pipeline = "
                              f"{layout.mesh.pipeline}; freeze less, or write a smaller mesh.pipeline.")
    return notes


def mesh_of(recipe: Recipe) -> Mesh:
    """The recipe's degrees, of one replica."""
    return Mesh(1, recipe.mesh.pipeline, recipe.mesh.tensor, recipe.mesh.expert)


def lay_out(recipe: Recipe, model: Any, mesh: Mesh, balance: Mapping[str, float] | None = None) -> Layout:
    """The model on a mesh, its stages balanced by what their pieces cost. RecipeError where it does not fit."""
    chunks = recipe.mesh.chunks if recipe.mesh.schedule == "interleaved" and mesh.pipeline > 1 else 1
    return Layout(model, mesh, recipe.mesh.layout, balance, chunks)


def laid(recipe: Recipe, workload: Workload, mesh: Mesh) -> Layout:
    """As every worker of the run lays it out."""
    return lay_out(recipe, workload.model, mesh, workload.balance if mesh.pipeline > 1 else None)


def create_backend(recipe: Recipe, model: Any) -> Backend:
    """The framework's backend on this process's device."""
    return framework(recipe).create(model, recipe.backend)


def open_state(recipe: Recipe, backend: Backend, portion: Portion | None = None, holders: int = 0) -> State:
    """`holders` of each block of the optimizer's slots; 0: every worker holds all."""
    return State(backend, recipe.optimizer.name, recipe.model.freeze, recipe.optimizer.no_decay,
                 recipe.optimizer.ema > 0, portion,
                 recipe.optimizer.decayed, recipe.model.thaw, holders)


EVAL_ROWS = 32  # rows of an evaluation batch: enough for speed, fixed so that its bits are
