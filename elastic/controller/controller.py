"""The controller: takes what workers, fleet and user say as events, asks the state machine, and carries out its actions.

It is never in the step path: workers train without it until their group changes. It alone writes the run directory's logs
and commits checkpoints, so a worker of an older generation can change neither.
"""

from __future__ import annotations

import dataclasses
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from elastic.chaos import Fault, parse
from elastic.checkpoint.claim import Claim, owner_of
from elastic.controller import ending, policy
from elastic.controller import membership as m
from elastic.controller.checkpoints import Commits
from elastic.controller.fleet import Fleet
from elastic.controller.journal import Journal, replay
from elastic.controller.mailbox import Inbox
from elastic.controller.membership import confirmed
from elastic.controller.policy import Bounds, Pulse
from elastic.controller.recovery import gaps
from elastic.controller.run_log import Books
from elastic.controller.takeover import recall, take_over
from elastic.messages import Generation, Job, Line, Part, Progress, Ready, Save, Standing
from elastic.storage.remote import shown

TICK_S = 0.1  # how often hangs and pending starts are looked at
FENCED = -1


@dataclass(frozen=True)
class Settings:
    """What the controller needs of the recipe."""

    bounds: Bounds
    hang_timeout_s: float
    start_timeout_s: float
    keep: int
    best: str
    keep_every: int = 0
    best_mode: str = "min"  # of `best`, which is the best: min or max


