"""Whether a process grows: its memory and descriptors kill after kill, and a line fitted to the later half."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
import psutil

PER = 100  # kills


@dataclass(frozen=True)
class Sample:
    """`bytes`: the proportional set size, in which a page that several processes share counts once."""

    kill: int
    bytes: int
    descriptors: int


@dataclass
class Growth:
    """What has been seen of each process."""

    samples: dict[int, list[Sample]] = field(default_factory=dict)

    def look(self, kill: int, pids: Iterable[int]) -> None:
        for pid in pids:
            with suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                self.samples.setdefault(pid, []).append(Sample(kill, process.memory_full_info().pss, process.num_fds()))

    def row(self, name: str, pid: int, since: int) -> list[str]:
        """A process's last figures, and by what it grows with the kills from `since` on: by PER of them."""
        later = [sample for sample in self.samples.get(pid, []) if sample.kill >= since]
        if len(later) < 3:
            return [name, str(len(later)), *["-"] * 4]
        mb, descriptors = [sample.bytes / 1e6 for sample in later], [float(sample.descriptors) for sample in later]
        return [name, str(len(later)), f"{mb[-1]:.1f}", f"{slope(later, mb):+.2f}", f"{descriptors[-1]:.0f}",
                f"{slope(later, descriptors):+.2f}"]


def slope(samples: Sequence[Sample], values: Sequence[float]) -> float:
    return PER * float(np.polyfit([sample.kill for sample in samples], values, 1)[0])


HEAD = ("", "kills seen", "MB", f"MB in {PER} kills", "descriptors", f"descriptors in {PER} kills")
