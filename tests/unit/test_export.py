"""A checkpoint's parameters as others read them: the other's own loader is the oracle."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from safetensors.torch import load_model

from elastic import cli, workload
from elastic.checkpoint import safetensors
from elastic.checkpoint.manager import commit, split
from elastic.checkpoint.manifest import Manifest, Piece
from elastic.checkpoint.part import Image
from elastic.errors import BadCheckpoint
from elastic.recipe import Recipe, dumps, parse
from elastic.storage.store import Store
from tests.support import modules
from tests.support.checkpoints import load, write_part
from tests.support.inprocess import fit, module_recipe

torch = pytest.importorskip("torch", reason="torch is not installed")
VOCAB = 50


class Normed(torch.nn.Module):
    """A user's own: its state dict has buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))


def test_a_user_s_module_takes_its_state_dict(tmp_path: Path) -> None:
    module, other = Normed(), Normed()
    for tensor in module.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(3)).abs() * 9)
    parameters = dict(module.named_parameters())
    arrays = {f"{'parameter' if name in parameters else 'buffer'}/{name}": value.detach().numpy()
              for name, value in module.state_dict().items()}
    store = Store.open(tmp_path / "c")
    commit(store, Manifest(4, 1, 16, 0, "", (write_part(store, 4, 1, "state", arrays),)))
    assert export(tmp_path / "c", "torch", tmp_path / "w.pt") == 0
    other.load_state_dict(torch.load(tmp_path / "w.pt", weights_only=True))
    assert_same({name: value.numpy() for name, value in other.state_dict().items()},
                {n: v.numpy() for n, v in module.state_dict().items()})
    assert export(tmp_path / "c", "safetensors", tmp_path / "w.safetensors") == 0
    assert_same(load_file(tmp_path / "w.safetensors"), {n: v.numpy() for n, v in module.state_dict().items()})


def test_complex_numbers_are_what_the_public_library_reads(tmp_path: Path) -> None:
    """It has complex64 and no complex128: that comes as pairs of float64, and ours puts it together, from a file of its
    own dtype too."""
    from safetensors.torch import load_file as torch_file

    draw = np.random.default_rng(4)
    wide = {name: draw.standard_normal(shape) + 1j * draw.standard_normal(shape)
            for name, shape in (("z", (3, 2)), ("one", ()), ("none", (0, 2)))}
    arrays = {**{f"buffer/{name}": value for name, value in wide.items()},
              "buffer/half": wide["z"].astype(np.complex64),
              "parameter/w": np.ones(3, np.float32), "buffer/n": np.arange(2)}
    store = Store.open(tmp_path / "c")
    entry = write_part(store, 4, 1, "state", arrays)
    path = tmp_path / "c" / commit(store, Manifest(4, 1, 16, 0, "", (entry,)))
    assert export(path, "safetensors", tmp_path / "w.safetensors") == 0
    for file, prefix in ((path / entry.name, "buffer/"), (tmp_path / "w.safetensors", "")):
        for found in (load_file(file), {name: value.numpy() for name, value in torch_file(file).items()}):
            for name, value in wide.items():
                pairs = found[prefix + name]
                assert pairs.dtype == np.float64 and pairs.shape == (*value.shape, 2)
                assert np.array_equal(pairs[..., 0] + 1j * pairs[..., 1], value)
            assert np.array_equal(found[prefix + "half"], arrays["buffer/half"]) and len(found) == len(arrays)
    assert_same(load(*split(path))[0], arrays)
    assert_same(safetensors.decode((tmp_path / "w.safetensors").read_bytes(), "w"),
                {key.partition("/")[2]: value for key, value in arrays.items()})


def test_a_checkpoint_with_a_dtype_of_our_own_still_loads(tmp_path: Path) -> None:
    """As earlier versions wrote complex128."""
    values = np.arange(6).reshape(3, 2) * (1 + 2j)
    image, store = Image((Piece("buffer/z", "complex128", (3, 2), (0, 0), (3, 2)),)), Store.open(tmp_path / "c")
    length = int.from_bytes(image.bytes[:8].tobytes(), "little")
    header = json.dumps({"buffer/z": {"dtype": "C128", "shape": [3, 2], "data_offsets": [0, 96]}}).encode()
    image.bytes[8:8 + length] = np.frombuffer(header.ljust(length), np.uint8)
    image.fill(lambda name, low, high: values.reshape(-1)[low:high])
    folder = "step-00000004"
    entry = image.write(store, folder, "state-0000-of-0001-g000001.safetensors")
    assert commit(store, Manifest(4, 1, 16, 0, "", (entry,))) == folder
    assert_same(load(*split(tmp_path / "c" / folder))[0], {"buffer/z": values})


