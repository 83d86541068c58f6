"""Saving a gigabyte of state beside a step loop: ours, PyTorch's distributed checkpoint, torch.save, and what no one can beat.

    python -m benchmarks.checkpoint [--rounds 5] [--saves 3] [--scale 1.0]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.kit import results
from benchmarks.kit.processes import ONE_THREAD, python, run, tidy_on_termination

OURS, LIMITS, ASYNC = "ours", "limits", "DCP async_save, kept stager"
PACED = "ours, at 500 MB/s"
CONTESTANTS = {
    OURS: "benchmarks.kit.own_checkpoints",
    PACED: "benchmarks.kit.own_checkpoints",
    ASYNC: "benchmarks.peers.checkpoints",
    "DCP async_save, kept stager, all cores": "benchmarks.peers.checkpoints",
    "DCP async_save": "benchmarks.peers.checkpoints",
    "DCP save": "benchmarks.peers.checkpoints",
    "torch.save + fsync": "benchmarks.peers.checkpoints",
    LIMITS: "benchmarks.kit.limits",
}
COLUMNS = {"stall": "stall of the step loop, ms", "total": "until durable, ms", "beside": "a step beside it, ratio",
           "load": "load, ms"}
Round = Mapping[str, Mapping[str, float]]  # contestant -> figure -> its median in this round


def measure(folder: Path, rounds: int, saves: int, scale: float, names: list[str]) -> list[Round]:
    found = []
    for number in range(rounds):
        medians: dict[str, dict[str, float]] = {}
        for name in names[number % len(names):] + names[:number % len(names)]:
            with tempfile.TemporaryDirectory(dir=folder) as place:
                arguments = [place, saves, scale, f"{place}/result.json"] if name == LIMITS else [name, place, saves, scale, f"{place}/result.json"]
                run(python(CONTESTANTS[name], *arguments), Path(place) / "log", 600.0, ONE_THREAD)
                figures: dict[str, list[float]] = json.loads(Path(place, "result.json").read_text())
            medians[name] = {key: statistics.median(values) for key, values in figures.items() if values}
            print(f"round {number + 1}: {name}: "
                  f"{', '.join(f'{key} {value:.3f}' for key, value in medians[name].items())}", flush=True)
        found.append(medians)
    return found


def figure(rounds: list[Round], name: str, key: str) -> float:
    return statistics.median(one[name][key] for one in rounds)


def cell(rounds: list[Round], name: str, key: str) -> str:
    """Median (lowest - highest) of the rounds, in milliseconds unless it is a ratio."""
    values = sorted(one[name][key] for one in rounds if key in one[name])
    if not values:
        return "-"
    scale, form = (1.0, ".2f") if key == "beside" else (1000.0, ".0f")
    low, middle, high = (format(value * scale, form) for value in (values[0], statistics.median(values), values[-1]))
    return f"{middle} ({low} - {high})"


def tables(rounds: list[Round]) -> str:
    rows = [[name, *(cell(rounds, name, key) for key in COLUMNS)] for name in rounds[0] if name != LIMITS]
    text = results.table(["", *COLUMNS.values()], rows)
    if LIMITS not in rounds[0]:
        return text
    words = {"copy": "a copy into kept memory, one thread", "hash": "the hash (xxh3-128), one thread",
             "raw write": "write + fsync, through the page cache",
             "raw write, direct": "write + fsync, past the page cache"}
    limits = [[words[key], cell(rounds, LIMITS, key)] for key in words]
    beside = f"A step beside the write + fsync past the page cache, and nothing else, takes {cell(rounds, LIMITS, 'beside')} of one without."
    return f"{text}\n\nThe limits, {figure(rounds, LIMITS, 'bytes') / 1e9:.2f} GB each:\n\n" + results.table(["", "ms"], limits) + f"\n\n{beside}"


def goals(rounds: list[Round]) -> list[tuple[str, float, float]]:
    """(words, what was got, at most). Ratios are taken within a round."""
    def ratio(key: str, other: Callable[[Round], float]) -> float:
        return statistics.median(one[OURS][key] / other(one) for one in rounds)

    return [("stall against DCP's async_save with a kept stager", ratio("stall", lambda one: one[ASYNC]["stall"]), 1.0),
            ("stall against the copy", ratio("stall", lambda one: one[LIMITS]["copy"]), 1.3),
            ("until durable against the faster raw write",
             ratio("total", lambda one: min(one[LIMITS]["raw write"], one[LIMITS]["raw write, direct"])), 1.2),
            ("until durable against the raw write through the page cache",
             ratio("total", lambda one: one[LIMITS]["raw write"]), 1.2),
            ("a step beside the write against one without", figure(rounds, OURS, "beside"), 1.1),
            ("the same with checkpoint.write_mb_s = 500", figure(rounds, PACED, "beside"), 1.1)]


def verdicts(rounds: list[Round]) -> str:
    if not {OURS, PACED, ASYNC, LIMITS} <= set(rounds[0]):
        return ""
    return "\n".join(f"- {words} at most {limit}: {got:.2f}, {'reached' if got <= limit else 'missed'}"
                     for words, got, limit in goals(rounds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="gigabytes of state")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to write to")
    parser.add_argument("--only", nargs="+", choices=list(CONTESTANTS), default=list(CONTESTANTS))
    arguments = parser.parse_args()
    tidy_on_termination()
    rounds: list[Any] = measure(arguments.folder, arguments.rounds, arguments.saves, arguments.scale, arguments.only)
    results.write("checkpoint", "Checkpoints",
                  [__doc__.partition("\n\n    python")[0] + "\n\n" + NOTE, tables(rounds), verdicts(rounds)])


NOTE = """Every contestant runs in a process of its own, one after the other, in an order that rotates from round to round; a round's figure is
the median of its saves (the first of each process is not counted: buffers come into being in it). The table gives the median of
the rounds with the lowest and the highest.

The state is a GPT's parameters with Adam's two slots, 207 float32 arrays. A step is about 20 ms of one thread: products and a pass over
16 MB. Steps beside a write are compared with the 25 steps before it. Loads find nothing in the page cache. DCP runs in a
gloo group of one; the row "all cores" stages with as many threads as there are cores, the others with one, as the steps have.
Durable means that everything is synced and, for ours, that the manifest is committed. Ours hashes every byte; the others hash nothing."""


if __name__ == "__main__":
    main()
