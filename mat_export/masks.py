"""Masks: pictures or arrays in, one truth value a pixel out. NumPy and Pillow only.

White is kept and black is the hole (the authors' convention); ``hole="white"`` turns that around.

What is white: values of 128 and above where white is 255, and the same share of the range where
white is 1 or 65535. Which of these white is follows from the largest value, so masks of 0 and 1,
of 0 and 255, and of 16 bits all work. Coloured masks count by their luminance.

Masks with transparency: a mask layer painted in black or in white alone stands for its paint, and
what is transparent for the opposite; one of black and white lies on black; in anything else (a
photograph with parts erased) transparency itself is the mask, and what is transparent the hole.
"""

from __future__ import annotations

import os

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from mat_export.contract import UserError
from mat_export.images import check_size, read_image
from mat_export.pixels import KEEP_THRESHOLD

__all__ = ["HOLES", "MaskSource", "hole_notes", "read_mask"]

MaskSource = Image.Image | NDArray[np.generic] | str | os.PathLike[str]
"""A picture, an array [H, W] or [H, W, 1 to 4], or the path of a picture file."""

HOLES = ("black", "white")
"""What the holes of a mask may be painted in."""

_SUSPICIOUS = 0.95
"""A hole of more than this share of the picture is more often a mask the wrong way round."""

_WHITES = (1, 255, 65535)
_STRIPE = 512

Mask = NDArray[np.bool_]


def read_mask(mask: MaskSource, *, hole: str = "black", notes: list[str] | None = None) -> Mask:
    """Which pixels are kept: [H, W], True keep, False hole, as the mask is displayed.

    Args:
        mask: A picture of any mode, an array (bool: True keeps; numbers as described above), or a
            path. A picture is turned upright by its own EXIF orientation.
        hole: ``black`` or ``white``, the colour of the holes. ``white`` flips arrays of bool too.
        notes: Collects sentences on grey values, 0/1 masks and the use of transparency.

    Raises:
        UserError: For an unreadable file, an array of another shape or type, values that are not
            finite, a side of more than 8192 pixels, or another word for `hole`.
    """
    if hole not in HOLES:
        raise UserError(f"the holes of a mask are 'black' or 'white', got '{hole}'")
    notes = [] if notes is None else notes
    if isinstance(mask, str | os.PathLike):
        mask = read_image(mask, notes)
    if isinstance(mask, Image.Image):
        values = _picture_values(mask, notes)
    else:
        values = _array_values(np.asarray(mask), notes)
    keep = _thresholded(values, notes)
    return ~keep if hole == "white" else keep


def hole_notes(keep: Mask) -> list[str]:
    """Sentences on a mask that looks like a mistake: no hole, all hole, or nearly all."""
    holes = keep.size - int(np.count_nonzero(keep))
    if holes == 0:
        return ["the mask has no holes: the picture comes back unchanged"]
    if holes == keep.size:
        return [
            "the mask is nothing but hole: the whole picture is made up (--hole white flips it)"
        ]
    if holes > _SUSPICIOUS * keep.size:
        share = min(99.9, 100 * holes / keep.size)
        return [
            f"{share:.1f} % of the picture is hole: the polarity looks wrong? --hole white flips it"
        ]
    return []


def _picture_values(mask: Image.Image, notes: list[str]) -> NDArray[np.generic]:
    """[H, W] grey values of a picture of any mode, upright."""
    check_size(mask.size, "the mask")
    mask.load()
    upright = ImageOps.exif_transpose(mask)
    if upright.mode in ("1", "L", "I", "F") or upright.mode.startswith("I;16"):
        return np.asarray(upright)
    if upright.mode == "LAB":
        return np.asarray(upright)[..., 0]
    alpha = "A" in upright.getbands() or "transparency" in upright.info
    if not alpha:
        return np.asarray(upright.convert("L"))
    planes = upright.convert("RGBA")
    grey, opacity = planes.convert("L"), planes.getchannel("A")
    return _without_alpha(np.asarray(grey), np.asarray(opacity), notes)


def _array_values(mask: NDArray[np.generic], notes: list[str]) -> NDArray[np.generic]:
    """[H, W] values of an array of 1 to 4 channels."""
    if mask.dtype.kind not in "buif" or mask.ndim not in (2, 3):
        raise UserError(
            f"a mask array is [H, W] or [H, W, C] of bool or numbers, got {mask.dtype} "
            f"{list(mask.shape)}"
        )
    check_size((mask.shape[1], mask.shape[0]), "the mask")
    if mask.ndim == 2:
        return mask
    channels = mask.shape[2]
    if channels == 1:
        return np.asarray(mask[..., 0])
    if channels > 4 or channels == 0 or mask.dtype != np.uint8:
        raise UserError(
            "a mask array of several channels is uint8 [H, W, 2 to 4], got "
            f"{mask.dtype} {list(mask.shape)}: give one channel"
        )
    mode = {2: "LA", 3: "RGB", 4: "RGBA"}[channels]
    size = (mask.shape[1], mask.shape[0])
    return _picture_values(Image.frombytes(mode, size, mask.tobytes()), notes)


def _without_alpha(
    grey: NDArray[np.uint8], alpha: NDArray[np.uint8], notes: list[str]
) -> NDArray[np.uint8]:
    """Grey values and transparency as one (the rules stand at the head of the module)."""
    if int(alpha.min()) == int(alpha.max()):
        return grey
    visible = grey[alpha > 0]
    black, white = bool((visible == 0).any()), bool((visible == 255).any())
    if not bool(((visible == 0) | (visible == 255)).all()):
        notes.append("the mask's transparency is taken as the mask: what is transparent is black")
        return alpha
    notes.append(f"what is transparent in the mask is taken as {'black' if white else 'white'}")
    if black and not white:
        return np.asarray(255 - alpha, dtype=np.uint8)
    return np.where(grey == 255, alpha, np.uint8(0))


def _white(top: float, real: bool) -> float:
    """What counts as white where `top` is the largest value: 1, 255, 65535, or that value.

    Resampling with a sharp filter takes real numbers a little above 1.
    """
    if real and top <= 2.0:
        return 1.0
    return next((float(white) for white in _WHITES if top <= white), top)


def _thresholded(values: NDArray[np.generic], notes: list[str]) -> Mask:
    """True from 128 of 255 up; grey values are counted and mentioned."""
    if values.dtype == np.bool_:
        return np.array(values, dtype=np.bool_)
    top = float(values.max())
    if not np.isfinite(top) or not np.isfinite(float(values.min())):
        raise UserError("the mask holds values that are not finite: use 0 for hole, 1 for kept")
    white = _white(top, values.dtype.kind == "f")
    if white == 1 and top == 1 and values.dtype.kind in "ui":
        notes.append("the mask holds only 0 and 1: 1 is taken as white")
    threshold = KEEP_THRESHOLD * white / 255
    keep = np.empty(values.shape, dtype=np.bool_)
    grey = 0
    for first in range(0, values.shape[0], _STRIPE):
        part = values[first : first + _STRIPE]
        keep[first : first + _STRIPE] = part >= threshold  # type: ignore[operator]
        grey += int(np.count_nonzero((part != 0) & (part != white)))
    if grey:
        notes.append(
            f"the mask holds grey values ({100 * grey / values.size:.2g} % of it): "
            f"{threshold:.5g} and above counts as white"
        )
    return keep
