"""The `elastic` command: thin doors to the trainer, the run directory and checkpoints.

Exit codes: 0 done, 2 bad usage or recipe, 3 the run failed, 130 interrupted. An error is one sentence on stderr.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.exceptions import TyperException

from elastic.driver.console import complain, ended, say, see_out, there
from elastic.errors import BAD_USAGE, DONE, FAILED, INTERRUPTED, BadCheckpoint, ElasticError, UserError

if TYPE_CHECKING:
    from elastic.driver.trainer import Trainer

WIDE = 10_000  # columns

app = typer.Typer(name="elastic", add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
                  help="Elastic training on Ray: workers come and go, the result stays the same to the bit.")

Sets = Annotated[list[str], typer.Option("--set", metavar="section.key=value",
                                         help="Overrides a key of the recipe; may be repeated.")]
Address = Annotated[str, typer.Option(metavar="local|auto|ADDR", envvar="RAY_ADDRESS", show_envvar=False,
                                      help="Which Ray: a new one here, the one here, or one elsewhere; none: RAY_ADDRESS, "
                                           "else local.")]
Server = Annotated[str, typer.Option("--address", metavar="http://HEAD:8265",
                                     help="The job server of a Ray elsewhere; none: RAY_ADDRESS.")]
There = Annotated[str, typer.Option("--address", metavar="http://HEAD:8265",
                                    help="Where it was submitted; RUN_DIR is then the id that `elastic submit` named.")]
Chaos = Annotated[list[str], typer.Option(metavar="SPEC", help="A fault, as kill:1@50/backward; may be repeated.")]
Recipe = Annotated[str, typer.Argument(metavar="RECIPE",
                                       help="A TOML file, or a shipped name such as nlp/gpt_shakespeare.")]
Degree = Annotated[int | None, typer.Option(min=1,
                                            help="Workers along this axis of the mesh; as the recipe says, where it is "
                                                 "not given.")]
RunDir = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A run's directory.")]
Location = Annotated[str, typer.Argument(metavar="CHECKPOINT",
                                         help="A checkpoint's folder or manifest, or a run's directory; a path or "
                                              "URI.")]
Trust = Annotated[bool, typer.Option("--trust",
                                     help="Imports a model or data set that somebody else's run or checkpoint names.")]


@app.command()
def train(recipe: Recipe,
          set_: Sets = [],  # noqa: B006 - typer copies it
          run_dir: Annotated[Path | None, typer.Option(metavar="DIR",
                                                       help="Where it is written; none: runs/NAME-TIME.")] = None,
          address: Address = "local", chaos: Chaos = [],  # noqa: B006
          check: Annotated[bool, typer.Option("--check",
                                              help="Opens recipe and data, tries the model, and trains nothing.")] = False) -> int:
    """Trains a recipe."""
    from elastic.recipe import load_recipe

    resolved = load_recipe(recipe, set_)
    from elastic.driver.trainer import Trainer  # after the recipe: a wrong key is told at once, without loading Ray

    trainer = Trainer(resolved, run_dir, address, tuple(chaos))
    return checked(trainer) if check else fit(trainer)


@app.command()
def resume(run_dir: RunDir, set_: Sets = [], address: Address = "local", chaos: Chaos = [], trust: Trust = False) -> int:  # noqa: B006
    """Goes on with a run from its newest good checkpoint."""
    from elastic.driver.trainer import Trainer

    return fit(Trainer.resume(run_dir, set_, address, tuple(chaos), trust))


@app.command("run")
def run_recipe(recipe: Recipe, run_dir: Annotated[Path, typer.Option(metavar="DIR", help="Where it is written, or goes on.")],
               set_: Sets = [], address: Address = "local", chaos: Chaos = [],  # noqa: B006
               id_: Annotated[str, typer.Option("--id", metavar="ID", help="What the run is called; none: by DIR.")] = "") -> int:
    """Goes on with the run in DIR, or from the checkpoints at checkpoint.path, or trains: what a cluster's retries call."""
    from elastic.recipe import load_recipe

    resolved = load_recipe(recipe, set_)
    from elastic.driver.run import trainer_of

    return fit(trainer_of(resolved, run_dir, address, tuple(chaos), id_))


@app.command()
def submit(recipe: Recipe, address: Server = "", set_: Sets = [],  # noqa: B006
           run_dir: Annotated[str, typer.Option(metavar="DIR", help="On the head; none: ~/runs/NAME-TIME.")] = "",
           follow: Annotated[bool, typer.Option("--follow", help="Shows it to its end. Ctrl-C asks: detach or stop.")] = False,
           runtime_env: Annotated[str, typer.Option(metavar="FILE", help="YAML of Ray's own keys: pip, env_vars, excludes.")] = "",
           chaos: Chaos = []) -> int:  # noqa: B006
    """Trains a recipe as a job of a Ray elsewhere."""
    from elastic.driver import submit as door
    from elastic.driver.job_client import Jobs

    jobs = Jobs(address)
    say(jobs.joined())
    submission = door.submit(jobs, recipe, set_, run_dir, runtime_env, tuple(chaos))
    say(f"submitted {submission.id}; its run directory is {submission.run_dir}")
    if not follow:
        say(f"look with: elastic status {submission.id} --address {jobs.get_address()}")
        return DONE
    from elastic.driver.job_follow import Follower

    return see_out(Follower(jobs, submission, complain))


