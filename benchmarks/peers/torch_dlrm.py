"""torch's DDP on the DLRM of the timings, in one of a contestant's processes: every process has all tables, and their gradients travel sparse."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.kit.dlrm_case import EPS, LR, ROWS_LR, WORKERS, Case, Net, batches, fill, loss_of, opened
from benchmarks.kit.turns import Turns


class Whole(nn.Module):
    """`distinct`: each row is looked up once a batch, so that its gradient is one row too."""

    def __init__(self, case: Case, distinct: bool):
        super().__init__()
        self.tables = nn.ModuleDict({name: nn.EmbeddingBag(case.vocabulary, case.width, mode="sum", sparse=True)
                                     for name in case.names})
        self.net, self.distinct = Net(case.tables, case.width), distinct

    def forward(self, numbers: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return self.net(numbers, [self.looked_up(table, one) for table, one in zip(self.tables.values(), ids)])

    def looked_up(self, table: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        if not self.distinct:
            return table(ids[:, None])
        different, stands = torch.unique(ids, return_inverse=True)
        return table(different[:, None])[stands]


def take_part(rank: int, turns: Turns, case: Case, log: str, port: int, distinct: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORKERS)
    workload = opened(case.recipe(log))
    assert workload.tables is not None
    fed, model = batches(case, workload, rank), Whole(case, distinct)
    fill({name: model.tables.get_parameter(f"{name}.weight") for name in case.names}, case, workload.tables.specs)
    ddp = DistributedDataParallel(model, init_sync=False)
    optimizers = (torch.optim.Adagrad(model.tables.parameters(), ROWS_LR, eps=EPS),
                  torch.optim.SGD(model.net.parameters(), LR))
    number = 0
    while True:
        turns.begin()
        for optimizer in optimizers:
            optimizer.zero_grad()
        numbers, labels, ids = fed[number % case.batches]
        loss = loss_of(ddp(numbers, ids), labels)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        number += 1
        turns.note(number, loss.item())