class Controller:
    """One run's controller. `run()` blocks until the run has ended; everything else may be called from any thread."""

    def __init__(self, job: Job, settings: Settings, fleet: Fleet, books: Books, checkpointed: int = 0,
                 generation: int = 0, journal: Journal | None = None):
        self.job, self.settings, self.fleet, self.books = job, settings, fleet, books
        self.commits = Commits(job.checkpoints, settings.keep, settings.best, checkpointed, settings.keep_every, settings.best_mode)
        self.claim = self.commits.claim = Claim(job.checkpoints, job.run_id, owner_of(job.run_dir))
        self.inbox, self.hearing = Inbox(), threading.Lock()
        self.chaos, self.stopped = list(job.chaos), dict[int, Ready]()
        self.losses, self.pulses = policy.Losses(), dict[str, Pulse]()
        self.started: dict[str, float] = {}
        self.nodes: dict[str, str] = {}  # of workers that are starting
        self.released: set[str] = set()  # let go: what they still have to say counts, but they are in no group
        self.live: dict[str, Ready] = {}
        self.given_up: set[str] = set()
        self.lost: set[str] = set()
        self.target, self.restart_at, self.checked = 0, 0.0, 0.0
        self.outcome: m.Finish | None = None
        self.saving: dict[Save, str] = {}  # parts of the last words, and who was asked for them and has not answered
        self.journal = journal or Journal(Path(job.run_dir) / "journal.jsonl", job.run_id)
        self.past = replay(self.journal.past, settings.bounds, generation) if self.journal.is_continued else None
        if self.past:
            recall(self, self.past)

    def opened(self, rewound_from: int = -1) -> None:
        """The first lines of a run, or of its resumption, as far as a controller before this one has not written them."""
        if "run_started" in self.books.told:
            return
        if rewound_from >= 0 and "rewound" not in self.books.told:
            self.books.event("rewound", **{"from": rewound_from, "to": self.books.written})
        said = {fields.get("why") for _, fields in self.books.feed}
        for name, why in self.job.notes:
            if why not in said:
                self.books.event(name, why=why)
        self.books.event("run_started", run=self.job.run_id, num_steps=self.job.num_steps, pid=os.getpid())

    # From other threads.

    def post(self, event: Any) -> None:
        self.inbox.put(event)

    def deliver(self, worker: str, messages: Sequence[Any]) -> int:
        """A worker's messages. Returns the steps on disk, or FENCED if this worker was given up."""
        if worker in self.given_up:
            return FENCED
        for message in messages:
            self.inbox.put((worker, message))
        return self.books.on_disk

    def hear(self, worker: str, messages: Sequence[Any], number: int) -> int:
        """As `deliver`, but returns when they are handled, so that none is lost with this controller. `number`: see Outbox.

        ConnectionError where it ends before that. Of a batch that is delivered again only what is new is taken.
        """
        with self.hearing:  # a batch and its repetition may come at once
            self.deliver(worker, self.inbox.fresh(worker, messages, number))
        self.inbox.wait()
        return FENCED if worker in self.given_up else self.books.on_disk

    def announce(self, worker: str, spec: str) -> None:
        """A fault fires: when this returns it is not handed out again, and carried out here unless it is the worker's own."""
        self.inbox.put((worker, parse(spec)))
        self.inbox.wait()

    def run(self) -> m.Finish:
        try:
            with self.claim.kept(lambda why: self.post(m.GiveUp(why))):
                outcome = self.work()
                self.close(outcome)
        finally:
            self.inbox.gone.set()
        return outcome

    def work(self) -> m.Finish:
        """Until the machine has finished."""
        if self.past:
            take_over(self, self.past)
        else:
            self.state, actions = m.begin(self.settings.bounds, self.books.generation)
            self.perform(actions)
        while self.outcome is None:
            item = self.inbox.get(TICK_S)
            if item is not None:
                self.handle(item)
            if time.monotonic() - self.checked > TICK_S:
                self.check()
        return self.outcome

    def close(self, outcome: m.Finish) -> None:
        """Ends the workers, and writes down how the run ended."""
        ending.close(self, outcome)

    def handle(self, item: Any) -> None:
        if isinstance(item, tuple):
            self.take(*item)
        else:
            self.advance(item)

    def take(self, worker: str, message: Any) -> None:
        """A worker's word; one that was given up meanwhile is not heard."""
        if worker in self.given_up:
            return
        if isinstance(message, (Progress, Standing, Line, Part)) and message.generation > self.state.generation:
            self.outcome = self.outcome or ending.behind(self, message.generation)
        elif isinstance(message, Progress):
            if worker not in self.released:
                self.take_pulse(message)
        elif isinstance(message, Line):
            self.take_line(message)
        elif isinstance(message, Part):
            self.take_part(message)
        elif isinstance(message, Fault):
            self.take_fault(worker, message)
        else:
            self.advance(message)

    def advance(self, event: Any) -> None:
        if self.is_repeated(event):
            return
        now = time.monotonic()
        if isinstance(event, m.Starting):
            self.started[event.worker] = now
            self.nodes[event.worker] = event.node
        elif isinstance(event, Ready):
            self.started.pop(event.worker, None)
            self.losses = replace(self.losses, unborn=0)
            self.live[event.worker] = event
            self.books.event("worker_joined", worker=event.worker, node=event.node, pid=event.pid)
        elif isinstance(event, m.Lost):
            self.note_loss(event, now)
        elif isinstance(event, m.Drain):
            self.books.event("node_draining", nodes=list(event.nodes))
        elif isinstance(event, Standing):
            event = confirmed(self.state, event, self.commits.newest, self.commits.error)
            self.note_standing(event)
        self.state, actions = m.advance(self.state, event)
        self.journal.event(event)
        if actions:
            self.journal.sync()
        self.perform(actions)

    def is_repeated(self, event: Any) -> bool:
        """Who did not hear that a word had arrived says it again."""
        if isinstance(event, Ready):
            return event.worker in self.live or event.worker in self.released
        if isinstance(event, Standing):
            return event.generation == self.state.generation and event.worker in self.state.standing
        return isinstance(event, m.Lost) and event.worker in self.lost

    def note_standing(self, event: Standing) -> None:
        """Lines that rank 0 may have died with come first: a generation starts when all its past is on disk."""
        if event.generation == self.state.generation:
            for fields in event.lines:
                self.books.metric(event.generation, fields)
        if event.worker in self.live:
            self.live[event.worker] = replace(self.live[event.worker], compilations=event.compilations)
        if event.rejected:
            if self.commits.refuse(event.rejected):
                self.books.event("checkpoint_rejected", path=shown(event.rejected), reason=event.error)
        elif event.reason == "failed":
            self.books.event("step_failed", worker=event.worker, error=event.error)

    def note_loss(self, event: m.Lost, now: float) -> None:
        ready, pulse = self.live.pop(event.worker, None), self.pulses.pop(event.worker, None)
        self.started.pop(event.worker, None)
        self.saving = {order: worker for order, worker in self.saving.items() if worker != event.worker}
        node = ready.node if ready else self.nodes.pop(event.worker, "")
        self.given_up.add(event.worker)
        self.lost.add(event.worker)
        group = self.state.group
        rank = group.index(event.worker) if event.worker in group else -1
        self.books.event("worker_lost", worker=event.worker, rank=rank, cause=event.cause,
                         detected_s=round(now - pulse.heard_s, 3) if pulse else 0.0)
        self.losses = policy.note_loss(self.losses, node, self.books.written, now, ready is not None,
                                       event.cause if event.raised else "")
        self.restart_at = now + policy.restart_delay_s(self.losses)
        if policy.gives_up(self.losses, max(len(group), self.target)):
            self.inbox.put(m.GiveUp(f"Worker after worker is lost without a step between them, the last by: {event.cause}"))

    def check(self) -> None:
        """What only time can tell: hangs, workers that never get ready, restarts that were put off."""
        now = time.monotonic()
        self.forgive(now - self.checked - 2 * TICK_S)
        self.checked = now
        self.books.retry()
        self.journal.lines.retry()
        for worker, since in list(self.started.items()):
            if now - since > self.settings.start_timeout_s:
                self.give_up_on(worker, f"not ready within start_timeout_s = {self.settings.start_timeout_s:g} s")
        if self.state.phase in ("running", "stopping", "regrouping"):
            pulses = {w: p for w, p in self.pulses.items() if w in self.state.group and w not in self.state.standing}
            for worker in policy.suspects(pulses, now, self.settings.hang_timeout_s, self.settings.start_timeout_s):
                self.books.event("hang", worker=worker, phase=pulses[worker].phase, silent_s=round(now - pulses[worker].heard_s, 3))
                self.give_up_on(worker, f"no progress within elastic.hang_timeout_s = {self.settings.hang_timeout_s:g} s (raise it if a shard "
                                         "takes longer)")
        if self.restart_at and now >= self.restart_at:
            self.restart_at = 0.0
            self.want()

    def forgive(self, away_s: float) -> None:
        """While the controller itself was held up (a slow disk, a machine put to sleep) nobody's silence counts."""
        if away_s > 0 and self.checked:
            self.pulses = {w: replace(p, heard_s=p.heard_s + away_s, changed_s=p.changed_s + away_s) for w, p in self.pulses.items()}

    def give_up_on(self, worker: str, cause: str) -> None:
        """Fence first, then kill: what it says from now on is not heard, and its group is abandoned without it."""
        self.given_up.add(worker)
        self.fleet.kill(worker)
        self.advance(m.Lost(worker, cause))

    def want(self) -> None:
        nodes = [r.node for r in self.live.values()]
        near = gaps([*nodes, *(self.nodes.get(w, "") for w in self.started)], self.state.bounds.meshes[0][1])
        self.fleet.want(self.target, policy.banned_nodes(self.losses, time.monotonic(), nodes), near)

    def take_pulse(self, word: Progress) -> None:
        now, old = time.monotonic(), self.pulses.get(word.worker)
        content = (word.step, word.phase, word.inside, word.waiting)
        moved = old is None or (old.step, old.phase, old.inside, old.waiting) != content or old.detail != word.detail
        self.pulses[word.worker] = Pulse(*content, now if moved or old is None else old.changed_s, now, word.detail)

    # Lines, checkpoints, faults.

    def take_line(self, line: Line) -> None:
        if line.file == "metrics":
            self.books.metric(line.generation, line.fields)
        else:
            fields = dict(line.fields)
            self.books.event(fields.pop("event"), fields.pop("step", None), line.generation, **fields)

    def take_part(self, part: Part) -> None:
        """A part of a checkpoint is on disk, or cannot be. With the last one it counts, or training goes on without it."""
        self.saving.pop(Save(part.generation, part.step, part.rank, part.world_size), None)
        found = self.commits.take(part, self.books.written, self.books.sync)
        if found is not None:
            self.books.event(found.event, found.step, found.generation, **found.fields)

    def take_fault(self, worker: str, fault: Fault) -> None:
        """What may be done twice is done before it is written off, and what may not be, after: a controller may fall between."""
        if fault.spec not in self.chaos:
            return  # said again, by who did not hear that the controller knew
        self.chaos.remove(fault.spec)
        if fault.kind == "stop":
            self.stopped[fault.number] = self.live[worker]
        elif fault.kind == "scale":
            self.advance(m.ScaleTo(fault.number))
        elif fault.kind == "cont":
            self.fleet.inject(fault, self.stopped.get(fault.number))
        self.journal.spent(fault.spec, self.stopped[fault.number] if fault.kind == "stop" else None)
        self.books.event("chaos", fault=fault.spec, worker=worker)
        if fault.kind == "controller":
            self.fleet.kill_controller()
        elif fault.kind == "corrupt":
            self.commits.flip_a_byte()

    # Actions.

    def perform(self, actions: Sequence[Any]) -> None:
        for action in actions:
            getattr(self, "do_" + type(action).__name__.lower())(action)

    def do_want(self, action: m.Want) -> None:
        self.target = action.workers
        self.want()

    def do_abandon(self, action: m.Abandon) -> None:
        self.fleet.abandon(action.worker, action.generation)

    def do_requeststop(self, action: m.RequestStop) -> None:
        self.fleet.request_stop(action.worker, action.generation, action.code)

    def do_release(self, action: m.Release) -> None:
        self.released.add(action.worker)
        self.live.pop(action.worker, None)
        self.pulses.pop(action.worker, None)
        self.fleet.release(action.worker)
        self.want()

    def do_wait(self, action: m.Wait) -> None:
        self.books.event("waiting", ready=action.ready, needed=action.needed)

    def do_savealone(self, action: m.SaveAlone) -> None:
        if action.step > self.commits.newest:
            order = Save(action.generation, action.step, action.rank, action.world_size)
            self.saving[order] = action.worker
            self.fleet.assign(action.worker, replace(order, ballot=action.ballot))

    def do_form(self, action: m.Form) -> None:
        """Publishes a generation: on disk first, then to its members."""
        generation = self.completed(action.generation)
        if action.before or self.books.last_commit:
            lost = max(0, self.books.written - generation.committed)
            self.books.interrupted(generation.number, action.cause, action.before, len(generation.members), lost, action.was, generation.mesh)
        if generation.committed < self.books.written:
            self.rewind(generation.committed)
        generation = replace(generation, written=self.books.on_disk, evaluated=self.books.evaluated,
                             checkpointed=self.commits.newest, chaos=tuple(self.chaos))
        self.journal.published(generation)
        self.announce_generation(generation)
        now = time.monotonic()
        self.pulses = {w: Pulse(generation.committed, "start", 0, False, now, now) for w in generation.members}
        for worker in generation.members:
            self.fleet.assign(worker, generation)
        self.books.sync_past()

    def announce_generation(self, generation: Generation) -> None:
        self.books.generation = generation.number
        members = [self.live[w] for w in generation.members]
        self.books.event("generation_started", generation.committed, world_size=len(members), transport=generation.transport,
                         mesh=generation.shape.as_dict(), written=self.books.written,
                         workers=[{"worker": r.worker, "rank": i, "node": r.node, "pid": r.pid, "compilations": r.compilations}
                                  for i, r in enumerate(members)])

    def completed(self, generation: Generation) -> Generation:
        """With the transport, and a start from the newest good checkpoint (or the recipe) where no member has any state."""
        transport = self.fleet.transport([self.live[w] for w in generation.members])
        if generation.committed >= 0:
            return replace(generation, transport=transport)
        path, step, rejected = self.commits.newest_good()
        for bad, reason in rejected:
            self.books.event("checkpoint_rejected", path=bad, reason=reason)
        for fields in self.commits.lines_of(path):
            self.books.metric(self.books.generation, fields)
        return replace(generation, transport=transport, load=path or "recipe", committed=step)

    def rewind(self, step: int) -> None:
        """Every copy of the newer state is gone: metrics go back to the checkpoint that is loaded."""
        self.books.event("rewound", **{"from": self.books.written, "to": step})
        self.books.cut_back(step)
        self.commits.newest = min(self.commits.newest, step)

    def do_finish(self, action: m.Finish) -> None:
        self.outcome = action

    def snapshot(self) -> dict[str, Any]:
        """Where the run is, for `elastic status`."""
        return {"phase": self.state.phase, "generation": self.books.generation, "step": self.books.written,
                "workers": [dataclasses.asdict(r) for r in self.live.values()], "target": self.target}
