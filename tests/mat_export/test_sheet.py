from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mat_export.contract import UserError
from mat_export.sheet import CELL, ContactSheet

RED = np.array([255, 0, 96])


def sheet_of(rows: int, answers: int, size: tuple[int, int] = (60, 40)) -> ContactSheet:
    sheet = ContactSheet()
    keep = np.ones(size[::-1], dtype=np.bool_)
    keep[:20, :20] = False
    for i in range(rows):
        sheet.start(f"picture {i}.png", Image.new("RGB", size, (200, 200, 200)), keep)
        for k in range(answers):
            sheet.answer(f"seed {k}", Image.new("RGB", size, (0, 40 * k % 256, 0)))
    return sheet


def test_the_input_comes_first_with_its_hole_tinted() -> None:
    drawn = np.asarray(sheet_of(1, 2).drawn()).astype(int)
    tinted = (200 + RED) // 2
    top, left = np.argwhere((drawn == tinted).all(axis=2)).min(axis=0)
    assert int((drawn == tinted).all(axis=2).sum()) == 20 * 20
    assert (drawn[top + 30, left + 30] == 200).all()
    first, second = ((drawn == [0, green, 0]).all(axis=2) for green in (0, 40))
    assert left < np.argwhere(first)[:, 1].min() < np.argwhere(second)[:, 1].min()


def test_a_hole_of_one_pixel_is_seen_in_a_large_picture() -> None:
    keep = np.ones((2000, 3000), dtype=np.bool_)
    keep[777, 1234] = False
    sheet = ContactSheet()
    sheet.start("x", Image.new("RGB", (3000, 2000), (0, 90, 0)), keep)
    drawn = np.asarray(sheet.drawn()).astype(int)
    assert (drawn == (np.array([0, 90, 0]) + RED) // 2).all(axis=2).sum() == 1


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "I", "F"])
def test_pictures_of_any_mode_are_shown(mode: str) -> None:
    keep = np.ones((30, 50), dtype=np.bool_)
    sheet = ContactSheet()
    image = Image.new(mode, (50, 30))
    sheet.start("x", image, keep)
    sheet.answer("y", image)
    assert sheet.drawn().mode == "RGB"


def test_transparent_parts_show_the_paper() -> None:
    image = Image.new("RGBA", (50, 30), (9, 9, 9, 0))
    sheet = ContactSheet()
    sheet.start("x", image, np.ones((30, 50), dtype=np.bool_))
    drawn = np.asarray(sheet.drawn())
    assert not (drawn == 9).all(axis=2).any()


def test_a_turned_picture_is_shown_upright() -> None:
    image = Image.new("RGB", (50, 30), (7, 8, 9))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.info["exif"] = exif.tobytes()
    sheet = ContactSheet()
    sheet.start("x", image, np.ones((50, 30), dtype=np.bool_))
    where = np.argwhere((np.asarray(sheet.drawn()) == [7, 8, 9]).all(axis=2))
    assert (where.max(axis=0) - where.min(axis=0) + 1).tolist() == [50, 30]


def test_answers_share_the_brightness_of_their_input() -> None:
    pixels = np.full((30, 50), 1000, dtype=np.uint16)
    pixels[:, 25:] = 3000
    keep = np.ones((30, 50), dtype=np.bool_)
    keep[:, :5] = False
    sheet = ContactSheet()
    sheet.start("x", pixels, keep)
    sheet.answer("y", np.where(keep, pixels, 2000).astype(np.uint16))
    assert (np.asarray(sheet.drawn()) == 128).all(axis=2).sum() == 5 * 30


def test_cells_are_never_larger_than_384_nor_enlarged() -> None:
    assert sheet_of(1, 1, (4000, 1000)).drawn().width < 2 * (CELL + 20)
    assert sheet_of(1, 0, (30, 30)).drawn().height < 100


def test_many_answers_go_on_in_the_next_line() -> None:
    few, many = sheet_of(1, 4).drawn(), sheet_of(1, 11).drawn()
    assert many.width == few.width
    assert many.height > 2 * few.height


def test_a_sheet_of_very_many_pictures_stays_small_and_says_what_it_left_out() -> None:
    drawn = sheet_of(400, 4, (90, 90)).drawn()
    assert max(drawn.size) < 65535
    assert drawn.width * drawn.height < 100e6


def test_long_names_are_shortened() -> None:
    keep = np.ones((30, 50), dtype=np.bool_)
    sheet = ContactSheet()
    sheet.start("long" * 100 + "名前.png", Image.new("RGB", (50, 30)), keep)
    assert sheet.drawn().width < CELL + 50


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_a_sheet_is_saved_whole(tmp_path: Path, suffix: str) -> None:
    sheet_of(2, 2).save(tmp_path / f"sheet{suffix}")
    with Image.open(tmp_path / f"sheet{suffix}") as image:
        image.load()
    assert len(list(tmp_path.iterdir())) == 1


def test_an_empty_sheet_and_an_answer_without_input_are_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing to put"):
        ContactSheet().save(tmp_path / "x.png")
    with pytest.raises(UserError, match="start one first"):
        ContactSheet().answer("x", Image.new("L", (1, 1)))
    with pytest.raises(UserError, match="does not exist"):
        sheet_of(1, 1).save(tmp_path / "absent" / "x.png")
    assert not list(tmp_path.iterdir())
