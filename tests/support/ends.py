"""How a run may end: what is kept, the exit code and the sentence of each, as docs/ends.md has them. `python -m tests.support.ends` writes that."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "ends.md"
LAST, NEWEST, START, ON = "its last step", "the newest checkpoint", "nothing: it had no step", "everything: it goes on"
THREADS, CRASHES = "tests/numerics/test_ends.py", "tests/chaos/test_controller_crashes.py"
COMMAND, KILLED, SUBMIT = (f"tests/cluster/test_{name}.py" for name in ("command", "killed_whole", "submit"))
INTERRUPTED = "Interrupted: a final checkpoint is written; press Ctrl-C again to end in the middle of the step."
GOES_ON = "`elastic resume RUN` goes on from there."
SAVED, OLDER = f"; step N is saved: {GOES_ON}", f"; the newest checkpoint is that of step N, of N: {GOES_ON}"


@dataclass(frozen=True)
class End:
    """`says`: with RUN and PLACE for the directories of the run and of its checkpoints, FILE for data, and N for
    numbers."""

    what: str
    code: int
    kept: str
    says: str = ""
    test: str = THREADS


@dataclass(frozen=True)
class Chapter:
    title: str
    ends: dict[str, End]


ERRORS = {
    "loss": End("the model raises at a step", 3, LAST,
                "ValueError: row N is poison (modules.py, line N, in loss)" + SAVED),
    "data": End("the data set raises at a step", 3, LAST,
                "data.kind: item N of FragileRows cannot be had: OSError: row N cannot be read "
                "(modules.py, line N, in __getitem__); mend the data set" + SAVED),
    "warm-up": End("the model raises before the first step", 3, START,
                   "ValueError: no such layer (modules.py, line N, in loss)"),
    "evaluation": End("the model raises in an evaluation", 3, LAST,
                      "ValueError: no such layer (modules.py, line N, in loss)" + SAVED),
    "metrics": End("the model's own figures raise", 3, LAST, "KeyError: 'recall' (modules.py, line N, in metrics)"
                   + SAVED),
    "nan": End("the loss is NaN or infinite", 3, LAST,
               "The loss is nan at step N, logical shard N, sample positions N, N; lower optimizer.lr, set "
               "optimizer.clip_norm or mend these samples" + SAVED),
    "norm": End("a gradient is infinite, and `optimizer.clip_norm` asks for its norm", 3, LAST,
                "The gradient's norm is inf at step N; lower optimizer.lr or mend the data" + SAVED),
    "gradient": End("a gradient is infinite, and nobody asks: the step counts, and what it left is not saved", 3,
                    NEWEST,
                    "The loss is nan at step N, logical shard N, sample positions N, N; lower optimizer.lr, set "
                    "optimizer.clip_norm or mend these samples" + OLDER),
    "file": End("a file of the data is gone", 3, LAST,
                "data.path: the file FILE is missing; put it back or leave it out" + SAVED),
    "sharded": End("the model raises, and three workers share out the optimizer's state: each writes what it owns", 3,
                   LAST,
                   "ValueError: row N is poison (modules.py, line N, in loss)" + SAVED),
}
SIGNALS = {
    "interrupt": End("SIGINT (Ctrl-C)", 130, LAST, INTERRUPTED, COMMAND),
    "again": End("SIGINT, twice: the step at hand is left", 130, LAST, INTERRUPTED, COMMAND),
    "process": End("SIGTERM to the process", 130, LAST, INTERRUPTED, COMMAND),
    "group": End("SIGTERM to all of its process group, as schedulers send it", 130, LAST, INTERRUPTED, COMMAND),
    "job stop": End("`ray job stop` of a submitted run, whose process Ray kills where a step takes longer than it waits", 130, LAST,
                    "The job was stopped; its controller saves the last step and ends the run by itself", SUBMIT),
    "stop": End("Ctrl-C in `elastic submit --follow`, which asks: stop. To detach leaves the run alone", 130, LAST, test=SUBMIT),
    "driver": End("a callback of the driver raises", 3, LAST, "The driver gave the run up" + SAVED),
}
FRUITLESS = "Worker after worker is lost without a step between them, the last by: MemoryError: no room" + SAVED
LOSSES = {
    "controller": End("the controller is lost (SIGKILL): another one takes over", 0, ON, test=CRASHES),
    "driver lost": End("the driver is lost, on a cluster: `elastic resume RUN` follows", 0, ON, test=KILLED),
    "driver and its Ray": End("the driver is lost, and with it a Ray of its own (`--address local`)", 137, NEWEST,
                              test=COMMAND),
    "directory": End("everything and the run directory: the same submission goes on from `checkpoint.path`", 0, NEWEST, test=SUBMIT),
    "everything": End("controller, workers and driver are lost together", 137, NEWEST, test=KILLED),
    "workers": End("all workers are lost, others come: an event `rewound` says from where to where", 0, NEWEST),
    "too few": End("workers are lost until fewer than `elastic.min_workers` are left, and those that replace them do "
                   "not start", 3, LAST,
                   FRUITLESS),
    "twin": End("likewise, and the workers share out the optimizer's state: a twin writes what the lost one owned", 3,
                LAST, FRUITLESS),
}
LINES = ("The lines of the steps up to N cannot be written to the run directory ({}), and a checkpoint counts with "
         "them only; make room there, then resume the run" + OLDER)
PARTS = "The checkpoint of step N could not be written to PLACE ({}); make room or mend the storage, then resume the run" + OLDER
FULL = "No space left on device"
DISKS = {
    "run": End("the run directory's disk is full to the end: training goes on, and no checkpoint counts without its "
               "lines", 3, NEWEST,
               LINES.format(FULL)),
    "ledger": End("likewise, with `data.ledger = true`", 3, NEWEST, LINES.format(FULL)),
    "checkpoints": End("the checkpoints' disk is full to the end: training goes on", 3, NEWEST, PARTS.format(FULL)),
    "both": End("both are full to the end", 3, NEWEST, PARTS.format(FULL)),
    "room": End("the disk of the run directory is full for a while: its lines, and the ledger's rows, wait in memory",
                0, ON),
    "taken": End("the checkpoints' place is taken away: training goes on", 3, NEWEST, PARTS.format("Not a directory")),
    "lines": End("the file of the metrics takes no more lines: training goes on", 3, NEWEST,
                 LINES.format("Input/output error")),
    "interrupt": End("SIGINT, and the checkpoints' disk is full: the group tries it three times, its first worker once more", 3, NEWEST,
                     "The run was interrupted, and its last checkpoint is not there: " + PARTS.format(FULL)),
    "unseen": End("the controller does not see what workers have written: the second checkpoint that is lost so ends the run", 3,
                  NEWEST, "step-N/state-N-of-N-gN.safetensors is missing where the controller looks, in PLACE; a worker has written "
                  "it, so put the run directory where all nodes share it" + OLDER),
    "controller, disk": End("the run directory's disk is full, the controller is lost, there is room again: workers "
                            "repeat what it held back", 0, ON),
    "controller, disk, worker": End("likewise, and a worker was lost meanwhile: which group there is stood nowhere", 3,
                                    NEWEST,
                                    "A controller fell while the run directory RUN could not be written, and its "
                                    "journal lacks generation N; make room there, then resume the run" + OLDER),
}
LIMITS = {
    "steps": End("`run.steps` or `run.epochs` are done; a resumption with more of them goes on", 0, LAST),
}
CHAPTERS = (Chapter("What a user's own code and data do", ERRORS), Chapter("Signals and drivers", SIGNALS),
            Chapter("Losses", LOSSES),
            Chapter("Disks", DISKS), Chapter("The end of the recipe", LIMITS))
BEGIN = """# How a run may end

