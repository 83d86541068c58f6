"""Images as data: every format, bad files in one sentence, and views that depend on seed, epoch and sample alone."""

from __future__ import annotations

import gzip
import importlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from elastic.errors import RecipeError, UserError
from elastic.recipe import load_recipe
from elastic.state.flat_layout import matches
from tests.support.images import CLASSES, draw, everything, idx_files, png, section, vision_recipe, write_idx
from vision.data import open_dataset, prepare
from vision.images import BadImage, decode

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")


def as_idx(folder: Path) -> Any:
    return section(**idx_files(folder))


def as_folder(folder: Path) -> Any:
    for split, count, seed in (("train", 90, 0), ("test", 30, 1)):
        for number, (image, label) in enumerate(zip(*draw(count, seed=seed))):
            place = folder / split / "abc"[label]
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{number:03d}.png").write_bytes(png(image))
    return section(format="imagefolder", path=str(folder / "train"), eval_path=str(folder / "test"))


def as_table(folder: Path) -> Any:
    for split, count, seed in (("train", 90, 0), ("test", 30, 1)):
        images, labels = draw(count, seed=seed)
        rows = [{"bytes": png(image), "path": None} for image in images]
        pq.write_table(pa.table({"image": rows, "label": labels.astype(np.int64)}), folder / f"{split}.parquet",
                       row_group_size=25)
    return section(format="parquet", path=str(folder / "train.parquet"), eval_path=str(folder / "test.parquet"),
                   image="image", label="label")


@pytest.mark.parametrize("make", [as_idx, as_folder, as_table])
def test_every_format_gives_the_same_images(make: Any, tmp_path: Path) -> None:
    info = prepare(make(tmp_path), {}, tmp_path / "cache")
    assert (info["shape"], info["num_classes"], info["num_samples"],
            info["num_eval_samples"]) == ([8, 8, 1], CLASSES, 90, 30)
    assert info["classes"] == (["a", "b", "c"] if make is as_folder else [])
    images, labels = draw(90)
    assert info["mean"][0] == pytest.approx((images / 255).mean(),
                                            rel=1e-12) and info["std"][0] == pytest.approx((images / 255).std(), rel=1e-9)
    for split, (pixels, numbers) in (("train", (images, labels)), ("eval", draw(30, seed=1))):
        found = everything(info, split)
        order = np.lexsort(found["image"].reshape(len(pixels), -1).T)
        wanted = ((pixels / 255 - info["mean"][0]) / info["std"][0])[..., None]
        other = np.lexsort(wanted.astype(np.float32).reshape(len(pixels), -1).T)
        np.testing.assert_allclose(found["image"][order], wanted[other], atol=2e-6)
        assert np.array_equal(found["label"][order], numbers[other])
        assert found["image"].dtype == np.float32 and found["label"].dtype == np.int64


def test_fashion_mnist_as_published(DATA: Path, tmp_path: Path) -> None:
    """The mean and deviation of its training pixels, and its classes, are published."""
    folder = DATA / "fashion-mnist"
    info = prepare(section(path=f"{folder}/t10k-images-idx3-ubyte.gz", eval_fraction=0.2), {}, tmp_path)
    assert info["mean"][0] == pytest.approx(0.286, abs=2e-3) and info["std"][0] == pytest.approx(0.353, abs=2e-3)
    dataset = open_dataset(info, "train")
    assert (dataset.num_samples, info["num_eval_samples"], info["num_classes"]) == (8000, 2000, 10)
    rows = np.arange(10)
    batch = dataset.batch(rows, 0 * rows)
    raw = gzip.decompress((folder / "t10k-labels-idx1-ubyte.gz").read_bytes())
    assert batch["label"].tolist() == list(raw[8:18]) and batch["image"].shape == (10, 28, 28, 1)


def test_views_depend_on_seed_epoch_and_sample_alone(tmp_path: Path) -> None:
    data = as_idx(tmp_path)
    data.crop, data.flip, data.mixup = 2, True, 0.4
    dataset, again = (open_dataset(prepare(data, {}, tmp_path / "cache"), "train", 7) for _ in range(2))
    rows, epochs = np.arange(90), np.arange(90) % 3
    whole = dataset.batch(rows, epochs)
    for i in (89, 3, 40):
        alone = again.batch(rows[i:i + 1], epochs[i:i + 1])
        assert all(np.array_equal(alone[key][0], whole[key][i]) for key in whole)
    assert not np.array_equal(whole["image"], dataset.batch(rows, epochs + 1)["image"])
    assert not np.array_equal(whole["image"],
                              open_dataset(prepare(data, {}, tmp_path / "cache"), "train",
                                           8).batch(rows, epochs)["image"])
    plain = everything(prepare(as_idx(tmp_path), {}, tmp_path / "cache"), "eval")
    varied = everything(prepare(data, {}, tmp_path / "cache"), "eval")
    assert plain.keys() == varied.keys() and all(np.array_equal(plain[key], varied[key]) for key in plain)


