"""A GPT of 124 M parameters on one GPU: our step against a plain torch loop of the same model.

    python -m benchmarks.gpu [--rounds 5] [--steps 20] [--rows 32]

Both compute in bfloat16 (autocast) with `torch.compile`, attention by `scaled_dot_product_attention` and fused AdamW,
from the same weights and on the same rows, turn by turn. Ours is the platform's own loop: the gradients of one logical
shard, the reduction, the vote over a group of one (NCCL), the commit. The plain loop reads no loss and votes on
nothing. Needs torch and NumPy only.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np

from backends.pytorch.backend import framework

# isort: split
import torch

from benchmarks.kit import results
from benchmarks.peers.torch_gpt import GPT, optimizer_of
from elastic.chaos import Injector
from elastic.collective.gloo import GlooGroup
from elastic.collective.kv_store import Endpoint
from elastic.collective.nccl import NcclGroup
from elastic.data.loader import Prefetcher
from elastic.messages import Generation
from elastic.state.state import State
from elastic.worker.loop import begin, train
from elastic.worker.loop_control import Control
from elastic.worker.training import Member, Placement, Plan, Training
from nlp import gpt

VOCAB = 50_304
GOAL = 0.97  # of the plain loop's tokens a second
WARM_STEPS = 3  # of each, before anything counts: they compile
SAME = 0.02  # how far the two losses may lie apart, relatively, after the warm steps
OPTIMIZER = {"name": "adamw", "lr": 1e-3, "min_lr": 0.0, "warmup_steps": 0, "schedule": "constant", "weight_decay": 0.1,
             "beta1": 0.9,
             "beta2": 0.99, "eps": 1e-8, "momentum": 0.9, "clip_norm": 0.0, "ema": 0.0}
# dense bfloat16, from NVIDIA's data sheets; the first name that is part of the device's counts
PEAK_FLOPS = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}

Contestant = Callable[[int], float]  # steps -> the mean loss of the last one


class Batches:
    """The same few batches for both, by step."""

    def __init__(self, rows: int, context: int, vocab_size: int):
        generator = np.random.Generator(np.random.Philox(key=0))
        self.tokens = [generator.integers(0, vocab_size, (rows, context + 1)) for _ in range(8)]
        self.weight = np.ones(rows, np.float32)

    def of(self, step: int) -> np.ndarray:
        return self.tokens[step % len(self.tokens)]

    def __call__(self, step: int, shard: int) -> Mapping[str, Any]:
        return {"tokens": self.of(step), "row_weight": self.weight}


def ours(state: State, batches: Batches, device: torch.device) -> Contestant:
    """The platform's loop, in a group of one."""
    lines: list[Any] = []
    positions = np.arange(len(batches.weight))
    training = Training(Plan(0, 1, 0, True, OPTIMIZER), Prefetcher(batches), lambda step, shard: positions)
    member = Member(training, Placement(state.backend, state), Control(), lines.append)
    endpoint = Endpoint()
    form = (NcclGroup if device.type == "cuda" else GlooGroup).form
    group = form(0, 1, endpoint.address, "gpu", threading.Event(), 120, "127.0.0.1")

    def run(steps: int) -> float:
        torch.use_deterministic_algorithms(True)
        training.plan = replace(training.plan, num_steps=state.committed + steps)
        train(begin(member, Generation(1, ("gpu",), endpoint.address, "", state.committed), group,
                    Injector([], 0, print, print, print)))
        return lines[-1].fields["loss"]

    return run


def plain(module: GPT, batches: Batches, device: torch.device, compiled: bool) -> Contestant:
    """As a torch user would write it; the loss is read at the end alone."""
    optimizer, loss_of, done = optimizer_of(module), torch.compile(module) if compiled else module, [0]

    def run(steps: int) -> float:
        torch.use_deterministic_algorithms(False)  # ours turns them on for the whole process
        for _ in range(steps):
            done[0] += 1
            tokens = torch.from_numpy(batches.of(done[0]))
            if device.type == "cuda":
                tokens = tokens.pin_memory().to(device, non_blocking=True)
            optimizer.zero_grad()
            with torch.autocast(device.type, torch.bfloat16):
                loss = loss_of(tokens)
            loss.backward()
            optimizer.step()
        return loss.item()

    return run


