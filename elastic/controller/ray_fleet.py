"""The fleet on Ray: one placement group and one detached actor per worker.

A worker that is wanted but has no place is a pending placement group: an autoscaling cluster reads it as demand, and a
node that joins serves it. Ray never restarts a worker (that delays the news of its death); the controller replaces it.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from elastic.chaos import Fault
from elastic.collective.connect import transport_of
from elastic.controller import membership as m
from elastic.errors import UserError
from elastic.messages import NAMESPACE, Generation, Job, Order, Ready
from elastic.storage.head import end_storage
from elastic.worker.actor import WorkerActor

POLL_S = 0.5  # how often a pending placement group and draining nodes are looked at
REPLACE_S = 0.5  # before another worker is started: its imports must not take the survivors' cores while they re-form
NEAR_S = 2.0  # for a place on the node of a worker's tensor group; then it comes from anywhere
NODE_LABEL = "ray.io/node-id"


@dataclass
class Slot:
    """One worker's place and process."""

    name: str
    avoid: tuple[str, ...] = ()
    near: str = ""  # the node to look for a place on first
    actor: Any = None
    delay_s: float = 0.0
    is_placed: bool = False
    let_go: threading.Event = field(default_factory=threading.Event)  # its end is no loss
    thread: threading.Thread | None = None


