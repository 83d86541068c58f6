"""nanoGPT's model as a plain module, and which of its parameters is which of ours."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    def __init__(self, width: int, heads: int, bias: bool):
        super().__init__()
        self.heads = heads
        self.ln1, self.ln2 = nn.LayerNorm(width, bias=bias), nn.LayerNorm(width, bias=bias)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias), nn.Linear(width, width, bias)
        self.up, self.down = nn.Linear(width, 4 * width, bias), nn.Linear(4 * width, width, bias)

    def forward(self, x: Any) -> Any:
        rows, time, width = x.shape
        q, k, v = (part.view(rows, time, self.heads, -1).transpose(1, 2)
                   for part in self.qkv(self.ln1(x)).split(width, 2))
        scores = (q @ k.transpose(2, 3)) / math.sqrt(width // self.heads)
        scores = scores.masked_fill(torch.tril(torch.ones(time, time)) == 0, -math.inf)
        x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(rows, time, width))
        return x + self.down(F.gelu(self.up(self.ln2(x))))


class PlainGPT(nn.Module):
    """nanoGPT's model, written without ours."""

    def __init__(self, vocab: int, layers: int, heads: int, width: int, context: int, bias: bool):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads, bias) for _ in range(layers))
        self.ln_f, self.head = nn.LayerNorm(width, bias=bias), nn.Linear(width, vocab, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, tokens: Any, targets: Any) -> Any:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.ln_f(x))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


def pairs(plain: PlainGPT) -> dict[str, tuple[Any, bool]]:
    """Our name -> (its parameter, whether ours is the transpose)."""
    out = {"wte": (plain.wte.weight, False), "wpe": (plain.wpe.weight, False)}

    def both(name: str, layer: Any, turned: bool) -> None:
        out[f"{name}.weight"] = (layer.weight, turned)
        if layer.bias is not None:
            out[f"{name}.bias"] = (layer.bias, False)

    for i, block in enumerate(plain.blocks):
        for name, layer in (("ln1", block.ln1), ("ln2", block.ln2)):
            both(f"h{i}.{name}", layer, False)
        for name, layer in (("attn.qkv", block.qkv), ("attn.out", block.out), ("mlp.up", block.up),
                            ("mlp.down", block.down)):
            both(f"h{i}.{name}", layer, True)
    both("ln_f", plain.ln_f, False)
    return out
