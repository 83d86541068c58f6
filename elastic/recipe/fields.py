"""What `sections` are made of: a frozen, strict, closed model, its kinds of fields, and how a value that is wrong is shown."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from elastic.errors import RecipeError

NAMES = "a list of texts"


def listed(value: Any) -> Any:
    """A single text stands for a list of one."""
    return [value] if isinstance(value, str) else value


Texts = Annotated[tuple[Annotated[str, Field(strict=True, min_length=1)], ...], BeforeValidator(listed),
                  Field(strict=False)]


class Section(BaseModel):
    """Frozen, strict about types (an integer may stand for a float), closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())


def at_least(low: int, default: Any = ..., extra: str = "") -> Any:
    """A whole number with a lower bound."""
    return Field(default, ge=low, description=f"a whole number of at least {low}{extra}")


def share(default: float, description: str = "a number of at least 0 and below 1") -> Any:
    """A number in [0, 1)."""
    return Field(default, ge=0.0, lt=1.0, description=description)


def shown(value: Any) -> str:
    """A value as a recipe would write it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(shown, value))}]"
    return f'"{value}"' if isinstance(value, str) else str(value)


def refuse_given(name: str, section: Section, keys: Iterable[str], only: str) -> None:
    """RecipeError for one of these keys that is not at its default."""
    for key in keys:
        if (value := getattr(section, key)) != type(section).model_fields[key].default:
            raise RecipeError(f"{name}.{key} = {shown(value)} has a meaning only {only}; leave it out.")
