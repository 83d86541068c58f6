"""BERT against Hugging Face's, all backends against the reference, hidden tokens as a pure function, and the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elastic.errors import RecipeError
from elastic.recipe import Recipe, parse
from nlp.augment import MaskedWindows
from nlp.bert import build
from nlp.data import TokenWindows, open_dataset, prepare
from tests.support.frameworks import assert_close, load, names
from tests.support.inprocess import Result, fit, merged
from tests.support.models import Rig, rig_of

torch = pytest.importorskip("torch", reason="torch is not installed")

VOCAB = 11
SMALL = {"layers": 2, "heads": 2, "width": 16, "context": 8, "mask": 0.3}


def rig(name: str, **config: Any) -> Rig:
    """Weights large enough that every part of the model matters."""
    found = rig_of(name, build({**SMALL, **config}, {"vocab_size": VOCAB}))
    found.param += np.random.default_rng(5).standard_normal(len(found.param)).astype(np.float32) * np.float32(0.2)
    return found


def masked(size: int = 4000, mask: float = 0.3, context: int = 8, seed: int = 0) -> MaskedWindows:
    tokens = np.random.default_rng(0).integers(0, VOCAB, size)
    return MaskedWindows(TokenWindows(tokens, context, None), VOCAB, mask, seed)


def batch(rows: int = 4, real: int = 4) -> dict[str, np.ndarray]:
    found = masked().batch(np.arange(rows), np.zeros(rows, np.int64))
    return {**found, "row_weight": (np.arange(rows) < real).astype(np.float32)}


def theirs(mine: Rig) -> Any:
    """Hugging Face's model with the same weights; it has a second embedding for segments, which is 0 here."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    layers, heads, width, context = (int(SMALL[key]) for key in ("layers", "heads", "width", "context"))
    config = transformers.BertConfig(vocab_size=VOCAB + 1, hidden_size=width, num_hidden_layers=layers,
                                     num_attention_heads=heads,
                                     intermediate_size=4 * width, max_position_embeddings=context, type_vocab_size=1,
                                     hidden_act="gelu",
                                     hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, layer_norm_eps=1e-12,
                                     pad_token_id=None)
    model = transformers.BertForMaskedLM(config)
    p = {name: torch.tensor(np.array(view)) for name, view in mine.layout.views(mine.param).items()}
    state: dict[str, Any] = {}

    def put(place: str, weight: Any, bias: Any) -> None:
        state[f"{place}.weight"], state[f"{place}.bias"] = weight, bias

    root = "bert.embeddings"
    state |= {f"{root}.word_embeddings.weight": p["wte"], f"{root}.position_embeddings.weight": p["wpe"],
              f"{root}.token_type_embeddings.weight": torch.zeros(1, width), "cls.predictions.bias": p["vocab.bias"],
              "cls.predictions.decoder.weight": p["wte"], "cls.predictions.decoder.bias": p["vocab.bias"]}
    put(f"{root}.LayerNorm", p["ln_e.weight"], p["ln_e.bias"])
    put("cls.predictions.transform.dense", p["head.weight"].t(), p["head.bias"])
    put("cls.predictions.transform.LayerNorm", p["ln_h.weight"], p["ln_h.bias"])
    for i in range(layers):
        at = f"bert.encoder.layer.{i}"
        for part, name in enumerate(("query", "key", "value")):
            weight, bias = p[f"h{i}.attn.qkv.weight"][:, part], p[f"h{i}.attn.qkv.bias"][part]
            put(f"{at}.attention.self.{name}", weight.reshape(width, width).t(), bias.reshape(width))
        put(f"{at}.attention.output.dense", p[f"h{i}.attn.out.weight"].reshape(width, width).t(),
            p[f"h{i}.attn.out.bias"])
        put(f"{at}.attention.output.LayerNorm", p[f"h{i}.ln1.weight"], p[f"h{i}.ln1.bias"])
        put(f"{at}.intermediate.dense", p[f"h{i}.mlp.up.weight"].t(), p[f"h{i}.mlp.up.bias"])
        put(f"{at}.output.dense", p[f"h{i}.mlp.down.weight"].t(), p[f"h{i}.mlp.down.bias"])
        put(f"{at}.output.LayerNorm", p[f"h{i}.ln2.weight"], p[f"h{i}.ln2.bias"])
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and all("position_ids" in name for name in missing), (missing, unexpected)
    return model


def test_same_loss_and_gradients_as_hugging_face() -> None:
    mine = rig("torch")
    model, rows = theirs(mine), batch()
    flat, result = mine.gradient(rows)
    labels = np.full(rows["tokens"].shape, -100)
    np.put_along_axis(labels, rows["places"].astype(np.int64), rows["targets"], 1)
    loss = model(input_ids=torch.tensor(rows["tokens"].astype(np.int64)),
                 labels=torch.tensor(labels.astype(np.int64))).loss
    loss.backward()
    count = rows["targets"].size
    assert result.weight == count and result.loss_sum == pytest.approx(loss.item() * count, rel=1e-5)
    found = mine.by_name(flat)
    at = model.bert
    for name, gradient in (("wte", at.embeddings.word_embeddings.weight.grad),
                           ("wpe", at.embeddings.position_embeddings.weight.grad),
                           ("h0.mlp.up.weight", at.encoder.layer[0].intermediate.dense.weight.grad.t()),
                           ("h1.ln1.weight", at.encoder.layer[1].attention.output.LayerNorm.weight.grad),
                           ("vocab.bias", model.cls.predictions.bias.grad),
                           ("head.weight", model.cls.predictions.transform.dense.weight.grad.t())):
        assert_close(found[name] / count, gradient.numpy(), 2e-5, name)


