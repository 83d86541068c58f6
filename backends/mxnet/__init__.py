"""The MXNet backend: recorded graphs; Gluon blocks as `gluon.Trainer` trains them.

backend (with its stages), ops, routing, optimizer, arrays, collectives, tracing and adapter as in every backend; turn:
which thread computes.
"""

import os
import sys
import warnings

import numpy

if "bool" not in vars(numpy):  # MXNet 1.9.1 still uses NumPy's old name for it
    numpy.bool = numpy.bool_  # type: ignore[misc,attr-defined]

# Kernels run in the calling thread, one after the other: without this each is a task for another thread, which costs
# more than a small kernel itself and computes with a thread count of its own. Read when MXNet starts its engine.
LATE = "mxnet" in sys.modules and "MXNET_ENGINE_TYPE" not in os.environ
os.environ.setdefault("MXNET_ENGINE_TYPE", "NaiveEngine")
# graphs as they are written; also silences a line of the library per graph
os.environ.setdefault("MXNET_SUBGRAPH_BACKEND", "NONE")


def warn_if_late() -> None:
    """Called where computing begins."""
    if LATE:
        warnings.warn("mxnet was imported before backends.mxnet, so its engine computes in threads of its own and "
                      "backend.threads may not hold; import backends.mxnet first, or set MXNET_ENGINE_TYPE=NaiveEngine "
                      "in the environment.", stacklevel=3)
