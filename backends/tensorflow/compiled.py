"""What `compile()` and a Keras model's own methods ask for: served as `fit` serves it, or refused in one sentence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras

from elastic.errors import UserError

OWN_LOSS = "give the model a method batch_loss(batch), which is computed shard by shard and returns the mean or (sum, weight)"
NOT_ASKED = ("train_step", "test_step", "compute_metrics", "make_train_function", "make_test_function", "fit", "evaluate", "train_on_batch")
MEANS = ("sum_over_batch_size", "mean")
TOLERANCE = 1e-4


def check_compiled(model: keras.Model, own_loss: bool) -> None:
    """UserError where `fit` would do what shards cannot."""
    kind = type(model).__name__
    for variable in model.trainable_weights:
        if variable.overwrite_with_gradient:
            raise UserError(f"model.kind: {kind} keeps {variable.path} by overwriting it with its gradient (float8); use another dtype policy.")
    if any(layer.compute_dtype == "float16" for layer in model._flatten_layers()):
        raise UserError(f'model.kind: {kind} computes in float16, for which `fit` scales its loss; use "mixed_bfloat16" or "float32".')
    if own_loss:
        return
    for name in NOT_ASKED:
        if getattr(type(model), name) is not getattr(keras.Model, name) or name in vars(model):
            raise UserError(f"model.kind: {kind} has a {name} of its own, which is not called here; {OWN_LOSS}.")
    if not model.loss and type(model).compute_loss is keras.Model.compute_loss:
        raise UserError(f"model.kind: {kind} has no loss; call its compile(loss=...), or {OWN_LOSS}.")
    for loss in keras.tree.flatten(model.loss):
        if isinstance(loss, keras.losses.Loss) and loss.reduction not in MEANS:
            raise UserError(f"model.kind: the loss {loss.name} of {kind} has reduction = {loss.reduction!r}, and what a batch gives is no mean of "
                            'what its shards give; write "sum_over_batch_size" (for "sum", with optimizer.lr times data.batch_size), or '
                            f"{OWN_LOSS}.")


def check_pieces(kind: str, found: Sequence[tuple[float, float]], draws: Callable[[], bool]) -> None:
    """Of a batch and its two parts, (sum, weight) of the loss. UserError unless the sums add up, or the model draws in inference as well, as a VAE
    does: then nobody can tell."""
    (whole, rows), *rest = found
    added = sum(total for total, _ in rest)
    if abs(whole - added) > TOLERANCE * max(abs(whole), abs(added), sum(abs(total) for total, _ in rest)) + 1e-6 * rows and not draws():
        raise UserError(f"model.kind: the loss of {kind} is not a mean over rows: over {rows:.0f} rows it is {whole / rows:.6g}, and "
                        f"{added / rows:.6g} on average over their two parts, so shards would train it otherwise than `fit`; {OWN_LOSS}.")


def parts(batch: Any) -> tuple[Any, Any, Any]:
    if not isinstance(batch, (tuple, list)) or not 2 <= len(batch) <= 3:
        raise UserError("model.kind: a compiled Keras model trains on rows (x, y) or (x, y, sample_weight); let the data set give them, or "
                        "give the model a method batch_loss(batch).")
    return batch[0], batch[1], batch[2] if len(batch) == 3 else None
