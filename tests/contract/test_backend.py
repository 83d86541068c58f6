"""The contract of `elastic.model.backend.Backend`, on every backend."""

from __future__ import annotations

import gc
import threading
import weakref
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from elastic.errors import UserError
from elastic.model.backend import SLOTS, UpdateRule
from nlp.gpt import GPT, Config, build
from tests.support.frameworks import assert_close, door, names, settings
from tests.support.models import SMALL, VOCAB, gpt_rig, rig_of, token_batch
from tests.support.rules import BLOCK, RULES
from tests.support.threads import together

every_backend = pytest.mark.parametrize("name", names())


@every_backend
def test_allocated_buffers_are_aligned_zeros(name: str) -> None:
    backend = gpt_rig(name).backend
    for size in (1, 17, 4096, 70_001):
        buffer = backend.allocate(size)
        assert buffer.shape == (size,) and buffer.dtype == np.float32 and buffer.flags.c_contiguous and buffer.flags.writeable
        assert not buffer.any()
        assert buffer.__array_interface__["data"][0] % 64 == 0


@every_backend
def test_parameters_are_views_of_the_buffer(name: str) -> None:
    rig = gpt_rig(name)
    before = rig.backend.metrics(token_batch())["loss"][0]
    rig.param[:] = 0
    after, weight = rig.backend.metrics(token_batch())["loss"]
    assert before != after
    assert after / weight == pytest.approx(np.log(VOCAB), rel=1e-6)  # all scores equal


@every_backend
def test_gradients_are_added_to_what_is_there(name: str) -> None:
    rig = gpt_rig(name)
    before = rig.param.copy()
    clean, result = rig.gradient(token_batch())
    again, _ = rig.gradient(token_batch())
    onto, _ = rig.gradient(token_batch(), start=1.0)
    assert np.linalg.norm(clean) > 0.1
    assert np.array_equal(clean, again)
    placed = np.concatenate([v.ravel() for v in rig.by_name(onto).values()])
    assert_close(placed - 1, np.concatenate([v.ravel() for v in rig.by_name(clean).values()]), 1e-5)
    assert np.array_equal(rig.param, before)
    assert result.weight == 3 * SMALL["context"]
    assert result.loss_sum == pytest.approx(rig.backend.metrics(token_batch())["loss"][0], rel=1e-6)


class Counted(GPT):
    """A GPT whose metrics hold one value a row as well, and which has a tally for them."""

    def metrics(self, ops: Any, params: Any, state: Any, batch: Any) -> Any:
        scores = self.logits(ops, params, ops.narrow(batch["tokens"], 1, 0, 4))
        return {**super().metrics(ops, params, state, batch),
                "first": (ops.sum(ops.narrow(scores, 1, 0, 1), (1, 2)), 1.0)}

    def tally(self) -> None:
        return None


@every_backend
def test_values_of_rows_for_a_tally_come_as_arrays(name: str) -> None:
    rig, batch = rig_of(name, Counted(Config(**SMALL), VOCAB)), token_batch()
    total, weight = rig.backend.metrics(batch)["loss"]
    assert type(total) is float and type(weight) is float
    for rows in (3, 1):
        first, _ = rig.backend.metrics({key: column[:rows] for key, column in batch.items()})["first"]
        assert isinstance(first, np.ndarray) and first.dtype == np.float64
        assert_close(first, np.asarray(rig.backend.logits(batch["tokens"][:rows, :4])[:, 0].sum(1)), 1e-5)


@every_backend
def test_frozen_parameters_get_no_gradient(name: str) -> None:
    whole = gpt_rig(name)
    part = gpt_rig(name, freeze=("wte", "h0.*"))
    wanted = whole.by_name(whole.gradient(token_batch())[0])
    found = part.by_name(part.gradient(token_batch())[0])
    assert set(found) == {n for n in wanted if n != "wte" and not n.startswith("h0.")}
    for key, value in found.items():
        assert_close(value, wanted[key], 1e-5, key)


