"""Checks that the configurations of the models share. RecipeError names the key, the value and what would be right."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from elastic.errors import RecipeError


def is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def need(config: Any, key: str, holds: bool, right: str) -> None:
    if not holds:
        raise RecipeError(f"model.{key} = {getattr(config, key)!r} must be {right}.")


def whole(config: Any, *keys: str) -> None:
    for key in keys:
        need(config, key, is_count(getattr(config, key)), "a whole number of at least 1")


def share(config: Any, *keys: str) -> None:
    for key in keys:
        value = getattr(config, key)
        need(config, key, is_number(value) and 0.0 <= value < 1.0, "a number of at least 0 and below 1")


def flag(config: Any, *keys: str) -> None:
    for key in keys:
        need(config, key, isinstance(getattr(config, key), bool), "true or false")


def one_of(config: Any, key: str, choices: tuple[str, ...]) -> None:
    need(config, key, getattr(config, key) in choices, f"one of {', '.join(choices)}")


def divided(config: Any, key: str, by: str) -> None:
    need(config, key, getattr(config, key) % getattr(config, by) == 0, f"a multiple of model.{by} = {getattr(config, by)}")


def read(kind: str, factory: type[Any], config: Mapping[str, Any]) -> Any:
    """`factory(**config)`, its keys known."""
    known = [field.name for field in fields(factory)]
    for key in config:
        if key not in known:
            raise RecipeError(f"model.{key} = {config[key]!r} is not a key of {kind}; its keys are {', '.join(known)}.")
    return factory(**config)
