"""The house rules that a machine can check: sizes, no cycles, one direction of imports, each framework in its own rim."""

from __future__ import annotations

import ast
import gc
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = {"elastic", "backends", "nlp", "vision", "recommender"}
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 60
FLOORS = (  # a folder of elastic, or a file at its root, imports those of lower floors and of its own
    ("errors", "humanize"), ("boxes", "buffers", "mesh"),
    ("model", "messages", "chaos", "storage", "collective", "recipe"),
    ("data", "parallel", "observe", "tables"), ("checkpoint",), ("state",), ("workload",), ("worker", "planning"),
    ("controller",), ("driver",), ("cli",))
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
RIM = {
    "torch": ("backends/pytorch/", "elastic/collective/"),
    "tensorflow": ("backends/tensorflow/",), "keras": ("backends/tensorflow/",), "mxnet": ("backends/mxnet/",),
}
WORKSHOP = ("tests/", "benchmarks/", "examples/")  # free to import any framework


@dataclass(frozen=True)
class Import:
    """One imported module; `names` are what `from module import ...` takes from it."""

    line: int
    module: str
    names: tuple[str, ...]
    top: bool

    @property
    def root(self) -> str:
        return self.module.partition(".")[0]


@pytest.fixture(autouse=True)
def no_collection() -> Iterator[None]:
    """Half a million nodes are made and kept: looking for garbage among them takes two thirds of the time."""
    gc.disable()
    yield
    gc.enable()


@cache
def files() -> tuple[str, ...]:
    listed = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
                            cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    return tuple(sorted(name for name in listed if name and (ROOT / name).exists()))


@cache
def tree(name: str) -> ast.Module:
    return ast.parse((ROOT / name).read_text(encoding="utf-8"), name)


def module_of(name: str) -> str:
    return name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def absolute(name: str, node: ast.ImportFrom) -> str:
    """The module of a `from` import, dots resolved."""
    if not node.level:
        return node.module or ""
    package = name.split("/")[:-1]
    return ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])


