"""What travels to a cluster with a recipe: the recipe, the user's modules with what they import from the working directory, and
the data that it names by a relative path; and the archive of them."""

from __future__ import annotations

import ast
import os
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from elastic.errors import RecipeError, UserError
from elastic.humanize import size
from elastic.recipe import Recipe
from elastic.recipe.paths import MADE, PACKAGE, matches

OURS = ("elastic", "backends", "nlp", "vision", "recommender")  # the cluster has its own
HIDDEN = (".*", "__pycache__", "node_modules", "*.egg-info")  # in which no user's code or data lies
EXCLUDED = ("runs", "data")  # nor in these of the working directory, unless something is imported from there or named
NAMED = 3  # of the largest files
EPOCH = (1980, 1, 1, 0, 0, 0)  # the same files are the same archive, which Ray then has already


@dataclass
class Package:
    """`files`: name in the archive -> file here."""

    files: dict[str, Path] = field(default_factory=dict)

    def add(self, root: Path, file: Path) -> None:
        self.files[file.relative_to(root).as_posix()] = file

    @property
    def bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files.values())

    def write(self, archive: Path, limit: int) -> None:
        """UserError where it would be larger than `limit` bytes, as soon as that is known."""
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as out:
            for name in sorted(self.files):
                entry = zipfile.ZipInfo(name, EPOCH)
                entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
                with open(self.files[name], "rb") as source, out.open(entry, "w") as target:
                    while block := source.read(1 << 20):
                        target.write(block)
                        if archive.stat().st_size > limit:
                            raise UserError(self.too_large(limit))
        if archive.stat().st_size > limit:
            raise UserError(self.too_large(limit))

    def too_large(self, limit: int) -> str:
        largest = sorted(self.files, key=lambda name: -self.files[name].stat().st_size)[:NAMED]
        named = ", ".join(f"{name} ({size(self.files[name].stat().st_size)})" for name in largest)
        return (f"What would be submitted, {size(self.bytes)} in {len(self.files)} files, is more than the {size(limit)} that "
                f"Ray's job server takes; the largest are {named}: put them where the nodes see them and write that path, or "
                "leave them out with `excludes` in --runtime-env.")


def package(recipe_file: Path, recipe: Recipe, folder: Path, excludes: Sequence[str] = ()) -> Package:
    """For a recipe whose paths are as they stand in it, given in `folder`.

    RecipeError where a relative path leads to what cannot travel.
    """
    found = Package({recipe_file.name: recipe_file})
    kinds = [kind.partition(":")[0] for kind in (recipe.model.kind, recipe.data.kind) if ":" in kind]
    reached = imported(folder, kinds)
    for file in (*reached, *beside(folder, reached)):
        found.add(folder, file)
    for key, path in relative_paths(recipe):
        for base in (folder, recipe_file.resolve().parent):
            if there := matches(base / path):
                for match in map(Path, there):
                    for file in (below(match) if match.is_dir() else (match,)):
                        found.add(base, file)
                break
        else:
            raise RecipeError(f'{key} = "{path}" does not exist: nothing at {folder / path}; write the path of a file or '
                              "folder, or an absolute one that the nodes see.")
    found.files = {name: file for name, file in found.files.items() if name == recipe_file.name or not excluded(name, excludes)}
    return found


def excluded(name: str, patterns: Sequence[str]) -> bool:
    """Whether a pattern matches a file's name in the archive, or a folder that it is in."""
    parts = name.split("/")
    ways = ["/".join(parts[:n]) for n in range(1, len(parts) + 1)]
    return any(fnmatch(way, pattern.strip("/")) for pattern in patterns for way in (*ways, *parts))


def relative_paths(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """(key, path) of the files that go along. RecipeError for those that would lie or lead elsewhere than here."""
    for key, paths in (("data.path", recipe.data.path), ("data.eval_path", recipe.data.eval_path)):
        for path in paths:
            if "://" in path or path.startswith((PACKAGE, MADE, "~")) or os.path.isabs(path):
                continue
            if ".." in Path(path).parts:
                raise RecipeError(f'{key} = "{path}" leads out of the folder that goes along; write an absolute path that '
                                  "the nodes see.")
            yield key, path
    for key, path in (("model.init", recipe.model.init), ("checkpoint.path", recipe.checkpoint.path)):
        if path and "://" not in path and not os.path.isabs(os.path.expanduser(path)):
            raise RecipeError(f'{key} = "{path}" is relative, and would lie in a folder that Ray clears away; write an absolute '
                              "path that the nodes see, or a URI.")


def imported(folder: Path, modules: Sequence[str]) -> list[Path]:
    """The files below `folder` that are executed when these modules are imported, as far as import statements say."""
    reached, waiting = dict[Path, None](), list(modules)
    seen = set[str]()
    while waiting:
        name = waiting.pop()
        if name in seen or name.partition(".")[0] in OURS:
            continue
        seen.add(name)
        for file in files_of(folder, name):
            if file not in reached:
                reached[file] = None
                waiting += imports(file, package_of(folder, file))
    return list(reached)


def files_of(folder: Path, name: str) -> list[Path]:
    """The file of a module, and those of the packages that it is in; nothing where it is not below `folder`."""
    parts, found = name.split("."), list[Path]()
    for n in range(1, len(parts) + 1):
        at = folder.joinpath(*parts[:n])
        for file in (at / "__init__.py", at.with_name(f"{at.name}.py")):
            if file.is_file():
                found.append(file)
                break
    return found


def package_of(folder: Path, file: Path) -> list[str]:
    return list(file.relative_to(folder).parent.parts)


def imports(file: Path, package: Sequence[str]) -> list[str]:
    """The modules that a file's import statements may mean. UserError where it is no Python."""
    try:
        tree = ast.parse(file.read_bytes(), str(file))
    except (SyntaxError, ValueError) as error:
        raise UserError(f"{file} is no Python of this version ({error}); mend it.") from None
    found = list[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = list(package[:len(package) - node.level + 1]) if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            found += [module, *(f"{module}.{alias.name}" for alias in node.names)]
    return [name.strip(".") for name in found if name.strip(".")]


def beside(folder: Path, reached: Sequence[Path]) -> Iterator[Path]:
    """What else lies in the packages that are imported from: modules that are imported by name, a vocabulary."""
    tops = {file.relative_to(folder).parts[0] for file in reached}
    for top in sorted(tops - set(EXCLUDED)):
        yield from below(folder / top)


def below(folder: Path) -> Iterator[Path]:
    """The files in it, but what is hidden."""
    for at, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        yield from (Path(at, name) for name in sorted(names) if Path(at, name).is_file() and not is_hidden(name))


def is_hidden(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in HIDDEN)