@pytest.mark.parametrize("named", ['["w"]', '["', '7', '[["w"]]'])
def test_a_file_that_names_other_numbers_complex_is_refused_or_read_as_it_is(named: str) -> None:
    header = json.dumps({"__metadata__": {"complex128": named},
                         "w": {"dtype": "F64", "shape": [3], "data_offsets": [0, 24]}}).encode()
    content = len(header).to_bytes(8, "little") + header + np.ones(3).tobytes()
    if named == '[["w"]]':
        assert_same(safetensors.decode(content, "w"), {"w": np.ones(3)})
        return
    with pytest.raises(BadCheckpoint, match="is not a safetensors file that this version reads"):
        safetensors.decode(content, "w")


class Tied(torch.nn.Module):
    """An array under two names, and buffers that a state dict has, and has not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(6, 6), torch.nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.register_buffer("steps", torch.zeros(1))
        self.register_buffer("table", torch.arange(6.0), persistent=False)

    def loss(self, batch: Any) -> Any:
        if self.training:
            self.steps += 1
        return (self.second(self.first(batch["x"]) + self.table) - batch["y"]).square().mean()


def test_a_trained_module_takes_its_export_strictly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modules, "Tied", Tied, raising=False)
    result = fit(tmp_path / "run", module_recipe("Tied", 3, optimizer={"lr": 1e-3}, elastic={"max_workers": 1}))
    result.assert_sound(3)
    assert export(tmp_path / "run", "torch", tmp_path / "w.pt") == export(tmp_path / "run", "safetensors", tmp_path / "w.safetensors") == 0
    loaded, module = torch.load(tmp_path / "w.pt", weights_only=True), Tied()
    module.load_state_dict(loaded, strict=True)
    arrays = result.arrays()
    assert np.array_equal(module.second.weight.detach().numpy(), arrays["parameter/first.weight"])
    assert np.array_equal(module.steps.numpy(), arrays["buffer/steps"]) and module.steps.item() > 0
    assert loaded["first.weight"].data_ptr() == loaded["second.weight"].data_ptr() and loaded.facts["key"] == "100 samples"
    assert sorted(load_file(tmp_path / "w.safetensors")) == ["first.bias", "first.weight", "second.bias", "steps"]
    assert save_model_takes(tmp_path / "w.safetensors") == ([], [])


def save_model_takes(file: Path) -> tuple[list[str], list[str]]:
    """(missing, unexpected), by safetensors' own loader of torch modules."""
    missing, unexpected = load_model(Tied(), file)
    return list(missing), list(unexpected)


def make(root: Path, bias: bool = True, kind: str = "nlp.gpt",
         step: int = 4) -> tuple[Path, dict[str, np.ndarray], Recipe]:
    """A checkpoint of a small GPT with random values everywhere; its parameters by name, and its recipe."""
    recipe = parse({"run": {"steps": 4}, "backend": {"name": "torch", "device": "cpu"},
                    "model": {"kind": "nlp.gpt", "layers": 2, "heads": 4, "width": 32, "context": 16, "dropout": 0.1,
                              "bias": bias},
                    "data": {"format": "text", "path": "plays.txt", "batch_size": 4}}, locate=False)
    generator = np.random.default_rng(1)
    specs = workload.open_model(recipe, {"vocab_size": VOCAB}).parameters
    values = {name: generator.standard_normal(spec.shape, np.float32) * np.float32(0.2) for name, spec in specs.items()}
    arrays = {f"{prefix}/{name}": value for prefix in ("parameter", "optimizer/exp_avg")
              for name, value in values.items()}
    text = dumps(recipe).replace('"nlp.gpt"', f'"{kind}"')
    store = Store.open(root)
    entry = write_part(store, step, 1, "state", arrays)
    return root / commit(store, Manifest(step, 1, 4 * step, 0, text, (entry,))), values, recipe


def export(path: Path, form: str, out: Path) -> int:
    return cli.run(["export", str(path), "--format", form, "--out", str(out)])


