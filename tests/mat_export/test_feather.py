from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mat_export.feather import feathered

N, WIDTH = 64, 8


def hole(top: int = 10, bottom: int = 54) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    keep = np.ones((N, N), dtype=np.bool_)
    keep[top:bottom, top:bottom] = False
    return keep


def test_a_wrong_shade_goes_at_the_edge_and_stays_deeper_in() -> None:
    keep = hole()
    rgb = np.full((N, N, 3), 100, dtype=np.uint8)
    fill = np.full((N, N, 3), 130, dtype=np.float32)
    result = feathered(fill, rgb, keep, WIDTH)
    row = result[32, 10:32, 0]
    np.testing.assert_allclose(row[0], 100, atol=1e-3)
    assert (np.diff(row[: WIDTH + 1]) > 0).all()
    assert (row[WIDTH:] == 130).all()
    np.testing.assert_array_equal(result[keep], fill[keep])


def test_a_fill_that_fits_is_left_alone() -> None:
    grey = np.full((N, N, 3), 100, dtype=np.float32)
    result = feathered(grey, grey.astype(np.uint8), hole(), WIDTH)
    np.testing.assert_allclose(result, grey, atol=1e-4)


def test_each_side_gets_its_own_shade() -> None:
    rgb = np.full((N, N, 3), 80, dtype=np.uint8)
    rgb[:, 32:] = 160
    result = feathered(np.full((N, N, 3), 120, dtype=np.float32), rgb, hole(), WIDTH)
    np.testing.assert_allclose(result[32, 10], 80, atol=1)
    np.testing.assert_allclose(result[32, 53], 160, atol=1)


def test_width_0_changes_nothing() -> None:
    fill = np.random.default_rng(0).random((N, N, 3)).astype(np.float32)
    rgb = np.zeros((N, N, 3), dtype=np.uint8)
    assert feathered(fill, rgb, hole(), 0) is fill


@given(st.integers(0, 500), st.floats(0, 1), st.integers(0, 16))
def test_nothing_under_the_hole_is_looked_at(seed: int, share: float, width: int) -> None:
    rng = np.random.default_rng(seed)
    keep = rng.random((N, N)) >= share
    keep[20:40, 30:50] = False
    rgb = rng.integers(0, 256, (N, N, 3), dtype=np.uint8)
    fill = (rng.random((N, N, 3)) * 255).astype(np.float32)
    result = feathered(fill, rgb, keep, width)
    other = feathered(fill, np.where(keep[..., None], rgb, 255 - rgb), keep, width)
    np.testing.assert_array_equal(result, other)
    np.testing.assert_array_equal(result[keep], fill[keep])
    assert np.isfinite(result).all()
    # A shade is a difference of means, so it is bounded by theirs.
    assert float(np.abs(result - fill).max()) <= 255.001


def test_a_mask_without_edge_changes_nothing() -> None:
    fill = np.zeros((N, N, 3), dtype=np.float32)
    rgb = np.full((N, N, 3), 9, dtype=np.uint8)
    for keep in (np.ones((N, N), dtype=np.bool_), np.zeros((N, N), dtype=np.bool_)):
        np.testing.assert_array_equal(feathered(fill, rgb, keep, WIDTH), fill)
