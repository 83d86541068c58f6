"""The PyTorch backend: models of named arrays, and users' own modules as the objects that they are.

backend is the door; neutral, the Backend for models of named arrays, and module, the one for users' own modules, which
adapter describes, watch looks into and rehearsal tries out; ops, optimizer, arrays, collectives and stages as in every
backend; export: files for torch's own loading.
"""

import os
import sys
import warnings

_NEEDED = {
    # Without strict reproducibility MKL picks kernels by operand alignment, and small products change their last bits.
    "MKL_CBWR": "AUTO,STRICT",
    # cuBLAS with several workspaces may reduce in another order from call to call.
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    # For what a user's own code compiles.
    "TORCHINDUCTOR_DETERMINISTIC": "1",
}

# Both libraries read these when they load: set after `import torch` they do nothing, without a word.
_missing = [name for name in _NEEDED if name not in os.environ]
LATE = "torch" in sys.modules and "MKL_CBWR" in _missing
for _name in _missing:
    os.environ[_name] = _NEEDED[_name]


def warn_if_late() -> None:
    """Called where computing begins; opening a model for a look does not matter."""
    if LATE:
        warnings.warn("torch was imported before backends.pytorch and MKL_CBWR was not set: results may differ in "
                      "their last bits from process to process; set MKL_CBWR=AUTO,STRICT in the environment.",
                      stacklevel=3)