def take_over(module: GPT, values: Mapping[str, Any]) -> None:
    """The weights of `nlp.gpt` in the plain module, whose layers have their outputs first."""
    width = module.tokens.weight.shape[1]
    found = {"tokens.weight": values["wte"], "positions.weight": values["wpe"], "last.weight": values["ln_f.weight"]}
    for i in range(len(module.blocks)):
        h, block = f"h{i}", f"blocks.{i}"
        found |= {f"{block}.first.weight": values[f"{h}.ln1.weight"],
                  f"{block}.second.weight": values[f"{h}.ln2.weight"],
                  f"{block}.qkv.weight": values[f"{h}.attn.qkv.weight"].reshape(width, -1).T,
                  f"{block}.out.weight": values[f"{h}.attn.out.weight"].reshape(-1, width).T,
                  f"{block}.up.weight": values[f"{h}.mlp.up.weight"].T,
                  f"{block}.down.weight": values[f"{h}.mlp.down.weight"].T}
    module.load_state_dict({name: torch.as_tensor(value) for name, value in found.items()})


def flops_per_token(model: Mapping[str, int], num_parameters: int) -> float:
    """Forward and backward, without recomputation: 6 N + 12 L H Q T (PaLM, Chowdhery et al. 2022, appendix B)."""
    return 6 * num_parameters + 12 * model["layers"] * model["width"] * model["context"]


def measure(contestants: Mapping[str, Contestant], rounds: int, steps: int,
            device: torch.device) -> dict[str, list[float]]:
    """Seconds a step of each, round by round. ValueError where the two do not train the same model."""
    for _ in range(2):  # what one sets for the whole process may make the other compile once more
        losses = {name: run(WARM_STEPS) for name, run in contestants.items()}
    low, high = sorted(losses.values())
    if high - low > SAME * high:
        raise ValueError(f"the losses after {WARM_STEPS} steps lie apart, so these are not the same model: {losses}")
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            synchronize(device)
            started = time.perf_counter()
            run(steps)
            synchronize(device)
            found[name].append((time.perf_counter() - started) / steps)
    return found


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def section(seconds: Mapping[str, list[float]], tokens: int, flops: float, device_name: str) -> str:
    peak = next((peak for name, peak in PEAK_FLOPS.items() if name in device_name), 0.0)
    rows = []
    for name, taken in seconds.items():
        rate = tokens / statistics.median(taken)
        rows.append([name, f"{statistics.median(taken) * 1e3:.2f}", f"{rate:,.0f}", f"{flops * rate / peak:.3f}" if peak
                     else "-"])
    ratios = sorted(theirs / mine for theirs, mine in zip(seconds["plain torch"], seconds["ours"], strict=True))
    ratio = statistics.median(ratios)
    return results.table(["", "step, ms", "tokens/s", "FLOPs utilisation"], rows) + (
        f"\n\nOurs against plain torch, median of the rounds: {ratio:.3f} ({ratios[0]:.3f} - {ratios[-1]:.3f}) of its "
        f"tokens a second. Goal: at least {GOAL}; {'reached' if ratio >= GOAL else 'missed'}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda",
                        help="cpu tries the script out and writes no result")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rows", type=int, default=32)
    for key, value in (("layers", 12), ("heads", 12), ("width", 768), ("context", 1024), ("vocab", VOCAB)):
        parser.add_argument(f"--{key}", type=int, default=value)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks.gpu: this process sees no CUDA GPU or has a torch without CUDA, so nothing was measured; "
              "--device cpu tries it out.")
        return
    device, model = torch.device(given.device), {key: getattr(given, key)
                                                 for key in ("layers", "heads", "width", "context")}
    settings = SimpleNamespace(device=given.device, precision="bfloat16", threads=1, compile=given.compile)
    state = State(framework.create(gpt.build(model, {"vocab_size": given.vocab}), settings), "adamw")
    state.start(0)
    module = GPT(model, given.vocab)
    take_over(module, state.layout.views(state.param))
    batches = Batches(given.rows, given.context, given.vocab)
    contestants = {"ours": ours(state, batches, device),
                   "plain torch": plain(module.to(device), batches, device, given.compile)}
    seconds = measure(contestants, given.rounds, given.steps, device)

    num_parameters = sum(parameter.numel() for parameter in module.parameters())
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else results.processor()
    about = (f"A GPT of {num_parameters / 1e6:.0f} M parameters "
             f"({', '.join(f'{key} {value}' for key, value in model.items())}, vocabulary {given.vocab:,}), "
             f"{given.rows} rows a step, on {name}; {given.rounds} rounds of {given.steps} steps. The utilisation is "
             "that of PaLM's appendix B; positions do not count as parameters there. Ours computes with deterministic "
             "kernels, as always, plain torch with whichever it likes best.")
    flops = flops_per_token(model, num_parameters - module.positions.weight.numel())
    table = section(seconds, given.rows * given.context, flops, name)
    if device.type == "cuda":
        results.write("gpu", "One GPU", [about, table])
    else:
        print(f"{about}\n\n{table}")


if __name__ == "__main__":
    main()
