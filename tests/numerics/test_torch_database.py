"""Every module of torch.nn, as torch's own database has them: trained to plain torch's values on one and on two workers, or refused."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("expecttest", reason="torch's database of modules needs expecttest")

from tests.support.sampling import WHOLE, sample  # noqa: E402  (what follows needs torch)
from tests.support.torch_database import EQUAL, EQUAL_ONCE_CALLED, REFUSED, UNBUILT, WRONG, database, outcome  # noqa: E402

LAZY = ["nn.LazyConv1d", "nn.LazyConv2d", "nn.LazyConv3d", "nn.LazyConvTranspose1d", "nn.LazyConvTranspose2d",
        "nn.LazyConvTranspose3d"]


@pytest.mark.timeout(900)  # all of them on a machine that has much else to do
def test_every_module_trains_as_in_plain_torch_or_is_refused(tmp_path: Path) -> None:
    names = sample(list(database()), 6, always=("nn.BatchNorm1d", "nn.LazyConv2d"))
    found = [outcome(name, tmp_path) for name in names]
    assert not [one for one in found if one.kind in (WRONG, UNBUILT)]
    counts = Counter(one.kind for one in found)
    assert {one.name for one in found if one.kind == EQUAL_ONCE_CALLED} == {name for name in LAZY if name in names}
    assert counts[EQUAL] + counts[EQUAL_ONCE_CALLED] + counts[REFUSED] == len(names)
    assert counts[EQUAL] >= 100 if WHOLE else counts[EQUAL] >= len(names) - 3
