"""A step of a DLRM over embedding tables on two workers: ours, torch's DDP with sparse gradients, and TorchRec; and ours without each of its causes.

    python -m benchmarks.dlrm_step [--rows 10000000] [--rounds 9] [--steps 8] [--only "TorchRec" ...]
    [--small 16000] [--width 32] [--tables 8] [--batch 4096]

The two of a contest are alive together and take turns of a few steps, first the one, then the other; a ratio is taken
within a round, and the table gives the median of the rounds. Losses of the first steps, from the same weights and rows,
must agree. Contests of TorchRec are left out where it cannot be imported.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.kit import results
from benchmarks.kit.dlrm_case import WORKERS, Case
from benchmarks.kit.processes import free_port, tidy_on_termination
from benchmarks.kit.turns import Contestant
from elastic.collective.kv_store import Endpoint

CLOSE, COMPARED = 1e-3, 6  # relative difference of losses, and steps after the start at which they are compared
SMALL_BATCH = 256
PEERS = {"DDP": "torch_dlrm", "TorchRec": "torchrec_dlrm"}


@dataclass(frozen=True)
class Ours:
    """How ours is run."""

    distinct: bool = True
    kernels: str = "numba"
    embedding: Mapping[str, Any] = field(default_factory=dict)
    transport: str = "shared"


@dataclass(frozen=True)
class Peer:
    who: str
    distinct: bool


@dataclass(frozen=True)
class Contest:
    name: str
    first: Ours
    second: Ours | Peer
    is_small: bool = False  # of few rows and a small batch, for the second takes no more


PLAIN, GLOO, REPEATED = Ours(), Ours(transport="gloo"), Ours(distinct=False)
FEW = Ours(embedding={"buckets": 16})  # the reference looks through all rows for each bucket
CONTESTS = (
    Contest("DDP, each row once a batch", PLAIN, Peer("DDP", True)),
    Contest("DDP, each row once a batch; ours over gloo", GLOO, Peer("DDP", True)),
    Contest("DDP; neither deduplicates lookups", REPEATED, Peer("DDP", False)),
    Contest("TorchRec, each row once a batch", PLAIN, Peer("TorchRec", True)),
    Contest("TorchRec, each row once a batch; ours over gloo", GLOO, Peer("TorchRec", True)),
    Contest("TorchRec; neither deduplicates lookups", REPEATED, Peer("TorchRec", False)),
    Contest("ours without deduplication", PLAIN, REPEATED),
    Contest(f"ours with NumPy's kernels, {SMALL_BATCH} rows a step", FEW, Ours(kernels="reference", embedding=FEW.embedding), is_small=True),
    Contest("ours without looking ahead", PLAIN, Ours(embedding={"look_ahead": 0})),
    Contest("ours with twins", PLAIN, Ours(embedding={"twin": True})),
)


def own(rank: int, turns: Any, case: Case, log: str, address: str, how: Ours) -> None:
    from benchmarks.kit.own_dlrm import take_part  # the frameworks' own imports belong to their processes

    take_part(rank, turns, case, log, address, how.transport, distinct=how.distinct, kernels=how.kernels, embedding=how.embedding)


def peer(rank: int, turns: Any, case: Case, log: str, port: int, how: Peer) -> None:
    module = importlib.import_module(f"benchmarks.peers.{PEERS[how.who]}")
    module.take_part(rank, turns, case, log, port, how.distinct)


def why_not(contest: Contest) -> str:
    """Why it cannot be held; "" where it can."""
    needs = isinstance(contest.second, Peer) and contest.second.who == "TorchRec"
    return "TorchRec is not installed" if needs and importlib.util.find_spec("torchrec") is None else ""


def held(contest: Contest, case: Case, rounds: int, length: int) -> list[tuple[float, float]]:
    """Per round the mean step of the two, in seconds, after a turn that is not counted."""
    endpoints, found = [], []
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        log = Path(folder) / "log.parquet"
        case.write(log)
        two = []
        for number, how in enumerate((contest.first, contest.second)):
            target: Callable[..., None] = peer if isinstance(how, Peer) else own
            if isinstance(how, Peer):
                where: Any = free_port()
            else:
                endpoints.append(Endpoint("127.0.0.1"))
                where = endpoints[-1].address
            two.append(stack.enter_context(Contestant(f"{contest.name}, {number + 1}", target, WORKERS, length, case, str(log), where,
                                                      how)))
        for turn in range(rounds + 1):
            order = (0, 1) if turn % 2 else (1, 0)
            times = {at: two[at].turn() for at in order}
            if turn:
                found.append((times[0], times[1]))
        check(contest, *(one.losses for one in two))
    return found


def check(contest: Contest, mine: dict[int, list[float]], theirs: dict[int, list[float]]) -> None:
    """RuntimeError unless the losses agree."""
    for step in range(1, COMPARED + 1):
        one, other = statistics.mean(mine[step]), statistics.mean(theirs[step])
        if abs(one - other) > CLOSE * other:
            raise RuntimeError(f"{contest.name}: the loss of step {step} is {one} of the first and {other} of the second")


def row(contest: Contest, case: Case, rounds: list[tuple[float, float]]) -> list[str]:
    ratios = sorted(other / mine for mine, other in rounds)
    steps = [f"{statistics.median(times) * 1e3:.1f}" for times in zip(*rounds)]
    return [contest.name, f"{case.rows:,}", *steps, f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} - {ratios[-1]:.2f})"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--small", type=int, default=16_000, help="rows, where NumPy's kernels take part")
    for name in ("rows", "tables", "width", "batch"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Case(), name))
    parser.add_argument("--only", nargs="+", choices=[contest.name for contest in CONTESTS],
                        default=[contest.name for contest in CONTESTS])
    options = parser.parse_args()
    tidy_on_termination()
    whole = Case(options.rows, options.tables, options.width, options.batch)
    rows, notes = [], []
    for contest in CONTESTS:
        case = replace(whole, rows=min(whole.rows, options.small), batch=min(whole.batch, SMALL_BATCH)) if contest.is_small else whole
        if contest.name not in options.only:
            continue
        if reason := why_not(contest):
            notes.append(f"Left out: {contest.name} ({reason}).")
            continue
        rows.append(row(contest, case, held(contest, case, options.rounds, options.steps)))
        print(*rows[-1], flush=True)
    about = (f"{whole.tables} tables of {whole.width} columns, {whole.batch} rows a step in all, one id of each table, drawn by Zipf's law "
             f"({whole.skew}). " + NOTE)
    results.write("dlrm_step", "A step of a DLRM over embedding tables",
                  [__doc__.split("\n\n")[2].replace("\n", " "), about,
                   results.table(["against", "rows", "ours, ms", "the other, ms", "the other / ours"], rows), *notes])


NOTE = """All rows are stored from the start, with Adagrad's sums; float32, one thread a process, plain SGD for the layers. Ours is the
engine's loop with its vote and its exact sums, without the controller's process, over shared memory unless it says gloo, which the
others use; its tables grow: rows are found by hash. No twins but in the last row. DDP keeps every table and its sums on both workers.
TorchRec updates whole tables where they lie, four on each worker: splitting one by rows takes a reduce-scatter, which gloo lacks."""


if __name__ == "__main__":
    main()
