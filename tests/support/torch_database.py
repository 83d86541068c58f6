"""The modules of torch.nn, as torch's own database of modules has them, each trained by the platform and by plain torch.

    python -m tests.support.torch_database [FILE]     # all of them, as a table
"""

from __future__ import annotations

import functools
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from backends.pytorch.backend import framework
from benchmarks.kit import results
from elastic.recipe import Recipe
from tests.support import plain_torch
from tests.support.inprocess import Result, fit, module_recipe

HERE = "tests.support.torch_database"
STEPS, BATCH, SHARDS, RATE, TOLERANCE = 3, 6, 2, 0.05, 1e-6
EQUAL, EQUAL_ONCE_CALLED, REFUSED, UNBUILT, WRONG = "equal", "equal once called on an example", "refused", "cannot be built", "wrong"


@functools.cache
def database() -> dict[str, Any]:
    """ModuleInfo by name."""
    from torch.testing._internal.common_modules import module_db

    torch.backends.__allow_nonbracketed_mutation_flag = True  # type: ignore[attr-defined]  # switched off by that import, for the process
    return {info.name: info for info in module_db}


@functools.cache
def inputs(name: str) -> list[Any]:
    """ModuleInputs, of which nobody changes the arrays."""
    info = database()[name]
    with framework.seeded(0):
        listed = info.module_inputs_func(info, device="cpu", dtype=torch.float32, requires_grad=False, training=True)
    return [entry for entry in listed if entry.forward_input is not None]


class Rows:
    """One number each, by which a module's input is scaled."""

    def __init__(self, size: int = 18):
        self.s = np.random.default_rng(0).uniform(0.5, 1.0, size).astype(np.float32)

    def __len__(self) -> int:
        return len(self.s)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"s": self.s[i]}


class Held(nn.Module):
    """A module of the database on one of its inputs there, of which the first array of floats is scaled by a row and a
    trained gain.

    `called`: once where it is made, as lazy modules need it.
    """

    def __init__(self, name: str, number: int, called: bool = False):
        super().__init__()
        entry = inputs(name)[number]
        self.part = database()[name].module_cls(*entry.constructor_input.args, **entry.constructor_input.kwargs).float()
        self.given, self.shape = tree_flatten((entry.forward_input.args, entry.forward_input.kwargs))
        self.scaled = next((i for i, value in enumerate(self.given) if torch.is_tensor(value)
                            and value.is_floating_point()), -1)
        self.gain = nn.Parameter(torch.ones(()))
        if called:
            self.on(1.0)

    def on(self, scale: Any) -> Any:
        args, kwargs = tree_unflatten([value * scale if i == self.scaled else value
                                       for i, value in enumerate(self.given)], self.shape)
        return self.part(*args, **kwargs)

    def loss(self, b: Any) -> Any:
        """Of every element something else, and never steep."""
        out = [(found, s) for s in b["s"] for found in tree_leaves(self.on(self.gain * s))]
        terms = [s * torch.log1p((found * ramp(found)).square().mean()) for found, s in out if torch.is_tensor(found)
                 and found.is_floating_point()]
        return torch.stack([*terms, 0.1 * self.gain.square()]).sum() / len(b["s"])


def ramp(like: Any) -> Any:
    return torch.linspace(0.5, 1.5, like.numel()).reshape(like.shape)


@dataclass(frozen=True)
class Oracle:
    """What plain torch makes of a module, by name; `start` is of its parameters."""

    config: dict[str, Any]
    start: dict[str, np.ndarray]
    wanted: dict[str, np.ndarray]


def oracle(name: str) -> Oracle:
    """On the first of its inputs with which it trains to numbers. ValueError where there is none, or whatever building
    it raises."""
    for number in range(len(inputs(name))):
        config = {"name": name, "number": number, **({"called": True} if name.startswith("nn.Lazy") else {})}
        made = framework.construct(Held, config, 0)
        start = {key: p.detach().numpy().copy() for key, p in made.named_parameters()}
        wanted = plain_torch.train(made, Rows(), STEPS, BATCH, SHARDS, "sgd", RATE)
        if all(np.isfinite(value).all() for value in wanted.values()):
            return Oracle(config, start, wanted)
    raise ValueError("plain torch trains it to no numbers")


# What torch's own modules raise where an entry's arguments do not build or train them.
BUILDING = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, RuntimeError, TypeError,
            ValueError)


@dataclass(frozen=True)
class Outcome:
    name: str
    kind: str
    told: str = ""


