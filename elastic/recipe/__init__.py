"""The recipe: what a user hands over. TOML in, one clear error or a frozen `Recipe` out."""

from elastic.recipe.cross_checks import best_mode, check_resumed
from elastic.recipe.load import dumps, load_recipe, loads, parse, with_mesh
from elastic.recipe.paths import resolve_path, shipped
from elastic.recipe.sections import Recipe

__all__ = ["Recipe", "best_mode", "check_resumed", "dumps", "load_recipe", "loads", "parse", "resolve_path", "shipped",
           "with_mesh"]
