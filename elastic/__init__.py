"""An elastic training platform for Ray: workers come and go, the result stays the same to the bit."""

from importlib import import_module
from typing import Any

DOORS = {"Trainer": "elastic.driver.trainer", "Result": "elastic.driver.follow", "Recipe": "elastic.recipe", "load_recipe": "elastic.recipe",
         **dict.fromkeys(("ElasticError", "UserError", "RecipeError", "RunFailed", "NonFiniteLoss", "BadCheckpoint"), "elastic.errors")}
__all__ = list(DOORS)


def __getattr__(name: str) -> Any:
    """What a user's script takes from here, loaded when it is taken: Ray comes with `Trainer`."""
    if name not in DOORS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return vars(import_module(DOORS[name]))[name]
