"""A plan as a person reads it: a row for every number of workers, and what to do in words."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table

from elastic.errors import UserError
from elastic.observe.words import count, duration, size
from elastic.parallel.planner import Cluster, Forecast, Task, choose, enough_shards, forecasts, verdict
from elastic.recipe import Recipe

HEADS = ("workers", "shards", "step", "work", "exchange", "update", "speed-up", "at best", "sent", "memory", "")


def table(task: Task, cluster: Cluster) -> Table:
    """Every useful number of workers."""
    found = forecasts(task, cluster)
    best = choose(found, cluster)
    out = Table(*HEADS, box=None, pad_edge=False)
    for one in found:
        out.add_row(*cells(one), verdict(one, best, cluster), style="bold green" if one is best else "")
    return out


def cells(one: Forecast) -> list[str]:
    times = [duration(value) if value >= 1 else f"{value * 1e3:.1f} ms" for value in (one.step_s, one.compute_s, one.exchange_s, one.update_s)]
    return [str(one.workers), str(one.rounds), *times, f"{one.speedup:.2f}", f"{one.bound:.2f}", size(one.sent_bytes), size(one.memory_bytes)]


def sentences(recipe: Recipe, task: Task, cluster: Cluster) -> Iterator[str]:
    """The recommendation. UserError where no number of workers fits."""
    found = forecasts(task, cluster)
    best = choose(found, cluster)
    if best is None:
        least = min(found, key=lambda one: one.memory_bytes)
        more = size(least.memory_bytes - cluster.memory)
        raise UserError(f"A worker needs {size(least.memory_bytes)} at least, {more} more than it has; give it more memory, or take a smaller "
                        'model, more elastic.logical_shards (smaller ones) or optimizer.name = "sgd".')
    yield (f"elastic.max_workers = {best.workers}: {best.speedup:.2f} times as fast as one worker ({count(task.num_shards, 'logical shard')} allow "
           f"{best.bound:.2f}); {best.exchange_s / best.step_s:.0%} of a step is exchange.")
    room = cluster.nodes * cluster.workers_per_node
    if room > task.num_shards:
        shards = enough_shards(recipe.data.batch_size, room)
        yield (f"{count(room, 'worker')} have room here and {task.num_shards} shards feed only as many: " + (
            f"elastic.logical_shards = {shards} would feed all." if shards else
            f"data.batch_size = {recipe.data.batch_size} has no more equal parts; write a multiple of {room}."))
