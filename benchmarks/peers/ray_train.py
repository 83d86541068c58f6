"""Ray Train's TorchTrainer with DDP: `python -m benchmarks.peers.ray_train --help`.

Fixed size without checkpoints for the steady step; with --elastic and --checkpoint-every for failures and resizes, as
its own guide has it: every process starts again from the last checkpoint.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.kit.logs import StepLog
from benchmarks.kit.mlp import LEARNING_RATE, MLP, ROWS_PER_WORKER, WEIGHT_DECAY, arrays, batch_of


def loop(config: dict[str, Any]) -> None:
    """One worker."""
    import ray.train
    import ray.train.torch

    torch.set_num_threads(1)
    context = ray.train.get_context()
    rank, size, log = context.get_world_rank(), context.get_world_size(), StepLog(config["folder"])
    model = ray.train.torch.prepare_model(MLP())
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
    first, checkpoint, every = 1, ray.train.get_checkpoint(), config["checkpoint_every"]
    if checkpoint:
        with checkpoint.as_directory() as folder:
            saved = torch.load(os.path.join(folder, "state.pt"))
        model.module.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"] + 1
    x, y = map(torch.from_numpy, arrays())
    for step in range(first, config["steps"] + 1):
        rows, labels = batch_of(x, y, step, rank, size, ROWS_PER_WORKER)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(rows), labels).backward()
        optimizer.step()
        log.write(step, size)
        if every and step % every == 0:
            save(rank, step, model, optimizer)


def save(rank: int, step: int, model: Any, optimizer: Any) -> None:
    import ray.train

    with tempfile.TemporaryDirectory() as folder:
        checkpoint = None
        if rank == 0:
            state = {"model": model.module.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            torch.save(state, os.path.join(folder, "state.pt"))
            checkpoint = ray.train.Checkpoint.from_directory(folder)
        ray.train.report({"step": step}, checkpoint=checkpoint)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--elastic", action="store_true", help="from one worker to --workers")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--checkpoint-every", type=int, default=0)
    parser.add_argument("--monitor-s", type=float, default=1.0, help="how often it looks for new resources")
    parser.add_argument("--folder", type=Path, required=True, help="for step logs")
    parser.add_argument("--address", default="", help="of a Ray cluster; none starts one here")
    arguments = parser.parse_args()

    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    if arguments.address:
        ray.init(address=arguments.address, logging_level="ERROR")
    else:
        ray.init(num_cpus=arguments.workers + 1, include_dashboard=False, logging_level="ERROR")
    scaling = ScalingConfig(num_workers=(1, arguments.workers) if arguments.elastic else arguments.workers,
                            elastic_resize_monitor_interval_s=arguments.monitor_s)
    config = {"folder": str(arguments.folder), "steps": arguments.steps, "checkpoint_every": arguments.checkpoint_every}
    storage = arguments.folder / "storage"
    run = RunConfig(name="mlp", storage_path=str(storage.absolute()), failure_config=FailureConfig(max_failures=-1),
                    checkpoint_config=CheckpointConfig(num_to_keep=2))
    TorchTrainer(loop, train_loop_config=config, scaling_config=scaling, run_config=run).fit()


if __name__ == "__main__":
    main()
