"""What a language model's mean loss (nats per token) says in other units."""

from __future__ import annotations

import math


def perplexity(loss: float) -> float:
    """exp(loss); infinite where that does not fit into a float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def bits_per_character(loss: float, num_tokens: int, num_characters: int) -> float:
    """Loss in bits, spread over the characters that the tokens stand for: comparable between tokenizers."""
    return loss / math.log(2.0) * num_tokens / num_characters