@pytest.mark.parametrize("name", names(without="reference"))
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_backends_agree_with_the_reference(name: str, dropout: float) -> None:
    found, wanted = rig(name, dropout=dropout), rig("reference", dropout=dropout)
    (a, left), (b, right) = found.gradient(batch(real=3), seed=9), wanted.gradient(batch(real=3), seed=9)
    assert left.loss_sum == pytest.approx(right.loss_sum, rel=1e-5) and left.weight == right.weight == 6
    assert_close(a, b, 2e-5)
    for key, (total, weight) in wanted.backend.metrics(batch(real=3)).items():
        assert found.backend.metrics(batch(real=3))[key] == (pytest.approx(total, rel=1e-5), weight)


def test_hidden_tokens_are_a_function_of_seed_epoch_and_window() -> None:
    data = masked(mask=0.15, context=40)
    assert (data.num_chosen, data.num_samples) == (6, 99)
    whole = data.batch(np.arange(99), np.full(99, 3))
    one = data.batch(np.array([17]), np.array([3]))
    assert all(np.array_equal(whole[key][17:18], one[key]) for key in whole), "whatever else is in the batch"
    for other in (data.batch(np.arange(99), np.full(99, 4)),
                  masked(mask=0.15, context=40, seed=1).batch(np.arange(99), np.full(99, 3))):
        assert (other["places"] != whole["places"]).any(1).mean() > 0.9
    plain = data.windows.batch(np.arange(99), np.full(99, 3))["tokens"][:, :40]
    assert np.array_equal(np.take_along_axis(plain, whole["places"], 1), whole["targets"])
    assert all(len(set(row)) == 6 for row in whole["places"].tolist())
    untouched = whole["tokens"].copy()
    np.put_along_axis(untouched, whole["places"], whole["targets"], 1)
    assert np.array_equal(untouched, plain), "nothing else changes"


def test_how_tokens_are_hidden() -> None:
    """80 % by the hidden token, 10 % by any, 10 % not at all, every place alike; within four deviations."""
    data = masked(size=120_000)
    found = data.batch(np.arange(data.num_samples), np.zeros(data.num_samples, np.int64))
    shown, count = np.take_along_axis(found["tokens"], found["places"], 1), found["targets"].size
    hidden = (shown == VOCAB).mean()
    same = (shown == found["targets"]).mean()
    assert abs(hidden - 0.8) < 4 * np.sqrt(0.16 / count) and abs(same - (0.1 + 0.1 / VOCAB)) < 4 * np.sqrt(0.1 / count)
    places = np.bincount(found["places"].ravel(), minlength=8) / count
    np.testing.assert_allclose(places, 1 / 8, atol=4 * np.sqrt(1 / 8 / count))
    assert np.ptp(np.bincount(shown[(shown != VOCAB) & (shown != found["targets"])],
                              minlength=VOCAB)) < 0.25 * 0.1 * count / VOCAB


@pytest.mark.parametrize(("config", "words"),
                         [({"mask": 0.0}, "model.mask"), ({"heads": 3}, "model.heads"), ({"layers": 0}, "model.layers"),
                                               ({"dropout": 1}, "model.dropout"), ({"bias": True}, "model.bias"),
                                               ({"recompute": 1}, "model.recompute"),
                          ({"smoothing": 1.0}, "model.smoothing")])
def test_bad_numbers_are_named(config: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        build(config, {"vocab_size": VOCAB})


def recipe(text: Path, **changes: Any) -> Recipe:
    base = {"run": {"steps": 8, "eval_every": 4}, "model": {"kind": "nlp.bert", **SMALL, "layers": 1, "dropout": 0.1},
            "data": {"format": "text", "path": [str(text)], "batch_size": 16, "eval_fraction": 0.02},
            "elastic": {"max_workers": 3, "logical_shards": 8, "hang_timeout_s": 5.0}, "checkpoint": {"every_steps": 4},
            "optimizer": {"lr": 1e-2, "schedule": "cosine", "warmup_steps": 5}}
    return parse(merged(base, changes))


@pytest.mark.parametrize("framework", names(without="reference"))
def test_same_bits_for_any_workers_and_a_kill(framework: str, plays: Path, tmp_path: Path,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    load(framework, "backend")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(name: str, workers: int, chaos: tuple[str, ...] = (), **changes: Any) -> Result:
        result = fit(tmp_path / name, recipe(plays, backend={"name": framework}, elastic={"max_workers": workers},
                                             **changes), chaos)
        result.assert_sound(8)
        return result

    one = run("one", 1)
    for other in (run("two", 2), run("three", 3), run("killed", 3, ("kill:1@5/backward",))):
        assert other.sha == one.sha
        assert [line.get("eval") for line in other.metrics] == [line.get("eval") for line in one.metrics]
    if framework == "torch":
        assert run("other", 1, run={"seed": 1}).sha != one.sha


def test_every_seed_is_evaluated_on_the_same_tokens(plays: Path, tmp_path: Path) -> None:
    info = prepare(recipe(plays).data, SMALL, tmp_path / "cache")
    for split, same in (("eval", True), ("train", False)):
        one, two = (open_dataset(info, split, seed).batch(np.arange(9), np.zeros(9, np.int64)) for seed in (1, 2))
        assert all(np.array_equal(one[key], two[key]) for key in one) == same
