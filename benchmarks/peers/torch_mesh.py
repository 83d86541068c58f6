"""torch's own parallelisms on the model of the timings, in one of a contestant's processes: DTensor, FSDP2, pipelining, and two of them at once."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, loss_parallel, parallelize_module

from benchmarks.kit.mesh_case import BETAS, DECAY, LR, MODEL, SEED, Case, opened, tokens_of
from benchmarks.kit.turns import Turns
from benchmarks.peers.mesh_gpt import GPT, token_loss
from elastic.model.initial import initial_values

PREPARED = 400  # steps whose rows are loaded before the clock starts; then they come again


def take_part(rank: int, turns: Turns, case: Case, text: str, port: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=case.size)
    mesh = init_device_mesh("cpu", (case.data, case.pipeline, case.tensor),
                            mesh_dim_names=("data", "pipeline", "tensor"))
    workload = opened(case.recipe(text))
    shard = mesh["data"].get_local_rank()
    batches = [torch.from_numpy(tokens_of(workload, step, shard)) for step in range(1, PREPARED + 1)]
    model = build(case, mesh, workload.model)
    # the fused kernel takes no mixture
    kinds = [[p for p in model.parameters() if isinstance(p, DTensor) is split] for split in (True, False)]
    optimizer = torch.optim.AdamW([{"params": kind} for kind in kinds if kind], LR, betas=BETAS, weight_decay=DECAY,
                                  fused=True)
    step = staged(case, mesh, model) if case.pipeline > 1 else whole(model)
    split = loss_parallel if case.tensor > 1 and case.split_vocab else nullcontext
    number = 0
    while True:
        turns.begin()
        optimizer.zero_grad()
        with split():
            loss = step(batches[number % PREPARED])
        optimizer.step()
        number += 1
        if loss is not None and mesh["tensor"].get_local_rank() == 0:  # data rank's own share of the batch
            turns.note(number, loss.item())


def build(case: Case, mesh: DeviceMesh, of: Any) -> GPT:
    stage, stages, layers = mesh["pipeline"].get_local_rank(), case.pipeline, MODEL["layers"]
    first, last = stage == 0, stage == stages - 1
    model = GPT(MODEL, of.vocab_size, layers * stage // stages, layers * (stage + 1) // stages, first, last)
    model.load(initial_values(of.parameters, SEED, {}))
    if case.tensor > 1:
        plan: dict[str, Any] = {"blocks.*.qkv": ColwiseParallel(), "blocks.*.out": RowwiseParallel(),
                                "blocks.*.up": ColwiseParallel(), "blocks.*.down": RowwiseParallel()}
        if case.split_vocab:
            plan |= {"tokens": RowwiseParallel(input_layouts=Replicate())} if first else {}
            plan |= {"head": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)} if last else {}
        parallelize_module(model, mesh["tensor"], plan)
        model.tie()
    if case.data > 1:
        for block in model.blocks.values():
            fully_shard(block, mesh=mesh["data"])
        fully_shard(model, mesh=mesh["data"])
    return model


def whole(model: GPT) -> Callable[[torch.Tensor], torch.Tensor]:
    def step(tokens: torch.Tensor) -> torch.Tensor:
        loss = token_loss(model(tokens[:, :-1]), tokens[:, 1:])
        loss.backward()
        return loss

    return step


def staged(case: Case, mesh: DeviceMesh, model: GPT) -> Callable[[torch.Tensor], torch.Tensor | None]:
    group, rank = mesh["pipeline"].get_group(), mesh["pipeline"].get_local_rank()
    schedule = Schedule1F1B(PipelineStage(model, rank, case.pipeline, torch.device("cpu"), group=group),
                            case.micro_batches, token_loss)
    tied = model.tokens.weight if model.tokens is not None else model.head.weight if model.head is not None else None

    def step(tokens: torch.Tensor) -> torch.Tensor | None:
        losses: list[torch.Tensor] = []
        inputs = (tokens[:, :-1].contiguous(),) if rank == 0 else ()
        targets = tokens[:, 1:].contiguous() if rank == case.pipeline - 1 else None
        schedule.step(*inputs, target=targets, losses=losses)
        if tied is not None:  # two stages hold it
            if isinstance(tied.grad, DTensor):  # the embedding's comes whole, the head's in parts
                tied.grad = tied.grad.redistribute(placements=tied.placements)
            dist.all_reduce(tied.grad.to_local() if isinstance(tied.grad, DTensor) else tied.grad, group=group)
        return torch.stack(losses).mean() if losses else None

    return step