def test_crops_and_mirror_images_are_what_they_say(tmp_path: Path) -> None:
    images = np.arange(1, 65, dtype=np.uint8).reshape(1, 8, 8).repeat(400, 0)
    write_idx(tmp_path / "images", images)
    write_idx(tmp_path / "labels", np.arange(400) % 2)
    found = everything(info := prepare(section(path=str(tmp_path / "images"), crop=1, flip=True), {},
                                       tmp_path / "cache"))["image"]
    pixels = np.rint((found[..., 0] * info["std"][0] + info["mean"][0]) * 255).astype(int)
    wide = np.pad(images[0], 1)
    views = [wide[y:y + 8, x:x + 8][:, ::step] for y in range(3) for x in range(3) for step in (1, -1)]
    seen = [next(n for n, view in enumerate(views) if np.array_equal(view, image)) for image in pixels]
    counts = np.bincount(seen, minlength=18)
    assert counts.min() > 0 and counts.max() < 60  # of 400 in 18 equally likely ways
    np.testing.assert_allclose(np.bincount([n % 2 for n in seen]) / 400, 0.5, atol=0.1)


def test_mixtures_are_sums_of_two(tmp_path: Path) -> None:
    data = as_idx(tmp_path)
    plain = everything(prepare(data, {}, tmp_path / "cache"))
    data.mixup = 1.0
    mixed = everything(prepare(data, {}, tmp_path / "cache"))
    part = mixed["mix"][:, None, None, None]
    others = (mixed["image"] - part * plain["image"]) / (1 - part)
    near = [int(np.abs(plain["image"] - other).max((1, 2, 3)).argmin()) for other in others]
    sure = mixed["mix"] < 0.9
    assert np.array_equal(plain["label"][near][sure], mixed["label2"][sure]) and len(set(near)) > 80
    # Beta(1, 1)
    assert mixed["mix"].min() >= 0 and mixed["mix"].max() <= 1 and mixed["mix"].std() == pytest.approx(12 ** -0.5, abs=0.06)


def test_a_part_of_each_class_is_held_out_of_folders(tmp_path: Path) -> None:
    data = as_folder(tmp_path)
    data.eval_path, data.eval_fraction = (), 0.2
    info = prepare(data, {}, tmp_path / "cache")
    parts = [everything(info, split)["label"] for split in ("train", "eval")]
    assert [len(part) for part in parts] == [72, 18]
    assert set(parts[1]) == set(range(CLASSES))
    assert np.array_equal(np.bincount(np.concatenate(parts)), np.bincount(draw(90)[1]))


def spoil(folder: Path, what: str) -> Any:
    """Image data with one thing wrong."""
    data = as_idx(folder)
    path, labels = Path(data.path[0]), folder / "train-labels-idx1-ubyte.gz"
    images, numbers = draw(90)
    if what == "no labels":
        labels.unlink()
    elif what == "fewer labels":
        write_idx(labels, numbers[:-1])
    elif what == "cut":
        path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-5]))
    elif what == "cut gzip":
        path.write_bytes(path.read_bytes()[:-500])
    elif what == "no idx":
        path.write_bytes(b"images")
    elif what == "unknown class":
        write_idx(folder / "t10k-labels-idx1-ubyte.gz", np.append(draw(29, seed=1)[1], 9))
    elif what == "one class":
        write_idx(labels, 0 * numbers)
        data.eval_path = ()
    elif what == "other size":
        write_idx(folder / "t10k-images-idx3-ubyte.gz", images[:30, :6])
    elif what == "no row":
        write_idx(path, images[:0])
        write_idx(labels, numbers[:0])
    elif what == "crop":
        data.crop = 8
    elif what == "another name":
        data.path = (str(path.rename(folder / "pictures.gz")),)
    return data


@pytest.mark.parametrize(("what", "says"), [
    ("no labels", "train-labels-idx1-ubyte.gz beside it"), ("fewer labels", "holds 90 images and its labels 89"),
    ("cut", "holds 5755 bytes of values where its header tells of 5760"), ("cut gzip", "train-images.* cannot be read"),
    ("no idx", "no IDX file of unsigned bytes with 3 or 4 dims"),
    ("unknown class", "row 29 of .*t10k-images.* is of class 9.*0 to 2"),
    ("one class", "images of 1 class"), ("other size", "data.eval_path: row 0 of .* is 6 x 8 .* first image 8 x 8"),
    ("no row", "data.path gives no image"), ("crop",
                                             "data.crop = 8 moves images of 8 x 8 .* out of sight; write less than 8"),
    ("another name", "pictures.gz is not named as a file of images is")])
