"""A worker's first run through the model, before any step: what compiles and allocates does so, and what cannot be trained faithfully is refused."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from elastic.data.collate import num_rows
from elastic.errors import UserError
from elastic.model.user_code import describe, is_of_machine, users
from elastic.parallel.groups import mirrored
from elastic.tables.rehearsal import rehearse_rows
from elastic.tables.untrained import with_starting_rows
from elastic.worker.evaluation import measure, named
from elastic.worker.gradients import part_of
from elastic.worker.training import Placement, Training


def warm_up(training: Training, place: Placement) -> None:
    """Runs what compiles or allocates lazily, on the first shard, and notes the model's habits. The state has to be
    started or loaded after."""
    if training.tables:
        rehearse_rows(training.tables)
    try:
        with users(training.is_own):
            rehearse(training, place)
    except UserError:
        traceback.print_exc()
        raise


def rehearse(training: Training, place: Placement) -> None:
    backend, state, plan = place.backend, place.state, training.plan
    state.start(plan.seed)
    state.committed = -1
    if place.portion is not None:
        backend.connect(mirrored(place.portion.layout, place.portion.coordinate))

    def room() -> Mapping[str, Any]:
        return state.layout.views(backend.allocate(state.layout.gradient), state.layout.trainable_names)

    first = part_of(with_starting_rows(training.tables, training.load_batch(1, 0)),
                    plan.micro_batches * place.mesh.expert, 0)
    if place.pipeline is not None:
        place.pipeline.warm_up(first, room())
        return
    place.habits = habits = backend.rehearse(first, room)
    if habits.undivided and plan.num_shards * plan.micro_batches > 1:
        raise UserError(habits.undivided)
    state.layout.move([*state.buffers, *habits.moved])
    last = shorter(training) if place.portion is None else None
    if last is not None:
        batch = with_starting_rows(training.tables, training.load_batch(plan.num_steps, last))
        rows = int((training.positions(plan.num_steps, last) >= 0).sum())
        with fewer(f"The last step leaves {rows} of a logical shard's {len(training.positions(1, 0))} samples to "
                   f"logical shard {last}",
                   "choose run.steps, data.batch_size or elastic.logical_shards so that all shards are alike"):
            backend.gradients(batch, 0, room())
    if training.eval_batches:
        rehearse_evaluation(training, place)


def rehearse_evaluation(training: Training, place: Placement) -> None:
    """Of the first batch, and of the last where it has fewer rows."""
    tally = place.backend.tally()
    first = part_of(with_starting_rows(training.tables, training.eval_batches[0]()), place.mesh.expert, 0)
    found, best = measure(place.backend, tally, first), training.plan.best.removeprefix("eval.")
    if best and best not in found and best not in (known := named(found, tally)):
        raise UserError(f'checkpoint.best = "{training.plan.best}" is none of the figures of this evaluation, '
                        f'{", ".join(known)}; '
                        "write one of them.")
    if place.portion is not None or training.fills:
        return
    last = with_starting_rows(training.tables, training.eval_batches[-1]())
    if num_rows(last) == num_rows(first):
        return
    with fewer(f"The last batch of the evaluation has {num_rows(last)} rows where the others have {num_rows(first)}",
               f"choose data.eval_fraction so that the evaluation set has a multiple of {num_rows(first)} rows, or let "
               "the model take any number"):
        place.backend.metrics(last)


@contextmanager
def fewer(what: str, remedy: str) -> Iterator[None]:
    """Inside, the model computes with fewer rows than before: UserError where it cannot."""
    try:
        yield
    except Exception as error:
        if is_of_machine(error):
            raise
        raise UserError(f"{what}, and the model cannot take that ({describe(error)}); {remedy}.") from error


def shorter(training: Training) -> int | None:
    """The shard of the last step that has fewer rows than the others but not none, where rows are left out rather than
    filled up."""
    plan = training.plan
    if plan.micro_batches > 1 or training.fills:
        return None
    real = [training.positions(plan.num_steps, shard) >= 0 for shard in range(plan.num_shards)]
    return next((shard for shard, rows in enumerate(real) if 0 < rows.sum() < len(rows)), None)