class RayFleet:
    """`Fleet` on a Ray cluster. One thread per worker waits for its place, its process and its end."""

    def __init__(self, job: Job, post: Callable[[Any], None], *, device: str, threads: int, hang_timeout_s: float,
                 orphan_timeout_s: float):
        self.job, self.post = job, post
        self.device = device
        self.arguments = (threads, hang_timeout_s, orphan_timeout_s)
        self.slots: dict[str, Slot] = {}
        self.ended: list[Slot] = []
        self.taken: set[str] = set()  # names that were ever given
        self.numbers = itertools.count()
        self.put: tuple[Any, Any] = (None, None)  # the newest generation, and where its members find it
        # how many are still to start without a wait: those that are wanted at the start
        self.at_once: int | None = None
        self.lock = threading.RLock()
        self.wanted, self.closed = 0, threading.Event()
        self.avoid: tuple[str, ...] = ()
        self.watcher = threading.Thread(target=self.watch_drains, daemon=True)

    def want(self, workers: int, avoid: Sequence[str], near: Sequence[str] = ()) -> None:
        with self.lock:
            if self.watcher.ident is None:  # not before somebody takes what it posts
                self.watcher.start()
            self.wanted, self.avoid = workers, tuple(avoid)
            self.at_once = workers if self.at_once is None else self.at_once
            pending = [s for s in self.slots.values() if not s.is_placed]
            for slot in pending[:max(0, len(self.slots) - workers)]:
                self.forget(slot.name)
            places = iter([node for node in near if node not in avoid])
            while not self.closed.is_set() and len(self.slots) < workers:
                name = next(name for number in self.numbers if (name := f"worker-{number}") not in self.taken)
                self.start(Slot(name, self.avoid, next(places, ""), delay_s=0.0 if self.at_once > 0 else REPLACE_S))
                self.at_once -= 1

    def adopt(self, known: Iterable[str]) -> list[str]:
        """Finds the actors by their places' names. A place without an actor is given back: another is asked for."""
        prefix = f"{self.job.run_id}/"
        with self.lock:
            self.at_once = 0  # all from now on are replacements
            self.taken.update(known)
            for place in placement_group_table().values():
                name = place["name"].removeprefix(prefix)
                if name == place["name"]:
                    continue  # another run's
                self.taken.add(name)
                if place["state"] == "REMOVED":
                    continue
                try:
                    self.start(Slot(name, actor=ray.get_actor(place["name"], NAMESPACE), is_placed=True))
                except ValueError:  # no such actor
                    remove_placement_group(ray.util.get_placement_group(place["name"]))
            return list(self.slots)

    def start(self, slot: Slot) -> None:
        self.slots[slot.name] = slot
        self.taken.add(slot.name)
        slot.thread = threading.Thread(target=self.live, args=(slot,), name=slot.name, daemon=True)
        slot.thread.start()

    def resync(self, worker: str) -> None:
        self.call(worker, "resync")

    def live(self, slot: Slot) -> None:
        """From asking for a place, or from taking charge of who has one, to the process's end."""
        place, cause, raised = None, "it was never placed", False
        slot.let_go.wait(slot.delay_s)
        try:
            place = self.place(slot)
            if not slot.is_placed:
                asked = time.monotonic()
                while not place.wait(POLL_S) and not slot.let_go.is_set():
                    if slot.near and time.monotonic() - asked > NEAR_S:  # no room there: another one, anywhere
                        self.forget(slot.name)
                        self.want(self.wanted, self.avoid)
                with self.lock:
                    if slot.let_go.is_set():
                        return
                    slot.is_placed = True
                self.post(m.Starting(slot.name, placement_group_table(place)["bundles_to_node_id"][0]))
            cause, raised = self.serve(slot, place)
        except ray.exceptions.RayError as error:
            cause = brief(error)
        finally:
            if place is not None:
                remove_placement_group(place)
            with self.lock:
                self.slots.pop(slot.name, None)
            if not slot.let_go.is_set():
                self.post(m.Lost(slot.name, cause, raised))

    def place(self, slot: Slot) -> Any:
        """A placement group of one bundle: the one it has, or a new one."""
        name = f"{self.job.run_id}/{slot.name}"
        if slot.is_placed:
            return ray.util.get_placement_group(name)
        where = f"in({slot.near})" if slot.near else f"!in({','.join(slot.avoid)})" if slot.avoid else ""
        selector = [{NODE_LABEL: where}] if where else None
        resources = {"CPU": 1.0, "GPU": 1.0} if self.device == "cuda" else {"CPU": 1.0}
        return placement_group([resources], lifetime="detached", name=name, bundle_label_selector=selector)

    def serve(self, slot: Slot, place: Any) -> tuple[str, bool]:
        """Starts the process and waits for its end; returns why it ended, and whether its own code raised that."""
        options = {"num_cpus": 1, "num_gpus": 1 if self.device == "cuda" else 0,
                   "name": f"{self.job.run_id}/{slot.name}",
                   "namespace": NAMESPACE, "lifetime": "detached", "max_restarts": 0, "max_concurrency": 32,
                   "scheduling_strategy": PlacementGroupSchedulingStrategy(place)}
        try:
            if slot.actor is None:
                slot.actor = ray.remote(WorkerActor).options(**options).remote(slot.name, self.job, *self.arguments)
            slot.actor.serve.remote()
            while not ray.get(slot.actor.watch.remote()):
                continue
            ray.kill(slot.actor)
            return "ended by itself", False
        except ray.exceptions.RayTaskError as error:
            ray.kill(slot.actor)
            if isinstance(error.cause, UserError):  # every other worker would raise the same
                self.post(m.GiveUp(str(error.cause)))
            return str(error.cause), True
        except ray.exceptions.RayError as error:
            return brief(error), False

    def call(self, worker: str, method: str, *arguments: Any) -> None:
        """An order to a worker; nobody waits for it, and one that is gone does not receive it."""
        slot = self.slots.get(worker)
        if slot is not None and slot.actor is not None:
            getattr(slot.actor, method).remote(*arguments)

    def send(self, worker: str, order: Order) -> None:
        """A generation leaves this process once: what each member gets is its place in the object store."""
        if isinstance(order, Generation) and len(order.members) > 1:
            if self.put[0] is not order:
                self.put = order, ray.put(order)
            self.call(worker, "take", self.put[1])
        else:
            self.call(worker, "take", order)

    def release(self, worker: str) -> None:
        self.call(worker, "release")
        self.forget(worker)

    def forget(self, worker: str) -> Slot | None:
        with self.lock:
            slot = self.slots.pop(worker, None)
            if slot is not None:
                slot.let_go.set()
                self.ended.append(slot)
        return slot

    def kill(self, worker: str) -> None:
        """`ray.kill` of a stopped process takes seconds, so nobody waits for it."""
        slot = self.forget(worker)
        if slot is not None and slot.actor is not None:
            threading.Thread(target=ray.kill, args=(slot.actor,), daemon=True).start()

    def transport(self, ready: Sequence[Ready]) -> str:
        return transport_of(ready, self.device)

    def inject(self, fault: Fault, stopped: Ready | None = None) -> None:
        if fault.kind == "controller":
            os.kill(os.getpid(), signal.SIGKILL)
        if stopped is not None and stopped.node == ray.get_runtime_context().get_node_id():
            with contextlib.suppress(ProcessLookupError):  # given up and dead by now
                os.kill(stopped.pid, signal.SIGCONT)

    def watch_drains(self) -> None:
        """Spot notices and scale-downs: Ray says which nodes drain; their workers leave at the next step boundary."""
        from ray._private.state import state as cluster_state

        seen: set[str] = set()
        while not self.closed.wait(POLL_S):
            try:
                draining = set(cluster_state.get_draining_nodes()) - seen
            except ray.exceptions.RayError as error:
                print(f"Draining nodes are not known: {error}", flush=True)
                continue
            if draining:
                seen |= draining
                self.post(m.Drain(tuple(sorted(draining))))

    def close(self) -> None:
        self.closed.set()
        with self.lock:
            left = list(self.slots.values())
        for slot in left:
            slot.let_go.set()
            self.call(slot.name, "release")
        for slot in left + self.ended:
            if slot.thread is not None:
                slot.thread.join(CLOSE_S)
            if slot.actor is not None and slot.thread is not None and slot.thread.is_alive():
                ray.kill(slot.actor)
                slot.thread.join(CLOSE_S)
        end_storage(self.job.run_id)


def brief(error: BaseException) -> str:
    """Ray's reason in one line; what it calls the exit detail says most."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    detail = next((line for line in lines if "exit detail" in line.lower()), lines[0] if lines
                  else type(error).__name__)
    return detail.partition("exit detail:")[2].strip() or detail


CLOSE_S = 10.0  # for a released worker to finish its last delivery; then it is killed
