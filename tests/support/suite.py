"""The whole suite, as `make test` runs it: a process for each framework, a few at a time, then real Ray: those that share one beside
those that start and end their own.

    python -m tests.support.suite [--durations N] [--budgets] [PHASE ...]

While it runs it says how far each process is; what fails is printed as soon as its process has ended. `--budgets` fails
the suite where a folder takes longer than its share, or a process more memory than it may have.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.sampling import SEED

ROOT = Path(__file__).resolve().parents[2]
AT_ONCE = {"threads": 3, "ray": 2, "sampled": 3}  # on two cores: a tenth of the time of those without Ray is waiting
SAY_S, POLL_S, STOP_S = 30.0, 0.1, 20.0
MAX_BYTES = 3 << 30

# Seconds of tests (pytest's durations, added up) that a folder may take on two cores on which `counted` takes
# COUNTED_S, so that the suite does not grow unnoticed; on slower ones as much more as `counted` takes there while the
# tests run, and NOISE beside. All of them together are twenty minutes: 1830 s three at a time without Ray, 1180 s two
# at a time with it. What needs more belongs in `make chaos`.
COUNTED_S, NOISE = 0.047, 1.25
BUDGET_S: dict[str, float] = {"tests/unit": 250, "tests/contract": 440, "tests/numerics": 1020, "tests/chaos": 120,
                              "tests/cluster": 1180,
                              "tests/gpu": 5}


@dataclass(frozen=True)
class Job:
    """One process of pytest: its folders, and the framework whose tests it runs ("": all)."""

    name: str
    folders: tuple[str, ...]
    backend: str = ""
    options: tuple[str, ...] = ()


def files(pattern: str, words: str = "") -> tuple[str, ...]:
    """Those in which these words stand."""
    return tuple(str(file.relative_to(ROOT)) for file in sorted(ROOT.glob(f"tests/{pattern}.py"))
                 if words in file.read_text())


NUMERICS, OTHERS = ("tests/numerics",), ("tests/contract", "tests/chaos", "tests/gpu")
MODELS = (*files("numerics/test_mesh*"), *files("numerics/test_gluon*"))
TABLES = files("numerics/test_table_runs")
OWN_RAY, NODES = (tuple(f"tests/cluster/test_{name}.py" for name in names)
                  for names in (("command", "attacks", "tables", "submit"), ("meshes", "nodes", "own_disks", "placing")))
SAMPLES, LONG = "from tests.support.sampling import ", ("--timeout=1800",)
SCHEDULES, TABLE_CRASHES = files("cluster/test_random_schedules"), files("chaos/test_table_crashes")
SAMPLED = tuple(file for folder in ("unit", "contract", "numerics") for file in files(f"{folder}/test_*", SAMPLES))
PHASES: dict[str, tuple[Job, ...]] = {  # of a phase, the longest first
    "threads": (*(Job(f"{name}-numerics", NUMERICS, name) for name in ("torch", "tensorflow")),
                *(Job(name, OTHERS, name) for name in ("torch", "tensorflow")), Job("unit", ("tests/unit",)),
                Job("mxnet-models", MODELS, "mxnet"), Job("mxnet-tables", TABLES, "mxnet"),  # apart: MXNet gives little memory back
                Job("mxnet-numerics", NUMERICS, "mxnet", tuple(f"--ignore={file}" for file in (*MODELS, *TABLES))),
                Job("mxnet", OTHERS, "mxnet")),
    "ray": (Job("ray", ("tests/cluster",), options=tuple(f"--ignore={file}" for file in (*OWN_RAY, *NODES))),
            Job("own-ray", OWN_RAY),
            Job("nodes", NODES)),
    # whole, some of these take many minutes in one test
    "sampled": (Job("schedules", SCHEDULES, options=LONG),
                Job("crashes-s3", TABLE_CRASHES, options=(*LONG, "-k", "s3")),
                Job("table-crashes", TABLE_CRASHES, options=(*LONG, "-k", "not s3")),
                Job("crashes", tuple(file for file in files("chaos/test_*", SAMPLES) if file not in TABLE_CRASHES), options=LONG),
                Job("cluster", tuple(file for file in files("cluster/test_*", SAMPLES) if file not in SCHEDULES), options=LONG),
                *(Job(f"{name}-sampled", SAMPLED, name, LONG)
                  for name in ("torch", "tensorflow", "mxnet")))}
DEFAULT = ("threads", "ray")


def counted() -> float:
    """Seconds of a processor for a fixed piece of work, whatever else runs."""
    began, total = time.thread_time(), 0
    for number in range(1_000_000):
        total += number * number
    return time.thread_time() - began


@dataclass
class Running:
    """A job's process, its output and what its tests have come to so far."""

    job: Job
    folder: Path
    process: Any = None
    bytes: int = 0
    worked: float = 0.0  # seconds of a processor, with what it started and waited for
    code: int | None = None
    began: float = field(default_factory=time.monotonic)

    def start(self) -> None:
        environment = {**os.environ, "ELASTIC_TEST_BACKENDS": self.job.backend or "torch,tensorflow,mxnet",
                       "ELASTIC_TEST_RECORD": str(self.record)}
        command = [sys.executable, "-m", "pytest", "-p", "tests.support.recording",
                   f"--basetemp={self.folder / self.job.name}",
                   *self.job.folders, *self.job.options]
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT,
                                            start_new_session=True)

    @property
    def record(self) -> Path:
        return self.folder / f"{self.job.name}.jsonl"

    @property
    def log(self) -> Path:
        return self.folder / f"{self.job.name}.log"

    def lines(self) -> list[dict[str, Any]]:
        whole = self.record.read_text().rpartition("\n")[0] if self.record.exists() else ""
        return [json.loads(line) for line in whole.splitlines()]

    def ended(self) -> bool:
        """Reaps the process; its largest one's memory is known then."""
        pid, status, usage = os.wait4(self.process.pid, os.WNOHANG)
        if pid:
            self.code, self.bytes, self.worked = os.waitstatus_to_exitcode(status), usage.ru_maxrss << 10, usage.ru_utime + usage.ru_stime
            self.process.returncode = self.code
        return bool(pid)

    def told(self) -> str:
        lines = self.lines()
        total = next((line["total"] for line in lines if "total" in line), "?")
        tests = [line for line in lines if "test" in line]
        failed = sum(line["outcome"] == "failed" for line in tests)
        now = f", in {tests[-1]['test'].partition('::')[0]}" if tests else ""
        return f"{self.job.name}: {len(tests)} of {total}{f', {failed} FAILED' if failed else ''}{now}"

    def stop(self) -> None:
        """Asks its whole session to end as Ctrl-C would, then ends it."""
        for number in (signal.SIGINT, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
            until = time.monotonic() + STOP_S
            while self.code is None and time.monotonic() < until and not self.ended():
                time.sleep(POLL_S)


def run_phase(jobs: Sequence[Job], at_once: int, folder: Path, paces: list[float]) -> Iterator[Running]:
    """Each job once it has ended, so many at a time; `paces` grows by what `counted` takes meanwhile."""
    waiting, running = list(jobs), list[Running]()
    said = time.monotonic()
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                running.append(Running(waiting.pop(0), folder))
                running[-1].start()
            for one in [r for r in running if r.ended()]:
                running.remove(one)
                yield one
            if time.monotonic() - said > SAY_S:
                said = time.monotonic()
                paces.append(counted())
                print("  ".join(one.told() for one in running), flush=True)
            time.sleep(POLL_S)
    finally:
        for one in running:
            one.stop()


def tell_end(one: Running) -> None:
    """A line, and all that it printed where it failed."""
    counts = Counter(line["outcome"] for line in one.lines() if "test" in line)
    lacking = next((line["total"] for line in one.lines() if "total" in line), 0) - counts.total()
    if lacking:
        counts["NEVER RUN"] = lacking
    print(f"{one.job.name}: {', '.join(f'{count} {outcome}' for outcome, count in sorted(counts.items()))} in "
          f"{time.monotonic() - one.began:.0f} s, {one.worked:.0f} of a processor, {one.bytes / (1 << 30):.1f} GB",
          flush=True)
    if one.code:
        print(one.log.read_text(errors="replace"), flush=True)


def seconds_of(lines: Sequence[dict[str, Any]]) -> dict[str, float]:
    """By folder of tests."""
    out: Counter[str] = Counter()
    for line in lines:
        out["/".join(line["test"].split("/")[:2])] += line["seconds"]
    return dict(out)


def over_budget(spent: dict[str, float], largest: dict[str, int], pace: float) -> list[str]:
    """What takes more than its share on a machine of this pace (1: that of the budgets; more is slower), in sentences."""
    slow = {folder: (seconds, budget) for folder, seconds in spent.items()
            if seconds > (budget := BUDGET_S.get(folder, 0) * pace) * NOISE}
    return [f"{folder} took {seconds:.0f} s of tests, and its budget on this machine is {budget:.0f} s: shorten it, or "
            "sample what make chaos runs whole."
            for folder, (seconds, budget) in slow.items()] + [
        f"The process of {name} took {held / (1 << 30):.1f} GB, and the bound is {MAX_BYTES >> 30} GB."
        for name, held in largest.items() if held > MAX_BYTES]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tests.support.suite")
    parser.add_argument("phases", nargs="*", choices=[*PHASES, []], default=[], metavar="PHASE", help=", ".join(PHASES))
    parser.add_argument("--durations", type=int, default=0, help="so many of the longest tests are listed")
    parser.add_argument("--budgets", action="store_true")
    asked = parser.parse_args(arguments)
    began, ended, paces = time.monotonic(), list[Running](), list[float]()
    os.environ.setdefault("ELASTIC_TEST_SEED", str(SEED))
    print(f"samples of long suites: ELASTIC_TEST_SEED={os.environ['ELASTIC_TEST_SEED']}")
    with tempfile.TemporaryDirectory(prefix="suite-") as folder:
        for phase in asked.phases or DEFAULT:
            print(f"{phase}: {', '.join(job.name for job in PHASES[phase])}", flush=True)
            for one in run_phase(PHASES[phase], AT_ONCE[phase], Path(folder), paces):
                tell_end(one)
                ended.append(one)
        lines = [line for one in ended for line in one.lines() if "test" in line]
    for line in sorted(lines, key=lambda line: -line["seconds"])[:asked.durations]:
        print(f"{line['seconds']:7.1f} s  {line['test']}")
    pace = max(1.0, statistics.median(paces or [counted()]) / COUNTED_S)
    print(f"this machine takes {pace:.2f} of the time that the budgets are for")
    spent = seconds_of(lines)
    for name, seconds in sorted(spent.items()):
        print(f"{name}: {seconds:.0f} s of tests (budget {BUDGET_S.get(name, 0) * pace:.0f} s)")
    over = over_budget(spent, {one.job.name: one.bytes for one in ended}, pace) if asked.budgets else []
    print("\n".join(over) or f"{(time.monotonic() - began) / 60:.1f} min", flush=True)
    counts = Counter(line["outcome"] for line in lines)
    broken = [one.job.name for one in ended if one.code]
    print(f"{counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped", flush=True)
    return 1 if broken or over else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # its children are ended on the way out
    sys.exit(main())
