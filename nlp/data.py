"""Text as windows of tokens: files or a column of tables, read through pyarrow, tokenised once into Arrow files, memory-mapped afterwards.

The data door of a language model: `prepare` turns the recipe's `[data]` into plain facts (`info`), `open_dataset` turns
the facts into a data set. Both give the same on every machine that sees the same text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from elastic.data.arrow import FORMAT, read_tokens, write_tokens
from elastic.data.cache import facts_once
from elastic.data.dataset import Dataset
from elastic.data.files import find, left_out
from elastic.data.permutation import keyed_word
from elastic.data.text import read_column, read_text
from elastic.errors import RecipeError, UserError
from nlp import encode as tokenizing
from nlp.augment import MaskedWindows
from nlp.gpt import Config

VOCAB_SIZE = 1024  # of byte pairs, where the recipe says nothing
UNIT = "tokens"  # what a batch's weight counts


def prepare(data: Any, model_config: Mapping[str, Any], cache_dir: str | Path) -> dict[str, Any]:
    """Facts that a model and `open_dataset` need, as plain values; tokenises the text where `cache_dir` does not hold
    it yet.

    `data` has format and text (the column, of tables), path and eval_path (files, folders, globs, URIs,
    "package:NAME/GLOB"; eval_path may be empty), tokens, eval_fraction and perhaps vocab_size. Keys of the result:
    vocab_size, tokenizer (its spec), context, mask (0 for a model that reads on), num_tokens, num_eval_tokens,
    train_file, eval_file, sources, notes (lines on what is left out), key (the same for the same text, cut and tokens).
    RecipeError names the key, the file and the remedy.
    """
    context = model_config.get("context", Config.context)
    if isinstance(context, bool) or not isinstance(context, int) or context < 1:
        raise RecipeError(f"model.context = {context!r} must be a whole number of at least 1.")
    source = read(data)
    folder = Path(cache_dir) / f"tokens-{source.key}"
    known = facts_once(folder, lambda: tokenise(source, folder))
    files = {"train_file": str(folder / "train.arrow"), "eval_file": str(folder / "eval.arrow")}
    notes = [*left_out("data.path", data.path), *left_out("data.eval_path", data.eval_path)]
    info = {**known, **files, "notes": notes, "context": context,
            "mask": model_config.get("mask", 0.0), "sources": list(data.path), "key": source.key}
    check_lengths(data, info)
    return info


def open_dataset(info: Mapping[str, Any], split: str, seed: int = 0) -> TokenWindows | MaskedWindows:
    """The "train" split, its windows shifted anew every epoch, or the "eval" split, not shifted; with `mask`, tokens
    hidden in them."""
    tokens = read_tokens(info[f"{split}_file"])
    expected = info["num_tokens" if split == "train" else "num_eval_tokens"]
    if len(tokens) != expected:
        raise UserError(f"The token file {info[f'{split}_file']} holds {len(tokens)} tokens instead of {expected}; "
                        "delete its folder, it is made again.")
    windows = TokenWindows(tokens, info["context"], seed if split == "train" else None)
    if not info.get("mask"):
        return windows
    return MaskedWindows(windows, info["vocab_size"], info["mask"], seed if split == "train" else 0)


def encode(info: Mapping[str, Any], text: str) -> list[int]:
    """The token ids of a prompt."""
    return tokenizing.build(info["tokenizer"]).encode(text).tolist()


def decode(info: Mapping[str, Any], tokens: Sequence[int]) -> str:
    """The text of token ids."""
    return tokenizing.build(info["tokenizer"]).decode(tokens)


class TokenWindows(Dataset):
    """Windows of `context` + 1 tokens, the last `context` of which are the targets of the first.

    Window i of epoch e starts at i * context + offset(e), with an offset in [0, context) drawn from (seed, e), so that
    over the epochs a model sees other cuts of the text; without a seed the offset is 0. No token is a target twice in
    an epoch.
    """

    def __init__(self, tokens: np.ndarray, context: int, seed: int | None):
        self.tokens, self.context, self.seed = tokens, context, seed
        shifts = 1 if seed is None else context
        self.num_samples = max(0, (len(tokens) - shifts) // context)

    def offset(self, epoch: int) -> int:
        return 0 if self.seed is None else keyed_word(self.seed, epoch, self.context) % self.context

    def batch(self, indices: np.ndarray, epochs: np.ndarray) -> dict[str, np.ndarray]:
        """{"tokens": int32 (rows, context + 1)}."""
        offsets = np.array([self.offset(epoch) for epoch in np.asarray(epochs).tolist()], np.int64)
        starts = np.asarray(indices, np.int64) * self.context + offsets
        return {"tokens": self.tokens[starts[:, None] + np.arange(self.context + 1)].astype(np.int32)}


@dataclass(frozen=True)
class Source:
    """The text of both splits, and a key that names text and tokenizer settings."""

    training: str
    evaluation: str
    kind: str
    vocab_size: int
    key: str


def read(data: Any) -> Source:
    """Reads and checks the files that `data` names, and cuts off the evaluation text (as nanoGPT: the last part, by
    characters)."""
    kind, vocab_size = data.tokens or "char", getattr(data, "vocab_size", None) or VOCAB_SIZE
    if kind not in tokenizing.KINDS:
        raise RecipeError(f"data.tokens = {kind!r} must be one of {', '.join(tokenizing.KINDS)}.")
    if kind == "bpe" and vocab_size < 256:
        raise RecipeError(f"data.vocab_size = {vocab_size} must be at least 256, one for each byte.")
    column = data.format, getattr(data, "text", "")
    training = read_all("data.path", data.path, *column)
    if data.eval_path:
        evaluation = read_all("data.eval_path", data.eval_path, *column)
    else:
        cut = int(len(training) * (1.0 - data.eval_fraction))
        training, evaluation = training[:cut], training[cut:]
    digest = hashlib.sha256()
    for part in (FORMAT, kind, str(vocab_size) if kind == "bpe" else "", training, evaluation):
        digest.update(hashlib.sha256(part.encode()).digest())
    return Source(training, evaluation, kind, vocab_size, digest.hexdigest()[:32])


def read_all(key: str, paths: Sequence[str], kind: str, column: str) -> str:
    """The files, or the rows of their column, one after the other; a line break is put where one ends without."""
    files = find(key, paths)
    texts = [text for file in files for text in (read_column(kind, file, column) if column else [read_text(key, file)])]
    whole = "".join(text if text.endswith("\n") or n == len(texts) - 1 else text + "\n" for n, text in enumerate(texts))
    if not whole:
        raise RecipeError(f"{key}: {files[0].name} holds no text; give a file with some.")
    return whole


def tokenise(source: Source, folder: Path) -> dict[str, Any]:
    """Writes both splits, and says what is in them."""
    spec = tokenizing.train(source.kind, source.training, source.training + source.evaluation, source.vocab_size)
    tokenizer = tokenizing.build(spec)
    kind = np.uint8 if tokenizer.size <= 1 << 8 else np.uint16 if tokenizer.size <= 1 << 16 else np.int32
    splits = {"train": tokenizer.encode(source.training).astype(kind),
              "eval": tokenizer.encode(source.evaluation).astype(kind)}
    for split, tokens in splits.items():
        write_tokens(folder / f"{split}.arrow", tokens)
    return {"vocab_size": tokenizer.size, "tokenizer": spec, "num_tokens": len(splits["train"]),
            "num_eval_tokens": len(splits["eval"])}


def check_lengths(data: Any, info: Mapping[str, Any]) -> None:
    """At least one window in each split that is asked for."""
    context, files = info["context"], ", ".join(info["sources"][:3]) + (", ..." if len(info["sources"]) > 3 else "")
    if info["num_tokens"] < 2 * context:
        raise RecipeError(f"data.path: {files} gives {info['num_tokens']} tokens to train on, fewer than the "
                          f"{2 * context} that model.context = {context} needs; give more text or a smaller context.")
    if 0 < info["num_eval_tokens"] <= context:
        key = f"data.eval_path = {data.eval_path!r}" if data.eval_path else f"data.eval_fraction = {data.eval_fraction}"
        raise RecipeError(f"{key} gives {info['num_eval_tokens']} tokens of {files}, fewer than one window of "
                          f"model.context + 1 = {context + 1}; give more text, a larger part or a smaller context.")