Exit codes of `elastic train` and `elastic resume`: 0 done; 2 a mistake told before the start; 3 ended by what the sentence says; 130 interrupted;
137 killed. What is kept is what `elastic resume RUN` goes on from, once what failed is mended: to the bits of a run that nothing happened to. Where
a run ends with 3, its sentence tells after these words which step that is. `N`, `RUN`, `PLACE` and `FILE` stand for numbers, the run directory, the
place of its checkpoints and a file.
"""
END = """Each row is an end that its test (below `tests/`) brings about. The page is written from `tests/support/ends.py`
(`python -m tests.support.ends`), and a test compares both.
"""


def said(error: str, **places: Path) -> str:
    """A sentence as the table has it."""
    for name, place in sorted(places.items(), key=lambda pair: -len(str(pair[1]))):
        error = error.replace(str(place), name)
    return re.sub(r"\d+", "N", error)


def page() -> str:
    """docs/ends.md."""
    lines = [BEGIN]
    for chapter in CHAPTERS:
        lines += [f"## {chapter.title}", "", "| what happens | exit code | kept | what it says | shown by |",
                  "|---|---|---|---|---|"]
        lines += [f"| {end.what} | {end.code} | {end.kept} | {briefly(end.says)} | `{end.test.removeprefix('tests/')}` |"
                  for end in chapter.ends.values()]
        lines += [""]
    return "\n".join([*lines, END])


def briefly(says: str) -> str:
    """Without the words on what is kept, which has a column of its own."""
    return says.removesuffix(SAVED).removesuffix(OLDER).rstrip(".")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
