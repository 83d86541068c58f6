"""Where a recipe and its data lie: paths, globs, files shipped in an installed package, recipes shipped with the platform."""

from __future__ import annotations

import difflib
import glob
import importlib.util
import os
import re
from pathlib import Path

from elastic.errors import RecipeError

DOMAINS = ("nlp", "vision", "recommender")
PACKAGE = "package:"
MADE = "made:"


def resolve_path(path: str, key: str = "data.path") -> list[str]:
    """The existing files or folders that `path` means, absolute, globs and packages expanded, sorted. RecipeError names
    `key` and what is missing."""
    return _packaged(path, key) if path.startswith(PACKAGE) else _local(path, None, key)


def absolute(path: str, base: Path | None, key: str) -> str:
    """The same path made absolute, globs, packages, URIs of data and what is made left as they are; RecipeError if it
    leads nowhere."""
    if path.startswith(MADE):
        made_by(path, key)
        return path
    if path.startswith(PACKAGE):
        _packaged(path, key)
        return path
    if "://" in path and key.startswith("data."):
        return path
    _local(path, base, key)
    return str(_anchor(path, base))


def _anchor(path: str, base: Path | None) -> Path:
    here = Path(os.path.abspath(os.path.expanduser(path)))
    if matches(here) or base is None:
        return here
    there = Path(os.path.abspath(base / os.path.expanduser(path)))
    return there if matches(there) else here


def matches(path: Path) -> list[str]:
    if path.exists():
        return [str(path)]
    return sorted(glob.glob(str(path), recursive=True)) if glob.has_magic(str(path)) else []


def _local(path: str, base: Path | None, key: str) -> list[str]:
    if "://" in path:
        raise RecipeError(f'{key} = "{path}" is a URI, which is not yet supported; write the path of a local file or '
                          'folder.')
    anchor = _anchor(path, base)
    found = matches(anchor)
    if not found:
        also = f" nor in {base}" if base and not os.path.isabs(path) else ""
        raise RecipeError(f'{key} = "{path}" does not exist: nothing at {anchor}{also}; write the path of a file or '
                          'folder.')
    for file in found:
        if not os.access(file, os.R_OK):
            raise RecipeError(f'{key} = "{path}": {file} may not be read; mend its permissions.')
    return found


def _packaged(path: str, key: str) -> list[str]:
    """Files of an installed package, found without importing it: package:NAME/GLOB, NAME as one imports it."""
    name, _, pattern = path.removeprefix(PACKAGE).partition("/")
    if not name or not pattern:
        raise RecipeError(f'{key} = "{path}" is incomplete; write "package:NAME/GLOB", as '
                          '"package:shksprdata/texts/*_gut.txt".')
    found: set[str] = set()
    folders = package_folders(name)
    if not folders:
        raise RecipeError(f'{key} = "{path}" needs the Python package {name}, which is not installed here; install it '
                          'with pip.')
    for folder in folders:
        found.update(glob.glob(os.path.join(glob.escape(folder), pattern), recursive=True))
    if not found:
        raise RecipeError(f'{key} = "{path}" matches no file of the package {name} in {folders[0]}; '
                          f'mend the part after "{name}/".')
    return sorted(found)


def made_by(path: str, key: str) -> tuple[str, dict[str, int]]:
    """The module of the platform that makes data, and what it is asked for: made:DOMAIN.MODULE?NAME=NUMBER&..."""
    found = re.fullmatch(r"made:(\w+)\.(\w+)(?:\?((?:\w+=\d+)(?:&\w+=\d+)*))?", path)
    if not found or found[1] not in DOMAINS or not any(Path(folder, f"{found[2]}.py").is_file()
                                                       for folder in package_folders(found[1])):
        raise RecipeError(f'{key} = "{path}" is nothing that can be made; write "made:MODULE?NAME=NUMBER", as '
                          '"made:recommender.click_log?rows=1000000".')
    options = [option.partition("=") for option in (found[3] or "").split("&") if option]
    return f"{found[1]}.{found[2]}", {name: int(value) for name, _, value in options}


def package_folders(name: str) -> list[str]:
    """The folders of an installed top-level package; empty if there is none. Nothing is imported."""
    try:
        spec = importlib.util.find_spec(name) if name.isidentifier() else None
    except (ImportError, ValueError):
        return []
    return list(spec.submodule_search_locations or ()) if spec else []


def shipped() -> dict[str, Path]:
    """The recipes that come with the platform: "nlp/gpt_shakespeare" and so on -> file."""
    return {f"{domain}/{file.stem}": file for domain in DOMAINS for folder in package_folders(domain)
            for file in sorted(Path(folder, "recipes").glob("*.toml"))}


def find_recipe(name: str | Path) -> Path:
    """The file of a recipe given by path or by shipped name."""
    path = Path(name).expanduser()
    if path.is_file():
        return path
    known = shipped()
    if str(name) in known:
        return known[str(name)]
    if path.is_dir():
        raise RecipeError(f'the recipe "{name}" is a folder; write the path of a TOML file.')
    near = difflib.get_close_matches(str(name), known, 1, 0.4)
    remedy = f'did you mean "{near[0]}"?' if near else f"the shipped ones are {', '.join(known) or 'none'}."
    raise RecipeError(f'the recipe "{name}" is neither a file nor a shipped name; {remedy}')
