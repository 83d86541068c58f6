"""Breaks the code in one place after the other, and demands that the tests see it: `python -m tests.support.mutations [NAME ...]`.

The tracked files, as they are now, are copied once; nothing here is touched. A mutation that survives is a test that is
missing.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.util import cache_from_source
from pathlib import Path

from tests.support.mutation_table import TABLE, Mutation

ROOT = Path(__file__).resolve().parents[2]
CAUGHT, SOUND = 1, 0  # pytest's exit codes: a test failed, all passed
LIMIT_S, TOGETHER_S = 180.0, 1200.0  # for the tests of one mutation, and for all of them on the sound code


def copy_tree(target: Path) -> None:
    """Every tracked file as it is on the disk."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes((ROOT / name).read_bytes())


def pytest(copy: Path, tests: Sequence[str], limit_s: float, *options: str) -> tuple[int, str]:
    """(exit code, what it said) of pytest on the copy's own code. Whatever it started has ended when this returns."""
    env = {**os.environ, "ELASTIC_TEST_SAMPLE": "all", "PYTHONPATH": str(copy), "TMPDIR": str(copy.parent)}
    child = subprocess.Popen([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options, *tests], cwd=copy,
                             env=env, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        said, _ = child.communicate(timeout=limit_s)
        return child.returncode, said
    except subprocess.TimeoutExpired:
        return -1, f"no end within {limit_s:g} s"
    finally:
        end_all(child)


def end_all(child: subprocess.Popen[str]) -> None:
    """The child and all of its session, which outlive nobody."""
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    child.wait()


def put(file: Path, content: str) -> None:
    """Python takes a compiled file for the right one by its source's size and second: it goes."""
    file.write_text(content, encoding="utf-8")
    Path(cache_from_source(str(file))).unlink(missing_ok=True)


def survives(mutation: Mutation, copy: Path) -> str:
    """Why a mutation counts as not caught; "" if a test has failed for it."""
    file = copy / mutation.file
    sound = file.read_text(encoding="utf-8")
    if (number := sound.count(mutation.text)) != 1:
        return f"its text stands {number} times in {mutation.file}"
    put(file, sound.replace(mutation.text, mutation.instead))
    try:
        code, said = pytest(copy, mutation.tests, LIMIT_S, "-x")
    finally:
        put(file, sound)
    if code == CAUGHT and re.search(r"^FAILED tests/", said, re.MULTILINE):  # a fixture that fails is an ERROR
        return ""
    return "no test fails" if code == SOUND else f"pytest ended with {code}, not by a failed test:\n{said[-2000:]}"


def chosen(names: Sequence[str]) -> list[Mutation]:
    known = {mutation.name: mutation for mutation in TABLE}
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"{unknown[0]!r} is no mutation; they are {', '.join(known)}.")
    return [known[name] for name in names] or list(TABLE)


def run(names: Sequence[str]) -> int:
    mutations, num_caught = chosen(names), 0
    with tempfile.TemporaryDirectory(prefix="elastic-mutations-") as folder:
        copy = Path(folder) / "copy"
        copy_tree(copy)
        tests = list(dict.fromkeys(test for mutation in mutations for test in mutation.tests))
        code, said = pytest(copy, tests, TOGETHER_S)
        if code != SOUND:
            print(f"The tests do not pass on the sound code (pytest ended with {code}):\n{said[-4000:]}", flush=True)
            return 1
        print(f"{len(tests)} tests pass on the sound code: {said.strip().splitlines()[-1]}", flush=True)
        for mutation in mutations:
            began = time.monotonic()
            why = survives(mutation, copy)
            num_caught += not why
            word, more = ("SURVIVES", f": {why}") if why else ("caught", "")
            print(f"{word:8} {time.monotonic() - began:5.1f} s  {mutation.name} ({mutation.breaks}){more}", flush=True)
    print(f"{len(mutations)} mutations, {num_caught} caught", flush=True)
    return int(num_caught < len(mutations))


def stop(number: int, frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)
    try:
        sys.exit(run(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
