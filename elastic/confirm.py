"""Does the end of a group count? Only with the checkpoint that its members say they have written."""

from __future__ import annotations

from dataclasses import replace

from elastic.membership import State
from elastic.messages import STOP_AND_SAVE, Standing


def confirmed(state: State, word: Standing, newest: int, error: str) -> Standing:
    """The last word of a group that ends with its state saved is another if no checkpoint of that step was committed after all.

    `newest`: step of the newest committed checkpoint; `error`: why the last one was not. With a reason it is a failure, which ends the run
    when it comes again; without one parts of it fell with a controller, no member is to blame, and the group saves once more.
    """
    ends = word.reason == "done" or (word.reason == "stopped" and word.ballot and word.ballot.stop == STOP_AND_SAVE)
    others = [w for w in state.group if w != word.worker]
    is_last = word.generation == state.generation and all(w in state.standing for w in others)
    if not ends or not is_last or word.committed <= newest:
        return word
    return replace(word, reason="failed" if error else "broken", error=error or f"The checkpoint of step {word.committed} was not committed.")