@cache
def imports(name: str) -> tuple[Import, ...]:
    """All of a file's imports, those within functions and for the type checker alone too: a reader follows those as
    well."""
    found: list[Import] = []

    def walk(node: ast.AST, top: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(node.lineno, alias.name, (), top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.append(Import(node.lineno, absolute(name, node), tuple(alias.name for alias in node.names), top))
        inner = top and not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            walk(child, inner)

    walk(tree(name), True)
    return tuple(found)


def shipped() -> tuple[str, ...]:
    return tuple(name for name in files() if name.split("/")[0] in SHIPPED)


def functions(name: str) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree(name)) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


def test_files_are_short() -> None:
    lines = {name: (ROOT / name).read_text(encoding="utf-8").count("\n") for name in files()}
    assert not {name: count for name, count in lines.items() if count > MAX_FILE_LINES}


def test_functions_are_short() -> None:
    long = [f"{name}:{f.lineno} {f.name}" for name in shipped() for f in functions(name)
            if (f.end_lineno or f.lineno) - f.lineno + 1 > MAX_FUNCTION_LINES]
    assert not long


def test_the_platform_imports_no_sibling_and_siblings_import_only_the_platform() -> None:
    crossed = []
    for name in shipped():
        own = name.split("/")[0]
        allowed = {own} if own == "elastic" else {own, "elastic"}
        crossed += [f"{name}:{i.line} imports {i.module}" for i in imports(name) if i.root in SHIPPED - allowed]
    assert not crossed


def room_of(name: str) -> str:
    return name.split("/")[1].removesuffix(".py")


def test_every_room_has_a_floor_and_arrows_point_down() -> None:
    wrong = []
    for name in files():
        if not name.startswith("elastic/") or name == "elastic/__init__.py":
            continue
        here = LEVEL.get(room_of(name))
        if here is None:
            wrong.append(f"{name} is in a room without a floor")
            continue
        for i in imports(name):
            if i.root == "elastic":
                rooms = [i.module.split(".")[1]] if "." in i.module else list(i.names)
                wrong += [f"{name}:{i.line} imports elastic.{room}" for room in rooms if LEVEL.get(room, -1) > here]
    assert not wrong


def test_few_files_stand_beside_the_rooms() -> None:
    assert len({name for name in files() if name.startswith("elastic/")
                and name.count("/") == 1} - {"elastic/__init__.py"}) <= 9


def test_the_tree_in_the_readme_says_what_the_files_say() -> None:
    """A line for every folder of elastic and every file at its root, and for the packages beside it, with their first
    sentence."""
    said = dict(line.strip().split(maxsplit=1) for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
                if re.match(r" *[a-z_/]+(/|\.py) +[A-Z]", line))
    wanted = {f"{name.split('/')[1]}/" if name.endswith("__init__.py") else name.split("/")[1]: name for name in files()
              if name.startswith("elastic/") and (name.endswith("/__init__.py") or name.count("/") == 1)
              and name != "elastic/__init__.py"}
    wanted |= {name.removesuffix("__init__.py"): name for name in files()
               if name.endswith("__init__.py") and name.split("/")[0] in SHIPPED - {"elastic"}}
    assert {entry: said.get(entry) for entry in wanted} == {
        entry: (ast.get_docstring(tree(name)) or "").partition("\n")[0] for entry, name in wanted.items()}


def test_a_framework_is_imported_in_its_rim_only() -> None:
    outside = [f"{name}:{i.line} imports {i.root}" for name in files() if not name.startswith(WORKSHOP)
               for i in imports(name) if i.root in RIM and not name.startswith(RIM[i.root])]
    assert not outside


def test_no_test_imports_another() -> None:
    """What two of them share stands in tests/support."""
    shared = [f"{name}:{i.line} imports {i.module}" for name in files() if name.startswith("tests/")
              for i in imports(name)
              if any(part.startswith("test_") for part in [*i.module.split("."),
                                                           *(i.names if i.module.startswith("tests") else ())])]
    assert not shared


def graph() -> dict[str, set[str]]:
    """Module -> modules it imports, lazily or not: a lazy import hides a cycle, it does not open it."""
    known = {module_of(name) for name in files()}
    out: dict[str, set[str]] = {}
    for name in files():
        here, targets = module_of(name), set()
        for i in imports(name):
            inner = {f"{i.module}.{n}" for n in i.names} & known
            targets |= inner or ({i.module} & known)
        out[here] = targets - {here}
    return out


def find_cycle(edges: dict[str, set[str]]) -> list[str]:
    """One cycle as a path whose last module imports its first; empty if there is none."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return path[path.index(module):]
        if module in done:
            return []
        for target in sorted(edges.get(module, ())):
            if cycle := visit(target, [*path, module]):
                return cycle
        done.add(module)
        return []

    return next((cycle for module in sorted(edges) if (cycle := visit(module, []))), [])


def test_no_import_cycle() -> None:
    assert find_cycle(graph()) == []


@pytest.mark.parametrize(("edges", "cycle"), [
    ({"a": {"b"}, "b": {"c"}, "c": set()}, []),
    ({"a": {"b"}, "b": {"c"}, "c": {"b"}}, ["b", "c"]),
])
def test_the_cycle_finder_finds(edges: dict[str, set[str]], cycle: list[str]) -> None:
    assert find_cycle(edges) == cycle


def test_the_import_walker_sees_lazy_and_relative_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    source = ("from __future__ import annotations\nfrom ..errors import X\nif TYPE_CHECKING:\n    import torch\n"
              "def f():\n    import ray.util\n")
    monkeypatch.setattr(f"{__name__}.tree", lambda name: ast.parse(source))
    imports.cache_clear()
    seen = [(i.module, i.top) for i in imports("elastic/data/made_up.py")]
    imports.cache_clear()
    assert seen == [("__future__", True), ("elastic.errors", True), ("torch", True), ("ray.util", False)]


def test_every_test_asserts() -> None:
    def checks(function: ast.AST) -> bool:
        calls = [node.func for node in ast.walk(function) if isinstance(node, ast.Call)]
        names = [getattr(call, "attr", getattr(call, "id", "")) for call in calls]
        return any(isinstance(node, ast.Assert) for node in ast.walk(function)) or any(
            name.startswith("assert") or name in ("raises", "warns", "fail") for name in names)

    idle = [f"{name}:{f.lineno} {f.name}" for name in files() if name.startswith("tests/")
            for f in functions(name) if f.name.startswith("test") and not checks(f)]
    assert not idle


def test_every_error_of_the_tree_is_raised_somewhere() -> None:
    defined = {node.name for node in tree("elastic/errors.py").body
               if isinstance(node, ast.ClassDef)} - {"ElasticError"}
    called = {node.func.id for name in files() if name.split("/")[0] in SHIPPED for node in ast.walk(tree(name))
              if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert defined and defined <= called, defined - called
