"""Our step on a mesh against torch's own parallelisms: the same GPT, the same rows, as many processes.

    python -m benchmarks.hybrid [--rounds 9] [--steps 4] [--only tensor ...] [--data tiny-shakespeare.txt]

All sides' processes are alive from the start and take turns of a few steps, in an order that changes from round to
round. A ratio is taken within a round; the table gives the median of the rounds. Losses of the first steps, from the
same weights, must agree.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.kit import results
from benchmarks.kit.mesh_case import Case
from benchmarks.kit.processes import ROOT, free_port, tidy_on_termination
from benchmarks.kit.turns import Contestant
from elastic.collective.kv_store import Endpoint

CASES = (
    Case("tensor 2", "DTensor", tensor=2),
    Case("tensor 2, vocabulary whole", "DTensor", tensor=2, split_vocab=False),
    Case("data 2, sharded", "FSDP2", data=2, sharded=True),
    Case("pipeline 2", "Schedule1F1B", pipeline=2, micro_batches=4),
    Case("data 2 x tensor 2, sharded", "FSDP2 on DTensor", data=2, tensor=2, sharded=True),
    Case("pipeline 2 x tensor 2", "Schedule1F1B on DTensor", pipeline=2, tensor=2, micro_batches=4),
)
SIDES = ("ours", "ours, gloo", "peer")
LIMIT = 1.05  # of their step
CLOSE, COMPARED = 1e-3, 10  # relative difference of losses, and steps after the start at which they are compared


def ours(rank: int, turns: Any, case: Case, text: str, address: str, transport: str) -> None:
    from benchmarks.kit.own_mesh import take_part  # the frameworks' own imports belong to their processes

    take_part(rank, turns, case, text, address, transport)


def peer(rank: int, turns: Any, case: Case, text: str, port: int) -> None:
    from benchmarks.peers.torch_mesh import take_part

    take_part(rank, turns, case, text, port)


def contest(case: Case, text: str, rounds: int, length: int) -> list[dict[str, float]]:
    """Per round the mean step of each side, in seconds, after a turn that is not counted."""
    endpoint = Endpoint("127.0.0.1")
    sides: dict[str, tuple[Callable[..., None], tuple[Any, ...]]] = {
        "ours": (ours, (endpoint.address, "shared")), "ours, gloo": (ours, (endpoint.address, "gloo")),
        "peer": (peer, (free_port(),))}
    found = []
    with ExitStack() as stack:
        contestants = [stack.enter_context(Contestant(name, side, case.size, length, case, text, *how))
                       for name, (side, how) in sides.items()]
        for turn in range(rounds + 1):
            order = contestants[turn % len(contestants):] + contestants[:turn % len(contestants)]
            times = {one.name: one.turn() for one in order}
            if turn:
                found.append(times)
        for one in contestants[:-1]:
            check(case, one.losses, contestants[-1].losses)
    return found


def check(case: Case, mine: dict[int, list[float]], theirs: dict[int, list[float]]) -> None:
    """RuntimeError unless the losses agree."""
    for step in range(1, COMPARED + 1):
        one, other = statistics.mean(mine[step]), statistics.mean(theirs[step])
        if abs(one - other) > CLOSE * other:
            raise RuntimeError(f"{case.name}: the loss of step {step} is {one} here and {other} there")


def row(case: Case, rounds: list[dict[str, float]]) -> list[str]:
    def ratio(side: str) -> tuple[float, str]:
        ratios = sorted(times[side] / times["peer"] for times in rounds)
        return statistics.median(ratios), f"{statistics.median(ratios):.3f} ({ratios[0]:.2f} - {ratios[-1]:.2f})"

    middle, shown = ratio("ours")
    steps = [f"{statistics.median(times[side] for times in rounds) * 1e3:.0f}" for side in SIDES]
    return [case.name, str(case.size), case.peer, *steps, shown, "reached" if middle <= LIMIT else "missed",
            ratio("ours, gloo")[1]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--only", nargs="+", choices=[case.name for case in CASES],
                        default=[case.name for case in CASES])
    parser.add_argument("--data", type=Path, default=ROOT / "tiny-shakespeare.txt")
    arguments = parser.parse_args()
    tidy_on_termination()
    rows = []
    for case in CASES:
        if case.name in arguments.only:
            rows.append(row(case, contest(case, str(arguments.data.absolute()), arguments.rounds, arguments.steps)))
            print(*rows[-1], flush=True)
    head = ["mesh", "workers", "torch's", "ours, ms", "ours over gloo, ms", "torch's, ms", "ratio", f"at most {LIMIT}",
            "ratio over gloo"]
    results.write("hybrid", "A step on a mesh",
                  [__doc__.split("\n\n")[2].replace("\n", " "), NOTE, results.table(head, rows)])


NOTE = """A GPT as nanoGPT has it, embedding and head tied: 4 layers, 4 heads, width 256, context 128, 65 characters, 3.2 million
parameters; 16 rows a step in all, float32, AdamW, one thread a process; a pipeline cuts them into 4 micro-batches. Ours is the engine's loop
with its vote and its exact reduction, without the controller's process: over shared memory, as on one node, and over gloo, as on several. torch's
talk over gloo; the stages of its pipeline sum the tied weights' gradients by a call of their own. Along data, FSDP2 shards parameters, gradients
and optimizer, ours the optimizer (`sharded`, without a twin)."""


if __name__ == "__main__":
    main()