@app.command()
def scale(run_dir: RunDir, workers: Annotated[int, typer.Option(help="How many workers the run should have.")],
          tensor: Degree = None, pipeline: Degree = None, expert: Degree = None, trust: Trust = False,
          address: There = "") -> int:
    """Grows or shrinks a live run, or lays it on another mesh."""
    degrees = {axis: degree for axis, degree in (("tensor", tensor), ("pipeline", pipeline), ("expert", expert))
               if degree}
    if address:
        words = [word for axis, degree in degrees.items() for word in (f"--{axis}", str(degree))]
        return there(address, str(run_dir), "scale", ["--workers", str(workers), *words, *["--trust"] * trust])
    from elastic.driver import trainer

    trainer.scale(run_dir, workers, trust, **degrees)
    lying = ", ".join(f"{axis} {degree}" for axis, degree in degrees.items())
    say(f"asked for {workers} workers{' with ' + lying if lying else ''}; `elastic status {run_dir}` shows when they "
        "train")
    return DONE


@app.command()
def status(run_dir: RunDir, address: There = "") -> int:
    """Where a run is, from its files alone."""
    if address:
        return there(address, str(run_dir), "status")
    from elastic.observe.status import status_lines

    for line in status_lines(run_dir):
        say(line)
    return DONE


@app.command()
def verify(run_dir: RunDir, replay: Annotated[bool,
                                              typer.Option("--replay", help="Runs it again undisturbed and compares "
                                                                            "the bits.")] = False,
           address: Address = "local", trust: Trust = False) -> int:
    """Checks a run's steps, generations and every hash."""
    from elastic.driver import replay as door

    verdict = door.verify_run(run_dir)
    if replay and not verdict.problems:
        again = door.replay(run_dir, address, trust)
        verdict.problems += again.problems
        verdict.facts += again.facts
    for fact in verdict.facts:
        say(fact)
    for problem in verdict.problems:
        complain(problem)
    say("not sound" if verdict.problems else "sound", "bold red" if verdict.problems else "bold green")
    return FAILED if verdict.problems else DONE


@app.command()
def evaluate(checkpoint: Location, trust: Trust = False) -> int:
    """Evaluates a checkpoint on its recipe's evaluation set."""
    from elastic.driver import inference
    from elastic.humanize import numbers

    say(numbers(inference.evaluate(checkpoint, trust)))
    return DONE


@app.command()
def sample(checkpoint: Location, prompt: Annotated[str, typer.Option(help="What the text begins with.")] = "",
           tokens: Annotated[int, typer.Option(help="How many tokens to write.")] = 300,
           temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.8,
           seed: Annotated[int, typer.Option(help="Another seed, another text.")] = 0, trust: Trust = False) -> int:
    """Lets a language model write."""
    from elastic.driver import inference

    print(inference.sample(checkpoint, prompt, tokens, temperature, seed, trust))
    return DONE


@app.command()
def inspect(checkpoint: Location, diff: Annotated[str,
                                                  typer.Option(metavar="OTHER",
                                                               help="Another checkpoint: what differs.")] = "",
            table: Annotated[str, typer.Option(metavar="T", help="An embedding table: its rows, bytes, hashes.")] = "",
            id_: Annotated[int | None, typer.Option("--id", metavar="I", help="One id of it: its row.")] = None) -> int:
    """Shows a checkpoint's arrays, files, sizes and hashes, or how it differs from another."""
    from elastic.checkpoint.find import find
    from elastic.driver import inspection as door

    if id_ is not None and not table:
        raise UserError(f"--id {id_} is an id of an embedding table; name that with --table.")
    if table and diff:
        raise UserError(f"--table {table} shows one checkpoint; leave --diff out, which compares tables too.")
    places = [find(path) for path in ([checkpoint, diff] if diff else [checkpoint])]
    tables, verdict, whole = door.compared(*places) if diff else door.looked_into(places[0], table, id_)
    code, style = (DONE, "bold" if diff or table else "bold green") if whole else (FAILED, "bold red")
    console = Console() if sys.stdout.isatty() else Console(width=WIDE)  # whoever reads a pipe needs names in one piece
    for one in tables:
        console.print(one, "")
    say(verdict, style)
    return code


@app.command()
def export(checkpoint: Location, format_: Annotated[str,
                                                    typer.Option("--format", metavar="safetensors|torch|hf|parquet",
                                                                 help="hf is for nlp.gpt; parquet is for the rows of "
                                                                      "embedding tables, which go nowhere else.")],
           out: Annotated[str, typer.Option(metavar="PATH",
                                            help="A file, or for hf and parquet a folder, that does not exist "
                                                 "yet.")]) -> int:
    """Writes a checkpoint's parameters in a form that others read."""
    from elastic.checkpoint import export as door

    step, number = door.export(checkpoint, format_, out)
    say(f"{number} {'tables' if format_ == door.TABLES else 'arrays'} of step {step} written to {out}")
    return DONE


