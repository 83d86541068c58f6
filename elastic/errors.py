"""Every error of the platform, split by what to do next.

    ElasticError
    |-- UserError            mend the input and start again        (exit code 2)
    |   |-- RecipeError      a key of the recipe is wrong; names key, value and remedy
    |   `-- Overwritten      a user's model has changed what it trains: this worker's state is none any more
    |-- RunFailed            the run cannot go on                  (exit code 3)
    |   `-- NonFiniteLoss    a loss or a gradient is NaN or infinite
    |-- GroupBroken          a peer is gone: stand by, and re-form in the next generation
    `-- BadCheckpoint        this checkpoint is not whole: take an older one

Every error carries one sentence and pickles as it is.
"""


DONE, BAD_USAGE, FAILED, INTERRUPTED = 0, 2, 3, 130  # exit codes


class ElasticError(Exception):
    """The root: whatever the platform raises on purpose."""


class UserError(ElasticError):
    """The input is wrong; the message says what, where and how to mend it."""


class RecipeError(UserError, ValueError):
    """A recipe's key has a value that cannot work."""


class Overwritten(UserError):
    """A user's model wrote to parameters while it computed; those of this worker are not what the last step left."""


class RunFailed(ElasticError):
    """The run cannot go on."""


class NonFiniteLoss(RunFailed):
    """A loss or gradient is NaN or infinite; the message names step, shard and sample positions."""


class GroupBroken(ElasticError):
    """A collective cannot complete because a peer is gone or the generation was aborted."""


class BadCheckpoint(ElasticError):
    """A checkpoint is incomplete, altered or of another format."""
