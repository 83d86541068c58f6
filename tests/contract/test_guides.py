"""The guides' own code blocks, written to files as their first lines say: what a page shows is what is tested."""

from __future__ import annotations

import ast
import importlib
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import backends
from elastic import workload
from elastic.errors import UserError
from elastic.recipe import load_recipe, sections
from tests.support import frameworks
from tests.support.frameworks import assert_close
from tests.support.inprocess import Result, fit
from tests.support.models import gpt_rig

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^```(?:python|toml)\n# (\S+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MOST_LINES = 150


def blocks(page: str) -> dict[str, str]:
    """By the file that a block's first line names, its text."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    found = dict(BLOCK.findall(text))
    assert len(found) == text.count("\n```") // 2, "a block without a name, or two of one name"
    assert text.count("\n") < MOST_LINES
    return found


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """Both pages as files in an empty folder, found by name; the recipe knows the model's kind."""
    pages = blocks("adding_a_model.md") | blocks("adding_a_backend.md")
    monkeypatch.setattr(sections, "KINDS", (*sections.KINDS, *ast.literal_eval(pages.pop("KINDS"))))
    for name, text in pages.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(backends, "__path__", [*backends.__path__, str(tmp_path / "backends")])
    monkeypatch.setitem(frameworks.FOLDERS, "toy", "toy")
    known = set(sys.modules)
    yield pages
    for name in set(sys.modules) - known:
        if name.startswith(("shop", "backends.toy", "test_curve")):
            del sys.modules[name]
    vars(backends).pop("toy", None)


def trained(name: str, backend: str, *chaos: str, workers: int = 1) -> Result:
    """The page's recipe, with another backend."""
    recipe = load_recipe("shop/recipes/curve.toml",
                         [f"backend.name={backend}", f"elastic.max_workers={workers}", "elastic.logical_shards=4"])
    return fit(Path(name), recipe, chaos)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_the_model_trains_to_the_same_bits_through_a_kill(backend: str, written: dict[str, str]) -> None:
    runpy.run_path("points.py")
    alone, pair = trained("alone", backend), trained("pair", backend, "kill:1@20/backward", workers=2)
    alone.assert_sound(60)
    pair.assert_sound(60)
    assert len(pair.named("worker_lost")) == 1 and pair.sha == alone.sha
    first, last = (line["eval"]["loss"] for line in alone.metrics if "eval" in line)
    assert last < 0.8 * first and last < 0.1


def test_the_page_s_own_test_passes(written: dict[str, str]) -> None:
    module = importlib.import_module("test_curve")
    module.test_torch_agrees_with_numpy()
    monkey = module.curve.Curve.score
    module.curve.Curve.score = lambda self, ops, x, batch, seed: monkey(self, ops, ops.sigmoid(x) if ops.name == "torch" else x, batch, seed)
    with pytest.raises(AssertionError, match="relative error"):
        module.test_torch_agrees_with_numpy()


PLUGIN = """
import backends
from tests.support import frameworks

backends.__path__.append(r"{folder}/backends")
frameworks.FOLDERS["toy"] = "toy"
"""


@pytest.mark.parametrize("slip", ["", "param -= 1.001 * rule.lr"])
def test_the_backend_passes_the_contract(slip: str, written: dict[str, str], tmp_path: Path) -> None:
    """The suite as it is, in a process that knows one framework more; with a slip in the update, not all of it."""
    (tmp_path / "knows_toy.py").write_text(PLUGIN.format(folder=tmp_path))
    if slip:
        (tmp_path / "backends/toy/optimizer.py").write_text(written["backends/toy/optimizer.py"].replace("param -= rule.lr", slip))
    done = subprocess.run([sys.executable, "-m", "pytest", "-p", "knows_toy", "-p", "no:cacheprovider",
                           "tests/contract/test_backend.py"],
                          cwd=ROOT, env={**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}",
                                         "ELASTIC_TEST_BACKENDS": "toy"},
                          capture_output=True, text=True, timeout=300)
    passed, failed = (int((re.search(rf"(\d+) {word}", done.stdout) or ["", "0"])[1]) for word in ("passed", "failed"))
    assert passed > 15 and "skipped" not in done.stdout and bool(failed) == bool(slip), done.stdout[-2000:]


def test_the_backend_trains_as_the_oracle_does(written: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    runpy.run_path("points.py")
    wanted = trained("oracle", "reference")
    monkeypatch.setitem(workload.BACKENDS, "reference", "backends.toy.backend")
    found = trained("toy", "reference", "kill:0@7/reduction", workers=2)
    found.assert_sound(60)
    assert len(found.named("worker_lost")) == 1
    for name, value in wanted.arrays().items():
        assert_close(found.arrays()[name], np.asarray(value), 1e-4, name)


def test_what_the_backend_leaves_out_is_refused(written: dict[str, str]) -> None:
    backend = gpt_rig("toy").backend
    backend.connect({"heads": SimpleNamespace(size=1)})
    for ask in (lambda: backend.connect({"heads": SimpleNamespace(size=2)}),
                lambda: backend.forward(0, ("embed",), None, (), {}, 0),
                lambda: backend.infer(("embed",), None, (), {})):
        with pytest.raises(UserError, match='backend.name = "toy" does not split a model; write 1 for every degree'):
            ask()
