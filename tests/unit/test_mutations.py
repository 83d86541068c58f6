"""The table of mutations fits the code and the tests as they are. `make chaos` tries them."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest
import typer

from elastic.cli import app
from tests.support.mutation_table import FILES, TABLE, Mutation

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = {"verify --replay"}  # that are a command of their own


def commands() -> set[str]:
    group = typer.main.get_command(app)
    assert isinstance(group, typer.core.TyperGroup)
    return set(group.commands)


def promises() -> set[str]:
    return set(re.findall(r"^\| (P\d+) \|", (ROOT / "docs" / "promises.md").read_text(encoding="utf-8"), re.MULTILINE))


@cache
def functions(file: str) -> set[str]:
    return {node.name for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body
            if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("mutation", TABLE, ids=lambda mutation: mutation.name)
def test_a_mutation_fits(mutation: Mutation) -> None:
    assert (ROOT / mutation.file).read_text(encoding="utf-8").count(mutation.text) == 1, f"{mutation.text!r} in {mutation.file}"
    assert mutation.text != mutation.instead and mutation.fault.endswith(".") and mutation.tests
    ast.parse((ROOT / mutation.file).read_text(encoding="utf-8").replace(mutation.text, mutation.instead))
    for test in mutation.tests:
        file, _, name = test.partition("::")
        assert name.partition("[")[0] in functions(file), f"there is no {test}"


def test_every_promise_command_and_file_is_broken_once() -> None:
    wanted = promises() | commands() | OPTIONS | set(FILES)
    assert len(promises()) >= 8 and {"train", "verify"} <= commands()
    broken = {what for mutation in TABLE for what in mutation.broken}
    assert broken == wanted, f"without a mutation: {sorted(wanted - broken)}; unknown: {sorted(broken - wanted)}"
    assert len({mutation.name for mutation in TABLE}) == len(TABLE)
