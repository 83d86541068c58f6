"""Random histories of real processes: kills in every phase, hangs, growth and shrinkage, from a seed."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from elastic.chaos import PHASES
from elastic.driver.inference import check_checkpoint
from elastic.observe.verify import verify
from tests.support.runs import assert_sound, bits, train
from tests.support.sampling import sample

pytestmark = pytest.mark.usefixtures("cluster")
STEPS = 48
SMALL = {"run": {"steps": STEPS, "eval_every": 20}, "checkpoint": {"every_steps": 16}}


def schedule(seed: int) -> list[str]:
    """Two to four faults at increasing steps."""
    draw = random.Random(seed)
    faults = []
    for step in sorted(draw.sample(range(3, STEPS - 5), draw.randint(2, 4))):
        kind = draw.choice(["kill", "kill", "kill", "scale", "stop"] if step > 8 else ["kill"])
        rank, phase = draw.randrange(3), draw.choice(PHASES)
        faults.append({"kill": f"kill:{rank}@{step}/{phase}", "stop": f"stop:{rank}@{step}",
                       "scale": f"scale:{draw.randint(1, 3)}@{step}"}[kind])
    return faults


@pytest.mark.parametrize("seed", sample(range(20), 1))
def test_random_schedule(tmp_path: Path, seed: int) -> None:
    result = train(tmp_path / "run", 3, schedule(seed), **SMALL, elastic={"spares": 1, "hang_timeout_s": 3.0})
    assert_sound(result, bits(**SMALL), STEPS)
    verdict = verify(result.run_dir, check_checkpoint)
    assert not verdict.problems
