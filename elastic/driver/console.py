"""What the command says, how it ends, and how it asks: exit codes, lines, a run seen out that is elsewhere."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from elastic.errors import DONE, FAILED, INTERRUPTED

if TYPE_CHECKING:
    from elastic.driver.follow import Result
    from elastic.driver.job_follow import Follower

EXIT = {"done": DONE, "failed": FAILED, "interrupted": INTERRUPTED}


def say(text: str, style: str = "") -> None:
    Console(highlight=False).print(Text(text, style=style), soft_wrap=True)


def complain(text: str) -> None:
    """One line on stderr."""
    print(f"elastic: {' '.join(text.split())}", file=sys.stderr, flush=True)


def ended(result: Result) -> int:
    """Says how a run has ended. Its exit code."""
    from elastic.humanize import duration, numbers

    summary = result.summary
    if result.status == "failed":
        complain(result.error)
    say(f"{result.status}: {summary['steps']} steps in {duration(summary['wall_s'])}, loss {summary['final_loss']}, "
        f"evaluation {numbers(summary['eval']) or 'none'}, recoveries {summary['recoveries']}, steps lost "
        f"{summary['steps_lost']}")
    say(f"report: {result.run_dir / 'report.html'}")
    if result.status == "interrupted":
        say(f"go on with: elastic resume {result.run_dir}")
    return EXIT[result.status]


def see_out(follower: Follower) -> int:
    """A submission to its end, or until the user leaves it."""
    from elastic.observe.progress import Progress

    submission, jobs = follower.submission, follower.jobs
    while True:
        try:
            with Progress() as progress:
                code = follower.see_out(progress)
            return ended(follower.result) if follower.result else code
        except KeyboardInterrupt:
            if not wants_stop():
                say(f"{submission.id} goes on; stop it with: ray job stop {submission.id} --address {jobs.get_address()}")
                return INTERRUPTED
            jobs.stop(submission.id)
            say("asked to stop: it saves its last step")


def wants_stop() -> bool:
    """What Ctrl-C means for a run elsewhere; whoever cannot be asked detaches."""
    if not sys.stdin.isatty():
        return False
    try:
        return input("\nDetach, and let the run go on (d), or stop it (s)? [d] ").strip().lower().startswith("s")
    except (EOFError, KeyboardInterrupt):
        return False


def there(address: str, submission_id: str, command: str, options: list[str] | None = None) -> int:
    """A command on the head of the cluster that a run was submitted to."""
    from elastic.driver.job_client import Jobs
    from elastic.driver.submit import ask_there

    jobs = Jobs(address)
    say(jobs.joined())
    code, lines = ask_there(jobs, submission_id, command, options or [])
    for line in lines:
        complain(line.removeprefix("elastic: ")) if line.startswith("elastic: ") else say(line)
    return code
