"""A controller's life: it begins a run or takes a live one over, goes through its events, and ends it."""

from __future__ import annotations

from elastic.controller import membership as m
from elastic.controller.controller import Controller
from elastic.controller.ending import close
from elastic.controller.takeover import take_over


def run(controller: Controller) -> m.Finish:
    """Blocks until the run has ended."""
    try:
        with controller.claim.kept(lambda why: controller.post(m.GiveUp(why))):
            if controller.journal.is_continued:
                take_over(controller)
            else:
                controller.perform(controller.past.actions)
            outcome = controller.work()
            close(controller, outcome)
    finally:
        controller.mailbox.gone.set()
    return outcome
