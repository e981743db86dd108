"""The hard masks are what their names say, on real photographs."""

from __future__ import annotations

import numpy as np
import pytest

from mat_export.suite import MASKS, PHOTOGRAPHS, cases, photograph


def test_every_case_of_the_design_is_there() -> None:
    named = set(MASKS)
    assert {"all-hole", "no-hole", "one-pixel-hole", "one-window", "shift-seams"} <= named
    assert {"border", "checkerboard", "inverted-polarity", "one-pixel-lines-0-255"} <= named
    assert {"random-large", "random-small"} <= named


@pytest.mark.parametrize("size", [(256, 256), (512, 512), (256, 512)])
def test_masks_fit_the_image_and_repeat(size: tuple[int, int]) -> None:
    first, second = list(cases(*size)), list(cases(*size))
    for a, b in zip(first, second, strict=True):
        assert a.image.shape == (*size, 3)
        assert a.image.dtype == np.uint8
        assert a.keep.shape == size
        assert a.keep.dtype == bool
        assert (a.keep == b.keep).all()
    assert len({case.seed for case in first}) == len(first)


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("all-hole", 1.0, 1.0),
        ("no-hole", 0.0, 0.0),
        ("checkerboard", 0.5, 0.5),
        ("random-large", 0.3, 0.8),
        ("random-small", 0.03, 0.3),
        ("inverted-polarity", 0.7, 0.97),
    ],
)
def test_holes_are_as_large_as_the_name_says(name: str, low: float, high: float) -> None:
    share = 1.0 - MASKS[name](512, 512).mean()
    assert low <= share <= high


def test_one_window_leaves_no_valid_token_in_just_one_window() -> None:
    keep = MASKS["one-window"](512, 512)
    windows = keep.reshape(8, 64, 8, 64).any(axis=(1, 3))
    assert (~windows).sum() == 1


def test_pixel_masks_have_one_pixel() -> None:
    assert (~MASKS["one-pixel-hole"](256, 256)).sum() == 1
    assert MASKS["one-pixel-kept"](256, 256).sum() == 1


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_photographs_are_photographs(name: str) -> None:
    picture = photograph(name, 256, 256)
    # A photograph has many colours and smooth neighbours; noise or a plane has not.
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 5000
    step = np.abs(np.diff(picture.astype(int), axis=1)).mean()
    assert 0.5 < step < 20
