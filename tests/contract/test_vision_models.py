"""The image models: every framework against the reference, and the reference's sizes and torch's numbers against models written without ours."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from elastic.errors import RecipeError, UserError
from tests.support.frameworks import assert_close, load, names
from tests.support.models import Rig, rig_of
from vision import resnet, vit

INFO = {"shape": [8, 8, 2], "num_classes": 7}
MODELS = {
    "batch": (resnet, {"blocks": [1, 2], "width": 4, "stem": "small"}),
    "group": (resnet, {"blocks": [1, 1], "width": 4, "stem": "large", "norm": "group", "groups": 2}),
    "bottleneck": (resnet, {"blocks": [1, 1], "width": 3, "stem": "small", "bottleneck": True, "smoothing": 0.1}),
    "vit": (vit, {"layers": 2, "heads": 2, "width": 8, "patch": 4, "mlp": 2, "smoothing": 0.1}),
    "vit with dropout": (vit, {"layers": 1, "heads": 2, "width": 8, "patch": 4, "dropout": 0.2}),
}


def rig(name: str, model: str) -> Rig:
    """Weights large enough that every part of the model matters, the last norm of a block too; statistics that are not
    at their start."""
    module, config = MODELS[model]
    found = rig_of(name, module.build(config, INFO))
    rng = np.random.default_rng(5)
    for _, view in sorted(found.layout.views(found.param).items()):
        view += rng.standard_normal(view.shape).astype(np.float32) * np.float32(0.1)
    for key, value in sorted(found.state.items()):
        value += rng.uniform(0.1, 0.5, value.shape).astype(np.float32)
        assert key.endswith((".mean", ".var"))
    return found


def image_batch(rows: int = 6, mixed: bool = False) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 7, (2, rows))
    batch = {"image": rng.standard_normal((rows, 8, 8, 2)).astype(np.float32), "label": labels[0],
             "row_weight": (np.arange(rows) < rows - 1).astype(np.float32)}
    return {**batch, "label2": labels[1], "mix": rng.uniform(0, 1, rows).astype(np.float32)} if mixed else batch


@pytest.mark.parametrize("name", names())
def test_one_value_a_channel_is_refused(name: str) -> None:
    load(name, "backend")
    found = rig_of(name, resnet.build({"blocks": [1], "width": 4, "stem": "large"},
                                      {"shape": [4, 4, 2], "num_classes": 7}))
    batch = {key: value[:, :4, :4] if key == "image" else value for key, value in image_batch(1).items()}
    batch["row_weight"] = np.ones(1, np.float32)
    with pytest.raises(UserError, match='model.norm = "batch" needs several values of each channel, and "s0.b0.conv1" '
                                        'gets one'):
        found.gradient(batch, 1)
    assert np.isfinite(found.gradient({key: np.concatenate([value] * 2) for key, value in batch.items()},
                                      1)[1].loss_sum)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", names("reference"))
def test_model_agrees_with_the_reference(name: str, model: str, mixed: bool) -> None:
    load(name, "backend")
    found, wanted = rig(name, model), rig("reference", model)
    batch = image_batch(mixed=mixed)
    (a, left), (b, right) = found.gradient(batch, 9), wanted.gradient(batch, 9)
    assert left.loss_sum == pytest.approx(right.loss_sum, rel=1e-5)
    assert left.weight == right.weight == 5
    assert_close(a, b, 1e-4)
    assert set(left.buffers) == set(right.buffers) == set(found.state)
    for key, value in right.buffers.items():
        assert_close(left.buffers[key], value, 1e-5, key)
        assert not np.allclose(value, found.state[key])
    scores, oracle = found.backend.metrics(image_batch()), wanted.backend.metrics(image_batch())
    assert set(scores) == {"loss", "accuracy", "top5"}
    for key, (total, weight) in oracle.items():
        assert scores[key] == pytest.approx((total, weight), rel=1e-4), key


@pytest.mark.parametrize(("blocks", "bottleneck", "published"), [
    ([2, 2, 2, 2], False, 11_689_512), ([3, 4, 6, 3], False, 21_797_672), ([3, 4, 6, 3], True, 25_557_032)],
                         ids=["18", "34", "50"])
def test_resnets_have_the_published_sizes(blocks: list[int], bottleneck: bool, published: int) -> None:
    """torchvision's counts for 1000 classes."""
    model = resnet.build({"blocks": blocks, "bottleneck": bottleneck}, {"shape": [224, 224, 3], "num_classes": 1000})
    assert sum(int(np.prod(spec.shape)) for spec in model.parameters.values()) == published


