"""Text to token ids and back: characters, bytes, or byte pairs (Sennrich et al. 2016) trained on the training text.

A tokenizer is described by a JSON text, its spec, which is all that is needed to build it again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np

from elastic.errors import UserError

KINDS = ("char", "byte", "bpe")
# characters handed to the bpe trainer and encoder at a time, before the end of a line as `str.splitlines` knows them
LEAST = (1 << 16) - 1
PIECES = re.compile(rf"(?s).{{{LEAST},}}?(?:\r\n|[\n-\r\x1c-\x1e\x85\u2028\u2029])|.+")


class Tokenizer(Protocol):
    """Token ids are int64 arrays in [0, size)."""

    size: int

    def encode(self, text: str) -> np.ndarray:
        """Token ids; UserError for a character that the training text does not have."""

    def decode(self, tokens: Sequence[int]) -> str:
        """The text; bytes that are no UTF-8 become U+FFFD."""


def train(kind: str, training: str, everything: str, vocab_size: int) -> str:
    """The spec of a tokenizer. Characters come from `everything` (evaluation text too, as in nanoGPT), byte pairs from
    `training`."""
    if kind == "char":
        return json.dumps({"kind": "char", "characters": "".join(sorted(set(everything)))})
    if kind == "byte":
        return json.dumps({"kind": "byte"})
    return json.dumps({"kind": "bpe", "tokenizer": train_byte_pairs(training, vocab_size)})


@lru_cache(maxsize=8)
def build(spec: str) -> Tokenizer:
    """The tokenizer of a spec."""
    value = json.loads(spec)
    kinds: dict[str, Callable[[dict], Tokenizer]] = {"char": Characters, "byte": Bytes, "bpe": BytePairs}
    return kinds[value["kind"]](value)


class Characters:
    """One id for each distinct character, in code-point order."""

    def __init__(self, value: dict):
        self._points = code_points(value["characters"])
        self.size = len(self._points)

    def encode(self, text: str) -> np.ndarray:
        points = code_points(text)
        ids = np.minimum(np.searchsorted(self._points, points), self.size - 1)
        unknown = np.flatnonzero(self._points[ids] != points)
        if unknown.size:
            raise UserError(f"The character {text[unknown[0]]!r} does not occur in the training text; leave it out.")
        return ids

    def decode(self, tokens: Sequence[int]) -> str:
        return self._points[np.asarray(tokens, np.int64)].tobytes().decode("utf-32-le")


def code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), "<u4")


class Bytes:
    """The 256 bytes of UTF-8."""

    def __init__(self, value: dict):
        self.size = 256

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int64)

    def decode(self, tokens: Sequence[int]) -> str:
        return np.asarray(tokens, np.uint8).tobytes().decode(errors="replace")


class BytePairs:
    """Byte-level byte pairs through the `tokenizers` library: any text can be encoded."""

    def __init__(self, value: dict):
        import tokenizers

        self._tokenizer = tokenizers.Tokenizer.from_str(value["tokenizer"])
        self.size = self._tokenizer.get_vocab_size()

    def encode(self, text: str) -> np.ndarray:
        return np.concatenate([np.asarray(self._tokenizer.encode(piece).ids, np.int64) for piece in pieces(text)]
                              or [np.zeros(0, np.int64)])

    def decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode([int(token) for token in tokens])


def train_byte_pairs(text: str, vocab_size: int) -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(pieces(text), trainer)
    return tokenizer.to_str()


def pieces(text: str) -> Iterator[str]:
    """The text in pieces that end behind a line, so that no word is cut."""
    return (found[0] for found in PIECES.finditer(text))