@every_backend
def test_a_bias_learns_beside_a_frozen_weight(name: str) -> None:
    whole = gpt_rig(name, config={"bias": True})
    part = gpt_rig(name, freeze=("*.weight",), config={"bias": True})
    wanted, found = (rig.by_name(rig.gradient(token_batch())[0]) for rig in (whole, part))
    for key in ("h0.attn.qkv.bias", "h1.attn.out.bias", "h0.mlp.up.bias", "h1.mlp.down.bias", "ln_f.bias"):
        assert np.linalg.norm(np.asarray(wanted[key])) > 1e-3
        assert_close(found[key], wanted[key], 1e-5, key)


@every_backend
def test_filler_rows_count_for_nothing(name: str) -> None:
    rig = gpt_rig(name)
    filled, short = token_batch(4, real=2), {k: v[:2] for k, v in token_batch(4).items()}
    (a, left), (b, right) = rig.gradient(filled), rig.gradient(short)
    assert left.weight == right.weight == 2 * SMALL["context"]
    assert left.loss_sum == pytest.approx(right.loss_sum, rel=1e-6)
    assert_close(a, b, 1e-5)
    nothing, empty = rig.gradient(token_batch(2, real=0))
    assert (empty.loss_sum, empty.weight) == (0.0, 0.0)
    assert not nothing.any()


@every_backend
def test_dropout_is_a_function_of_the_seed(name: str) -> None:
    rig = gpt_rig(name, config={"dropout": 0.2})
    one, same, other = (rig.gradient(token_batch(), seed)[0] for seed in (1, 1, 2))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)
    assert rig.backend.metrics(token_batch()) == gpt_rig(name).backend.metrics(token_batch())


def trained(name: str, rule: UpdateRule, cut_at: tuple[int, ...] = (), steps: int = 3, size: int = 5 * BLOCK
            + 333) -> dict[str, Any]:
    """Parameters and slots after some steps, each applied in ranges cut at `cut_at`."""
    backend = gpt_rig(name).backend
    rng = np.random.default_rng(1)
    arrays = {key: backend.allocate(size) for key in ("param", *SLOTS[rule.name])}
    arrays["param"][:] = rng.standard_normal(size)
    for step in range(1, steps + 1):
        grad = backend.allocate(size)
        grad[:] = rng.standard_normal(size)
        bounds = (0, *cut_at, size)
        for low, high in zip(bounds, bounds[1:]):
            slots = {slot: arrays[slot][low:high] for slot in SLOTS[rule.name]}
            backend.update(replace(rule, step=step), arrays["param"][low:high], grad[low:high], slots, BLOCK)
    return arrays


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@every_backend
def test_update_agrees_with_the_reference(name: str, rule: UpdateRule) -> None:
    found, wanted = trained(name, rule), trained("reference", rule)
    for key in found:
        assert_close(found[key], wanted[key], 1e-6, key)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@every_backend
def test_update_bits_do_not_depend_on_the_ranges(name: str, rule: UpdateRule) -> None:
    whole = trained(name, rule)
    for cut_at in ((BLOCK,), (2 * BLOCK, 3 * BLOCK), tuple(range(BLOCK, 6 * BLOCK, BLOCK))):
        parts = trained(name, rule, cut_at)
        assert all(np.array_equal(whole[key], parts[key]) for key in whole), cut_at


@every_backend
def test_no_gradient_buffer_outlives_its_generation(name: str) -> None:
    """Each is a piece of one that may be shared memory, and of that nothing goes before all of it is let go."""
    rig = gpt_rig(name)
    param, grad = rig.param[:rig.layout.decays[0][2]], rig.gradient(token_batch())[0]
    slots = {slot: rig.backend.allocate(len(param)) for slot in SLOTS["adamw"]}
    memory = weakref.ref(grad.base)
    rig.backend.squared_norms(grad, BLOCK)
    rig.backend.update(RULES["adamw"], param, grad[:len(param)], slots, BLOCK)
    del grad
    gc.collect()
    assert memory() is None


