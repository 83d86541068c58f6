"""The constants of the machine at hand, measured between real processes and kept for later plans."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import statistics
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from elastic.collective.connect import form
from elastic.collective.kv_store import Endpoint
from elastic.collective.reduction import Scratch, maximal_subtrees, out_size
from elastic.data.cache import cache_dir
from elastic.data.loader import load_batch
from elastic.errors import ElasticError
from elastic.humanize import size
from elastic.mesh import shards_of
from elastic.model.backend import is_neutral
from elastic.parallel.measure import measure
from elastic.planning.costs import FLOAT
from elastic.planning.profile import at_work, copied_bytes_s, seconds
from elastic.recipe import Recipe, dumps, loads
from elastic.state.flat_layout import BLOCK
from elastic.storage.atomic import write_atomically
from elastic.workload import Workload

LITTLE, MUCH = 256, 1 << 20  # elements of a call that is all latency, and of one that is all bandwidth
TIMES = 15
FORM_S = 120.0  # for all processes to import their framework and meet
TRANSPORTS = ("shared", "gloo")
median = partial(seconds, times=TIMES, enough_s=math.inf)


@dataclass(frozen=True)
class Constants:
    """Of `workers` processes on one node. `alone_s` and `together_s`: a training pass of one, and of each while all
    compute."""

    workers: int
    alone_s: float
    together_s: float
    flops_s: float  # of each while all compute; 0 where nobody counts the model's operations
    copy_bytes_s: float
    shared_latency_s: float
    shared_bytes_s: float
    gloo_latency_s: float
    gloo_bytes_s: float
    reduction_bytes_s: float  # of the gradients' sum where it lies in shared memory

    @property
    def cores(self) -> float:
        """As many as it is as if the workers shared; on a busy machine one worker alone is slow too, which says nothing
        of cores."""
        return min(float(os.cpu_count() or self.workers), self.workers * min(1.0, self.alone_s / self.together_s))

    def lines(self) -> list[str]:
        """For a person."""
        rate = f", {self.flops_s / 1e9:.2f} Gflop/s each" if self.flops_s else ""
        return [f"a pass of one shard: {self.alone_s * 1e3:.2f} ms alone, {self.together_s * 1e3:.2f} ms while "
                f"{self.workers} compute{rate} (as if they shared {self.cores:.1f} cores)",
                f"memory: {size(self.copy_bytes_s)}/s copied",
                *(f"{name}: {latency * 1e6:.0f} us a call, {size(rate)}/s" for name, latency, rate in (
                    ("shared memory", self.shared_latency_s, self.shared_bytes_s),
                    ("gloo", self.gloo_latency_s, self.gloo_bytes_s))),
                f"the sum of gradients in shared memory: {size(self.reduction_bytes_s)}/s"]


def key_of(recipe: Recipe, workers: int) -> str:
    """What the constants depend on, beside the machine."""
    return json.dumps([recipe.backend.name, recipe.backend.threads, recipe.model.model_dump(), recipe.data.batch_size,
                       recipe.elastic.logical_shards, workers], sort_keys=True)


def cache_file() -> Path:
    return cache_dir() / "calibration.json"


def cached() -> dict[str, Any]:
    try:
        return dict(json.loads(cache_file().read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def known(recipe: Recipe, workers: int) -> Constants | None:
    """What was measured here before for such a run."""
    try:
        return Constants(**cached()[key_of(recipe, workers)])
    except (KeyError, TypeError):
        return None


def keep(recipe: Recipe, found: Constants) -> None:
    cache_file().parent.mkdir(parents=True, exist_ok=True)
    write_atomically(cache_file(), json.dumps({**cached(), key_of(recipe, found.workers): asdict(found)}, indent=1))


def calibrate(recipe: Recipe, info: Mapping[str, Any], workers: int) -> Constants:
    """Starts so many processes on this machine and measures; the result is kept. ElasticError where one of them fails.
    """
    endpoint, context = Endpoint(), multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(workers)]
    processes = [context.Process(target=member,
                                 args=(rank, workers, endpoint.address, dumps(recipe), dict(info), pipes[rank][1]),
                                 daemon=True)
                 for rank in range(workers)]
    for process in processes:
        process.start()
    for _, theirs in pipes:
        theirs.close()  # so that a process that dies is noticed
    try:
        found = [pipe.recv() for pipe, _ in pipes]
    except EOFError as error:
        raise ElasticError("A process of the calibration died; `elastic doctor` says what is wrong.") from error
    finally:
        for process in processes:
            process.join(FORM_S)
            process.kill()
    constants = Constants(workers, *(statistics.median(one[field.name] for one in found)
                                     for field in fields(Constants)[1:]))
    keep(recipe, constants)
    return constants


def member(rank: int, workers: int, address: str, text: str, info: Mapping[str, Any], pipe: Any) -> None:
    """One of the processes; sends its figures."""
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")  # before a framework loads
    recipe = loads(text, locate=False)
    groups = {name: form(name, rank, workers, address, name, threading.Event(), FORM_S, "127.0.0.1")
              for name in TRANSPORTS}
    meet = groups["shared"].barrier
    found = dict.fromkeys((field.name for field in fields(Constants)[1:]), 0.0)
    work = Workload.open(recipe, info)
    batch = work.looked_up(load_batch(work.training, work.sampler, 1, rank % recipe.elastic.logical_shards))
    backend, layout, room = at_work(recipe, work.model)
    views = room()

    def run() -> None:
        backend.gradients(batch, 0, views)

    run()
    meet()
    found["alone_s"] = median(run) if rank == 0 else 0.0
    meet()
    found["together_s"] = median(run)
    if rank:
        found["alone_s"] = found["together_s"]
    if is_neutral(work.model):
        found["flops_s"] = measure(work.model, batch).flops / found["together_s"]
    found["copy_bytes_s"] = copied_bytes_s()
    for name, group in groups.items() if workers > 1 else ():
        meet()
        found[f"{name}_latency_s"], found[f"{name}_bytes_s"] = speed_of(group)
    if workers > 1:
        found["reduction_bytes_s"] = reduction_of(groups["shared"], recipe.elastic.logical_shards, layout.gradient)
    pipe.send(found)
    meet()


def speed_of(group: Any) -> tuple[float, float]:
    """Seconds of a call, for each doubling of the members, and bytes a second."""
    little, much = np.zeros(LITTLE, np.float32), np.zeros(MUCH, np.float32)
    latency = median(lambda: group.all_reduce(little)) / math.log2(2 * group.size)
    return latency, 2 * (group.size - 1) / group.size * much.nbytes / median(lambda: group.all_reduce(much))


def reduction_of(group: Any, num_shards: int, numel: int) -> float:
    """The canonical sum over shards as the loop has it, in the group's own buffers."""
    nodes = maximal_subtrees(shards_of(group.rank, group.size, num_shards), num_shards)
    sums = [(node, group.allocate(numel)) for node in nodes]
    out, scratch = group.allocate(out_size(numel, BLOCK, group.size)), Scratch(lambda size: np.zeros(size, np.float32))
    taken = median(lambda: group.reduce_tree(sums, num_shards, out, numel, BLOCK, scratch))
    return (len(nodes) + 1) * (group.size - 1) / group.size * numel * FLOAT / taken
