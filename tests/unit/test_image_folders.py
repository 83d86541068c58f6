"""Images in folders: which files count, as which class, how they stand, and where the logits' bias starts."""

from __future__ import annotations

import importlib
import io
from pathlib import Path

import numpy as np
import pytest

from elastic.errors import RecipeError
from elastic.model.initial import initial_values
from tests.support.images import everything, png, section
from vision.data import prepare
from vision.images import decode

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")


def put(path: Path, value: int = 128) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(np.full((8, 8, 3), value, np.uint8)))


LAID = {  # names of files -> images by class
    "deeper": (["cat/day/0.png", "cat/night/0.png", "dog/day/0.png", "dog/x/y/z/1.png"], {"cat": 2, "dog": 2}),
    "underscores": (["_back_/0.png", "yes/_DSC1.png", "yes/_DSC2.png", "no/__/_.png"],
                    {"_back_": 1, "no": 1, "yes": 2}),
    "a class like a part of another": (["a/b/0.png", "b/a/0.png", "b/1.png"], {"a": 1, "b": 2}),
    "signs": (["a b/0.PNG", "c#?%20/0.png", "\u00e9/0.png"], {"a b": 1, "c#?%20": 1, "\u00e9": 1}),
    "one deep, one flat": (["a/0.png", "b/c/d/0.png", "b/1.png"], {"a": 1, "b": 2})}


@pytest.mark.parametrize("laid", LAID)
@pytest.mark.parametrize("prefix", ["", "file://"])
def test_the_folders_below_the_path_are_the_classes(laid: str, prefix: str, tmp_path: Path) -> None:
    names, wanted = LAID[laid]
    for name in names:
        put(tmp_path / "in" / name)
    info = prepare(section(format="imagefolder", path=f"{prefix}{tmp_path}/in"), {}, tmp_path / "cache")
    found = [info["classes"][label] for label in everything(info)["label"]]
    assert {name: found.count(name) for name in found} == wanted and info["notes"] == []


def test_links_are_followed_and_what_is_left_out_is_named(tmp_path: Path) -> None:
    for name in ("in/a/0.png", "in/b/0.png", "in/.cache/0.png", "in/a/.hidden.png", "in/stray.png", "far/1.png",
                 "far/deep/2.png"):
        put(tmp_path / name)
    (tmp_path / "in" / "a" / "notes.txt").write_text("words")
    (tmp_path / "in" / "b" / "far").symlink_to(tmp_path / "far")
    (tmp_path / "in" / "c").symlink_to(tmp_path / "far" / "deep")
    (tmp_path / "in" / "b" / "3.png").symlink_to(tmp_path / "far" / "1.png")
    (tmp_path / "in" / "b" / "4.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "in" / "b" / "round").symlink_to(tmp_path / "in")
    info = prepare(section(format="imagefolder", path=str(tmp_path / "in")), {}, tmp_path / "cache")
    found = [info["classes"][label] for label in everything(info)["label"]]
    assert {name: found.count(name) for name in found} == {"a": 1, "b": 4, "c": 1}
    hidden, other, astray = info["notes"]
    assert all(f"{tmp_path}/in/{name}" in hidden for name in (".cache", "a/.hidden.png", "b/4.png", "b/round"))
    assert "as no image by its name" in other and other.endswith("notes.txt")
    assert "outside the classes' folders" in astray and astray.endswith("stray.png")
    assert all(line.startswith("data.path: left out") for line in info["notes"])


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_images_stand_as_their_exif_says(turn: int, kind: str) -> None:
    """EXIF 2.3, tag 0x0112: what the stored rows and columns are of the scene."""
    scene = np.zeros((16, 24), np.uint8)
    scene[:8, :12], scene[8:, 12:] = 250, 120
    stored = {1: lambda s: s, 2: lambda s: s[:, ::-1], 3: lambda s: s[::-1, ::-1], 4: lambda s: s[::-1],
              5: lambda s: s.T,
              6: lambda s: s.T[::-1], 7: lambda s: s[::-1, ::-1].T, 8: lambda s: s.T[:, ::-1]}[turn](scene)
    image, out = Image.fromarray(np.ascontiguousarray(stored)), io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = turn
    image.save(out, kind, exif=exif, **({"quality": 100} if kind == "JPEG" else {}))
    found = decode(out.getvalue(), "x")[..., 0].astype(int)
    assert found.shape == scene.shape and np.abs(found - scene).max() < 4


@pytest.mark.parametrize("kind", ["resnet", "vit"])
@pytest.mark.parametrize("counts", [[1, 2, 5], [7, 1, 0, 8], [4, 4]])
def test_the_bias_of_the_logits_may_start_at_the_classes_shares(kind: str, counts: list[int], tmp_path: Path) -> None:
    for label, count in enumerate(counts):
        for number in range(count):
            put(tmp_path / "in" / "abcd"[label] / f"{number}.png")
    put(tmp_path / "in" / "c" / "x.png") if 0 in counts else None
    info = prepare(section(format="imagefolder", path=str(tmp_path / "in")), {}, tmp_path / "cache")
    seen = np.array([count or 1 for count in counts])
    build = importlib.import_module(f"vision.{kind}").build
    found = initial_values(build({"bias_init": "mean"}, info).parameters, 0, {})["head.bias"]
    np.testing.assert_allclose(np.exp(found), seen / seen.sum(), rtol=1e-6)
    assert not initial_values(build({}, info).parameters, 0, {})["head.bias"].any()
    with pytest.raises(RecipeError, match="model.bias_init = 'median' must be one of zeros, mean"):
        build({"bias_init": "median"}, info)