@every_backend
def test_unknown_optimizer_is_named(name: str) -> None:
    backend = gpt_rig(name).backend
    buffer = backend.allocate(16)
    with pytest.raises(UserError, match="lion"):
        backend.update(replace(RULES["sgd"], name="lion"), buffer, backend.allocate(16), {}, BLOCK)


@every_backend
def test_squared_norms_are_per_block(name: str) -> None:
    backend = gpt_rig(name).backend
    grad = backend.allocate(3 * BLOCK + 5)
    grad[:] = np.random.default_rng(0).standard_normal(len(grad)) * 1e15  # the sum of squares leaves float32
    wanted = [float((grad[i:i + BLOCK].astype(np.float64) ** 2).sum()) for i in range(0, len(grad), BLOCK)]
    found = backend.squared_norms(grad, BLOCK)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, wanted, rtol=1e-12)
    assert np.array_equal(backend.squared_norms(grad[BLOCK:], BLOCK), found[1:])
    grad[BLOCK] = np.nan
    assert np.isnan(backend.squared_norms(grad, BLOCK)[1])


@every_backend
def test_backends_in_threads_do_not_disturb_each_other(name: str) -> None:
    config = {"dropout": 0.1}
    wanted = [gpt_rig(name, config=config).gradient(token_batch(seed=i), i)[0] for i in range(4)]

    def work(i: int, group: Any) -> list[Any]:
        rig = gpt_rig(name, config=config)
        return [rig.gradient(token_batch(seed=i), i)[0] for _ in range(5)]

    for flats, flat in zip(together(4, work), wanted):
        assert all(np.array_equal(one, flat) for one in flats)


@every_backend
def test_logits_score_the_next_token(name: str) -> None:
    rig = gpt_rig(name)
    batch = token_batch()
    scores = rig.backend.logits(batch["tokens"][:, :-1]).astype(np.float64)
    logs = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    loss = -np.take_along_axis(logs, batch["tokens"][:, 1:, None].astype(np.int64), -1).sum()
    assert loss == pytest.approx(rig.backend.metrics(batch)["loss"][0], rel=1e-5)
    assert rig.backend.logits(batch["tokens"][:1, :3]).shape == (1, 3, VOCAB)


@pytest.mark.parametrize(("name", "changes", "words"), [
    ("torch", {"precision": "float16"}, "precision"), ("torch", {"device": "tpu"}, "device"),
    ("reference", {"device": "cuda"}, "device"), ("reference", {"precision": "bfloat16"}, "precision")])
def test_impossible_settings_are_named(name: str, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        door(name).create(build(SMALL, {"vocab_size": VOCAB}), settings(**changes))


def test_cuda_where_there_is_none() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA GPU here")
    with pytest.raises(UserError, match="cuda"):
        door("torch").create(build(SMALL, {"vocab_size": VOCAB}), settings(device="cuda"))
    assert door("torch").create(build(SMALL, {"vocab_size": VOCAB}), settings(device="auto")).device.type == "cpu"


def test_every_thread_computes_with_the_recipe_s_thread_count() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    rig, seen = gpt_rig("torch", threads=2), []

    def work() -> None:
        rig.gradient(token_batch())
        seen.append(torch.get_num_threads())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    rig.gradient(token_batch())
    assert [*seen, torch.get_num_threads()] == [2, 2]
    gpt_rig("torch").gradient(token_batch())
    assert torch.get_num_threads() == 1


class Twisted(GPT):
    """Calls what no framework has."""

    def loss(self, ops: Any, params: Any, state: Any, batch: Any, seed: int) -> Any:
        return ops.twist(params["wte"]), 1.0, {}


@every_backend
def test_a_kernel_that_a_framework_lacks_is_one_sentence(name: str) -> None:
    with pytest.raises(UserError, match=rf"^model.kind calls ops.twist, which the {name} backend lacks[^\n]*$"):
        rig_of(name, Twisted(Config(**SMALL), VOCAB)).gradient(token_batch())
