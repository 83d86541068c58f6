"""A checkpoint's parameters in forms that others read: safetensors, a torch state dict, a Hugging Face folder."""

from __future__ import annotations

import importlib
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from elastic.checkpoint.find import read_newest
from elastic.checkpoint.hashing import BUFFER, PARAMETER
from elastic.checkpoint.manifest import Manifest
from elastic.checkpoint.store import TEMPORARY
from elastic.errors import UserError
from elastic.recipe import loads

Arrays = Mapping[str, np.ndarray]
Writer = Callable[[Arrays, Arrays, Manifest, Path], None]  # parameters and buffers by name


def export(path: str, form: str, out: str) -> tuple[int, int]:
    """Writes the parameters of a checkpoint (see `find`) to `out`, which must not exist yet and appears whole; returns its step and how many.

    A torch state dict has the model's buffers too, as `load_state_dict` asks for them.

    UserError for a form, a place or a model that cannot serve; BadCheckpoint before anything of a damaged one is written.
    """
    write = FORMS.get(form)
    if write is None:
        raise UserError(f"--format {form} must be one of {', '.join(FORMS)}.")
    target = free(out)
    arrays, manifest = read_newest(path)
    found, buffers = ({key.removeprefix(prefix): array for key, array in arrays.items() if key.startswith(prefix)} for prefix in (PARAMETER, BUFFER))
    unfinished = target.with_name(f".{target.name}.{uuid.uuid4().hex}{TEMPORARY}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write(found, buffers, manifest, unfinished)
        os.rename(unfinished, free(out))
    except OSError as error:
        raise UserError(f"--out {out} cannot be written ({error.strerror or error}); name another place.") from error
    finally:
        clear(unfinished)
    return manifest.step, len(found)


def clear(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    elif path.exists():
        path.unlink()


def free(out: str) -> Path:
    if not out or "://" in out:
        raise UserError(f"--out {out!r} must be a path on this machine.")
    target = Path(os.path.abspath(out))
    if os.path.lexists(target):
        raise UserError(f"--out {out} exists already; name another place or remove it.")
    return target


def write_safetensors(arrays: Arrays, buffers: Arrays, manifest: Manifest, path: Path) -> None:
    path.write_bytes(save({name: np.ascontiguousarray(array) for name, array in arrays.items()}))


def write_torch(arrays: Arrays, buffers: Arrays, manifest: Manifest, path: Path) -> None:
    try:
        framework = importlib.import_module("backends.pytorch.export")
    except ImportError as error:
        raise UserError(f"--format torch needs PyTorch ({error}); see `elastic doctor`, or take --format safetensors.") from error
    framework.save_state_dict({**arrays, **buffers}, path)


def write_hugging_face(arrays: Arrays, buffers: Arrays, manifest: Manifest, path: Path) -> None:
    model = loads(manifest.recipe, locate=False).model
    if model.kind != "nlp.gpt":
        raise UserError(f'--format hf is for the model nlp.gpt, and this checkpoint is of "{model.kind}"; take --format safetensors or torch.')
    importlib.import_module("nlp.hugging_face").write(model.config, arrays, path)


FORMS: dict[str, Writer] = {"safetensors": write_safetensors, "torch": write_torch, "hf": write_hugging_face}
