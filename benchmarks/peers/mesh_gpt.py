"""nanoGPT's model as a torch user would write it to lay it out on a mesh: whole, or a stage of a pipeline."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    """One layer, pre-norm. Query, key and value of a head lie side by side, so that a tensor rank's rows are whole
    heads."""

    def __init__(self, width: int, d_head: int):
        super().__init__()
        self.d_head = d_head
        self.first, self.second = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, time, _ = x.shape
        parts = self.qkv(self.first(x)).view(rows, time, -1, 3, self.d_head).transpose(1, 2).unbind(3)
        mixed = F.scaled_dot_product_attention(*parts, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(rows, time, -1))
        return x + self.down(F.gelu(self.up(self.second(x))))


class GPT(nn.Module):
    """Layers low to high - 1, with the embedding where `first` and the head where `last`; tied where it has both."""

    def __init__(self, model: Mapping[str, int], vocab_size: int, low: int = 0, high: int = -1, first: bool = True,
                 last: bool = True):
        super().__init__()
        width, high = model["width"], model["layers"] if high < 0 else high
        self.tokens = nn.Embedding(vocab_size, width) if first else None
        self.positions = nn.Embedding(model["context"], width) if first else None
        self.blocks = nn.ModuleDict({str(i): Block(width, width // model["heads"]) for i in range(low, high)})
        self.last = nn.LayerNorm(width, bias=False) if last else None
        self.head = nn.Linear(width, vocab_size, bias=False) if last else None
        self.tie()

    def tie(self) -> None:
        if self.tokens is not None and self.head is not None:
            self.head.weight = self.tokens.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.tokens is not None and self.positions is not None:
            x = self.tokens(x) + self.positions.weight
        for block in self.blocks.values():
            x = block(x)
        return x if self.last is None or self.head is None else self.head(self.last(x))

    def load(self, arrays: Mapping[str, np.ndarray]) -> None:
        """The platform's starting values, by its names."""
        values = {"tokens.weight": arrays["wte"], "head.weight": arrays["wte"], "positions.weight": arrays["wpe"],
                  "last.weight": arrays["ln_f.weight"]}
        for i in self.blocks:
            width = arrays["wte"].shape[1]
            values |= {f"blocks.{i}.first.weight": arrays[f"h{i}.ln1.weight"],
                       f"blocks.{i}.second.weight": arrays[f"h{i}.ln2.weight"],
                       f"blocks.{i}.qkv.weight": arrays[f"h{i}.attn.qkv.weight"].transpose(2, 1, 3, 0).reshape(3 * width, width),
                       f"blocks.{i}.out.weight": arrays[f"h{i}.attn.out.weight"].reshape(width, width).T,
                       f"blocks.{i}.up.weight": arrays[f"h{i}.mlp.up.weight"].T,
                       f"blocks.{i}.down.weight": arrays[f"h{i}.mlp.down.weight"].T}
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(torch.from_numpy(np.ascontiguousarray(values[name])))


def token_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The mean over the tokens."""
    return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1))
