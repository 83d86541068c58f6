"""The neutral GPT against an independent plain module with the same weights, and torch against the reference."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from elastic.errors import RecipeError
from elastic.model.backend import SLOTS
from nlp.gpt import build, generate
from tests.support.frameworks import assert_close, load
from tests.support.models import SMALL, VOCAB, Rig, gpt_rig, token_batch
from tests.support.rules import BLOCK, RULES
from tests.support.sampling import sometimes

torch = pytest.importorskip("torch", reason="torch is not installed")

from tests.support.plain_gpt import PlainGPT, pairs  # noqa: E402  (it needs torch)


def with_weights_of(rig: Rig, bias: bool) -> PlainGPT:
    plain = PlainGPT(VOCAB, SMALL["layers"], SMALL["heads"], SMALL["width"], SMALL["context"], bias)
    views = rig.layout.views(rig.param)
    mapped = pairs(plain)
    assert set(mapped) == set(views)
    with torch.no_grad():
        for name, (parameter, turned) in mapped.items():
            mine = torch.from_numpy(np.array(views[name]))
            parameter.copy_(mine.reshape(parameter.shape[::-1]).t() if turned else mine.reshape(parameter.shape))
    return plain


def spread(rig: Rig) -> None:
    """Weights large enough that every part of the model matters, biases and norms too."""
    rig.param += np.random.default_rng(5).standard_normal(len(rig.param)).astype(np.float32) * np.float32(0.1)


@pytest.mark.parametrize("bias", [False, True])
def test_same_loss_and_gradients_as_a_plain_module(bias: bool) -> None:
    rig = gpt_rig("torch", config={"bias": bias})
    spread(rig)
    plain = with_weights_of(rig, bias)
    batch = token_batch(4)
    flat, result = rig.gradient(batch)
    tokens = torch.from_numpy(batch["tokens"].astype(np.int64))
    loss = plain(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    assert result.loss_sum == pytest.approx(loss.item(), rel=1e-6)
    mapped = pairs(plain)
    for name, found in rig.by_name(flat).items():
        parameter, turned = mapped[name]
        wanted = parameter.grad.t() if turned else parameter.grad
        assert_close(found, wanted.reshape(found.shape).numpy(), 1e-5, name)


@pytest.mark.parametrize("config", [{}, {"bias": True}, {"dropout": 0.3}], ids=str)
def test_torch_agrees_with_the_reference(config: dict[str, Any]) -> None:
    found, wanted = (gpt_rig(name, config=config) for name in ("torch", "reference"))
    for rig in (found, wanted):
        spread(rig)
    batch = token_batch(4, real=3)
    (a, left), (b, right) = found.gradient(batch, seed=9), wanted.gradient(batch, seed=9)
    assert left.loss_sum == pytest.approx(right.loss_sum, rel=1e-6)
    assert left.weight == right.weight
    assert_close(a, b, 5e-6)
    for name, view in wanted.by_name(b).items():
        assert_close(found.by_name(a)[name], view, 1e-5, name)


def test_starts_as_nanogpt_does() -> None:
    model = build({"layers": 4, "heads": 4, "width": 128, "context": 64}, {"vocab_size": 65})
    sizes = [int(np.prod(spec.shape)) for name, spec in model.parameters.items() if name != "wpe"]
    assert sum(sizes) == 795_904  # nanoGPT prints 0.80M for its CPU setting, position embeddings left out
    scales = {name: spec.scale for name, spec in model.parameters.items() if spec.init == "normal"}
    assert {n for n, s in scales.items() if s == 0.02} == {
        "wte", "wpe", *(f"h{i}.{part}.weight" for i in range(4) for part in ("attn.qkv", "mlp.up"))}
    assert {s for s in scales.values() if s != 0.02} == {0.02 / math.sqrt(8)}
    assert all(spec.init == "ones" for name, spec in model.parameters.items() if "ln" in name)
    rig = gpt_rig("torch")
    loss, weight = rig.backend.metrics(token_batch())["loss"]
    assert loss / weight == pytest.approx(math.log(VOCAB), rel=0.02)


def test_later_tokens_do_not_leak() -> None:
    rig = gpt_rig("torch")
    spread(rig)
    tokens = token_batch()["tokens"][:, :-1].copy()
    before = rig.backend.logits(tokens)
    tokens[:, 5:] = (tokens[:, 5:] + 1) % VOCAB
    after = rig.backend.logits(tokens)
    np.testing.assert_allclose(after[:, :5], before[:, :5], rtol=1e-5, atol=1e-6)
    assert np.abs(after[:, 5:] - before[:, 5:]).max() > 1e-3


def test_torch_optimizers_take_the_same_steps() -> None:
    makers = {
        "adamw": lambda p, r: torch.optim.AdamW(p, r.lr, (r.beta1, r.beta2), r.eps, r.weight_decay),
        "adam": lambda p, r: torch.optim.Adam(p, r.lr, (r.beta1, r.beta2), r.eps, r.weight_decay),
        "sgd": lambda p, r: torch.optim.SGD(p, r.lr, r.momentum, weight_decay=r.weight_decay),
        "adagrad": lambda p, r: torch.optim.Adagrad(p, r.lr, weight_decay=r.weight_decay, eps=r.eps),
    }
    for key, make in makers.items():
        rule, backend, size = RULES[key], gpt_rig("torch").backend, 3 * BLOCK + 77
        rng = np.random.default_rng(2)
        param = backend.allocate(size)
        param[:] = rng.standard_normal(size)
        slots = {slot: backend.allocate(size) for slot in ("exp_avg", "exp_avg_sq", "momentum", "sum")}
        theirs = torch.tensor(param, requires_grad=True)
        optimizer = make([theirs], rule)
        for step in range(1, 6):
            grad = rng.standard_normal(size).astype(np.float32)
            theirs.grad = torch.tensor(grad) * rule.scale
            optimizer.step()
            backend.update(replace(rule, step=step), param, grad, {s: slots[s] for s in SLOTS[key]}, BLOCK)
        assert_close(param, theirs.detach().numpy(), 1e-6, key)


@pytest.mark.parametrize(("config", "words"), [
    ({"layers": 0}, "model.layers = 0"), ({"heads": 3}, "model.width = 128 .* model.heads = 3"),
    ({"width": 12.5}, "model.width"),
    ({"context": True}, "model.context"), ({"dropout": 1.0}, "model.dropout"), ({"bias": 1}, "model.bias"),
    ({"depth": 3}, "model.depth")])
def test_bad_numbers_are_named(config: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        build(config, {"vocab_size": VOCAB})


def test_generate_draws_from_the_scores() -> None:
    chain = np.full((5, 5), -30.0)
    chain[np.arange(5), (np.arange(5) + 1) % 5] = 0.0
    seen: list[int] = []

    def logits_of(tokens: np.ndarray) -> np.ndarray:
        seen.append(tokens.shape[1])
        return chain[tokens]

    assert generate(logits_of, [0], 7, context=3) == [1, 2, 3, 4, 0, 1, 2]
    assert max(seen) == 3
    assert generate(logits_of, [3], 2, context=3, temperature=0) == [4, 0]

    def flat(tokens: np.ndarray) -> np.ndarray:
        return np.broadcast_to(np.log([0.5, 0.3, 0.2]), (*tokens.shape, 3))

    drawn = generate(flat, [0], 2000, context=1, seed=1)
    np.testing.assert_allclose(np.bincount(drawn) / 2000, [0.5, 0.3, 0.2], atol=0.04)
    assert drawn == generate(flat, [0], 2000, context=1, seed=1)
    assert set(generate(flat, [0], 200, context=1, top_k=2)) == {0, 1}
    with pytest.raises(ValueError, match="prompt"):
        generate(flat, [], 1, context=1)


@pytest.mark.slow
@sometimes("compiled", 0.3)
def test_compiled_once_and_never_again() -> None:
    if not (shutil.which("g++") or shutil.which("c++")):
        pytest.skip("torch.compile needs a C++ compiler on the CPU")
    load("torch", "backend")
    config = {"layers": 1, "dropout": 0.2}
    plain, compiled = gpt_rig("torch", config=config), gpt_rig("torch", config=config, compile=True)
    wanted, _ = plain.gradient(token_batch(), seed=1)
    found, _ = compiled.gradient(token_batch(), seed=1)
    assert_close(found, wanted, 1e-5)
    count = compiled.backend.compilations()
    assert count == 1 and plain.backend.compilations() == 0
    for seed in range(2, 5):
        compiled.gradient(token_batch(seed=seed), seed)
    assert compiled.backend.compilations() == count
