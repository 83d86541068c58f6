"""The controller: takes what workers, fleet and user report as events, asks the state machine, and carries out its actions.

It is never in the step path: workers train without it until their group changes. It alone writes the run directory's
logs and commits checkpoints, so a worker of an older generation can change neither.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from elastic.chaos import Fault, parse
from elastic.checkpoint.claim import Claim, owner_of
from elastic.controller import membership as m
from elastic.controller import policy
from elastic.controller.checkpoints import Checkpoints
from elastic.controller.failure_detector import Heartbeat, suspects
from elastic.controller.fleet import Fleet
from elastic.controller.journal import JOURNAL, Journal, replay
from elastic.controller.mailbox import Mailbox
from elastic.controller.policy import Bounds, bounds_of
from elastic.controller.run_log import RunLog
from elastic.controller.seating import gaps
from elastic.controller.workers import Workers
from elastic.messages import Begin, Generation, Job, Line, Moved, Part, Progress, Ready, Save, Standing
from elastic.recipe import Recipe, best_mode
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

    @classmethod
    def of(cls, recipe: Recipe) -> Settings:
        elastic, checkpoint = recipe.elastic, recipe.checkpoint
        return cls(bounds_of(recipe), elastic.hang_timeout_s, elastic.start_timeout_s, checkpoint.keep, checkpoint.best,
                   checkpoint.keep_every, best_mode(recipe) or "min")


class Controller:
    """One run's controller. `session.run` is its thread; from others come `post`, `deliver`, `receive`, `announce`."""

    def __init__(self, job: Job, settings: Settings, fleet: Fleet, run_log: RunLog, begin: Begin | None = None,
                 journal: Journal | None = None):
        self.job, self.settings, self.fleet, self.run_log, self.begin = job, settings, fleet, run_log, begin or Begin()
        self.checkpoints = Checkpoints(job.checkpoints, settings.keep, settings.best, self.begin.written,
                                       settings.keep_every, settings.best_mode)
        self.claim = self.checkpoints.claim = Claim(job.checkpoints, job.run_id, owner_of(job.run_dir))
        self.mailbox, self.receiving = Mailbox(), threading.Lock()
        self.losses = policy.Losses()
        self.target, self.restart_at, self.checked, self.drained_s = 0, 0.0, 0.0, 0.0
        self.outcome: m.Finish | None = None
        # parts of the final checkpoint, and who was asked for them and has not answered
        self.saving: dict[Save, str] = {}
        self.journal = journal or Journal(Path(job.run_dir) / JOURNAL, job.run_id)
        self.past = replay(self.journal.past, settings.bounds, self.begin.generation)
        self.chaos = [spec for spec in job.chaos if spec not in self.past.spent]

    @property
    def state(self) -> m.State:
        return self.past.state

    @property
    def workers(self) -> Workers:
        return self.past.workers

    def opened(self) -> None:
        """The first lines of a run or of its resumption, as far as a controller before this one has not written them."""
        if "run_started" in self.run_log.seen:
            return
        if self.begin.rewound_from >= 0 and "rewound" not in self.run_log.seen:
            self.run_log.event("rewound", **{"from": self.begin.rewound_from, "to": self.run_log.written})
        there = {fields.get("why") for fields in self.run_log.since(0)[0]}
        for name, why in self.job.notes:
            if why not in there:
                self.run_log.event(name, why=why)
        self.run_log.event("run_started", run=self.job.run_id, num_steps=self.job.num_steps, pid=os.getpid())

    # From other threads.

    def post(self, event: Any) -> None:
        self.mailbox.put(event)

    def deliver(self, worker: str, messages: Sequence[Any]) -> int:
        """A worker's messages. Returns the steps on disk, or FENCED if this worker was given up."""
        if self.workers.is_given_up(worker):
            return FENCED
        for message in messages:
            self.mailbox.put((worker, message))
        return self.run_log.on_disk

    def receive(self, worker: str, messages: Sequence[Any], number: int) -> int:
        """As `deliver`, but returns when they are handled, so that none is lost with this controller. `number`: see
        Outbox.

        ConnectionError where it ends before that. Of a batch that is delivered again only what is new is taken.
        """
        with self.receiving:  # a batch and its repetition may come at once
            self.deliver(worker, self.mailbox.fresh(worker, messages, number))
        self.mailbox.wait()
        return FENCED if self.workers.is_given_up(worker) else self.run_log.on_disk

    def announce(self, worker: str, spec: str) -> None:
        """A fault fires: when this returns it is not handed out again, and carried out here unless it is the worker's
        own."""
        self.mailbox.put((worker, parse(spec)))
        self.mailbox.wait()

    # In its own thread.

    def work(self) -> m.Finish:
        """Until the machine has finished."""
        while self.outcome is None:
            item = self.mailbox.get(TICK_S)
            if item is not None:
                self.handle(item)
            if time.monotonic() - self.checked > TICK_S:
                self.check()
        return self.outcome

    def handle(self, item: Any) -> None:
        if isinstance(item, tuple):
            self.take(*item)
        else:
            self.advance(item)

    def take(self, worker: str, message: Any) -> None:
        """A worker's report; that of one that was given up meanwhile counts for nothing."""
        if self.workers.is_given_up(worker):
            return
        if isinstance(message, (Progress, Standing, Line, Part, Moved)) and message.generation > self.state.generation:
            self.outcome = self.outcome or self.behind(message.generation)
        elif isinstance(message, Progress):
            record, now = self.workers[worker], time.monotonic()
            if not record.released:
                beat = record.heartbeat
                record.heartbeat = beat.followed(message, now) if beat else Heartbeat(message, now, now)
        elif isinstance(message, Line) and message.file == "metrics":
            self.run_log.metric(message.generation, message.fields)
        elif isinstance(message, Line):
            fields = dict(message.fields)
            self.run_log.event(fields.pop("event"), fields.pop("step", None), message.generation, **fields)
        elif isinstance(message, Part):
            self.take_part(message)
        elif isinstance(message, Moved):
            self.run_log.event("tables_resharded", message.step, message.generation, buckets=message.buckets,
                               bytes=message.bytes, seconds=message.seconds, steps=message.steps)
            self.advance(message)
        elif isinstance(message, Fault):
            self.take_fault(worker, message)
        else:
            self.advance(message)

    def behind(self, generation: int) -> m.Finish:
        """Workers are in a generation that the journal lacks: who is in it nobody knows any more."""
        for worker in self.state.ready:
            self.fleet.send(worker, m.Abort(worker, generation))
        return m.Finish("failed", f"A controller fell while the run directory {self.job.run_dir} could not be written, "
                                  f"and its journal lacks generation {generation}; make room there, then resume the "
                                  "run.")

    def advance(self, event: Any) -> None:
        if self.is_repeated(event):
            return
        if isinstance(event, m.Starting):
            self.workers[event.worker].starting_s = time.monotonic()
        elif isinstance(event, Ready):
            self.workers[event.worker].starting_s = None
            self.losses = replace(self.losses, unborn=0)
            self.run_log.event("worker_joined", worker=event.worker, node=event.node, pid=event.pid)
        elif isinstance(event, m.Lost):
            self.note_loss(event)
        elif isinstance(event, m.Drain):
            self.run_log.event("node_draining", nodes=list(event.nodes))
        elif isinstance(event, Standing):
            event = m.confirmed(self.state, event, self.checkpoints.newest, self.checkpoints.error)
            self.note_standing(event)
            event = replace(event, lines=())  # they are in metrics.jsonl by now
        actions = self.past.take(event)
        self.journal.event(event)
        if actions:
            self.journal.sync()
        self.perform(actions)

    def is_repeated(self, event: Any) -> bool:
        """Who did not learn that a report had arrived sends it again."""
        if isinstance(event, Ready):
            return self.workers[event.worker].ready is not None
        if isinstance(event, Standing):
            return event.generation == self.state.generation and event.worker in self.state.standing
        return isinstance(event, m.Lost) and self.workers[event.worker].lost

    def note_standing(self, event: Standing) -> None:
        """Lines that rank 0 may have died with come first: a generation starts when all its past is on disk."""
        if event.generation == self.state.generation:
            for fields in event.lines:
                self.run_log.metric(event.generation, fields)
        record = self.workers[event.worker]
        if record.ready is not None:
            record.ready = replace(record.ready, compilations=event.compilations)
        if event.rejected:
            if self.checkpoints.refuse(event.rejected):
                self.run_log.event("checkpoint_rejected", path=shown(event.rejected), reason=event.error)
        elif event.reason == "failed":
            self.run_log.event("step_failed", worker=event.worker, error=event.error)

    def note_loss(self, event: m.Lost) -> None:
        record, group, now = self.workers[event.worker], self.state.group, time.monotonic()
        record.starting_s = None
        self.saving = {order: worker for order, worker in self.saving.items() if worker != event.worker}
        self.run_log.event("worker_lost", worker=event.worker, rank=group.index(event.worker) if event.worker in group
                           else -1, cause=event.cause,
                         detected_s=round(now - record.heartbeat.received_s, 3) if record.heartbeat else 0.0)
        record.heartbeat = None
        self.losses = policy.note_loss(self.losses, record.node, self.run_log.written, now, record.is_live, event.cause
                                       if event.raised else "")
        self.restart_at = now + policy.restart_delay_s(self.losses)
        if policy.gives_up(self.losses, max(len(group), self.target)):
            self.mailbox.put(m.GiveUp("Worker after worker is lost without a step between them, the last by: "
                                      f"{event.cause}"))

    def check(self) -> None:
        """What only time shows: hangs, workers that never get ready, restarts that were put off."""
        now = time.monotonic()
        self.forgive(now - self.checked - 2 * TICK_S)
        self.checked = now
        self.run_log.retry()
        self.journal.lines.retry()
        if self.state.phase == "running":  # whoever waits for a group does not wait for this
            self.journal.compact(self.past)
        for worker, record in list(self.workers.items()):
            if record.starting_s is not None and now - record.starting_s > self.settings.start_timeout_s:
                self.give_up_on(worker, f"not ready within start_timeout_s = {self.settings.start_timeout_s:g} s")
        if self.state.phase in ("running", "stopping", "regrouping"):
            beats = {w: beat for w in self.state.group if w not in self.state.standing
                     and (beat := self.workers[w].heartbeat)}
            for worker in suspects(beats, now, self.settings.hang_timeout_s, self.settings.start_timeout_s):
                self.run_log.event("hang", worker=worker, phase=beats[worker].progress.phase,
                                   silent_s=round(now - beats[worker].received_s, 3))
                self.give_up_on(worker, f"no progress within elastic.hang_timeout_s = {self.settings.hang_timeout_s:g} "
                                        "s (raise it if a shard takes longer)")
        state = self.state
        if not (state.handing and state.leaving.intersection(state.group)):
            self.drained_s = now
        elif not state.is_late and now - self.drained_s > policy.HAND_OVER_S:
            self.advance(m.Hurry())
        if self.restart_at and now >= self.restart_at:
            self.restart_at = 0.0
            self.want()

    def forgive(self, away_s: float) -> None:
        """While the controller itself was held up (a slow disk, a machine put to sleep) nobody's silence counts."""
        for record in self.workers.values() if away_s > 0 and self.checked else ():
            if beat := record.heartbeat:
                record.heartbeat = replace(beat, received_s=beat.received_s + away_s, changed_s=beat.changed_s + away_s)

    def give_up_on(self, worker: str, cause: str) -> None:
        """Fence first, then kill: what it reports from now on counts for nothing, and its group aborts without it."""
        self.workers[worker].given_up = True
        self.fleet.kill(worker)
        self.advance(m.Lost(worker, cause))

    def want(self) -> None:
        nodes = [ready.node for ready in self.workers.live()]
        soon = [*nodes, *(record.node for record in self.workers.values() if record.starting_s is not None)]
        self.fleet.want(self.target, policy.banned_nodes(self.losses, time.monotonic(), nodes), gaps(soon, self.state.bounds.meshes[0][1]))

    def take_part(self, part: Part) -> None:
        """A part of a checkpoint is on disk, or cannot be: with the last one it counts, or training goes on without it."""
        self.saving.pop(Save(part.generation, part.step, part.rank, part.world_size), None)
        found = self.checkpoints.take(part, self.run_log.written, self.run_log.sync)
        if found is not None:
            self.run_log.event(found.event, found.step, found.generation, **found.fields)
            if found.is_final:  # so would be the next, and the run would end with nothing saved
                self.mailbox.put(m.GiveUp(found.error))

    def take_fault(self, worker: str, fault: Fault) -> None:
        """What may be done twice is done before it is written off, and what may not be, after: a controller may fall
        between."""
        if fault.spec not in self.chaos:
            return  # announced again, by who did not learn that the controller knew
        self.chaos.remove(fault.spec)
        if fault.kind == "stop":
            self.workers.stop(worker, fault.number)
        elif fault.kind == "scale":
            self.advance(m.ScaleTo(fault.number))
        elif fault.kind == "cont":
            self.fleet.inject(fault, self.workers.stopped(fault.number))
        self.past.spent.add(fault.spec)
        self.journal.spent(fault.spec, self.workers[worker].ready if fault.kind == "stop" else None)
        self.run_log.event("chaos", fault=fault.spec, worker=worker)
        if fault.kind == "controller":
            self.fleet.inject(fault)
        elif fault.kind == "corrupt":
            self.checkpoints.flip_a_byte()

    # Actions.

    def perform(self, actions: Sequence[Any]) -> None:
        for action in actions:
            match action:
                case m.Want():
                    self.target = action.workers
                    self.want()
                case m.Abort() | m.RequestStop():
                    self.fleet.send(action.worker, action)
                case m.Release():
                    self.workers[action.worker].heartbeat = None
                    self.fleet.release(action.worker)
                case m.Wait():
                    self.run_log.event("waiting", ready=action.ready, needed=action.needed)
                case m.SaveAlone():
                    self.save_alone(action)
                case m.Form():
                    self.form(action)
                case m.Finish():
                    self.outcome = action
                case _:
                    raise TypeError(f"{action} is no action.")
        if any(isinstance(action, m.Release) for action in actions):
            self.want()

    def save_alone(self, action: m.SaveAlone) -> None:
        if action.step > self.checkpoints.newest:
            order = Save(action.generation, action.step, action.rank, action.world_size)
            self.saving[order] = action.worker
            self.fleet.send(action.worker, replace(order, ballot=action.ballot))

    def form(self, action: m.Form) -> None:
        """Publishes a generation: on disk first, then to its members."""
        generation = self.completed(action.generation)
        if action.before or self.run_log.last_commit:
            lost = max(0, self.run_log.written - generation.committed)
            self.run_log.interrupted(generation.number, action.cause, action.before, len(generation.members), lost,
                                     action.was, generation.mesh)
        if generation.committed < self.run_log.written:
            self.rewind(generation.committed)
        generation = replace(generation, written=self.run_log.on_disk, evaluated=self.run_log.evaluated,
                             checkpointed=self.checkpoints.newest, chaos=tuple(self.chaos))
        self.past.published = generation
        self.journal.published(generation)
        self.announce_generation(generation)
        self.expect(generation.members, generation.number, generation.committed)
        for worker in generation.members:
            self.fleet.send(worker, generation)
        with contextlib.suppress(OSError):  # of a full disk
            self.run_log.sync()  # who joins a group has none of the lines so far to bring along

    def expect(self, members: Sequence[str], generation: int, step: int) -> None:
        """A heartbeat of each member, from now on."""
        now = time.monotonic()
        for worker in members:
            self.workers[worker].heartbeat = Heartbeat(Progress(worker, generation, step, "start", 0, False), now, now)

    def announce_generation(self, generation: Generation) -> None:
        self.run_log.generation = generation.number
        members = self.workers.reports(generation.members)
        self.run_log.event("generation_started", generation.committed, world_size=len(members),
                           transport=generation.transport, mesh=generation.shape.as_dict(), written=self.run_log.written,
                           workers=[{"worker": r.worker, "rank": i, "node": r.node, "pid": r.pid,
                                     "compilations": r.compilations} for i, r in enumerate(members)])

    def completed(self, generation: Generation) -> Generation:
        """With the transport, and a start from the newest good checkpoint (or the recipe) where no member has any
        state."""
        transport = self.fleet.transport(self.workers.reports(generation.members))
        if generation.committed >= 0:
            return replace(generation, transport=transport)
        path, step, rejected = self.checkpoints.newest_good()
        for bad, reason in rejected:
            self.run_log.event("checkpoint_rejected", path=bad, reason=reason)
        for fields in self.checkpoints.lines_of(path):
            self.run_log.metric(self.run_log.generation, fields)
        return replace(generation, transport=transport, load=path or "recipe", committed=step)

    def rewind(self, step: int) -> None:
        """Every copy of the newer state is gone: metrics go back to the checkpoint that is loaded."""
        self.run_log.event("rewound", **{"from": self.run_log.written, "to": step})
        self.run_log.cut_back(step)
        self.checkpoints.newest = min(self.checkpoints.newest, step)
