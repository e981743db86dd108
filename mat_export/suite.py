"""The cases of a parity check: real photographs under hard masks. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import resources

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from mat_torch.config import TOKEN_GRID
from mat_torch.sampling import words

__all__ = ["MASKS", "PHOTOGRAPHS", "Case", "cases", "photograph"]

Keep = NDArray[np.bool_]

PHOTOGRAPHS = ("astronaut", "coffee", "rocket")
"""The photographs that come with the package; their README names sources and licences."""

_WINDOW, _SHIFT = 8, 4  # of the first transformer stage, in tokens


@dataclass(frozen=True)
class Case:
    """One picture to fill.

    Attributes:
        name: The mask's name.
        image: [H, W, 3], uint8.
        keep: [H, W], True where a pixel is kept.
        seed: What its randomness is drawn from.
        truncation: ψ.
    """

    name: str
    image: NDArray[np.uint8]
    keep: Keep
    seed: int
    truncation: float = 1.0


_TRUNCATIONS = (1.0, 0.5, 2.0, 0.0)
"""ψ of the cases, in turns: at 1 alone the mean style would cancel and go unchecked."""


def cases(height: int, width: int) -> Iterator[Case]:
    """Every mask of MASKS over a photograph each, for this size in pixels."""
    for i, (name, draw) in enumerate(MASKS.items()):
        picture = photograph(PHOTOGRAPHS[i % len(PHOTOGRAPHS)], height, width)
        truncation = _TRUNCATIONS[i % len(_TRUNCATIONS)]
        yield Case(name, picture, draw(height, width), seed=i, truncation=truncation)


@cache
def photograph(name: str, height: int, width: int) -> NDArray[np.uint8]:
    """One of PHOTOGRAPHS as [height, width, 3] uint8, cut from the middle and scaled."""
    with resources.files("mat_export").joinpath(f"data/{name}.jpg").open("rb") as file:
        image = Image.open(file).convert("RGB")
    scale = min(image.width / width, image.height / height)
    w, h = width * scale, height * scale
    left, top = (image.width - w) / 2, (image.height - h) / 2
    image = image.resize(
        (width, height), Image.Resampling.LANCZOS, box=(left, top, left + w, top + h)
    )
    return np.asarray(image)


# -- masks ------------------------------------------------------------------------------------


def _all_hole(h: int, w: int) -> Keep:
    return np.zeros((h, w), bool)


def _no_hole(h: int, w: int) -> Keep:
    return np.ones((h, w), bool)


def _one_pixel_hole(h: int, w: int) -> Keep:
    keep = _no_hole(h, w)
    keep[h // 3, w // 2] = False
    return keep


def _one_pixel_kept(h: int, w: int) -> Keep:
    return ~_one_pixel_hole(h, w)


def _one_window(h: int, w: int) -> Keep:
    """A hole of just one window of the first stage, so that no token of it is valid."""
    side = _WINDOW * min(h, w) // TOKEN_GRID
    keep = _no_hole(h, w)
    keep[2 * side : 3 * side, 3 * side : 4 * side] = False
    return keep


def _shift_seams(h: int, w: int) -> Keep:
    """Holes along the lines where the cyclic shift joins far sides of the image."""
    token = min(h, w) // TOKEN_GRID
    band = _SHIFT * token
    keep = _no_hole(h, w)
    keep[h - 2 * band : h - band // 2], keep[: band // 2] = False, False
    keep[:, w - band - token : w - band + token], keep[:, :band] = False, False
    return keep


def _border(h: int, w: int) -> Keep:
    keep = _all_hole(h, w)
    keep[h // 5 : -h // 5, w // 5 : -w // 5] = True
    return keep


def _checkerboard(h: int, w: int) -> Keep:
    """Squares of a token's size."""
    token = min(h, w) // TOKEN_GRID
    rows, columns = np.arange(h) // token, np.arange(w) // token
    keep: Keep = (rows[:, None] + columns[None, :]) % 2 == 0
    return keep


def _random(h: int, w: int, seed: int, boxes: int, strokes: int) -> Keep:
    """Rectangles and brush strokes."""
    raw = words(seed, "parity.mask", 8 * (boxes + strokes) + 64)
    numbers = iter((raw >> np.uint64(11)).astype(np.float64) * 2.0**-53)

    def within(low: float, high: float) -> float:
        return low + (high - low) * float(next(numbers))

    image = Image.new("1", (w, h), 1)
    pen = ImageDraw.Draw(image)
    for _ in range(boxes):
        x, y = within(0, 0.7 * w), within(0, 0.7 * h)
        pen.rectangle([x, y, x + within(0.1, 0.4) * w, y + within(0.1, 0.4) * h], fill=0)
    for _ in range(strokes):
        points = [(within(0, w), within(0, h)) for _ in range(3)]
        pen.line(points, fill=0, width=max(2, int(within(0.02, 0.08) * w)), joint="curve")
    return np.array(image, dtype=bool)


def _random_large(h: int, w: int) -> Keep:
    return _random(h, w, seed=1, boxes=6, strokes=6)


def _random_small(h: int, w: int) -> Keep:
    return _random(h, w, seed=2, boxes=1, strokes=2)


def _inverted(h: int, w: int) -> Keep:
    """What a caller with the polarity the wrong way round sends."""
    return ~_random_small(h, w)


def _thin_lines(h: int, w: int) -> Keep:
    """Scratches of one pixel, every 0/255 step of an 8-bit mask an edge."""
    keep = _no_hole(h, w)
    keep[:: max(8, h // 16)] = False
    return keep


MASKS: dict[str, Callable[[int, int], Keep]] = {
    "all-hole": _all_hole,
    "no-hole": _no_hole,
    "one-pixel-hole": _one_pixel_hole,
    "one-pixel-kept": _one_pixel_kept,
    "one-window": _one_window,
    "shift-seams": _shift_seams,
    "border": _border,
    "checkerboard": _checkerboard,
    "random-large": _random_large,
    "random-small": _random_small,
    "inverted-polarity": _inverted,
    "one-pixel-lines-0-255": _thin_lines,
}
"""Name and maker of every hard mask: (height, width) in pixels → True where kept."""