def assert_same(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert sorted(found) == sorted(wanted)
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype and np.array_equal(found[name], value), name


def test_safetensors_hold_the_parameters_alone(tmp_path: Path) -> None:
    path, values, _ = make(tmp_path / "c")
    assert export(path, "safetensors", tmp_path / "new" / "w.safetensors") == 0
    assert_same(load_file(tmp_path / "new" / "w.safetensors"), values)
    assert os.listdir(tmp_path / "new") == ["w.safetensors"]


def test_torch_loads_its_state_dict_without_running_code(tmp_path: Path) -> None:
    path, values, _ = make(tmp_path / "c")
    assert export(path, "torch", tmp_path / "w.pt") == 0
    loaded = torch.load(tmp_path / "w.pt", weights_only=True)
    assert_same({name: tensor.numpy() for name, tensor in loaded.items()}, values)


@pytest.mark.parametrize("bias", [True, False])
def test_transformers_computes_the_same_logits(tmp_path: Path, bias: bool) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    path, values, recipe = make(tmp_path / "c", bias)
    assert export(path, "hf", tmp_path / "hf") == 0
    assert sorted(os.listdir(tmp_path / "hf")) == ["config.json", "model.safetensors"]
    theirs, told = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = np.random.default_rng(2).integers(0, VOCAB, (3, 16))
    with torch.no_grad():
        found = theirs.eval()(torch.from_numpy(tokens)).logits.numpy()
    backend = workload.create_backend(recipe, workload.open_model(recipe, {"vocab_size": VOCAB}))
    backend.bind(values, {})
    wanted = backend.logits(tokens)  # type: ignore[attr-defined]
    assert np.abs(wanted).max() > 1.0, "the logits are large enough to be compared"
    np.testing.assert_allclose(found, wanted, atol=1e-5, rtol=1e-5)
    if not bias:
        assert not any(np.any(v) for k, v in load_file(tmp_path / "hf" / "model.safetensors").items()
                       if k.endswith(".bias"))


@pytest.mark.parametrize(("form", "out", "says"), [
    ("pickle", "new", "--format pickle must be one of safetensors, torch, hf, parquet."),
    ("safetensors", "there", "--out there exists already"),
    ("torch", "there", "--out there exists already"),
    ("hf", "folder", "--out folder exists already"),
    ("hf", "dangling", "--out dangling exists already"),
    ("safetensors", "there/below", "--out there/below cannot be written"),
    ("safetensors", "s3://bucket/w", "must be a path on this machine"),
    ("safetensors", "", "must be a path on this machine"),
])
def test_a_mistake_is_one_sentence_and_exit_code_2(tmp_path: Path, form: str, out: str, says: str,
                                                   monkeypatch: pytest.MonkeyPatch,
                                                   capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    path, _, _ = make(tmp_path / "c")
    (tmp_path / "there").write_text("kept")
    (tmp_path / "folder").mkdir()
    (tmp_path / "dangling").symlink_to("nowhere")
    before = sorted(os.listdir(tmp_path))
    assert cli.run(["export", str(path), "--format", form, "--out", out]) == 2
    err = capsys.readouterr().err
    assert says in err and err.startswith("elastic: ") and err.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == before and (tmp_path / "there").read_text() == "kept"


def test_another_model_has_no_hugging_face_layout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, _, _ = make(tmp_path / "c", kind="my.module:Net")
    assert export(path, "hf", tmp_path / "hf") == 2
    assert '--format hf is for the model nlp.gpt, and this checkpoint is of "my.module:Net"' in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["c"]


def damage(path: Path) -> None:
    """Flips a bit of a parameter."""
    file = next(path.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    length = int.from_bytes(content[:8], "little")
    start = 8 + length + json.loads(content[8:8 + length])["parameter/wte"]["data_offsets"][0]
    content[start] ^= 1
    file.write_bytes(content)


def test_a_damaged_checkpoint_gives_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, _, _ = make(tmp_path / "c")
    damage(path)
    for given in (path, tmp_path / "c"):
        assert export(given, "safetensors", tmp_path / "w") == 2
        assert "hash" in capsys.readouterr().err and os.listdir(tmp_path) == ["c"]


def test_of_a_run_the_newest_good_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, values, _ = make(tmp_path / "run" / "checkpoints")
    newer, _, _ = make(tmp_path / "run" / "checkpoints", step=5)
    damage(newer)
    assert export(tmp_path / "run", "safetensors", tmp_path / "w") == 0
    assert "of step 4" in capsys.readouterr().out
    assert_same(load_file(tmp_path / "w"), values)
