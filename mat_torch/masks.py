"""The random masks of training: rectangles and brush strokes (MAT paper, section 4.1).

Two kinds are drawn, *large* and *small* holes, by counts that `PRESETS` states. How the parts are
drawn was settled by the hole ratios that 4,000 draws of each published sampler gave
(`tests/data/mask_statistics.json`): every reading of the description was drawn thousands of times
and held against their quantiles, and this is the one that none of the four tables refutes.

- **Rectangles.** Width and height are uniform up to half of the picture's side or up to all of it,
  and the centre is uniform over the picture, so up to half of each side may lie outside.
- **Strokes.** Every stroke has its own range of angles: from ``2π/5 − a`` to ``2π/5 + b``, with a
  and b uniform up to 2π/15. Vertices are held inside the picture, and all of them are round, not
  the ends alone.
- **Widths** are 12 to 47 pixels at 512 and at 256 alike, which makes strokes twice as bold at 256.
- **An empty mask** (no hole) is drawn again. So is one that keeps nothing.
- **Small holes at 256** have smaller counts than at 512: at most one rectangle of each size and two
  strokes. The counts of 512 give a mean ratio of 0.27 there, and 0.22 is what was published.

Between and beyond the published sizes the counts are those of 512 from there up and of 256 below,
and the widths scale with the side, so that a ratio is as frequent as at the published size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

__all__ = [
    "MIN_RESOLUTION",
    "PRESETS",
    "MaskError",
    "MaskKind",
    "MaskPreset",
    "hole_ratio",
    "preset_for",
    "sample_mask",
    "stratified",
]

MaskKind = Literal["large", "small"]

MIN_RESOLUTION = 32
"""Smallest side, in pixels; strokes of 12 at 256 are still more than one pixel wide here."""

_VERTICES = (4, 17)
_WIDTHS = (12, 47)
_ANGLE = 2 * math.pi / 5
_SPREAD = 2 * math.pi / 15


class MaskError(ValueError):
    """Masks were asked for that cannot be drawn."""


@dataclass(frozen=True)
class MaskPreset:
    """How many parts a mask has at most; each count is uniform from 0 up to it, both included.

    Attributes:
        side: The published side in pixels, for which stroke widths are stated.
        half_rectangles: Rectangles of at most half the side.
        full_rectangles: Rectangles of at most the whole side.
        strokes: Brush strokes.
    """

    side: int
    half_rectangles: int
    full_rectangles: int
    strokes: int


PRESETS: dict[tuple[MaskKind, int], MaskPreset] = {
    ("large", 512): MaskPreset(512, half_rectangles=4, full_rectangles=2, strokes=8),
    ("small", 512): MaskPreset(512, half_rectangles=2, full_rectangles=1, strokes=3),
    ("large", 256): MaskPreset(256, half_rectangles=3, full_rectangles=1, strokes=7),
    ("small", 256): MaskPreset(256, half_rectangles=1, full_rectangles=1, strokes=2),
}
"""The published samplers, by kind and side."""


def preset_for(kind: MaskKind, resolution: int) -> MaskPreset:
    """The counts at this side (pixels): those of 512 from 512 up, those of 256 below.

    Raises:
        MaskError: For an unknown kind, or a resolution below 32.
    """
    if kind not in ("large", "small"):
        raise MaskError(f"there is no mask kind {kind!r}: choose 'large' or 'small'")
    if resolution < MIN_RESOLUTION:
        raise MaskError(f"masks have {MIN_RESOLUTION} pixels a side or more, got {resolution}")
    return PRESETS[kind, 512 if resolution >= 512 else 256]


def sample_mask(kind: MaskKind, resolution: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    """One random mask.

    Args:
        kind: ``large`` holes (a mean ratio of about 0.40) or ``small`` ones (about 0.22).
        resolution: Height and width, in pixels.
        rng: Where the randomness comes from. The same state gives the same mask.

    Returns:
        [resolution, resolution], True where the picture is kept. Both values occur.

    Raises:
        MaskError: As `preset_for`.
    """
    preset = preset_for(kind, resolution)
    while True:
        canvas = Image.new("L", (resolution, resolution), 0)
        draw = ImageDraw.Draw(canvas)
        for most, longest in (
            (preset.half_rectangles, resolution // 2),
            (preset.full_rectangles, resolution),
        ):
            for _ in range(rng.integers(most, endpoint=True)):
                _rectangle(draw, resolution, longest, rng)
        for _ in range(rng.integers(preset.strokes, endpoint=True)):
            _stroke(draw, resolution, resolution / preset.side, rng)
        keep: NDArray[np.bool_] = np.asarray(canvas) == 0
        if keep.any() and not keep.all():
            return keep


def hole_ratio(keep: NDArray[np.bool_]) -> float:
    """Which share of the mask is hole, 0 … 1."""
    return 1.0 - float(keep.mean())


def _rectangle(
    draw: ImageDraw.ImageDraw, side: int, longest: int, rng: np.random.Generator
) -> None:
    width, height = (int(length) for length in rng.integers(longest, size=2))
    if width == 0 or height == 0:
        return
    left, top = (
        int(rng.integers(side)) - width // 2,
        int(rng.integers(side)) - height // 2,
    )
    # Pillow's rectangles include their last row and column.
    draw.rectangle((left, top, left + width - 1, top + height - 1), fill=1)


def _stroke(draw: ImageDraw.ImageDraw, side: int, scale: float, rng: np.random.Generator) -> None:
    """A zigzag with round joints and ends; `scale` is that of the width."""
    count = int(rng.integers(*_VERTICES, endpoint=True))
    lowest, highest = _ANGLE - rng.uniform(0, _SPREAD), _ANGLE + rng.uniform(0, _SPREAD)
    angles = rng.uniform(lowest, highest, count)
    angles[::2] *= -1  # reversed: from the horizontal to the other side
    mean = math.hypot(side, side) / 8
    lengths = np.clip(rng.normal(mean, mean / 2, count), 0, 2 * mean)
    width = max(1, round(int(rng.integers(*_WIDTHS, endpoint=True)) * scale))

    x, y = (float(coordinate) for coordinate in rng.integers(side, size=2))
    path = [(round(x), round(y))]
    for across, down in zip(lengths * np.cos(angles), lengths * np.sin(angles), strict=True):
        x, y = min(max(x + across, 0.0), float(side)), min(max(y + down, 0.0), float(side))
        path.append((round(x), round(y)))
    draw.line(path, fill=1, width=width)
    radius = width // 2
    for x, y in path:
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=1)


def stratified(
    bins: Sequence[tuple[float, float]],
    per_bin: int,
    resolution: int,
    rng: np.random.Generator,
    *,
    kinds: Sequence[MaskKind] = ("large", "small"),
    max_draws: int = 20_000,
) -> NDArray[np.bool_]:
    """Masks whose hole ratios fill given bins equally, for evaluation and calibration.

    Masks are drawn, of the kinds in turn, until every bin is full: within a bin they are
    distributed as the samplers' are.

    Args:
        bins: (low, high) of each, with low ≤ ratio < high. A mask goes to the first that fits and
            has room.
        per_bin: How many masks each bin gets.
        resolution: Height and width, in pixels.
        rng: Where the randomness comes from.
        kinds: Which samplers take turns.
        max_draws: After how many draws to give up.

    Returns:
        [bins, per_bin, resolution, resolution], True where the picture is kept.

    Raises:
        MaskError: For bins that are empty or outside 0 … 1, no kinds, or bins that were not full
            after `max_draws`.
    """
    if not bins or per_bin < 1 or not kinds:
        raise MaskError("at least one bin, one mask per bin and one kind are needed")
    for low, high in bins:
        if not 0 <= low < high <= 1:
            raise MaskError(f"the bin ({low}, {high}) is not a range of hole ratios within 0 … 1")
    found: list[list[NDArray[np.bool_]]] = [[] for _ in bins]
    for number in range(max_draws):
        keep = sample_mask(kinds[number % len(kinds)], resolution, rng)
        ratio = hole_ratio(keep)
        for (low, high), masks in zip(bins, found, strict=True):
            if low <= ratio < high and len(masks) < per_bin:
                masks.append(keep)
                break
        if all(len(masks) == per_bin for masks in found):
            return np.stack([np.stack(masks) for masks in found])
    lacking = ", ".join(
        f"{low} … {high} ({len(masks)} of {per_bin})"
        for (low, high), masks in zip(bins, found, strict=True)
        if len(masks) < per_bin
    )
    raise MaskError(
        f"after {max_draws} draws these bins are not full: {lacking}; "
        "use wider bins, other kinds, or more draws"
    )
