from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from mat_export.canvas import Canvas, Picture
from mat_export.regions import Box, Window
from mat_export.resample import NEUTRAL, enlarged_strips, shrunk

Bytes = NDArray[np.uint8]


def canvas(pixels: Bytes) -> Canvas:
    return Picture(pixels).canvas(np.ones(pixels.shape[:2], dtype=np.bool_))


def noise(height: int, width: int, seed: int = 0) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def small(pixels: Bytes, known: NDArray[np.bool_] | None, height: int, width: int) -> Bytes:
    rows, columns = np.arange(pixels.shape[0]), np.arange(pixels.shape[1])
    return shrunk(canvas(pixels), known, rows, columns, height, width)[0]


def test_a_whole_factor_gives_the_mean_of_each_block() -> None:
    pixels = noise(12, 20)
    blocks = pixels.reshape(4, 3, 4, 5, 3).mean(axis=(1, 3))
    np.testing.assert_allclose(small(pixels, None, 4, 4), blocks, atol=0.51)


@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 30), st.integers(0, 30))
@settings(deadline=None)
def test_any_factor_keeps_the_mean_and_flat_colours(h: int, w: int, more: int, wider: int) -> None:
    pixels = noise(h + more, w + wider)
    result = small(pixels, None, h, w)
    np.testing.assert_allclose(result.mean(axis=(0, 1)), pixels.mean(axis=(0, 1)), atol=0.51)
    flat = np.full_like(pixels, 77)
    assert (small(flat, None, h, w) == 77).all()


@given(st.integers(1, 20), st.integers(0, 45), st.floats(0, 0.3), st.integers(0, 999))
@settings(deadline=None)
def test_nothing_unknown_shows(n: int, more: int, share: float, seed: int) -> None:
    side = n + more
    rng = np.random.default_rng(seed)
    known = rng.random((side, side)) >= share
    pixels = noise(side, side, seed)
    other = np.where(known[..., None], pixels, 255 - pixels)
    rows = np.arange(side)
    first, keep = shrunk(canvas(pixels), known, rows, rows, n, n)
    second, _ = shrunk(canvas(other), known, rows, rows, n, n)
    np.testing.assert_array_equal(first, second)
    assert (first[~keep] == NEUTRAL).all()
    for i in range(n):
        for j in range(n):
            span = [slice(k * side // n, -(-(k + 1) * side // n)) for k in (i, j)]
            assert keep[i, j] == known[span[0], span[1]].all()


def test_the_pictures_own_scale_is_passed_through() -> None:
    pixels = noise(8, 8)
    np.testing.assert_array_equal(small(pixels, None, 8, 8), pixels)


@pytest.mark.parametrize("side", [64, 100, 700])
def test_strips_are_one_enlargement(side: int) -> None:
    fill = np.random.default_rng(0).random((64, 64, 3)).astype(np.float32) * 255
    window, box = Window(-20, 30, side), Box(-20 + side // 9, 40, -20 + side, 30 + side)
    strips = list(enlarged_strips(fill, window, box))
    assert [top for top, _ in strips] == list(range(box.top, box.bottom, 256))
    got = np.concatenate([strip for _, strip in strips])
    planes = [
        np.asarray(Image.fromarray(fill[..., c]).resize((side, side), Image.Resampling.BICUBIC))
        for c in range(3)
    ]
    whole = np.clip(np.stack(planes, axis=2), 0, 255)
    np.testing.assert_allclose(got, whole[side // 9 :, 10:], atol=0.01)
