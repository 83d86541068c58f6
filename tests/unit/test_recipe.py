"""Recipes: defaults of the contract, round trips, and one clear sentence for every mistake."""

from __future__ import annotations

import pickle
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic.errors import RecipeError
from elastic.recipe import Recipe, best_mode, dumps, load_recipe, loads, parse, resolve_path, shipped, with_mesh

DEFAULTS = {
    "run": {"name": "run", "steps": 2000, "epochs": None, "seed": 0, "eval_every": 200},
    "backend": {"name": "torch", "device": "auto", "precision": "float32", "threads": 1, "compile": False},
    "mesh": {"tensor": 1, "pipeline": 1, "expert": 1, "schedule": "1f1b", "micro_batches": 1, "chunks": 2,
             "layout": {}},
    "elastic": {"min_workers": 1, "max_workers": 2, "logical_shards": 4, "reduction": "exact", "hang_timeout_s": 30.0,
                "start_timeout_s": 600.0, "orphan_timeout_s": 300.0, "spares": 0},
    "optimizer": {"name": "adamw", "lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "momentum": 0.9,
                  "weight_decay": 0.0,
                  "schedule": "constant", "warmup_steps": 0, "min_lr": 0.0, "clip_norm": 0.0, "no_decay": (),
                  "sharded": False, "twin": True,
                  "ema": 0.0, "base_batch": 0, "milestones": (), "gamma": 0.1, "pct_start": 0.3, "div_factor": 25.0,
                  "final_div_factor": 1e4},
    "checkpoint": {"every_steps": 200, "keep": 3, "keep_every": 0, "busy": "wait", "write_mb_s": 0.0,
                   "best": "eval.loss", "best_mode": None,
                   "path": ""},
}


@pytest.fixture
def least(tmp_path: Path) -> dict[str, Any]:
    """The least that a recipe can say."""
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be\n" * 50)
    return {"model": {"kind": "nlp.gpt"}, "data": {"format": "text", "path": str(text)}}


