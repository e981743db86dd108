"""A contact sheet: for each picture its input with the hole tinted, then every answer.

NumPy and Pillow only. A sheet keeps small copies, so pictures of any size and number can be added.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps, features

from mat_export.canvas import Picture
from mat_export.contract import UserError
from mat_export.images import check_output, write_image
from mat_export.resample import shrunk

__all__ = ["CELL", "ContactSheet"]

CELL = 384
"""Longest side of a small picture, in pixels."""

_COLUMNS = 5
_SIZES = ((60, CELL), (240, CELL // 2))
"""Up to so many small pictures are so large; with more of them each is a quarter of that."""

_MOST = 1500
"""Small pictures on a sheet; the sheet says how many more there were."""

_GAP = 12
_TEXT = 14
_LINE = 20
_PAPER = (246, 246, 244)
_INK = (40, 40, 40)
_TINT = (255, 0, 96)

_Anything = Image.Image | NDArray[Any]
_Cell = tuple[str, Image.Image]
_Font = ImageFont.ImageFont | ImageFont.FreeTypeFont


class ContactSheet:
    """Rows of small pictures, drawn when the sheet is saved."""

    def __init__(self) -> None:
        self._rows: list[list[_Cell]] = []
        self._keep: NDArray[np.bool_] = np.ones((1, 1), dtype=np.bool_)
        self._count = 0
        self._left_out = 0

    def start(self, name: str, image: _Anything, keep: NDArray[np.bool_]) -> None:
        """Begin a row with the input, its hole tinted.

        Args:
            name: What the caption calls it; the share of the hole is added.
            image: The picture with its hole, an image or an array.
            keep: [H, W] False in the hole, as the picture is displayed.
        """
        share = 100.0 * (1.0 - np.count_nonzero(keep) / keep.size)
        # Held so that answers in modes without a fixed white are shown at the input's range.
        self._keep = keep
        self._rows.append([])
        self._add(f"{name}, {share:.3g} % hole", image, tint=True)

    def answer(self, caption: str, image: _Anything) -> None:
        """Add a filled picture to the row begun last.

        Raises:
            UserError: If no row was begun.
        """
        if not self._rows:
            raise UserError("a contact sheet's row begins with its input: start one first")
        self._add(caption, image, tint=False)

    def _add(self, caption: str, image: _Anything, *, tint: bool) -> None:
        if self._count >= _MOST:
            self._left_out += 1
            return
        self._count += 1
        small = _small(image, self._keep, _side(self._count), tint=tint)
        self._rows[-1].append((caption, small))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Draw the sheet and write it, whole or not at all.

        Raises:
            UserError: If nothing was added, or `path` cannot be written (`images.write_image`).
        """
        check_output(path, "RGB")
        write_image(self.drawn(), path)

    def drawn(self) -> Image.Image:
        """The sheet as an RGB image.

        Raises:
            UserError: If nothing was added.
        """
        side = _side(self._count)
        lines = [
            [(text, _fitted(image, side)) for text, image in row[i : i + _COLUMNS]]
            for row in self._rows
            for i in range(0, len(row), _COLUMNS)
        ]
        if not lines:
            raise UserError("there is nothing to put on the contact sheet: no picture was filled")
        heights = [max(image.height for _, image in line) + _LINE + _GAP for line in lines]
        columns = max(len(line) for line in lines)
        footer = _LINE + _GAP if self._left_out else 0
        size = (columns * (side + _GAP) + _GAP, sum(heights) + _GAP + footer)
        sheet = Image.new("RGB", size, _PAPER)
        draw = ImageDraw.Draw(sheet)
        font = _font()
        top = _GAP
        for line, height in zip(lines, heights, strict=True):
            for i, (text, image) in enumerate(line):
                left = _GAP + i * (side + _GAP)
                below = top + height - _LINE - _GAP
                sheet.paste(image, (left + (side - image.width) // 2, below - image.height))
                draw.text((left, below + 3), _shortened(text, draw, font, side), _INK, font)
            top += height
        if self._left_out:
            draw.text((_GAP, top), f"and {self._left_out} more pictures", _INK, font)
        return sheet


def _side(count: int) -> int:
    """Longest side of the small pictures of a sheet that holds `count` of them."""
    return next((side for most, side in _SIZES if count <= most), CELL // 4)


def _fitted(image: Image.Image, side: int) -> Image.Image:
    return ImageOps.contain(image, (side, side)) if max(image.size) > side else image


def _small(image: _Anything, keep: NDArray[np.bool_], side: int, *, tint: bool) -> Image.Image:
    """An upright RGB copy that fits a square, never enlarged; the hole tinted if asked."""
    picture = Picture(image)
    scale = min(1.0, side / max(picture.height, picture.width))
    height = max(1, round(picture.height * scale))
    width = max(1, round(picture.width * scale))
    rows, columns = np.arange(picture.height), np.arange(picture.width)
    canvas = picture.canvas(keep, copy=False)
    rgb, _ = shrunk(canvas, None, rows, columns, height, width)
    if tint:
        hole = ~_all_kept(keep, height, width)
        rgb[hole] = (rgb[hole].astype(np.uint16) + np.array(_TINT, dtype=np.uint16)) // 2
    small = Image.fromarray(rgb)
    opacity = _opacity(image)
    if opacity is not None:
        area = Image.Resampling.BOX
        paper = Image.new("RGB", small.size, _PAPER)
        small = Image.composite(small, paper, opacity.resize(small.size, area))
    return small


def _all_kept(keep: NDArray[np.bool_], height: int, width: int) -> NDArray[np.bool_]:
    """[H, W] → [height, width], True where no pixel of the area is hole, however small."""
    rows = np.arange(height) * keep.shape[0] // height
    columns = np.arange(width) * keep.shape[1] // width
    lines = np.logical_and.reduceat(keep, rows, axis=0)
    return np.asarray(np.logical_and.reduceat(lines, columns, axis=1))


def _opacity(image: _Anything) -> Image.Image | None:
    """The alpha channel of an image, upright; None without one."""
    if not isinstance(image, Image.Image) or image.mode not in ("LA", "PA", "RGBA", "P"):
        return None
    if image.mode == "P" and "transparency" not in image.info:
        return None
    full = image if image.mode in ("LA", "RGBA") else image.convert("RGBA")
    alpha = full.getchannel("A")
    alpha.info = dict(image.info)
    return ImageOps.exif_transpose(alpha)


def _font() -> _Font:
    """Pillow's own font, in the size wanted where Pillow can draw outlines."""
    if features.check("freetype2"):
        return ImageFont.load_default(_TEXT)
    return ImageFont.load_default()


def _shortened(text: str, draw: ImageDraw.ImageDraw, font: _Font, width: int) -> str:
    """The text, its middle left out where it is wider than this many pixels."""
    if not isinstance(font, ImageFont.FreeTypeFont):
        text = text.encode("latin-1", "replace").decode("latin-1")
    short = text
    while len(short) > 8 and draw.textlength(short, font=font) > width:
        text = text[: len(text) // 2] + text[len(text) // 2 + 1 :]
        short = text[: len(text) // 2] + "..." + text[len(text) // 2 :]
    return short
