"""Tables on the screen and in results/NAME.md, with everything needed to repeat them."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

RESULTS = Path(__file__).resolve().parents[1] / "results"
PACKAGES = ("torch", "tensorflow-cpu", "mxnet", "ray", "torchft", "numba", "fbgemm-gpu-cpu", "numpy")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table with aligned columns."""
    lines = [list(head), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    cells = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def versions() -> str:
    found = [f"Python {platform.python_version()}"]
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    return ", ".join(found)


def write(name: str, title: str, sections: Sequence[str], script: str = "") -> Path:
    """Prints the sections and writes results/NAME.md. `script`: which wrote it, where that is not its name."""
    command = " ".join(["python -m", f"benchmarks.{script or name}", *sys.argv[1:]])
    header = (f"# {title}\n\n{time.strftime('%Y-%m-%d')} · {os.cpu_count()} cores, {processor()} · {versions()}\n"
              f"load average at the end: {os.getloadavg()[0]:.1f}\n\n    {command}\n")
    text = "\n\n".join([header.rstrip(), *sections]) + "\n"
    print("\n" + text)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.md"
    path.write_text(text)
    return path
