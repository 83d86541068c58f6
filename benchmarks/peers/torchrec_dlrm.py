"""TorchRec on the DLRM of the timings, in one of a contestant's processes: whole tables lie on workers, updated where they lie.

gloo has no reduce-scatter, so that of TorchRec's ways to lay tables out those that split one by rows are not for processors. Nor
is its own deduplication of what is looked up (`use_index_dedup` calls fbgemm::jagged_unique_indices, which has no kernel for
processors), so that `distinct` is done before it is asked.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
import torchrec
from torch import nn
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.distributed.types import ShardingType
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.keyed import KeyedOptimizerWrapper

from benchmarks.kit.dlrm_case import EPS, LR, ROWS_LR, WORKERS, Case, Net, batches, fill, loss_of, opened
from benchmarks.kit.turns import Turns


class Sharded(nn.Module):
    """`distinct`: each row is asked for once a batch, in one list a table."""

    def __init__(self, case: Case, distinct: bool):
        super().__init__()
        kinds: tuple[Any, Any] = ((torchrec.EmbeddingCollection, torchrec.EmbeddingConfig) if distinct
                                  else (torchrec.EmbeddingBagCollection, torchrec.EmbeddingBagConfig))
        self.names, self.distinct = case.names, distinct
        self.tables = kinds[0](device=torch.device("meta"), tables=[
            kinds[1](name=name, embedding_dim=case.width, num_embeddings=case.vocabulary, feature_names=[name])
            for name in case.names])
        self.net = Net(case.tables, case.width)

    def forward(self, numbers: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        if self.distinct:
            each = [torch.unique(one, return_inverse=True) for one in ids]
            lengths = torch.tensor([len(different) for different, _ in each], dtype=torch.int32)
            found = self.tables(torchrec.KeyedJaggedTensor(self.names, torch.cat([different for different, _ in each]), lengths=lengths))
            rows = [found[name].values()[stands] for name, (_, stands) in zip(self.names, each)]
        else:
            found = self.tables(torchrec.KeyedJaggedTensor(self.names, ids.reshape(-1),
                                                           lengths=torch.ones(ids.numel(), dtype=torch.int32)))
            rows = [found[name] for name in self.names]
        return self.net(numbers, rows)


def model_of(case: Case, distinct: bool) -> Any:
    model = Sharded(case, distinct)
    apply_optimizer_in_backward(torch.optim.Adagrad, model.tables.parameters(), {"lr": ROWS_LR, "eps": EPS})
    sharder: Any = EmbeddingCollectionSharder() if distinct else EmbeddingBagCollectionSharder()
    planner = EmbeddingShardingPlanner(
        topology=Topology(world_size=WORKERS, compute_device="cpu"),
        constraints={name: ParameterConstraints(sharding_types=[ShardingType.TABLE_WISE.value]) for name in case.names})
    plan = planner.collective_plan(model, [sharder], dist.group.WORLD)
    return DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=[sharder])


def take_part(rank: int, turns: Turns, case: Case, log: str, port: int, distinct: bool) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(WORKERS), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(WORKERS),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    workload = opened(case.recipe(log))
    assert workload.tables is not None
    fed, model = batches(case, workload, rank), model_of(case, distinct)
    held = {name: value.local_shards()[0].tensor for key, value in model.state_dict().items()
            if (name := key.split(".")[-2]) in case.names and key.endswith(".weight") and value.local_shards()}
    fill(held, case, workload.tables.specs)
    dense = [parameter for name, parameter in model.named_parameters() if ".net." in f".{name}"]
    optimizer = KeyedOptimizerWrapper({str(n): p for n, p in enumerate(dense)}, lambda these: torch.optim.SGD(these, LR))
    number = 0
    while True:
        turns.begin()
        optimizer.zero_grad()
        numbers, labels, ids = fed[number % case.batches]
        loss = loss_of(model(numbers, ids), labels)
        loss.backward()
        optimizer.step()
        number += 1
        turns.note(number, loss.item())