def test_vit_has_the_published_size() -> None:
    """torchvision's ViT-B/16 without its class token and that one's position."""
    model = vit.build({"layers": 12, "heads": 12, "width": 768, "patch": 16},
                      {"shape": [224, 224, 3], "num_classes": 1000})
    assert sum(int(np.prod(spec.shape)) for spec in model.parameters.values()) == 86_567_656 - 2 * 768


def plain_resnet(found: Rig, images: Any, labels: Any) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """The model "batch", step by step in PyTorch's own layout: mean loss, leaves, running statistics."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    F = torch.nn.functional
    leaves = {key: torch.from_numpy(np.array(view)).requires_grad_()
              for key, view in found.layout.views(found.param).items()}
    state = {key: torch.from_numpy(value.copy()) for key, value in found.state.items()}

    def conv(name: str, x: Any, stride: int = 1) -> Any:
        weight = leaves[f"{name}.weight"].permute(3, 2, 0, 1).contiguous()
        x = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)
        return F.batch_norm(x, state[f"{name}.norm.mean"], state[f"{name}.norm.var"], leaves[f"{name}.norm.weight"],
                            leaves[f"{name}.norm.bias"], True)

    x = F.relu(conv("stem", torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()))
    x = F.relu(x + conv("s0.b0.conv2", F.relu(conv("s0.b0.conv1", x))))
    x = F.relu(conv("s1.b0.shortcut", x, 2) + conv("s1.b0.conv2", F.relu(conv("s1.b0.conv1", x, 2))))
    x = F.relu(x + conv("s1.b1.conv2", F.relu(conv("s1.b1.conv1", x))))
    logits = F.adaptive_avg_pool2d(x, 1).flatten(1) @ leaves["head.weight"] + leaves["head.bias"]
    return F.cross_entropy(logits, torch.from_numpy(labels), reduction="sum"), leaves, state


def test_same_numbers_as_a_plain_network() -> None:
    load("torch", "backend")
    found, batch = rig("torch", "batch"), image_batch()
    batch["row_weight"][:] = 1
    loss, leaves, state = plain_resnet(found, batch["image"], batch["label"])
    loss.backward()
    flat, result = found.gradient(batch)
    assert result.loss_sum == pytest.approx(loss.item(), rel=1e-6)
    for key, view in found.by_name(flat).items():
        assert_close(view, leaves[key].grad.numpy(), 1e-4, key)
    for key, value in result.buffers.items():
        assert_close(value, state[key].numpy(), 1e-6, key)


@pytest.mark.parametrize(("module", "config", "words"), [
    (resnet, {"blocks": []}, "model.blocks"), (resnet, {"blocks": [2, 0]}, "model.blocks"),
    (resnet, {"blocks": 3}, "model.blocks = 3"),
    (resnet, {"width": 0}, "model.width = 0"),
    (resnet, {"stem": "tiny"}, "model.stem = 'tiny' must be one of large, small"),
    (resnet, {"norm": "layer"}, "model.norm"),
    (resnet, {"norm": "group", "width": 12}, "model.width = 12 must be a multiple"),
    (resnet, {"smoothing": 1.0}, "model.smoothing"), (resnet, {"bottleneck": 1}, "model.bottleneck"),
    (resnet, {"depth": 18}, "model.depth"),
    (vit, {"patch": 3}, "model.patch = 3 must divide"), (vit, {"heads": 3}, "model.heads = 3"),
    (vit, {"dropout": -0.1}, "model.dropout"),
    (vit, {"recompute": "yes"}, "model.recompute"),
    (vit, {"blocks": 2}, "model.blocks = 2 is not a key of vision.vit")])
def test_bad_keys_are_named(module: Any, config: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        module.build(config, INFO)
