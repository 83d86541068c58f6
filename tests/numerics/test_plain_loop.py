"""A run of one worker against a plain torch loop that imports nothing of the platform: same losses, same parameters."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.support.inprocess import fit, gpt_recipe

torch = pytest.importorskip("torch", reason="torch is not installed")

from tests.support.plain_gpt import PlainGPT, pairs  # noqa: E402  (it needs torch)

STEPS, BATCH, CONTEXT, HEADS, WIDTH, LAYERS = 10, 4, 8, 2, 16, 2
LR, MIN_LR, WARMUP, DECAY, CLIP = 3e-3, 1e-3, 3, 0.1, 0.8
TEXT = "the quality of mercy is not strained, it droppeth as the gentle rain from heaven upon the place beneath. "[:106]
# The 12 windows of the text in the order of seed 0, and how far they are shifted, epoch by epoch: a run's data never
# changes.
ORDER = [[0, 1, 9, 3, 6, 4, 8, 10, 11, 2, 7, 5], [1, 4, 9, 7, 0, 10, 3, 2, 5, 6, 11, 8],
         [2, 6, 11, 3, 1, 10, 7, 9, 5, 8, 0, 4], [9, 0, 8, 4, 11, 6, 2, 1, 10, 3, 5, 7]]
SHIFTS = [6, 4, 7, 7]


def batches() -> list[Any]:
    """Every step's tokens, (BATCH, CONTEXT + 1)."""
    letters = sorted(set(TEXT))
    tokens = [letters.index(letter) for letter in TEXT]
    starts = [window * CONTEXT + shift for order, shift in zip(ORDER, SHIFTS, strict=True) for window in order]
    rows = [tokens[start:start + CONTEXT + 1] for start in starts]
    return [torch.tensor(rows[k * BATCH:(k + 1) * BATCH]) for k in range(STEPS)]


def rate(step: int) -> float:
    """nanoGPT's schedule."""
    if step <= WARMUP:
        return LR * step / (WARMUP + 1)
    return MIN_LR + 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP))) * (LR - MIN_LR)


def train_plainly(model: PlainGPT) -> list[float]:
    """The mean loss of every step."""
    norms = [p for name, p in model.named_parameters() if "ln" in name]
    others = [p for name, p in model.named_parameters() if "ln" not in name]
    optimizer = torch.optim.AdamW([{"params": others, "weight_decay": DECAY}, {"params": norms, "weight_decay": 0.0}],
                                  betas=(0.9, 0.99))
    losses = []
    for step, tokens in enumerate(batches(), 1):
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        optimizer.zero_grad()
        loss = model(tokens[:, :-1], tokens[:, 1:]) / (BATCH * CONTEXT)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("workers", [1, 3])
def test_ten_steps_agree_with_a_plain_loop(workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    torch.manual_seed(0)
    plain = PlainGPT(len(set(TEXT)), LAYERS, HEADS, WIDTH, CONTEXT, bias=False)
    shapes = {"attn.qkv": (WIDTH, 3, HEADS, WIDTH // HEADS), "attn.out": (HEADS, WIDTH // HEADS, WIDTH)}

    def by_our_names() -> dict[str, np.ndarray]:
        found = {name: (p.t() if turned else p).detach().numpy() for name, (p, turned) in pairs(plain).items()}
        return {name: np.ascontiguousarray(a.reshape(shapes.get(".".join(name.split(".")[1:3]), a.shape)))
                for name, a in found.items()}

    save_file(by_our_names(), tmp_path / "start.safetensors")
    (tmp_path / "text.txt").write_text(TEXT)
    recipe = gpt_recipe(tmp_path / "text.txt", STEPS,
                        model={"layers": LAYERS, "heads": HEADS, "width": WIDTH, "context": CONTEXT,
                                                            "init": str(tmp_path / "start.safetensors")},
                        data={"batch_size": BATCH, "eval_fraction": 0.0},
                        elastic={"max_workers": workers, "logical_shards": BATCH},
                        optimizer={"lr": LR, "min_lr": MIN_LR, "warmup_steps": WARMUP, "beta2": 0.99,
                                   "weight_decay": DECAY,
                                   "clip_norm": CLIP})
    result = fit(tmp_path / "run", recipe)
    result.assert_sound(STEPS)
    losses = train_plainly(plain)
    assert len(set(losses)) == STEPS and max(losses) - min(losses) > 0.1  # it learns: equal losses mean something
    assert [line["loss"] for line in result.metrics] == pytest.approx(losses, rel=1e-5)
    arrays = result.arrays()
    for name, wanted in by_our_names().items():
        np.testing.assert_allclose(arrays[f"parameter/{name}"], wanted, rtol=1e-5, atol=1e-5, err_msg=name)
