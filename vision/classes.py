"""The classes of labelled images: whole numbers as they are, names in the order of the alphabet."""

from __future__ import annotations

import numpy as np

from elastic.errors import UserError

Label = int | str
MOST = 1 << 20


class Classes:
    """Numbers labels. While the training set is read, by first appearance; once it is `close`d, for good, and no class is added."""

    def __init__(self) -> None:
        self.numbers: dict[Label, int] = {}
        self.names: list[str] = []  # empty where labels are numbers
        self.count = 0

    def number(self, label: Label, where: str) -> int:
        """UserError for a label outside the classes, or of another kind than those before."""
        if isinstance(label, int) and label < 0:
            raise UserError(f"{where} is of class {label}; the classes are counted from 0.")
        first = next(iter(self.numbers), label)
        if isinstance(label, str) != isinstance(first, str):
            raise UserError(f"{where} is of class {label!r} and others are of class {first!r}; write all labels as whole numbers or all as texts.")
        if not self.count:
            return self.numbers.setdefault(label, len(self.numbers))
        if isinstance(label, int) and label < self.count:
            return label
        if label not in self.numbers:
            known = ", ".join(self.names[:12]) if self.names else f"0 to {self.count - 1}"
            raise UserError(f"{where} is of class {label!r}, which is none of those to train on ({known}); mend the label or leave it out.")
        return self.numbers[label]

    def close(self) -> np.ndarray:
        """The final number of each one given so far."""
        found = list(self.numbers)
        self.names = sorted(label for label in found if isinstance(label, str))
        final = [label if isinstance(label, int) else self.names.index(label) for label in found]
        self.count = max(final, default=-1) + 1
        if self.count > MOST:
            raise UserError(f"The largest class is {self.count - 1}, of {len(found)} different ones, and classes are counted from 0, at most "
                            f"{MOST} of them; number them anew, or write them as texts.")
        self.numbers = dict(zip(found, final))
        return np.array(final, np.int64)
