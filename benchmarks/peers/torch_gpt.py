"""nanoGPT's model as a torch user would write it, and its train step in a plain loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    """One layer, pre-norm."""

    def __init__(self, heads: int, width: int):
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, time, width = x.shape
        apart = (part.view(rows, time, self.heads, -1).transpose(1, 2)
                 for part in self.qkv(self.first(x)).split(width, 2))
        mixed = F.scaled_dot_product_attention(*apart, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(rows, time, width))
        return x + self.down(F.gelu(self.up(self.second(x))))


class GPT(nn.Module):
    """Tied embedding and head; gives the mean loss over the tokens (rows, context + 1)."""

    def __init__(self, model: dict[str, int], vocab_size: int):
        super().__init__()
        width = model["width"]
        self.tokens, self.positions = nn.Embedding(vocab_size, width), nn.Embedding(model["context"], width)
        self.blocks, self.last = nn.ModuleList(Block(model["heads"], width)
                                               for _ in range(model["layers"])), nn.LayerNorm(width, bias=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens[:, :-1]) + self.positions.weight
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.last(x), self.tokens.weight)
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), tokens[:, 1:].reshape(-1))


def optimizer_of(gpt: GPT) -> Any:
    return torch.optim.AdamW(gpt.parameters(), 1e-3, betas=(0.9, 0.99), weight_decay=0.1, fused=True)


def stepper(model: dict[str, int], vocab_size: int, tokens: np.ndarray) -> Callable[[], float]:
    """One AdamW step on `tokens` (rows, context + 1) a call; gives the mean loss."""
    gpt = GPT(model, vocab_size)
    optimizer = optimizer_of(gpt)

    def step() -> float:
        torch.use_deterministic_algorithms(False)  # ours turns them on for the whole process
        optimizer.zero_grad()
        loss = gpt(torch.from_numpy(tokens))
        loss.backward()
        optimizer.step()
        torch.use_deterministic_algorithms(True)
        return loss.item()

    return step
