"""The steady step of the platform against a bare torch loop and Ray Train's DDP, on the same work.

    python -m benchmarks.overhead [--rounds 5] [--steps 100] [--workers 4 2]

The contestants run one after the other, in an order that rotates from round to round. A run's figure is the median of
its steps; a ratio is taken within a round, and the table gives the median of the rounds: the machine's moods touch both
sides.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from benchmarks.kit import ours, results
from benchmarks.kit.logs import Folder, durations
from benchmarks.kit.processes import ONE_THREAD, free_port, python, run, started, tidy_on_termination

Contestant = Callable[[Path, int, int], list[float]]  # (an empty folder, workers, steps) -> seconds of each step
GOALS = (("ours, fast", "bare", 1.03), ("ours, exact", "bare", 1.10),
         ("ours, exact, one shard a worker", "Ray Train", 0.8))


def bare(shards: int) -> Contestant:
    def contest(folder: Path, workers: int, steps: int) -> list[float]:
        port = free_port()
        with ExitStack() as stack:
            processes = [stack.enter_context(started(python("benchmarks.peers.bare", rank, workers, port, steps, shards,
                                                            folder),
                                                     folder / "log", ONE_THREAD)) for rank in range(workers)]
            for process in processes:
                if process.wait(300):
                    raise RuntimeError((folder / "log").read_text()[-2000:])
        return durations(Folder(folder).read())

    return contest


def ray_train(folder: Path, workers: int, steps: int) -> list[float]:
    run(python("benchmarks.peers.ray_train", "--workers", workers, "--steps", steps, "--folder", folder),
        folder / "log")
    found = Folder(folder).read()
    return durations(found)


def platform(reduction: str, gloo: bool = False, one_shard: bool = False) -> Contestant:
    def contest(folder: Path, workers: int, steps: int) -> list[float]:
        settings = [f'elastic.reduction="{reduction}"', *([f"elastic.logical_shards={workers}"] if one_shard else [])]
        run(ours.command(folder / "run", workers, steps, gloo=gloo, settings=settings), folder / "log")
        done = ours.Run(folder / "run")
        done.read()
        transports = {event["transport"] for event in done.generations()}
        if transports != {"gloo" if gloo else "shared"}:
            raise RuntimeError(f"the workers talked over {transports}")
        return durations(done.as_steps())

    return contest


CONTESTANTS: dict[str, Contestant] = {
    "bare": bare(2),
    "bare, one shard a worker": bare(1),
    "ours, fast": platform("fast"),
    "ours, exact": platform("exact"),
    "ours, exact, one shard a worker": platform("exact", one_shard=True),
    "ours, fast, gloo": platform("fast", gloo=True),
    "ours, exact, gloo": platform("exact", gloo=True),
    "Ray Train": ray_train,
}


def measure(workers: int, rounds: int, steps: int, names: list[str]) -> list[dict[str, float]]:
    """Per round the median step of each contestant, in seconds."""
    found = []
    for number in range(rounds):
        medians = {}
        for name in names[number % len(names):] + names[:number % len(names)]:
            with tempfile.TemporaryDirectory() as folder:
                medians[name] = statistics.median(CONTESTANTS[name](Path(folder), workers, steps))
            print(f"{workers} workers, round {number + 1}: {name} {medians[name] * 1000:.1f} ms", flush=True)
        found.append(medians)
    return found


def ratio(rounds: list[dict[str, float]], name: str, other: str) -> str:
    """Median (lowest - highest) of the ratios within a round."""
    if other not in rounds[0]:
        return "-"
    ratios = sorted(medians[name] / medians[other] for medians in rounds)
    return f"{statistics.median(ratios):.3f} ({ratios[0]:.2f} - {ratios[-1]:.2f})"


def section(workers: int, rounds: list[dict[str, float]], steps: int) -> str:
    rows = [[name, f"{statistics.median(m[name] for m in rounds) * 1000:.1f}", ratio(rounds, name, "bare"),
             ratio(rounds, name, "Ray Train")]
            for name in rounds[0]]
    text = f"## {workers} workers, {len(rounds)} rounds of {steps} steps\n\n"
    return text + results.table(["", "step, ms", "ratio to bare", "ratio to Ray Train"], rows)


def goals(rounds: list[dict[str, float]], workers: int) -> str:
    lines = []
    for name, other, limit in GOALS:
        if name in rounds[0] and other in rounds[0]:
            got = statistics.median(medians[name] / medians[other] for medians in rounds)
            lines.append(f"- {workers} workers: {name} against {other} at most {limit}: {got:.3f}, "
                         f"{'reached' if got <= limit else 'missed'}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--workers", type=int, nargs="+", default=[4, 2])
    parser.add_argument("--only", nargs="+", choices=list(CONTESTANTS), default=list(CONTESTANTS))
    arguments = parser.parse_args()
    tidy_on_termination()
    sections, verdicts = [], []
    for workers in arguments.workers:
        rounds = measure(workers, arguments.rounds, arguments.steps, arguments.only)
        sections.append(section(workers, rounds, arguments.steps))
        verdicts.append(goals(rounds, workers))
    results.write("overhead", "Steady step", [__doc__.partition("\n\n    python")[0] + "\n\n" + NOTE, *sections,
                                              "\n".join(verdicts)])


NOTE = """An MLP of 3.4 million parameters, 32 rows a worker and step, AdamW, one thread a worker. The module comes into the platform as
a user's own nn.Module, the data as a map-style data set. Ours computes two logical shards of 16 rows a worker, and so does `bare`;
Ray Train computes its 32 rows at once, as does "bare, one shard a worker". On one node our workers share memory; in the rows
marked "gloo" they talk over TCP as `bare` and Ray Train do."""


if __name__ == "__main__":
    main()
