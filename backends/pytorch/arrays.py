"""What passes between the platform's buffers, NumPy's arrays, users' batches and tensors."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from backends.common import ALIGN_BYTES, address_of
from elastic.data.collate import PLAIN, Collated
from elastic.model.backend import Buffer
from elastic.model.user_code import rebuilt


def plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    """A copy."""
    tensor = tensor.detach().cpu()
    if tensor.is_conj() or tensor.is_neg():
        tensor = tensor.resolve_conj().resolve_neg()
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(np.dtype("bfloat16")).copy()
    return tensor.numpy().copy(order="C")


def as_torch(array: np.ndarray) -> torch.Tensor:
    """Where it lies."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def as_tensor(buffer: Buffer) -> torch.Tensor:
    return buffer if isinstance(buffer, torch.Tensor) else torch.from_numpy(buffer)


def as_buffer(x: torch.Tensor | None) -> Buffer | None:
    """A tensor as a flat buffer, where it lies if that is possible; narrow floats as float32."""
    if x is None:
        return None
    wide = x.detach() if x.dtype == torch.float64 else x.detach().float()
    flat = wide.reshape(-1)
    return flat.numpy() if flat.device.type == "cpu" else flat


def tensors(into: Mapping[str, Buffer]) -> dict[str, torch.Tensor]:
    return {name: as_tensor(view) for name, view in into.items()}


def shaped_like(result: torch.Tensor, gradient: Buffer | None) -> torch.Tensor | None:
    return None if gradient is None else as_tensor(gradient).view(result.shape).to(result.dtype)


def as_float64(total: Any) -> Any:
    return total.detach().double().cpu().numpy() if isinstance(total, torch.Tensor) else total


def as_scalar(weight: Any, like: torch.Tensor) -> torch.Tensor:
    if isinstance(weight, torch.Tensor):
        return weight.detach().double().reshape(())
    return torch.full((), float(weight), dtype=torch.float64, device=like.device)


def address(buffer: Buffer) -> int:
    return buffer.data_ptr() if isinstance(buffer, torch.Tensor) else address_of(buffer)


def columns(batch: Any, device: torch.device) -> Any:
    """The batch as its data set made it, with copies of its tensors and tensors for arrays (of which float64 becomes
    float32); all else stays."""
    if isinstance(batch, Collated):
        return columns(batch.content, device)
    if isinstance(batch, torch.Tensor):
        return batch.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else batch.clone()
    if isinstance(batch, (str, bytes)):
        return batch
    if isinstance(batch, torch.nn.utils.rnn.PackedSequence):
        return copy.deepcopy(batch).to(device=device)  # type: ignore[call-arg]  # its lengths stay on the CPU
    if isinstance(batch, (Mapping, tuple, list)):
        return rebuilt(batch, lambda value: columns(value, device))
    if not isinstance(batch, (np.ndarray, np.generic, *PLAIN)):  # what a collate_fn makes, be it a sequence
        return batch.to(device) if callable(getattr(batch, "to", None)) else batch
    array = np.asarray(batch)
    if array.dtype.kind not in "biuf":
        return array
    return placed(array, device, torch.float32 if array.dtype == np.float64 else None)


def row_leaf(array: np.ndarray, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """What was looked up, as a leaf with a gradient to come. Where it lies, if that is as aligned as a copy would be:
    bits may depend on it."""
    lies_well = array.dtype == np.float32 and array.flags.writeable and address_of(array) % ALIGN_BYTES == 0
    if device.type == "cpu" and dtype == torch.float32 and lies_well:
        return torch.from_numpy(array).requires_grad_()
    return placed(array, device, dtype).requires_grad_()


def slopes_of(leaves: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Their gradients, which nothing else holds or writes to; zeros where nothing came."""
    return {feature: np.zeros(tuple(leaf.shape), plain(leaf.dtype)) if leaf.grad is None
            else np.ascontiguousarray(leaf.grad.cpu().numpy()) for feature, leaf in leaves.items()}


def placed(array: np.ndarray, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A copy on the device. Through pinned memory, so that the host need not wait until a GPU is done with all that it
    was given."""
    copy = torch.tensor(array, dtype=dtype)
    return copy.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else copy
