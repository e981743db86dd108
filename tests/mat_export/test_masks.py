from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from mat_export.contract import UserError
from mat_export.masks import hole_notes, read_mask

KEEP = np.array([[True, False, True], [False, False, True]])


def read(mask: Any, hole: str = "black") -> tuple[NDArray[np.bool_], list[str]]:
    notes: list[str] = []
    keep = read_mask(mask, hole=hole, notes=notes)
    return keep, notes


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I", "F"])
def test_black_and_white_of_any_mode(mode: str) -> None:
    keep, notes = read(Image.fromarray(KEEP).convert("L").convert(mode))
    np.testing.assert_array_equal(keep, KEEP)
    assert notes == []


@pytest.mark.parametrize(
    ("dtype", "white", "noted"),
    [
        (np.bool_, 1, False),
        (np.uint8, 255, False),
        (np.uint8, 1, True),
        (np.uint16, 65535, False),
        (np.uint16, 255, False),
        (np.int64, 255, False),
        (np.float32, 1, False),
        (np.float64, 255, False),
    ],
)
def test_arrays_of_any_type(dtype: type, white: int, noted: bool) -> None:
    keep, notes = read((KEEP * white).astype(dtype))
    np.testing.assert_array_equal(keep, KEEP)
    assert bool(notes) == noted


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_arrays_of_several_channels(channels: int) -> None:
    array = np.repeat((KEEP * 255).astype(np.uint8)[..., None], channels, axis=2)
    if channels == 4:
        array[..., 3] = 255
    np.testing.assert_array_equal(read(array)[0], KEEP)


def test_a_file_and_its_path(tmp_path: Path) -> None:
    Image.fromarray(KEEP).save(tmp_path / "m.png")
    np.testing.assert_array_equal(read(tmp_path / "m.png")[0], KEEP)
    np.testing.assert_array_equal(read(str(tmp_path / "m.png"))[0], KEEP)


@pytest.mark.parametrize("mask", [KEEP, (KEEP * 255).astype(np.uint8), Image.fromarray(KEEP)])
def test_white_holes_flip_every_mask(mask: Any) -> None:
    np.testing.assert_array_equal(read(mask, "white")[0], ~KEEP)


@given(st.lists(st.integers(0, 255), min_size=1, max_size=50))
def test_grey_counts_as_white_from_128_up(values: list[int]) -> None:
    if max(values) <= 1:
        return
    keep, notes = read(np.array([values], dtype=np.uint8))
    assert keep[0].tolist() == [value >= 128 for value in values]
    assert ("grey" in "".join(notes)) == any(value not in (0, 255) for value in values)


def test_16_bit_grey_has_its_threshold_in_the_same_place() -> None:
    values = np.array([[0, 128 * 257 - 1, 128 * 257, 65535]], dtype=np.uint16)
    assert read(values)[0].tolist() == [[False, False, True, True]]


def test_real_numbers_a_little_above_1_are_still_shares() -> None:
    keep, notes = read(np.array([[0.0, 0.4, 0.6, 1.04]]))
    assert keep.tolist() == [[False, False, True, True]]
    assert "grey" in notes[0]


@pytest.mark.parametrize(
    ("paint", "wanted"),
    [
        ((0, 0, 0), [True, False]),  # black paint on nothing: the paint is the hole
        ((255, 255, 255), [False, True]),  # white paint on nothing: the paint is kept
        ((90, 120, 40), [False, True]),  # a photograph, erased where the hole is to be
    ],
)
def test_transparency(paint: tuple[int, int, int], wanted: list[bool]) -> None:
    layer = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    layer.putpixel((1, 0), (*paint, 255))
    keep, notes = read(layer)
    assert keep.tolist() == [wanted]
    assert "transparent" in notes[0]


def test_constant_transparency_says_nothing() -> None:
    for opacity in (0, 100, 255):
        layer = Image.fromarray(KEEP).convert("RGBA")
        layer.putalpha(opacity)
        np.testing.assert_array_equal(read(layer)[0], KEEP)


def test_a_mask_is_turned_upright() -> None:
    image = Image.fromarray(KEEP).convert("L")
    exif = Image.Exif()
    exif[0x0112] = 6
    image.info["exif"] = exif.tobytes()
    np.testing.assert_array_equal(read(image)[0], np.rot90(KEEP, -1))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.zeros((2, 2, 2, 2)), "H, W"),
        (np.zeros((2, 2, 5), dtype=np.uint8), "2 to 4"),
        (np.zeros((2, 2, 3)), "one channel"),
        (np.array([["a"]]), "numbers"),
        (np.zeros((0, 4)), "empty"),
        (np.zeros((1, 9000), dtype=np.bool_), "8192"),
        (np.array([[np.nan, 1.0]]), "finite"),
    ],
)
def test_what_is_no_mask_is_refused(mask: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(mask)


def test_another_colour_of_holes_is_refused() -> None:
    with pytest.raises(UserError, match="'black' or 'white', got 'red'"):
        read(KEEP, "red")


def test_masks_that_look_like_a_mistake_are_mentioned() -> None:
    keep = np.ones((10, 10), dtype=np.bool_)
    assert "no holes" in hole_notes(keep)[0]
    keep[:9] = False
    assert hole_notes(keep) == []
    keep[9, 1:] = False
    assert "99.0 %" in hole_notes(keep)[0]
    assert "--hole white" in hole_notes(keep)[0]
    keep[:] = False
    assert "nothing but hole" in hole_notes(keep)[0]