def refused(tree: dict[str, Any], *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        parse(tree, overrides)
    message = str(caught.value)
    assert "\n" not in message and message.rstrip()[-1] in ".?"
    return message


def test_defaults_are_the_contract(least: dict[str, Any]) -> None:
    recipe = parse(least)
    for section, keys in DEFAULTS.items():
        assert getattr(recipe, section).model_dump() == keys
    assert recipe.model.config == {"layers": 4, "heads": 4, "width": 128, "context": 64, "dropout": 0.0,
                                   "smoothing": 0.0, "recompute": False,
                                   "experts": 0, "expert_every": 2, "top": 1, "capacity": 1.25, "balance": 0.01}
    assert (recipe.data.batch_size, recipe.data.eval_fraction, recipe.data.shuffle,
            recipe.data.tokens) == (12, 0.1, True, "char")


def test_a_resolved_recipe_says_everything_and_loads_to_itself(least: dict[str, Any], tmp_path: Path) -> None:
    recipe = parse(least, ["run.epochs=3", "model.freeze=[\"wte\"]", "checkpoint.best=", "model.width=64"])
    (tmp_path / "recipe.toml").write_text(dumps(recipe))
    assert load_recipe(tmp_path / "recipe.toml") == recipe == loads(dumps(recipe))
    assert recipe.checkpoint.best == "" and recipe.run.steps is None and recipe.model.config["width"] == 64
    said, whole = tomllib.loads(dumps(recipe)), recipe.model_dump()
    assert {name: set(keys) for name, keys in said.items()} == {
        name: {key for key, value in section.items() if value is not None} for name, section in whole.items()}
    assert pickle.loads(pickle.dumps(recipe)) == recipe


def test_recipes_of_earlier_versions_load(least: dict[str, Any]) -> None:
    """With a section that never had a meaning, at the values at which all were written."""
    stored = '\n[embedding]\nplacement = "workers"\nservers = 1\nconsistency = "sync"\nstaleness = 0\n'
    recipe = parse(least)
    assert loads(dumps(recipe) + stored) == recipe and "embedding" not in dumps(recipe)
    for text in (stored.replace("1", "2"), stored + "more = 1\n"):
        with pytest.raises(RecipeError, match=r"embedding\.\w+ = \S+ is not a key of the recipe"):
            loads(dumps(recipe) + text)


def test_a_recipe_cannot_be_changed(least: dict[str, Any]) -> None:
    recipe = parse(least)
    with pytest.raises(ValueError, match="frozen"):
        recipe.run.steps = 5  # type: ignore[misc]


def test_a_mesh_that_the_planner_finds(least: dict[str, Any]) -> None:
    """The word stands in place of the section; what is written down are the numbers."""
    asked = parse({**least, "mesh": "auto"})
    assert asked.mesh.auto and parse(least, ["mesh=auto"]).mesh.auto and not parse(least).mesh.auto
    found = with_mesh(asked, pipeline=1, tensor=1, expert=1, micro_batches=1)
    assert not found.mesh.auto and loads(dumps(found)) == found and "auto" not in tomllib.loads(dumps(asked))["mesh"]


@pytest.mark.parametrize(("override", "says"), [
    ("run.steps=-5", "run.steps = -5 cannot work; it must be a whole number of at least 1."),
    ("run.steps=2.5", "run.steps = 2.5"),
    ("run.steps=soon", 'run.steps = "soon" cannot work'),
    ("run.steps=true", "run.steps = true cannot work"),
    ("run.stesp=5", "run.stesp = 5 is not a key of the recipe; did you mean run.steps?"),
    ("run.nonsense=5", "the keys of [run] are name, steps, epochs, seed, eval_every."),
    ("runs.steps=5", "[runs] is not a section of the recipe; did you mean [run]?"),
    ("zebra.steps=5", "[zebra] is not a section of the recipe; the sections are run,"),
    ("run.name=../up", 'run.name = "../up" cannot work'),
    ("run.seed=-1", "run.seed = -1 cannot work"),
    ("run.eval_every=-1", "run.eval_every = -1 cannot work"),
    ("run.epochs=0", "run.epochs = 0 cannot work"),
    ("model.kind=nlp.bart", 'model.kind = "nlp.bart" cannot work; it must be one of nlp.gpt, nlp.bert'),
    ("model.kind=nlp.gtp", 'model.kind = "nlp.gtp" cannot work'),
    ("model.kind=no:colon:here", "model.kind = "),
    ("model.init=nowhere.safetensors", 'model.init = "nowhere.safetensors" does not exist'),
    ("backend.name=jax", 'must be one of "torch", "reference", "tensorflow", "mxnet"'),
    ("backend.device=tpu", 'must be one of "auto", "cpu", "cuda"'),
    ("backend.threads=0", "backend.threads = 0 cannot work"),
    ("backend.compile=1", "backend.compile = 1 cannot work; it must be true or false."),
    ("data.format=idx", 'data.format = "idx" holds images, which model.kind = "nlp.gpt" does not read'),
    ("data.format=parquet", "data.text is missing; model.kind = \"nlp.gpt\" reads a column of text"),
    ("data.format=pickle", "data.format"),
    ("data.path=nowhere.txt", 'data.path = "nowhere.txt" does not exist'),
    ("data.path=[]", "data.path is missing"),
    ("data.path=[1]", "data.path = 1 cannot work"),
    ("data.path=package:no_such_package/x", "no_such_package, which is not installed"),
    ("data.path=package:elastic", "is incomplete"),
    ("data.path=package:elastic/*.nothing", "matches no file of the package elastic"),
    ("data.eval_path=nowhere.txt", 'data.eval_path = "nowhere.txt" does not exist'),
    ("data.batch_size=0", "data.batch_size = 0 cannot work"),
    ("data.eval_fraction=1.0", "data.eval_fraction = 1.0 cannot work; it must be a number of at least 0 and below 1."),
    ("data.eval_fraction=nan", "data.eval_fraction = nan cannot work"),
    ("data.tokens=word", 'must be one of "char", "byte", "bpe"'),
    ("data.label=click", "has a meaning only for the recommenders"),
    ("data.kind=mine:Rows", "exclude each other"),
    ("data.options={size=3}", "data.options"),
    ("mesh=automatic", 'mesh = "automatic" cannot work; it must be a section: [mesh] and its keys below (or "auto").'),
    ("mesh.tensor=4", "mesh.pipeline x mesh.tensor x mesh.expert = 1 x 4 x 1 needs 4 workers, and elastic.max_workers "
                      "= 2; write max_workers = 4"),
    ("mesh.micro_batches=5", "mesh.micro_batches = 5 does not divide the 3 rows of a logical shard"),
    ("mesh.schedule=interleaved", "mesh.pipeline = 1; write mesh.pipeline = 2"),
    ("mesh.schedule=zigzag", '"1f1b", "gpipe", "interleaved", "zb-h1"'),
    ("mesh.chunks=3", 'mesh.chunks = 3 has a meaning only under mesh.schedule = "interleaved"'),
    ("mesh.layout.d_ff=data", 'mesh.layout.d_ff = "data" cannot work; it must be written {DIM = AXIS, ...}, each axis '
                              '"tensor" or "expert"'),
    ("mesh.layout=tensor", 'mesh.layout = "tensor" cannot work; it must be written {DIM = AXIS, ...}'),
    ("mesh.tensor=0", "mesh.tensor = 0 cannot work"),
    ("elastic.logical_shards=5", "data.batch_size = 12 cannot be cut into elastic.logical_shards = 5 equal shards"),
    ("elastic.logical_shards=0", "elastic.logical_shards = 0 cannot work"),
    ("elastic.min_workers=3", "elastic.min_workers = 3 is above elastic.max_workers = 2"),
    ("elastic.max_workers=40", "elastic.max_workers = 40 is above elastic.logical_shards = 12"),
    ("elastic.hang_timeout_s=0", "elastic.hang_timeout_s = 0 cannot work"),
    ("elastic.hang_timeout_s=inf", "elastic.hang_timeout_s = inf cannot work"),
    ("elastic.reduction=sloppy", 'must be one of "exact", "fast"'),
    ("optimizer.name=lamb", 'must be one of "adamw", "adam", "sgd", "adagrad"'),
    ("optimizer.name=adma", 'optimizer.name = "adma" cannot work'),
    ("optimizer.lr=hot", 'optimizer.lr = "hot" cannot work'),
    ("optimizer.lr=-1", "optimizer.lr = -1 cannot work"),
    ("optimizer.min_lr=1.0", "optimizer.min_lr = 1.0 is above optimizer.lr = 0.001"),
    ("optimizer.beta2=1.0", "optimizer.beta2 = 1.0 cannot work"),
    ("optimizer.schedule=step", "optimizer.milestones is missing"),
    ("optimizer.schedule=steps", '"constant", "cosine", "linear", "step", "one-cycle"'),
    ("optimizer.milestones=[100]", 'optimizer.milestones = [100] has a meaning only under optimizer.schedule = "step"'),
    ("optimizer.gamma=0.5", "optimizer.gamma = 0.5 has a meaning only"),
    ("optimizer.div_factor=10", 'has a meaning only under optimizer.schedule = "one-cycle"'),
    ("optimizer.base_batch=-1", "optimizer.base_batch = -1 cannot work"),
    ("checkpoint.keep=0", "checkpoint.keep = 0 cannot work"),
    ("checkpoint.path=ftp://host/run", "checkpoint.path"),
    ("checkpoint.path=s3://", "checkpoint.path"),
    ("checkpoint.busy=never", '"wait" or "skip"'),
    ("checkpoint.keep_every=-1", "checkpoint.keep_every = -1 cannot work"),
    ("checkpoint.best=loss", "checkpoint.best"),
    ("embedding.placement=servers", 'embedding.placement = "servers" cannot work; it must be "workers"'),
    ("embedding.size=8", "embedding.size = 8 is not a key of the recipe; the keys of [embedding] are placement, twin"),
    ("run=3", "is not of the form section.key=value"),
    ("run.steps", "is not of the form section.key=value"),
    ("=5", "is not of the form section.key=value"),
    ("run.steps.more=5", "run.steps"),
])
def test_a_wrong_key_is_told_in_one_sentence(least: dict[str, Any], override: str, says: str) -> None:
    assert says in refused(least, override)


def test_several_keys_that_exclude_each_other(least: dict[str, Any]) -> None:
    assert "run.steps = 10 and run.epochs = 2 exclude each other" in refused(least, "run.steps=10", "run.epochs=2")
    assert "model of one framework" in refused(least, "model.kind=mine:Net", "backend.name=reference")
    assert 'backend.precision = "bfloat16"' in refused(least, "backend.name=reference", "backend.precision=bfloat16")
    assert 'backend.device = "cuda" is not for backend.name = "tensorflow"; write "cpu".' in refused(
        least, "backend.name=tensorflow", "backend.device=cuda")
    assert 'backend.precision = "bfloat16" is not for backend.name = "mxnet"' in refused(
        least, "backend.name=mxnet", "backend.precision=bfloat16")
    own = {"model": {"kind": "mine:Net"}, "data": {"kind": "mine:Rows"}}
    assert parse(own, ["data.options.size=3"]).data.options == {"size": 3}
    assert "has no meaning beside data.kind" in refused(own, "data.path=x")
    assert "does not feed" in refused(own, "model.kind=nlp.gpt")


def test_the_best_checkpoint_is_never_guessed_from_a_name(least: dict[str, Any]) -> None:
    assert [best_mode(parse(least, [f"checkpoint.best=eval.{name}"]))
            for name in ("loss", "accuracy")] == ["min", "max"]
    own = {"model": {"kind": "mine:Net"}, "data": {"kind": "mine:Rows"}}
    assert best_mode(parse(own)) == "min"
    for name in ("wer", "error", "accuracy", "my_loss"):
        assert refused(own, f"checkpoint.best=eval.{name}") == (f'checkpoint.best = "eval.{name}" does not say whether '
                                                                'less is better; add checkpoint.best_mode = "min" or '
                                                                '"max".')
        recipe = parse(own, [f"checkpoint.best=eval.{name}", "checkpoint.best_mode=max"])
        assert best_mode(recipe) == "max" and loads(dumps(recipe)) == recipe
    assert "does not say whether less is better" in refused(least, "checkpoint.best=eval.base_rate")
    assert "has no meaning without checkpoint.best" in refused(least, "checkpoint.best=", "checkpoint.best_mode=min")
    assert 'must be "min" or "max"' in refused(least, "checkpoint.best_mode=least")


def test_keys_of_schedules(least: dict[str, Any]) -> None:
    recipe = parse(least, ["optimizer.schedule=step", "optimizer.milestones=[100, 150]", "optimizer.gamma=0.2",
                           "optimizer.warmup_steps=5"])
    assert recipe.optimizer.milestones == (100, 150) and loads(dumps(recipe)) == recipe
    for value in ("[150, 100]", "[100, 100]"):
        assert "that rise from each to the next" in refused(least, "optimizer.schedule=step",
                                                            f"optimizer.milestones={value}")
    for value in ("[0]", "[1.5]", "7"):
        assert "optimizer.milestones = " in refused(least, "optimizer.schedule=step", f"optimizer.milestones={value}")
    for key in ("warmup_steps=5", "min_lr=0.0001"):
        assert "has no meaning under optimizer.schedule = \"one-cycle\"" in refused(least, "optimizer.schedule=one-cycle", f"optimizer.{key}")


def test_keys_of_tables(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x\n1\n")
    path = str(tmp_path / "a.csv")
    table = {"model": {"kind": "mine:Net"}, "data": {"format": "csv", "path": [path, path]}}
    recipe = parse(table, ["data.columns=x", "data.weights=[1, 0.5]", "run.steps=5", "data.shuffle_by=rows"])
    assert (recipe.data.columns, recipe.data.weights, recipe.data.shuffle_by,
            recipe.data.is_table) == (("x",), (1.0, 0.5), "rows", True)
    assert loads(dumps(recipe)) == recipe
    assert parse(table, ["data.format=parquet", "data.path=s3://bucket/x"]).data.path == ("s3://bucket/x",)
    for override, says in (("data.weights=[1]", "data.weights = [1.0] has 1 numbers and data.path 2 entries"),
                           ("data.weights=[1, 0]", "data.weights = 0 cannot work; it must be a list of numbers above 0"),
                           ("data.shuffle_by=blocks", "is not for CSV"), ("data.shuffle_by=columns", "must be one of"),
                           ("data.kind=mine:Rows", "exclude each other")):
        assert says in refused(table, override)
    assert "run.epochs = 3 has no meaning for sources mixed by data.weights" in refused(table, "data.weights=[1, 2]", "run.epochs=3")
    assert not parse(table, ["data.text=word"]).data.is_table
    assert "data.columns = [\"x\"] has a meaning only for tables" in refused(table, "data.text=word", "data.columns=x")
    text = {"model": {"kind": "nlp.gpt"}, "data": {"format": "text", "path": path}}
    for key, value in (("columns", "x"), ("weights", "[1]"), ("shuffle_by", "rows")):
        assert f"data.{key} = " in refused(text, f"data.{key}={value}", "run.steps=5")
    assert "data.text = \"word\" names a column" in refused(text, "data.text=word")


def test_what_must_be_given(least: dict[str, Any]) -> None:
    assert "[data] is missing" in refused({"model": {"kind": "nlp.gpt"}})
    assert "[model] is missing" in refused({"data": least["data"]})
    assert "model.kind is missing" in refused({**least, "model": {}})
    assert "data.format is missing" in refused({**least, "data": {"path": "x"}})
    assert "data.path is missing" in refused({**least, "data": {"format": "text"}})
    assert "run = 3 cannot work; it must be a section" in refused({**least, "run": 3})


@given(batch=st.integers(1, 200), workers=st.integers(1, 20))
def test_default_shards_divide_the_batch(batch: int, workers: int) -> None:
    """Twice the largest group where it divides the batch, else the largest divisor below that."""
    tree = {"model": {"kind": "a:b"}, "data": {"kind": "a:c", "batch_size": batch}, "elastic": {"max_workers": workers}}
    expected = max(n for n in range(1, 2 * workers + 1) if batch % n == 0)
    if expected < workers:
        assert "elastic.max_workers" in refused(tree)
    else:
        assert parse(tree).elastic.logical_shards == expected


@pytest.mark.parametrize(("text", "value"), [
    ("run.name=night-3", "night-3"), ('run.name="night-3"', "night-3"), ("run.name=nlp.gpt", "nlp.gpt"),
])
def test_a_text_needs_no_quotes(least: dict[str, Any], text: str, value: str) -> None:
    assert parse(least, [text]).run.name == value


def test_an_override_of_steps_takes_the_place_of_epochs(least: dict[str, Any]) -> None:
    tree = {**least, "run": {"epochs": 5}}
    assert (parse(tree, ["run.steps=7"]).run.steps, parse(tree, ["run.steps=7"]).run.epochs) == (7, None)
    assert (parse({**least, "run": {"steps": 5}}, ["run.epochs=2"]).run.epochs,
            parse(tree, ["run.seed=1"]).run.epochs) == (2, 5)
    assert tree["run"] == {"epochs": 5}, "the caller's own tree stays as it is"


def test_numbers_in_overrides(least: dict[str, Any]) -> None:
    recipe = parse(least, ["optimizer.lr=3e-4", "run.seed=1_000", "model.dropout=0", 'optimizer.no_decay=["*ln*"]',
                           "model.freeze=wte"])
    assert (recipe.optimizer.lr, recipe.run.seed, recipe.optimizer.no_decay,
            recipe.model.freeze) == (3e-4, 1000, ("*ln*",), ("wte",))


def test_broken_files(tmp_path: Path) -> None:
    bad = tmp_path / "bad.toml"
    bad.write_text("[run\nsteps = 5")
    with pytest.raises(RecipeError, match="is not valid TOML.*line 1"):
        load_recipe(bad)
    bad.write_bytes(b"\xff\xfe")
    with pytest.raises(RecipeError, match="UTF-8"):
        load_recipe(bad)
    with pytest.raises(RecipeError, match="neither a file nor a shipped name"):
        load_recipe(tmp_path / "absent.toml")
    with pytest.raises(RecipeError, match="is a folder"):
        load_recipe(tmp_path)
    with pytest.raises(RecipeError, match='did you mean "nlp/gpt_shakespeare"'):
        load_recipe("nlp/gpt_shakespear")


def test_shipped_recipes_are_sound(least: dict[str, Any]) -> None:
    assert "nlp/gpt_shakespeare" in shipped()
    for name in shipped():
        own = [f"data.{key}={least['data']['path']}" for key in ("path", "eval_path")
               if f"\n{key} =" in shipped()[name].read_text()]
        recipe = load_recipe(name, own)
        assert isinstance(recipe, Recipe) and loads(dumps(recipe)) == recipe


def test_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looked for in the current directory first, then beside the recipe; absolute from then on."""
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
        (folder / "both.txt").write_text("x")
    (there / "one.txt").write_text("x")
    (there / "r.toml").write_text('[model]\nkind = "nlp.gpt"\n[data]\nformat = "text"\npath = ["both.txt", "one.txt", '
                                  '"*.txt"]\n')
    monkeypatch.chdir(here)
    recipe = load_recipe(there / "r.toml")
    assert recipe.data.path == (str(here / "both.txt"), str(there / "one.txt"), str(here / "*.txt"))
    found = [file for path in recipe.data.path for file in resolve_path(path)]
    assert found == [str(here / "both.txt"), str(there / "one.txt"), str(here / "both.txt")]


def test_files_of_a_package() -> None:
    found = resolve_path("package:nlp/recipes/*.toml")
    assert found == sorted(found) and all(Path(file).is_absolute() and file.endswith(".toml") for file in found)
    assert set(found) == {str(file) for name, file in shipped().items() if name.startswith("nlp/")}


def test_a_text_of_a_recipe_may_name_files_of_another_machine() -> None:
    text = '[model]\nkind = "nlp.gpt"\n[data]\nformat = "text"\npath = "/elsewhere/x.txt"\n'
    assert loads(text, locate=False).data.path == ("/elsewhere/x.txt",)
    with pytest.raises(RecipeError, match="does not exist"):
        loads(text)


@pytest.mark.parametrize(("overrides", "message"), [
    ("mesh.tensor=2 elastic.max_workers=5", "elastic.max_workers = 5 is not in whole replicas of 2 workers "
                                            "(mesh.pipeline x mesh.tensor x mesh.expert = 1 x 2 x 1); write "
                                            "max_workers = 4 or 6."),
    ("mesh.tensor=2 elastic.max_workers=6 elastic.min_workers=3", "write min_workers = 2 or 4."),
    ("mesh.tensor=2 elastic.max_workers=8 elastic.logical_shards=3",
     "is above elastic.logical_shards = 3, the most that can share the batch, and "
                                                                     "a replica is 2 workers; write max_workers = 6 or "
                                                                     "less"),
    ("mesh.expert=2 elastic.logical_shards=4", "mesh.expert = 2 does not divide the 3 rows of a logical shard"),
    ("mesh.expert=2 elastic.logical_shards=2 mesh.micro_batches=2",
     "over mesh.expert = 2); write a batch_size that is a multiple of 8"),
])
def test_meshes_that_do_not_come_out_even(least: dict[str, Any], overrides: str, message: str) -> None:
    assert message in refused(least, *overrides.split())


def test_logical_shards_follow_the_replicas(least: dict[str, Any]) -> None:
    def shards(*overrides: str) -> int:
        return parse(least, overrides).elastic.logical_shards

    assert shards("elastic.max_workers=4", "data.batch_size=16") == 8
    assert shards("elastic.max_workers=4", "data.batch_size=16", "mesh.tensor=2") == 4, "twice the most replicas"
    assert shards("elastic.max_workers=4", "data.batch_size=16", "mesh.pipeline=2",
                  "mesh.micro_batches=8") == 2, "its rows divide"
    assert parse(least, ["mesh.tensor=2", 'mesh.layout={d_ff="tensor"}']).mesh.layout == {"d_ff": "tensor"}


def test_a_run_without_a_name_has_the_file_s(tmp_path: Path) -> None:
    file = tmp_path / "night shift (2).toml"
    file.write_text('[model]\nkind = "mine.models:Tagger"\n[data]\nkind = "mine.data:Rows"\n')
    assert load_recipe(file).run.name == "night-shift-2-" and load_recipe(file, ["run.name=mine"]).run.name == "mine"
    file.write_text(file.read_text() + '[run]\nname = "given"\n')
    assert load_recipe(file).run.name == "given"
