"""An elastic training platform for Ray: workers come and go, the result stays the same to the bit."""

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

DOORS = {"Trainer": "elastic.driver.trainer", "Result": "elastic.driver.follow", "Recipe": "elastic.recipe",
         "load_recipe": "elastic.recipe",
         **dict.fromkeys(("ElasticError", "UserError", "RecipeError", "RunFailed", "NonFiniteLoss", "BadCheckpoint"),
                         "elastic.errors")}
__all__ = list(DOORS)


def __getattr__(name: str) -> Any:
    """What a user's script takes from here, loaded when it is taken: Ray comes with `Trainer`."""
    if name not in DOORS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return vars(import_module(DOORS[name]))[name]


class Moved(MetaPathFinder, Loader):
    """Modules that users' own code, and so the runs that they have trained, imports by names of before."""

    NAMES = {"elastic.trainer": "elastic.driver.trainer", "elastic.follow": "elastic.driver.follow",
             "elastic.inference": "elastic.driver.inference",
             "elastic.backend": "elastic.model.backend", "elastic.ops": "elastic.model.ops",
             "elastic.layers": "elastic.model.layers"}

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in self.NAMES else None

    def exec_module(self, module: ModuleType) -> None:
        found = vars(import_module(self.NAMES[module.__name__]))
        vars(module).update({name: value for name, value in found.items() if not name.startswith("__")})


sys.meta_path.append(Moved())
