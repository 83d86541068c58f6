"""The pause after a SIGKILL of a random worker at a random moment, four workers: ours, Ray Train's elastic mode, torchft.

    python -m benchmarks.recovery [--kills 200] [--peer-kills 20] [--only ours "Ray Train" "torchft, DDP" "torchft,
    flat"]

The clock runs from the signal, sent from outside, to the next step that commits without the victim, by the workers' own
logs; one ordinary step of the smaller group is taken off where that step was redone. The killed worker is replaced, and
the next kill comes when the group is whole and has gone on for some steps. After a quarter of our kills one worker is
spared: by it and the controller a line is fitted, over the later half, to what a survivor grows by.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.kit import ours, results
from benchmarks.kit.growth import HEAD, Growth
from benchmarks.kit.kills import Kill, Outcome, Stalled, kill_one, peer_outcome, wait_until
from benchmarks.kit.logs import Folder
from benchmarks.kit.processes import ONE_THREAD, python, started, tidy_on_termination

SIZE = 4
ENDLESS = 1_000_000  # steps: the run is ended by us
WHOLE_S = 90.0  # until the group must be whole again
NEXT_S = 40.0  # until the next step must have committed

Contestant = Callable[[int, int], list[Outcome]]  # (kills, seed) -> what came of each
GROWN: list[list[str]] = []  # rows of our processes


def ours_kills(kills: int, seed: int) -> list[Outcome]:
    """All kills in one run."""
    generator, outcomes, growth, spared = random.Random(seed), list[Outcome](), Growth(), list[int]()
    with tempfile.TemporaryDirectory() as folder:
        run = ours.Run(Path(folder) / "run")

        def group() -> tuple[list[int], int]:
            run.read()
            step, last = (run.steps[-1]["step"], run.steps[-1]) if run.steps else (0, None)
            current = run.generations()[-1:] if last else []
            same = current and current[0]["generation"] == last["generation"]
            return ([w["pid"] for w in current[0]["workers"]] if same else []), step

        def spare(pids: list[int]) -> list[int]:
            """Looks at who is to be looked at, while the group is whole: what processes share is as much every time."""
            controller = next(event["pid"] for event in run.events if event["event"] == "run_started")
            if len(outcomes) >= kills // 4 and not spared:
                spared.append(pids[-1])
            growth.look(len(outcomes), [controller, *spared])
            if len(outcomes) == kills - 1:
                GROWN[:] = [growth.row("controller", controller, kills // 2), growth.row("a survivor", spared[0], kills // 2)]
            return spared

        with started(ours.command(Path(folder) / "run", SIZE, ENDLESS, settings=["checkpoint.every_steps=100"]), Path(folder) / "log") as process:
            try:
                for _ in range(kills):
                    kill = kill_one(group, SIZE, generator, WHOLE_S, lambda: process.poll() is None, spare)
                    outcomes.append(ours_outcome(kill, run, group))
                    report("ours", outcomes)
            except Stalled as stalled:
                outcomes.append(failed("ours", stalled, Path(folder)))
            process.terminate()
            process.wait(60)
    return outcomes


def ours_outcome(kill: Kill, run: ours.Run, group: Any) -> Outcome:
    """From events.jsonl and metrics.jsonl."""
    def following() -> list[dict[str, Any]]:
        group()
        number = next((g["generation"] for g in run.generations() if g["time"] > kill.time), None)
        return [line for line in run.steps if number is not None and line["generation"] >= number]

    try:
        wait_until(lambda: len(following()) >= 4, NEXT_S, "no next step", lambda: True)
    except Stalled:
        return Outcome(False, float("nan"), 0)
    lines, generations = following(), run.generations()
    new = next(g for g in generations if g["time"] > kill.time)
    old = generations[generations.index(new) - 1]
    survivors = {w["pid"] for w in old["workers"]} - {kill.pid}
    same = [line["step_s"] for line in lines if line["generation"] == new["generation"] and line["step_s"] > 0]
    redone = statistics.median(same) if same and lines[0]["step_s"] > 0 else 0.0
    committed = max(line["step"] for line in run.steps if line["generation"] < new["generation"])
    return Outcome(survivors <= {w["pid"] for w in new["workers"]}, max(0.0, lines[0]["time"] - kill.time - redone),
                   max(0, committed + 1 - lines[0]["step"]))


def ray_train_kills(kills: int, seed: int) -> list[Outcome]:
    """All kills in one run, with a checkpoint every ten steps."""
    generator, found = random.Random(seed), []
    with tempfile.TemporaryDirectory() as folder:
        logs = Folder(Path(folder))
        command = python("benchmarks.peers.ray_train", "--workers", SIZE, "--elastic", "--steps", ENDLESS,
                         "--checkpoint-every", 10,
                         "--folder", folder)
        with started(command, Path(folder) / "log") as process:
            try:
                for _ in range(kills):
                    kill = kill_one(lambda: whole(logs), SIZE, generator, WHOLE_S, lambda: process.poll() is None)
                    found.append(outcome_of(kill, logs, restarts=True))
                    report("Ray Train", found)
            except Stalled as stalled:
                found.append(failed("Ray Train", stalled, Path(folder)))
    return found


def failed(name: str, stalled: Stalled, folder: Path) -> Outcome:
    """The run did not go on: its last words."""
    print(f"{name}: {stalled}\n" + (folder / "log").read_text(errors="replace")[-3000:], flush=True)
    return Outcome(False, float("nan"), 0)


def whole(logs: Folder) -> tuple[list[int], int]:
    """The processes whose last word is less than two seconds old and speaks of a full group."""
    last = {step.pid: step for step in logs.read()}
    now = time.time()
    fresh = [step for step in last.values() if now - step.time < 2.0 and step.world == SIZE
             and os.path.exists(f"/proc/{step.pid}")]
    return [step.pid for step in fresh], max((step.step for step in fresh), default=0)


def outcome_of(kill: Kill, logs: Folder, restarts: bool) -> Outcome:
    def known() -> Outcome:
        return peer_outcome(kill, logs.read(), SIZE, restarts)

    try:
        wait_until(lambda: known().survived, NEXT_S, "no next step", lambda: True)
    except Stalled:
        return Outcome(False, float("nan"), 0)
    time.sleep(1.0)  # some more steps, whose duration is taken off
    return known()


def torchft_kills(mode: str) -> Contestant:
    """A killed replica is started again at once; where the survivors fail, everything is."""

    def contest(kills: int, seed: int) -> list[Outcome]:
        generator, outcomes = random.Random(seed), []
        while len(outcomes) < kills:
            with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
                outcomes += torchft_run(mode, kills - len(outcomes), Path(folder), stack, generator, outcomes)
        return outcomes

    return contest


def torchft_run(mode: str, kills: int, folder: Path, stack: ExitStack, generator: random.Random,
                so_far: list[Outcome]) -> list[Outcome]:
    """Kills until the survivors fail or there were enough."""
    stack.enter_context(started(python("benchmarks.peers.torchft_ddp", "lighthouse", folder / "address"),
                                folder / "log", ONE_THREAD))
    wait_until((folder / "address").exists, 30, "no lighthouse", lambda: True)
    address, logs, found = (folder / "address").read_text(), Folder(folder), []

    def start(number: int) -> Any:
        command = python("benchmarks.peers.torchft_ddp", "replica", number, address, folder, mode)
        return stack.enter_context(started(command, folder / "log", ONE_THREAD))

    replicas = [start(number) for number in range(SIZE)]
    for _ in range(kills):
        try:
            kill = kill_one(lambda: whole(logs), SIZE, generator, WHOLE_S)
        except Stalled as stalled:
            print(f"torchft: {stalled}", flush=True)
            return found or [Outcome(False, float("nan"), 0)]
        outcome = outcome_of(kill, logs, restarts=False)
        victim = next(n for n, replica in enumerate(replicas) if replica.pid == kill.pid)
        dead = [n for n, replica in enumerate(replicas) if n != victim and replica.poll() is not None]
        found.append(Outcome(outcome.survived and not dead, outcome.pause_s, outcome.steps_lost))
        report(f"torchft, {mode}", so_far + found)
        if not found[-1].survived:
            return found
        replicas[victim] = start(victim)
    return found


def report(name: str, outcomes: list[Outcome]) -> None:
    last = outcomes[-1]
    print(f"{name}: kill {len(outcomes)}: survived {last.survived}, pause {last.pause_s:.3f} s, lost {last.steps_lost}",
          flush=True)


def row(name: str, outcomes: list[Outcome]) -> list[str]:
    survived = [o for o in outcomes if o.survived]
    pauses = [o.pause_s for o in survived]
    late = statistics.quantiles(pauses, n=20, method="inclusive")[-1] if len(pauses) > 1 else max(pauses, default=0.0)
    figures = [f"{figure:.3f}" for figure in (statistics.median(pauses), late, max(pauses))] if pauses else ["-"] * 3
    lost = f"{statistics.mean(o.steps_lost for o in survived):.1f} ({max(o.steps_lost for o in survived)})" if survived else "-"
    return [name, f"{len(survived)} of {len(outcomes)}", *figures, lost]


CONTESTANTS: dict[str, Contestant] = {"ours": ours_kills, "Ray Train": ray_train_kills,
                                      "torchft, DDP": torchft_kills("ddp"),
               "torchft, flat": torchft_kills("flat")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--peer-kills", type=int, default=20, help="of each of the others, which take much longer")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=list(CONTESTANTS), default=list(CONTESTANTS))
    arguments = parser.parse_args()
    tidy_on_termination()
    found = {name: CONTESTANTS[name](arguments.kills if name == "ours" else arguments.peer_kills, arguments.seed)
             for name in arguments.only}
    head = ["", "survived", "median pause, s", "95th in 100, s", "worst, s", "steps lost, mean (worst)"]
    text = __doc__.split("\n\n")
    sections = [text[0], text[2].strip(), NOTE,
                results.table(head, [row(name, outcomes) for name, outcomes in found.items()])]
    if "ours" in found:
        if GROWN:
            sections.append(results.table(HEAD, GROWN))
        pauses = [o.pause_s for o in found["ours"] if o.survived]
        others = [f"{statistics.median(o.pause_s for o in outcomes if o.survived) / statistics.median(pauses):.1f} "
                  f"times shorter than {name}'s"
                  for name, outcomes in found.items() if name != "ours" and any(o.survived for o in outcomes)]
        sections.append("Goal: a median under 0.2 s, nothing lost, all survived. Our median pause is "
                        f"{', '.join(others) or 'alone here'}.")
    results.write("recovery", "Recovery from a kill", sections)


NOTE = """Survived means: the others went on (Ray Train: the run did; it starts all processes again by design). Ray Train has a checkpoint
every 10 steps. torchft's heartbeats and joins are set to 0.5 s and 0.2 s, far below its defaults; where its survivors failed, all of it was
started again for the next kill. "DDP" is its DistributedDataParallel; "flat" calls its manager's all-reduce once on all gradients."""


if __name__ == "__main__":
    main()