def test_bad_files_in_one_sentence(what: str, says: str, tmp_path: Path) -> None:
    with pytest.raises((RecipeError, UserError), match=says) as error:
        prepare(spoil(tmp_path, what), {}, tmp_path / "cache")
    assert "\n" not in str(error.value)


def test_damaged_images_are_named_or_skipped_and_counted(tmp_path: Path) -> None:
    data = as_folder(tmp_path)
    one, other = sorted((tmp_path / "train" / "b").iterdir())[:2]
    one.write_bytes(one.read_bytes()[:60])
    with pytest.raises(UserError, match=f"{one.name} is no image that can be decoded"):
        prepare(data, {}, tmp_path / "cache")
    for content, words in ((b"", "has no bytes"), (b"hello", "is no image of a known format")):
        one.write_bytes(content)
        with pytest.raises(UserError, match=f"{one.name} {words};"):
            prepare(data, {}, tmp_path / "cache")
    one.write_bytes(b"")
    other.write_bytes(png(draw(1, side=9)[0][0]))
    data.skip_bad = True
    info = prepare(data, {}, tmp_path / "cache")
    assert (info["num_skipped"], info["num_samples"]) == (2, 88)


def test_images_of_all_sizes_are_brought_to_one(tmp_path: Path) -> None:
    for name, value in (("dark", 40), ("light", 200)):
        (tmp_path / name).mkdir()
        for number in range(1, 6):
            pixels = np.full((20 * number, 30, 3), value, np.uint8)
            pixels[:, :3], pixels[:, -3:] = 255, 0
            (tmp_path / name / f"{number}.png").write_bytes(png(pixels))
    data = section(format="imagefolder", path=(str(tmp_path / "dark"), str(tmp_path / "light")))
    with pytest.raises(UserError, match="2.png is 40 x 30 with 3 channels and the first image 20 x 30"):
        prepare(data, {}, tmp_path / "cache")
    data.image_size = 10
    info = prepare(data, {}, tmp_path / "cache")
    assert (info["shape"], info["num_samples"], info["classes"]) == ([10, 10, 3], 10, ["dark", "light"])
    batch = everything(info)
    middle = (batch["image"][:, 5, 5] * info["std"] + info["mean"]) * 255
    np.testing.assert_allclose(middle, np.where(batch["label"] == 0, 40, 200)[:, None].repeat(3, 1), atol=0.1)