def outcome(name: str, folder: Path) -> Outcome:
    """What comes of a module, on one and on two workers, beside plain torch."""
    try:
        plain = oracle(name)
    except BUILDING as error:
        return Outcome(name, UNBUILT, f"{type(error).__name__}: {error}")
    folder = folder / name
    if "called" not in plain.config:
        return judged(name, plain, folder, EQUAL)
    refused = trained({**plain.config, "called": False}, folder / "0", 1)
    told = str(refused.outcome.error)
    if refused.outcome.status == "done" or "call it once on an example" not in told:
        return Outcome(name, WRONG, f"trains without values: {refused.outcome}")
    return judged(name, plain, folder, EQUAL_ONCE_CALLED, told)


def judged(name: str, plain: Oracle, folder: Path, equal: str, told: str = "") -> Outcome:
    """`equal`, with what was `told`; REFUSED or WRONG, and why."""
    one = trained(plain.config, folder / "1", 1)
    if one.outcome.status != "done":
        said = str(one.outcome.error)
        return Outcome(name, REFUSED if said.startswith("model.kind") and said.endswith(".") and "\n" not in said
                       and not one.steps else WRONG, said)
    two = trained(plain.config, folder / "2", 2)
    if two.outcome.status != "done" or two.sha != one.sha:
        return Outcome(name, WRONG, f"two workers: {two.outcome.status} {two.outcome.error}")
    if np.array_equal(plain.start["gain"], plain.wanted["gain"]):
        return Outcome(name, WRONG, "nothing trains in plain torch")
    found = {key.partition("/")[2]: array for key, array in one.arrays().items() if not key.startswith("optimizer/")}
    if set(found) != set(plain.wanted):
        return Outcome(name, WRONG, f"arrays {set(found) ^ set(plain.wanted)}")
    far = {key: distance(found[key], value) for key, value in plain.wanted.items()}
    worst = max(far, key=lambda key: far[key])
    return Outcome(name, equal, told) if far[worst] <= TOLERANCE else Outcome(name, WRONG, f"{worst} is {far[worst]:.1e} apart by norm")


def distance(found: np.ndarray, wanted: np.ndarray) -> float:
    """By norm, as a part of what is wanted; norms below 0.1 count as 0.1. Infinite where either is not finite."""
    found, wanted = found.astype(np.float64), wanted.astype(np.float64)
    apart = np.linalg.norm(found - wanted) / max(np.linalg.norm(wanted), 0.1)
    return float(apart) if np.isfinite(apart) else np.inf


def trained(config: dict[str, Any], folder: Path, workers: int) -> Result:
    return fit(folder, recipe(config, workers))


def recipe(config: dict[str, Any], workers: int) -> Recipe:
    return module_recipe("", STEPS, model={"kind": f"{HERE}:Held", **config},
                         data={"kind": f"{HERE}:Rows", "batch_size": BATCH, "shuffle": False},
                         checkpoint={"every_steps": STEPS},
                         elastic={"max_workers": workers, "logical_shards": SHARDS},
                         optimizer={"name": "sgd", "lr": RATE, "weight_decay": 0.0, "momentum": 0.0})


def table(found: Sequence[Outcome]) -> str:
    counts = Counter(one.kind for one in found)
    told = ", ".join(f"{counts[kind]} {kind}" for kind in (EQUAL, EQUAL_ONCE_CALLED, REFUSED, UNBUILT, WRONG))
    rows = [(one.name, one.kind, one.told) for one in found if one.kind != EQUAL]
    equal = ", ".join(one.name.removeprefix("nn.") for one in found if one.kind == EQUAL)
    return "\n\n".join((
        "# Modules of torch.nn", f"{date.today()} · {results.versions()}",
        f"    python -m {HERE} benchmarks/results/torch_modules.md",
        "Every module in torch's own database (`torch.testing._internal.common_modules`), on the first of its inputs "
        f"there with which\nplain torch trains it to numbers: {STEPS} steps of SGD over {SHARDS} logical shards, on "
        "one and on two workers. Equal: the same bits on both,\n"
        f"and within {TOLERANCE:.0e} by norm of plain torch over the same shards, parameters and buffers.",
        f"{len(found)} modules: {told}.", results.table(("module", "outcome", "in its words"), rows),
        f"Equal: {equal}.")) + "\n"


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        found = [outcome(name, Path(folder)) for name in database()]
    text = table(found)
    if sys.argv[1:]:
        Path(sys.argv[1]).write_text(text)
    else:
        print(text)
    return 1 if any(one.kind == WRONG for one in found) else 0


if __name__ == "__main__":
    sys.exit(main())
