"""TOML and --set in, a resolved `Recipe` out, or the sentence for a key that is wrong; and back to TOML."""

from __future__ import annotations

import difflib
import importlib
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import tomli_w
from pydantic import BaseModel, ValidationError

from elastic.errors import RecipeError
from elastic.recipe.cross_checks import check
from elastic.recipe.embedding import TableSection
from elastic.recipe.fields import shown
from elastic.recipe.paths import absolute, find_recipe
from elastic.recipe.sections import Recipe

DEFAULT_STEPS = 2000
# what earlier versions wrote, and never read
EMBEDDING = {"placement": "workers", "servers": 1, "consistency": "sync", "staleness": 0}


def load_recipe(path: str | Path, overrides: Sequence[str] = (), base: Path | None = None, locate: bool = True) -> Recipe:
    """The recipe in a TOML file or of a shipped name, with `section.key=value` overrides.

    A run without a name has the file's.
    Relative data paths are looked for in the current directory, then in `base` (default: the recipe's own folder);
    without `locate` all paths are taken as they are.
    """
    file = find_recipe(path)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"the recipe {file} cannot be read ({error}); it must be a TOML file in UTF-8.") from None
    tree = _tree(text, str(file))
    if isinstance(tree.setdefault("run", {}), dict):
        tree["run"].setdefault("name", re.sub(r"[^\w.-]+", "-", file.stem)[:100])
    return parse(tree, overrides, base or file.resolve().parent, locate)


def loads(text: str, overrides: Sequence[str] = (), base: Path | None = None, locate: bool = True) -> Recipe:
    """The recipe in a TOML text. Without `locate` its paths are taken as they are, wherever they lead."""
    return parse(_tree(text, "the recipe"), overrides, base, locate)


def dumps(recipe: Recipe) -> str:
    """TOML that loads to the same recipe. What is None has no TOML form and is left out."""
    return tomli_w.dumps(recipe.model_dump(exclude_none=True))


def parse(tree: Mapping[str, Any], overrides: Sequence[str] = (), base: Path | None = None,
          locate: bool = True) -> Recipe:
    """Validates, fills in and checks; RecipeError is one sentence naming section.key, the value and the remedy."""
    full = {name: dict(part) if isinstance(part, Mapping) else part for name, part in tree.items()}
    for override in overrides:
        _override(full, override)
    given = {override.partition("=")[0].strip() for override in overrides}
    for key, other in (("steps", "epochs"), ("epochs", "steps")):  # an override of one takes the recipe's other away
        if f"run.{key}" in given and f"run.{other}" not in given and isinstance(full.get("run"), dict):
            full["run"].pop(other, None)
    if isinstance(gone := full.get("embedding"), dict) and gone.items() <= EMBEDDING.items():
        del full["embedding"]
    if full.get("mesh") == "auto":
        full["mesh"] = {"auto": True}
    for name in ("model", "data"):
        if name not in full:
            least = "kind" if name == "model" else "format and path"
            raise RecipeError(f"[{name}] is missing; add the section with at least its {least}.")
    try:
        recipe = Recipe.model_validate(full)
    except ValidationError as error:
        raise RecipeError(_sentence(error)) from None
    recipe = _complete(recipe)
    check(recipe)
    return _located(recipe, base) if locate else recipe


def with_mesh(recipe: Recipe, **numbers: int) -> Recipe:
    """The recipe with a mesh that was found for it."""
    settled = recipe.model_copy(update={"mesh": recipe.mesh.model_copy(update={**numbers, "auto": False})})
    check(settled)
    return settled


