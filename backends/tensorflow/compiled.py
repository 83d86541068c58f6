"""What `compile()` and a Keras model's own methods ask for: served as `fit` serves it, or refused in one sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras
from keras.src.backend import get_keras_mask
from keras.src.losses.loss import apply_mask

from elastic.errors import UserError

OWN_LOSS = "give the model a method batch_loss(batch), which is computed shard by shard and returns the mean or (sum, weight)"
ONE_SHARD = f"write elastic.logical_shards = 1, or {OWN_LOSS}"
NOT_ASKED = ("train_step", "test_step", "compute_metrics", "make_train_function", "make_test_function", "fit", "evaluate", "train_on_batch")
MEANS = ("sum_over_batch_size", "mean")
WEIGHTED = "mean_with_sample_weight"
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
    if not model.compiled:
        raise UserError(f"model.kind: {kind} has no loss; call its compile(loss=...), or {OWN_LOSS}.")
    for loss in losses_of(model):
        if loss.reduction not in (*MEANS, WEIGHTED, "sum"):
            raise UserError(f"model.kind: the loss {loss.name} of {kind} has reduction = {loss.reduction!r}, which gives no one number; write "
                            f'reduction = "sum_over_batch_size", or {OWN_LOSS}.')


def losses_of(model: keras.Model) -> list[Any]:
    """Those that compile() was given as objects; the others are means over rows."""
    return [loss for loss in keras.tree.flatten(model.loss) if isinstance(loss, keras.losses.Loss)]


def is_sum(model: keras.Model) -> bool:
    """Whether all its losses are sums over rows."""
    return len(losses_of(model)) == num_losses(model) > 0 and all(loss.reduction == "sum" for loss in losses_of(model))


def num_losses(model: keras.Model) -> int:
    return sum(loss is not None for loss in keras.tree.flatten(model.loss))


def divisor(model: keras.Model, y_pred: Any, sample_weight: Any, added: Sequence[Any], rows: int) -> tuple[Any, str]:
    """What the loss of a batch is divided by, so that batches' losses can be put together by it; and why they cannot, or "".

    `added`: what the call has told to add_loss.
    """
    masks = [mask for mask in map(get_keras_mask, keras.tree.flatten(y_pred)) if mask is not None]
    kinds, named = {loss.reduction for loss in losses_of(model)}, f"model.kind: the loss of {type(model).__name__}"
    is_mixed = bool(added) or num_losses(model) > 1 or type(model).compute_loss is not keras.Model.compute_loss
    if "sum" in kinds:
        if is_sum(model) and not model.losses and type(model).compute_loss is keras.Model.compute_loss:
            return float(rows), ""
        return float(rows), f'{named} has reduction = "sum" and another part (a penalty, add_loss, a mean), which is no sum over rows; {ONE_SHARD}.'
    if not masks and WEIGHTED not in kinds:
        return float(rows), ""
    if is_mixed:
        what = "a mask" if masks else f"reduction = {WEIGHTED!r}"
        return float(rows), f"{named} has {what}, by which Keras divides, and more than one part, each divided by something else; {ONE_SHARD}."
    if WEIGHTED not in kinds:
        return total(masks[0]), ""
    weights = apply_mask(sample_weight, masks[0] if masks else None, "float32", WEIGHTED)
    return (float(rows) if weights is None else total(weights)), ""


def total(values: Any) -> Any:
    return keras.ops.sum(keras.ops.cast(values, "float32"))


def uneven(kind: str, found: Sequence[tuple[float, float]], is_sum: bool) -> str:
    """Of a batch and its two parts, the loss and what it is divided by. Why the parts do not make the batch, or ""."""
    (whole, size), *rest = found
    pieces = [loss * (1.0 if is_sum else weight / max(size, 1e-30)) for loss, weight in rest]
    if abs(whole - sum(pieces)) <= TOLERANCE * max(abs(whole), sum(map(abs, pieces))) + 1e-6:
        return ""
    return (f"model.kind: the loss of {kind} is not a {'sum' if is_sum else 'mean'} over rows: over a batch it is {whole:.6g}, and {sum(pieces):.6g} "
            f"put together from its two parts, so shards would train it otherwise than `fit`; {ONE_SHARD}.")


def parts(batch: Any, is_asked: bool) -> tuple[Any, Any, Any]:
    """(x, y, sample_weight); without a compiled loss x alone will do."""
    if not is_asked and (isinstance(batch, Mapping) or not isinstance(batch, (tuple, list)) or len(batch) == 1):
        return batch[0] if isinstance(batch, (tuple, list)) else batch, None, None
    if not isinstance(batch, (tuple, list)) or not 2 <= len(batch) <= 3:
        raise UserError("model.kind: a compiled Keras model trains on rows (x, y) or (x, y, sample_weight); let the data set give them, or "
                        "give the model a method batch_loss(batch).")
    return batch[0], batch[1], batch[2] if len(batch) == 3 else None