@app.command()
def plan(recipe: Recipe, set_: Sets = [],  # noqa: B006
         nodes: Annotated[int, typer.Option(min=0, help="Nodes of the cluster; none: this machine.")] = 0,
         gpus_per_node: Annotated[int, typer.Option(min=0, help="Workers on each of them.")] = 0,
         memory_gb: Annotated[float, typer.Option(min=0, help="Memory of a worker.")] = 0.0,
         tflops: Annotated[float, typer.Option(min=0, max=1e6,
                                               help="10^12 operations a second of a worker; none: a trial here.")] = 0.0,
         intra_gbps: Annotated[float, typer.Option(min=0,
                                                   help="Gigabits a second of a worker within its node; none: a copy "
                                                        "here.")] = 0.0,
         inter_gbps: Annotated[float, typer.Option(min=0.001, help="Gigabits a second of a node.")] = 10.0,
         mesh: Annotated[str, typer.Option(metavar="data=2,tensor=2",
                                           help="Which mesh --show-layout shows; none: the recommended one.")] = "",
         show_layout: Annotated[bool, typer.Option("--show-layout",
                                                   help="How every parameter lies, and what a step's collectives "
                                                        "carry.")] = False,
         calibrate: Annotated[bool, typer.Option("--calibrate",
                                                 help="First measures this machine, for this plan and later ones.")] = False) -> int:
    """A step's seconds, memory and traffic on every mesh of the cluster's workers, and which to take."""
    from elastic.driver.trainer import Trainer
    from elastic.planning import plan as planning
    from elastic.recipe import load_recipe

    if mesh and not show_layout:
        raise UserError(f"--mesh {mesh} says which layout is to be shown; add --show-layout, or leave it out.")
    resolved = load_recipe(recipe, set_)
    trainer = Trainer(resolved)
    info = trainer.check()
    assert trainer.opened is not None
    size = planning.Size(nodes, gpus_per_node or resolved.elastic.max_workers, memory_gb, intra_gbps, inter_gbps)
    if calibrate:
        for line in planning.calibrated(resolved, info, size):
            say(line, "dim")
    console = Console(highlight=False, width=WIDE)
    for part in planning.parts(resolved, info, trainer.opened, size, tflops * planning.TERA, show_layout, mesh):
        say(part) if isinstance(part, str) else console.print(part)
    return DONE


@app.command()
def doctor() -> int:
    """What is installed, which devices and frameworks work, and what to do about the rest."""
    from elastic.driver.doctor import findings

    console, bad = Console(), False
    table = Table("", "what", "found", "what to do", box=None, pad_edge=False)
    for finding in findings():
        mark, style = {True: ("ok", "green"), False: ("!!", "bold red"), None: ("--", "dim")}[finding.good]
        table.add_row(Text(mark, style), Text(finding.what), Text(finding.found), Text(finding.remedy))
        bad = bad or finding.good is False
    console.print(table)
    return FAILED if bad else DONE


def checked(trainer: Trainer) -> int:
    """--check: everything that can be known before a worker starts."""
    info = trainer.check()
    notes = [trainer.settle(info), *trainer.notes]
    recipe = trainer.recipe
    found = trainer.check_memory()
    trainer.check_loss()
    for line in filter(None, notes):
        say(line)
    facts = ", ".join(f"{key} {value}" for key, value in info.items() if isinstance(value, int))
    frozen = f", {found.frozen} of them frozen" if found.frozen else ""
    say(f"data: {facts or recipe.data.kind + ', ' + info['key']}")
    say(f"model: {found.parameters} parameters{frozen}; up to {found.workers} workers, about {found.bytes / 1e9:.1f} GB")
    for line in trainer.table_lines:
        say(line)
    say(f"{recipe.run.name}: recipe, data, model and memory are sound", "bold green")
    return DONE


def fit(trainer: Trainer) -> int:
    """Trains with the live line, and says how it ended."""
    from elastic.observe.progress import Progress

    if trainer.follows:
        say(f"{trainer.run_dir} is alive: following it")
    with Progress(trainer.recipe.run.steps) as progress:
        result = trainer.fit(progress.on_step, progress.on_eval, progress.on_event)
    return ended(result)


def run(arguments: list[str] | None = None) -> int:
    """The command's exit code. Whatever went wrong on purpose is one sentence on stderr."""
    try:
        return app(arguments or sys.argv[1:] or ["--help"], standalone_mode=False) or DONE
    except TyperException as error:
        complain(f"{error.format_message().rstrip('.')}; `elastic --help` shows the usage.")
        return BAD_USAGE
    except (UserError, BadCheckpoint) as error:
        complain(str(error))
        return BAD_USAGE
    except ElasticError as error:
        complain(str(error))
        return FAILED
    except (KeyboardInterrupt, typer.Abort):
        complain("Interrupted.")
        return INTERRUPTED


def main() -> None:
    """The console script. A user's own modules are importable from the current directory."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(run())


if __name__ == "__main__":
    main()
