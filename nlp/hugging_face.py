"""GPT in the layout of Hugging Face's GPT-2: a folder that `GPT2LMHeadModel.from_pretrained` loads, with the same logits.

Their projections are Conv1D, (in, out) as ours; queries, keys and values lie one after the other in one matrix, heads
first in each. Biases are always there: where ours has none they are 0. The head is tied to the embedding and is not
stored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from elastic.errors import UserError
from nlp.gpt import Config

NORM_EPS = 1e-5  # of ops.layer_norm
BLOCK = {"ln1": "ln_1", "attn.qkv": "attn.c_attn", "attn.out": "attn.c_proj", "ln2": "ln_2", "mlp.up": "mlp.c_fc",
         "mlp.down": "mlp.c_proj"}


def write(model: Mapping[str, Any], arrays: Mapping[str, np.ndarray], folder: Path) -> None:
    """`model` has the keys of `[model]`; `folder` is made, with config.json and model.safetensors."""
    config = Config(**model)
    if config.experts:
        raise UserError(f"model.experts = {config.experts} has no place in Hugging Face's GPT-2; export it as "
                        "safetensors.")
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings(config, len(arrays["wte"])), indent=2) + "\n",
                                        encoding="utf-8")
    (folder / "model.safetensors").write_bytes(save(tensors(config, arrays), {"format": "pt"}))


def settings(config: Config, vocab_size: int) -> dict[str, Any]:
    """config.json. Ours names no token that begins or ends a text, so theirs must not either."""
    return {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": vocab_size,
            "n_positions": config.context,
            "n_ctx": config.context, "n_embd": config.width, "n_layer": config.layers, "n_head": config.heads,
            "n_inner": None,
            "activation_function": "gelu", "layer_norm_epsilon": NORM_EPS, "embd_pdrop": config.dropout,
            "resid_pdrop": config.dropout,
            "attn_pdrop": config.dropout, "tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": None,
            "dtype": "float32"}


def tensors(config: Config, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Their names and shapes, our values."""
    width = config.width
    out = {"transformer.wte.weight": np.ascontiguousarray(arrays["wte"]),
           "transformer.wpe.weight": np.ascontiguousarray(arrays["wpe"])}

    def put(theirs: str, ours: str, shape: tuple[int, ...]) -> None:
        bias = arrays.get(f"{ours}.bias", np.zeros(shape[-1:], np.float32))
        out[f"transformer.{theirs}.weight"] = np.ascontiguousarray(arrays[f"{ours}.weight"]).reshape(shape)
        out[f"transformer.{theirs}.bias"] = np.ascontiguousarray(bias).reshape(shape[-1:])

    shapes = {"ln1": (width,), "attn.qkv": (width, 3 * width), "attn.out": (width, width), "ln2": (width,),
              "mlp.up": (width, 4 * width),
              "mlp.down": (4 * width, width)}
    for layer in range(config.layers):
        for ours, theirs in BLOCK.items():
            put(f"h.{layer}.{theirs}", f"h{layer}.{ours}", shapes[ours])
    put("ln_f", "ln_f", (width,))
    return out
