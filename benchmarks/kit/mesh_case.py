"""The model, the data and the meshes of the timings of hybrid parallelism."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from elastic.data.loader import load_batch
from elastic.recipe import Recipe, loads
from elastic.workload import Workload, prepare

MODEL = {"layers": 4, "heads": 4, "width": 256, "context": 128}
LR, BETAS, DECAY = 1e-3, (0.9, 0.99), 0.1
SEED = 0
MOST_STEPS = 2000  # more than any contest takes


@dataclass(frozen=True)
class Case:
    """One contest: the degrees, the rows of a step, and what else is asked for."""

    name: str
    peer: str
    data: int = 1
    pipeline: int = 1
    tensor: int = 1
    micro_batches: int = 1
    sharded: bool = False
    split_vocab: bool = True
    rows: int = 16

    @property
    def size(self) -> int:
        return self.data * self.pipeline * self.tensor

    def recipe(self, text: str) -> Recipe:
        """On the text in a file, one logical shard a replica."""
        layout = "" if self.tensor == 1 or self.split_vocab else 'layout = {heads = "tensor", d_ff = "tensor"}\n'
        return loads(f'[run]\nsteps = {MOST_STEPS}\nseed = {SEED}\neval_every = 0\n'
                     '[model]\nkind = "nlp.gpt"\n' + "".join(f"{key} = {value}\n" for key, value in MODEL.items()) +
                     f'[backend]\ndevice = "cpu"\n[data]\nformat = "text"\npath = "{text}"\nbatch_size = {self.rows}\n'
                     f"[mesh]\ntensor = {self.tensor}\npipeline = {self.pipeline}\nmicro_batches = "
                     f"{self.micro_batches}\n{layout}[elastic]\nmax_workers = {self.size}\nlogical_shards = "
                     f"{self.data}\n[optimizer]\nlr = {LR}\nbeta1 = {BETAS[0]}\nbeta2 = {BETAS[1]}\nweight_decay = "
                     f"{DECAY}\nsharded = {str(self.sharded).lower()}\n" + ("twin = false\n" if self.sharded else "")
                     + "[checkpoint]\nevery_steps = 0\n")


def opened(recipe: Recipe) -> Workload:
    return Workload.open(recipe, prepare(recipe))


def tokens_of(workload: Workload, step: int, shard: int) -> np.ndarray:
    """(rows, context + 1), what the platform feeds."""
    return np.asarray(load_batch(workload.training, workload.sampler, step, shard)["tokens"]).astype(np.int64)
