"""Checks that the configurations of models share. RecipeError names the key, the value and what would be right."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from elastic.errors import RecipeError


def is_whole(value: Any, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def whole(config: Any, *keys: str, least: int = 1) -> None:
    for key in keys:
        if not is_whole(value := getattr(config, key), least):
            raise RecipeError(f"model.{key} = {value!r} must be a whole number of at least {least}.")


def multiple(config: Any, key: str, of: str) -> None:
    if getattr(config, key) % getattr(config, of):
        raise RecipeError(f"model.{key} = {getattr(config, key)} must be a multiple of model.{of} = "
                          f"{getattr(config, of)}.")


def number(config: Any, key: str, words: str, is_right: Callable[[float], bool]) -> None:
    """A number for which `is_right`; `words` say which are."""
    value = getattr(config, key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not is_right(value):
        raise RecipeError(f"model.{key} = {value!r} must be {words}.")


def share(config: Any, *keys: str) -> None:
    for key in keys:
        number(config, key, "a number of at least 0 and below 1", lambda value: 0.0 <= value < 1.0)


def flag(config: Any, *keys: str) -> None:
    for key in keys:
        if not isinstance(getattr(config, key), bool):
            raise RecipeError(f"model.{key} = {getattr(config, key)!r} must be true or false.")


def one_of(config: Any, key: str, choices: tuple[str, ...]) -> None:
    value = getattr(config, key)
    if value not in choices:
        raise RecipeError(f"model.{key} = {value!r} must be one of {', '.join(choices)}.")


def read(kind: str, factory: type[Any], config: Mapping[str, Any]) -> Any:
    """`factory(**config)`, its keys known."""
    known = [field.name for field in fields(factory)]
    for key in config:
        if key not in known:
            raise RecipeError(f"model.{key} = {config[key]!r} is not a key of {kind}; its keys are {', '.join(known)}.")
    return factory(**config)

