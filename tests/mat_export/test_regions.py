from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mat_export.regions import Box, plan_regions, reflected

NATIVE = 64
Mask = NDArray[np.bool_]


def keep_all(height: int, width: int) -> Mask:
    return np.ones((height, width), dtype=np.bool_)


@st.composite
def masks(draw: st.DrawFn) -> Mask:
    """Rectangles, lines, specks and noise."""
    height, width = draw(st.integers(1, 700)), draw(st.integers(1, 700))
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    keep = keep_all(height, width)
    for _ in range(draw(st.integers(0, 6))):
        top, left = rng.integers(height), rng.integers(width)
        sides = rng.integers(1, [1 + height // 2, 1 + width // 2], endpoint=True)
        keep[top : top + sides[0], left : left + sides[1]] = False
    return keep & (rng.random((height, width)) >= draw(st.sampled_from([0.0, 0.0, 0.001, 0.5, 1])))


def test_reflection_leaves_out_the_end_pixels() -> None:
    assert reflected(-2, 7, 4).tolist() == [2, 1, 0, 1, 2, 3, 2]


@given(st.integers(1, 40), st.integers(0, 100), st.integers(0, 100))
def test_reflection_runs_to_and_fro(length: int, before: int, after: int) -> None:
    to_and_fro = [*range(length), *range(length - 2, 0, -1)]
    wanted = [to_and_fro[i % len(to_and_fro)] for i in range(-before, length + after)]
    assert reflected(-before, before + length + after, length).tolist() == wanted


@settings(deadline=None, max_examples=150)
@given(masks(), st.floats(1.0, 4.0), st.integers(1, 40))
def test_every_hole_lies_in_a_window_of_its_own(keep: Mask, context: float, most: int) -> None:
    regions = plan_regions(keep, NATIVE, context=context, max_windows=most)
    left = ~keep
    for box, window in regions:
        assert window.side >= NATIVE
        for first, last, start, length in (
            (box.top, box.bottom, window.top, keep.shape[0]),
            (box.left, box.right, window.left, keep.shape[1]),
        ):
            assert 0 <= first < last <= length
            assert start <= first
            assert last <= start + window.side
            inside = start >= 0 and start + window.side <= length
            around = start <= 0 and length <= start + window.side
            assert inside or around
        left[box.top : box.bottom, box.left : box.right] = False
    assert not left.any()
    assert len(regions) <= most
    assert len({window for _, window in regions}) == len(regions)
    assert regions == plan_regions(keep, NATIVE, context=context, max_windows=most)


@settings(deadline=None, max_examples=50)
@given(masks())
def test_a_picture_within_the_native_size_is_one_window(keep: Mask) -> None:
    keep = keep[:NATIVE, :NATIVE]
    assert len(plan_regions(keep, NATIVE)) == int(not keep.all())


def test_a_mask_without_holes_has_no_region() -> None:
    assert plan_regions(keep_all(500, 300), NATIVE) == []


def test_a_small_hole_is_seen_at_full_resolution_in_the_middle() -> None:
    keep = keep_all(500, 500)
    keep[200:210, 300:320] = False
    (region,) = plan_regions(keep, NATIVE)
    assert region.box == Box(200, 300, 210, 320)
    assert region.window == (205 - NATIVE // 2, 310 - NATIVE // 2, NATIVE)


def test_a_large_hole_gets_context_as_wide_as_itself() -> None:
    keep = keep_all(1000, 1000)
    keep[400:600, 350:550] = False
    (region,) = plan_regions(keep, NATIVE)
    assert region.window == (300, 250, 400)


def test_a_round_hole_is_not_cut() -> None:
    y, x = np.ogrid[:1000, :1000]
    keep = (y - 500) ** 2 + (x - 500) ** 2 > 300**2
    assert len(plan_regions(keep, NATIVE)) == 1


def test_a_window_stays_in_the_picture_where_it_can() -> None:
    keep = keep_all(300, 500)
    keep[:5, -5:] = False
    (region,) = plan_regions(keep, NATIVE)
    assert region.window == (0, 500 - NATIVE, NATIVE)


def test_a_hole_of_half_a_narrow_picture_needs_no_mirror_image() -> None:
    keep = keep_all(200, 2000)
    keep[20:160, 900:1040] = False
    (region,) = plan_regions(keep, NATIVE)
    assert region.window.side == 200


def test_holes_far_apart_have_windows_of_their_own() -> None:
    keep = keep_all(2000, 2000)
    keep[100:200, 100:200] = False
    keep[1500:1600, 1800:1900] = False
    assert [r.box for r in plan_regions(keep, NATIVE)] == [
        Box(100, 100, 200, 200),
        Box(1500, 1800, 1600, 1900),
    ]


def test_holes_side_by_side_share_a_window() -> None:
    keep = keep_all(500, 500)
    keep[100:104, 100:104] = False
    keep[100:104, 130:134] = False
    assert [r.box for r in plan_regions(keep, NATIVE)] == [Box(100, 100, 104, 134)]


def test_a_scratch_is_cut_so_that_it_is_not_scaled_down_much() -> None:
    keep = keep_all(1000, 1000)
    keep[np.arange(1000), np.arange(1000)] = False
    regions = plan_regions(keep, NATIVE)
    assert len(regions) > 10
    assert max(r.window.side for r in regions) <= 2 * NATIVE


def test_regions_come_from_top_to_bottom() -> None:
    keep = keep_all(1000, 1000)
    keep[np.arange(1000), np.arange(1000)[::-1]] = False
    regions = plan_regions(keep, NATIVE)
    assert [r.box.top for r in regions] == sorted(r.box.top for r in regions)


@pytest.mark.parametrize("most", [1, 5, 64])
def test_windows_grow_where_there_would_be_too_many(most: int) -> None:
    keep = keep_all(2000, 2000)
    keep[::50, ::50] = False
    regions = plan_regions(keep, NATIVE, max_windows=most)
    assert 1 <= len(regions) <= most