def encoded(image: Any, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()


@pytest.mark.parametrize("dtype", ["<u2", ">u2"])
def test_images_of_16_bits_keep_their_upper_8(dtype: str) -> None:
    values = np.random.default_rng(0).integers(0, 1 << 16, (5, 7)).astype(np.uint16)
    kind = "TIFF" if dtype == ">u2" else "PNG"
    image = Image.fromarray(values) if kind == "PNG" else Image.frombytes("I;16B", (7, 5), values.astype(dtype).tobytes())
    assert np.array_equal(decode(encoded(image, kind), "x")[..., 0], values // 256)
    assert np.array_equal(decode(encoded(image, kind), "x", channels=3), (values // 256)[..., None].repeat(3, -1))


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_images_of_32_bits_are_refused(dtype: Any) -> None:
    with pytest.raises(BadImage, match="x holds numbers of 32 bits"):
        decode(encoded(Image.fromarray(np.ones((4, 4), dtype)), "TIFF"), "x")


def test_grey_and_coloured_images_are_brought_to_one_kind(tmp_path: Path) -> None:
    grey, colour = np.full((8, 8), 90, np.uint8), np.full((8, 8, 3), (200, 100, 0), np.uint8)
    veiled = Image.merge("LA", (Image.fromarray(grey), Image.new("L", (8, 8), 7)))
    for name, content in (("a/1", png(grey)), ("b/1", png(colour)), ("b/2", encoded(veiled))):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / f"{name}.png").write_bytes(content)
    data = section(format="imagefolder", path=str(tmp_path / "in"))
    with pytest.raises(UserError, match="3 channels and the first image 8 x 8 with 1 channel; .*data.channels all to "
                                        "grey or to colour"):
        prepare(data, {}, tmp_path / "cache")
    luma = round(200 * 0.299 + 100 * 0.587)  # ITU-R 601-2
    for channels, wanted in ((3, [[90] * 3, [200, 100, 0], [90] * 3]), (1, [[90], [luma], [90]])):
        data.channels = channels
        info = prepare(data, {}, tmp_path / "cache")
        found = (everything(info)["image"][:, 0, 0] * info["std"] + info["mean"]) * 255
        np.testing.assert_allclose(found, wanted, atol=0.6)


def test_a_bad_row_of_a_table_is_named(tmp_path: Path) -> None:
    data = as_table(tmp_path)
    table = pq.read_table(data.path[0])
    rows = table["image"].to_pylist()
    rows[47] = {"bytes": b"not an image", "path": None}
    pq.write_table(table.set_column(0, "image", pa.array(rows)), data.path[0])
    with pytest.raises(UserError, match="row 47 of .*train.parquet is no image"):
        prepare(data, {}, tmp_path / "cache")
    data.image = "label"
    with pytest.raises(UserError, match='"label" of .* is int64, which holds no bytes'):
        prepare(data, {}, tmp_path / "cache")


def test_new_labels_are_noticed(tmp_path: Path) -> None:
    data = as_idx(tmp_path)
    before = prepare(data, {}, tmp_path / "cache")
    numbers = (draw(90)[1] + 1) % CLASSES
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", numbers)
    info = prepare(data, {}, tmp_path / "cache")
    assert np.array_equal(everything(info)["label"], numbers) and info["key"] != before["key"]
    assert prepare(data, {}, tmp_path / "cache") == info


@pytest.mark.parametrize("label", [10**12, 2**64 - 1])
def test_classes_that_are_ids_are_named(label: int, tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [png(draw(1)[0][0])] * 3, "label": pa.array([0, 1, label], pa.uint64())}),
                   tmp_path / "t.parquet")
    with pytest.raises(UserError, match=f"largest class is {label}, of 3 different ones"):
        prepare(section(format="parquet", path=str(tmp_path / "t.parquet"), image="image", label="label"), {},
                tmp_path / "cache")


def test_a_damaged_cache_is_named(tmp_path: Path) -> None:
    info = prepare(as_idx(tmp_path), {}, tmp_path / "cache")
    pixels = Path(info["train_file"]).with_suffix(".pixels")
    pixels.write_bytes(pixels.read_bytes()[:-100])
    with pytest.raises(UserError, match="delete their folder"):
        open_dataset(info, "train")


@pytest.mark.parametrize(("changes", "says"), [
    ({"data": {"format": "csv"}}, 'data.format = "csv" does not feed model.kind = "vision.vit", which reads images; '
                                  'write one of "idx"'),
    ({"data": {"format": "parquet"}}, 'data.image = "" does not go with data.format = "parquet"; write the column\'s '
                                      'name.'),
    ({"data": {"label": "y"}}, 'data.label = "y" does not go with data.format = "idx"; leave it out'),
    ({"data": {"image_size": 28}}, 'data.image_size = 28 does not go with data.format = "idx"'),
    ({"data": {"channels": 3}}, 'data.channels = 3 does not go with data.format = "idx"'),
    ({"data": {"channels": 2}}, "data.channels = 2 cannot work"),
    ({"data": {"crop": -1}}, "data.crop = -1 cannot work"),
    ({"data": {"mixup": -0.5}}, "data.mixup = -0.5 cannot work"),
    ({"data": {"weights": [1.0]}}, "data.weights = .* has a meaning only for tables of numbers"),
    ({"data": {"kind": "mine:Set"}}, "exclude each other"),
    ({"model": {"kind": "nlp.gpt"}}, 'data.format = "idx" holds images, which model.kind = "nlp.gpt" does not read'),
    ({"model": {"kind": "nlp.gpt"}, "data": {"format": "text", "crop": 0}},
     "data.flip = true has a meaning only for image models"),
])
def test_keys_that_do_not_go_together(changes: dict[str, dict[str, Any]], says: str, tmp_path: Path) -> None:
    files = idx_files(tmp_path)
    with pytest.raises(RecipeError, match=says) as error:
        vision_recipe("vision.vit", files, **changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["vision/fashion_resnet", "vision/fashion_vit"])
def test_shipped_recipes_start_where_the_data_lies(name: str, DATA: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(DATA)
    recipe = load_recipe(name)
    model = importlib.import_module(recipe.model.kind).build(recipe.model.config,
                                                             {"shape": [28, 28, 1], "num_classes": 10})
    size = sum(int(np.prod(spec.shape)) for spec in model.parameters.values())
    assert size < (100_000 if "resnet" in name else 300_000)
    assert all(any(matches(key, [pattern]) for key in model.parameters) for pattern in recipe.optimizer.no_decay)