def _tree(text: str, where: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{where} is not valid TOML: {error}; mend that line.") from None


def _override(tree: dict[str, Any], text: str) -> None:
    """section.key=value; the value is TOML, and a text needs no quotes."""
    key, equals, value = text.partition("=")
    *parents, last = key.strip().split(".")
    if not equals or not last or not all(parents) or (not parents and last != "mesh"):
        raise RecipeError(f'--set "{text}" is not of the form section.key=value, as run.steps=100.')
    here = tree
    for depth, parent in enumerate(parents):
        inner = here.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise RecipeError(f'--set "{text}": {".".join(parents[: depth + 1])} is no section; the form is '
                              'section.key=value.')
        here[parent] = here = dict(inner)
    here[last] = _value(value.strip())


def _value(text: str) -> Any:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return parsed["value"] if len(parsed) == 1 else text


def _complete(recipe: Recipe) -> Recipe:
    """Fills in what depends on other keys. A logical_shards of 0 means that none was given."""
    run, model, elastic = recipe.run, recipe.model, recipe.elastic
    if run.steps is None and run.epochs is None:
        run = run.model_copy(update={"steps": DEFAULT_STEPS})
    model = type(model).model_validate({**model_defaults(model.kind), **model.model_dump(exclude_defaults=True)})
    if not elastic.logical_shards:
        mesh, batch = recipe.mesh, recipe.data.batch_size
        most = 2 * max(1, elastic.max_workers // mesh.replica_size)
        dividing = [n for n in range(min(most, batch), 0, -1) if batch % n == 0]
        shards = next((n for n in dividing if batch // n % (mesh.expert * mesh.micro_batches) == 0), dividing[0])
        elastic = elastic.model_copy(update={"logical_shards": shards})
    return recipe.model_copy(update={"run": run, "model": model, "elastic": elastic})


def model_defaults(kind: str) -> dict[str, Any]:
    """What a model takes for the keys that a recipe leaves out, as its domain's `Config` says, but for those that are
    not written down."""
    found = () if ":" in kind else fields(importlib.import_module(kind).Config)
    return {f.name: list(f.default) if isinstance(f.default, tuple) else f.default for f in found
            if f.metadata.get("written", True)}


def _located(recipe: Recipe, base: Path | None) -> Recipe:
    """Paths made absolute, and known to exist."""
    data, model = recipe.data, recipe.model
    update = {key: tuple(absolute(path, base, f"data.{key}") for path in getattr(data, key))
              for key in ("path", "eval_path")}
    if model.init:
        model = model.model_copy(update={"init": absolute(model.init, base, "model.init")})
    place = recipe.checkpoint.path
    if place and "://" not in place:
        place = os.path.abspath(os.path.expanduser(place))
    checkpoint = recipe.checkpoint.model_copy(update={"path": place})
    return recipe.model_copy(update={"data": data.model_copy(update=update), "model": model, "checkpoint": checkpoint})


def _sentence(error: ValidationError) -> str:
    """The first error in one sentence; a missing key comes after whatever else is wrong (it may be a misspelt one)."""
    found = sorted(error.errors(include_url=False), key=lambda e: e["type"] == "missing")[0]
    names = [str(part) for part in found["loc"]]
    if names[0] == "tables" and (len(names) < 3 or names[2] == "[key]"):
        return _wrong_table(names, found)
    section = ".".join(names[:2]) if names[0] == "tables" else names[0]
    key = next(iter(names[section.count(".") + 1:]), "")
    if not key:
        return _wrong_section(section, found)
    fields = _fields(section)
    dotted = ".".join(part for part in found["loc"] if isinstance(part, str))
    if found["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, fields, 1)
        remedy = f"did you mean {section}.{near[0]}?" if near else f"the keys of [{section}] are {', '.join(fields)}."
        return f"{dotted} = {shown(found['input'])} is not a key of the recipe; {remedy}"
    right = _right(section, key)
    if found["type"] == "missing":
        return f"{dotted} is missing; add it: {right}."
    return f"{dotted} = {shown(found['input'])} cannot work; it must be {right}."


def _wrong_section(section: str, found: Mapping[str, Any]) -> str:
    if found["type"] == "extra_forbidden":
        near = difflib.get_close_matches(section, Recipe.model_fields, 1)
        remedy = f"did you mean [{near[0]}]?" if near else f"the sections are {', '.join(Recipe.model_fields)}."
        return f"[{section}] is not a section of the recipe; {remedy}"
    auto = ' (or "auto")' if section == "mesh" else ""
    return f"{section} = {shown(found['input'])} cannot work; it must be a section: [{section}] and its keys below{auto}."


def _wrong_table(names: Sequence[str], found: Mapping[str, Any]) -> str:
    if names[2:]:
        return (f'"{names[1]}" cannot be a table\'s name; write [tables.NAME] with letters, digits, "_" and "-", a '
                "letter first.")
    return (f"{'.'.join(names)} = {shown(found['input'])} cannot work; it must be a section with a name, [tables.NAME], "
            "and its keys below.")


def _fields(section: str) -> Mapping[str, Any]:
    if section.startswith("tables."):
        return TableSection.model_fields
    model = Recipe.model_fields[section].annotation
    assert isinstance(model, type) and issubclass(model, BaseModel)
    return model.model_fields


def _right(section: str, key: str) -> str:
    field = _fields(section)[key]
    if field.description:
        return field.description
    choices = [shown(value) for value in _choices(field.annotation)]
    return f"one of {', '.join(choices)}"


def _choices(annotation: Any) -> list[Any]:
    """The values of a Literal, also within a union."""
    return [value for part in get_args(annotation) for value in (_choices(part) if get_args(part) else [part])
            if isinstance(value, str)]
