"""What a user's model writes to parameters shows in their values."""

from __future__ import annotations

import numpy as np
import pytest

from elastic.errors import Overwritten
from elastic.model.backend import Spec
from elastic.state.flat_layout import BLOCK, FlatLayout
from elastic.worker.overwrite_watch import SMALL, STRIDE, Watch

SHAPES = {"wide": (3, BLOCK), "bias": (SMALL,), "odd": (SMALL + 1,), "none": (0, 4), "scale": (), "frozen": (5, 900)}


def watch() -> tuple[FlatLayout, Watch, np.ndarray]:
    layout = FlatLayout({name: Spec(shape, (), "given") for name, shape in SHAPES.items()}, freeze=["frozen"])
    return layout, Watch("mine:Model", layout), np.random.default_rng(0).standard_normal(layout.size).astype(np.float32)


def told(watch: Watch, param: np.ndarray, step: int, whole: bool, position: int) -> str:
    """What is said of a write there; what was there is put back."""
    before = param[position]
    try:
        with watch.over(param, step, whole):
            param[position] = -before
    except Overwritten as error:
        return str(error)
    finally:
        param[position] = before
    return ""


def test_all_of_small_arrays_and_of_large_ones_every_element_in_so_many_steps() -> None:
    layout, seen, param = watch()
    for name, place in layout.places.items():
        for position in {place.offset, place.offset + place.size // 2, place.offset
                         + place.size - 1} if place.size else ():
            assert f"its parameter {name} while" in told(seen, param, 1, True, position)
            found = sum(f"its parameter {name} while" in told(seen, param, step, False, position)
                        for step in range(STRIDE))
            assert found == STRIDE if place.size <= SMALL else found >= 1, (name, position)


@pytest.mark.parametrize("step", [1, 2, 200])
def test_a_whole_array_shows_at_once(step: int) -> None:
    layout, seen, param = watch()
    for name, view in layout.views(param).items():
        if view.size:
            with pytest.raises(Overwritten, match=f"its parameter {name} while"), seen.over(param, step, False):
                view *= 0.5


def test_what_stays_is_not_told_even_where_it_is_no_number() -> None:
    layout, seen, param = watch()
    layout.views(param)["bias"][3] = np.nan
    for whole in (False, True):
        with seen.over(param, 7, whole):
            layout.views(param)["wide"][0] = layout.views(param)["wide"][0].copy()
    with pytest.raises(ZeroDivisionError), seen.over(param, 7, True):
        layout.views(param)["bias"][3] = 1 / 0


@pytest.mark.parametrize("whole", [False, True])
def test_a_write_before_an_error_shows_all_the_same(whole: bool) -> None:
    layout, seen, param = watch()
    with pytest.raises(Overwritten, match="its parameter bias while") as caught, seen.over(param, 7, whole):
        layout.views(param)["bias"][3] += 1
        raise ValueError("row 7")
    assert isinstance(caught.value.__context__, ValueError)


def test_who_has_seen_a_write_closer_is_heard() -> None:
    layout, seen, param = watch()
    with pytest.raises(Overwritten, match="^closer$"), seen.over(param, 7, False):
        layout.views(param)["bias"][3] += 1
        raise Overwritten("closer")
