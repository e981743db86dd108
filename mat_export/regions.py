"""Where to look: holes of a mask, and the square window in which the model sees each. NumPy only.

A network takes one size, so a picture is worked on in square windows, scaled down where a window
is larger than the network. The smaller a window, the sharper its fill; the more of them, the longer
it takes. `plan_regions` finds the balance:

1. The bounding box of the holes is cut along empty rows and columns (a recursive X-Y cut), and in
   the middle of its longer axis where its holes are long and thin (a scratch, a wire, scattered
   brush strokes): a window around the whole of those would scale down a lot for nothing.
2. It stops where a window of the network's own size serves, or where the hole is one lump.
3. Each box gets context on every side as wide as the hole is thick, at least an eighth of the
   box and at most `context` times the box altogether, and no more than the picture offers.
4. Boxes that fit a window of the network's own size together are joined.

Everything depends on the mask alone, so the same mask always gives the same windows in the same
order (from top to bottom, then from left to right).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Box", "Region", "Window", "plan_regions", "reflected"]

Mask = NDArray[np.bool_]

_GAP = 16
"""Holes further apart than a sixteenth of the native side may get windows of their own."""

_SLACK = 1.5
"""Holes that could be cut in two are not, up to a window of this many native sides."""

_THIN = 3.0
"""Holes are thin where their box is longer than this many times their thickness."""

_LEAST_CONTEXT = 1.25
"""The window's side is at least this many times the box's, where the picture is large enough."""

_COARSE = 96
"""Thickness is measured on a grid of at most this many cells a side."""


class Box(NamedTuple):
    """A rectangle of pixels: rows top to bottom - 1, columns left to right - 1."""

    top: int
    left: int
    bottom: int
    right: int

    @property
    def longer(self) -> int:
        """The longer side in pixels."""
        return max(self.bottom - self.top, self.right - self.left)

    def union(self, other: Box) -> Box:
        """The smallest box around both."""
        return Box(
            min(self.top, other.top),
            min(self.left, other.left),
            max(self.bottom, other.bottom),
            max(self.right, other.right),
        )


class Window(NamedTuple):
    """A square that may reach beyond the picture, where the picture is mirrored.

    Attributes:
        top: First row, negative where the window begins above the picture.
        left: First column likewise.
        side: Pixels a side.
    """

    top: int
    left: int
    side: int


class Region(NamedTuple):
    """Holes to fill at once: all of those in `box`, seen in `window` (which contains the box)."""

    box: Box
    window: Window


class _Hole(NamedTuple):
    box: Box
    thickness: int


def reflected(start: int, side: int, length: int) -> NDArray[np.intp]:
    """Indices start … start + side - 1 mirrored into [0, length), the end pixels not repeated.

    A length of 1 gives zeros. ``reflected(-2, 7, 4)`` is ``[2, 1, 0, 1, 2, 3, 2]``.
    """
    period = max(1, 2 * (length - 1))
    index = np.arange(start, start + side, dtype=np.intp) % period
    return np.minimum(index, period - index) if length > 1 else np.zeros(side, dtype=np.intp)


def plan_regions(
    keep: Mask, native: int, *, context: float = 2.0, max_windows: int = 64
) -> list[Region]:
    """Every hole of a mask in one region or another, in the order of filling.

    Boxes may overlap; whoever fills them leaves out what an earlier region has filled.

    Args:
        keep: [H, W], False in the holes.
        native: Side in pixels of the network's input; no window is smaller.
        context: Side of a window relative to a compact hole's, 1 or more.
        max_windows: With more windows than this, coarser ones are chosen until it is enough.

    Returns:
        No region for a mask without holes.
    """
    hole = ~keep
    whole = _tight(hole, Box(0, 0, *hole.shape))
    if whole is None:
        return []
    target = native
    while True:
        finder = _Finder(hole, native, target, context, limit=4 * max_windows)
        holes = finder.cut(whole)
        if holes is not None:
            holes = finder.joined(holes)
            if len(holes) <= max_windows or target >= 2 * max(hole.shape):
                regions = [Region(h.box, finder.window(h)) for h in holes]
                return _same_windows_joined(sorted(regions))
        target *= 2


class _Finder:
    """One attempt at a mask: windows of up to `target` pixels are good enough to stop cutting."""

    def __init__(self, hole: Mask, native: int, target: int, context: float, limit: int) -> None:
        self.hole = hole
        self.native = native
        self.target = target
        self.context = context
        self.limit = limit

    def side(self, hole: _Hole) -> int:
        """The window's side for this hole (rule 3 of the module)."""
        height, width = self.hole.shape
        longer = hole.box.longer
        margin = (self.context - 1.0) * min(longer / 2, max(longer / 8, hole.thickness))
        least = min(self.context, _LEAST_CONTEXT) * longer
        wanted = min(longer + 2 * margin, max(least, min(height, width)), max(height, width))
        return max(self.native, int(np.ceil(max(wanted, longer))))

    def window(self, hole: _Hole) -> Window:
        """The window around this hole, shifted into the picture where it fits."""
        box, side = hole.box, self.side(hole)
        height, width = self.hole.shape
        top = _placed(box.top, box.bottom, side, height)
        return Window(top, _placed(box.left, box.right, side, width), side)

    def cut(self, whole: Box) -> list[_Hole] | None:
        """The holes in a tight box, or None for more than the limit."""
        found: list[_Hole] = []
        waiting = [whole]
        while waiting:
            if len(found) + len(waiting) > self.limit:
                return None
            box = waiting.pop()
            inside = self.hole[box.top : box.bottom, box.left : box.right]
            hole = _Hole(box, _thickness(inside))
            side = self.side(hole)
            parts = None
            if side > self.target:
                parts = _gap_cut(inside, box, max(1, self.target // _GAP))
                thin = box.longer > _THIN * hole.thickness
                if parts is None and thin and side > _SLACK * self.target:
                    parts = _middle_cut(box)
            if parts is None:
                found.append(hole)
            else:
                tight = (_tight(self.hole, part) for part in parts)
                waiting.extend(part for part in tight if part is not None)
        return found

    def joined(self, holes: list[_Hole]) -> list[_Hole]:
        """The same holes, those that fit one window of the target size made one (rule 4)."""
        groups: list[_Hole] = []
        for hole in sorted(holes):
            for i, group in enumerate(groups):
                both = _Hole(group.box.union(hole.box), max(group.thickness, hole.thickness))
                if self.side(both) <= self.target:
                    groups[i] = both
                    break
            else:
                groups.append(hole)
        return groups if len(groups) == len(holes) else self.joined(groups)


def _same_windows_joined(regions: list[Region]) -> list[Region]:
    """One region for all those that share a window."""
    boxes: dict[Window, Box] = {}
    for box, window in regions:
        boxes[window] = boxes[window].union(box) if window in boxes else box
    return sorted(Region(box, window) for window, box in boxes.items())


def _placed(first: int, last: int, side: int, length: int) -> int:
    """Start of a window centred on first … last: inside the picture, or centred around it."""
    if side >= length:
        return -((side - length) // 2)
    return min(max(0, (first + last - side) // 2), length - side)


def _tight(hole: Mask, box: Box) -> Box | None:
    """The box around the holes inside this one, None without any."""
    inside = hole[box.top : box.bottom, box.left : box.right]
    rows = np.flatnonzero(inside.any(axis=1))
    if not rows.size:
        return None
    columns = np.flatnonzero(inside[rows[0] : rows[-1] + 1].any(axis=0))
    return Box(
        box.top + int(rows[0]),
        box.left + int(columns[0]),
        box.top + int(rows[-1]) + 1,
        box.left + int(columns[-1]) + 1,
    )


def _gap_cut(inside: Mask, box: Box, least: int) -> tuple[Box, Box] | None:
    """Two boxes on the sides of the widest empty strip, None without one of `least` pixels."""
    row = _widest_gap(np.asarray(inside.any(axis=1)))
    column = _widest_gap(np.asarray(inside.any(axis=0)))
    if max(row[0], column[0]) < least:
        return None
    if row[0] >= column[0]:
        middle = box.top + row[1]
        return box._replace(bottom=middle), box._replace(top=middle)
    middle = box.left + column[1]
    return box._replace(right=middle), box._replace(left=middle)


def _widest_gap(occupied: NDArray[np.bool_]) -> tuple[int, int]:
    """Width and middle of the widest run of empty lines, the most central one among equals."""
    lines = np.flatnonzero(occupied)
    gaps = np.diff(lines) - 1
    if not gaps.size or not gaps.max():
        return 0, 0
    widest = np.flatnonzero(gaps == gaps.max())
    middles = lines[widest] + 1 + gaps[widest] // 2
    best = int(np.argmin(np.abs(2 * middles - occupied.size)))
    return int(gaps.max()), int(middles[best])


def _middle_cut(box: Box) -> tuple[Box, Box] | None:
    """Two halves along the longer axis, None where there is nothing to halve."""
    if box.longer < 2:
        return None
    if box.bottom - box.top >= box.right - box.left:
        middle = (box.top + box.bottom) // 2
        return box._replace(bottom=middle), box._replace(top=middle)
    middle = (box.left + box.right) // 2
    return box._replace(right=middle), box._replace(left=middle)


def _thickness(inside: Mask) -> int:
    """About the side of the largest square that is all hole, in pixels, at least 1.

    Counted in cells of a coarse grid: shrinking by one cell at a time until nothing is left.
    """
    height, width = (int(n) for n in inside.shape)
    cell = max(1, -(-max(height, width) // _COARSE))
    rows, columns = height // cell, width // cell
    if not rows or not columns:
        return max(1, min(height, width)) if bool(inside.all()) else cell
    cells = inside[: rows * cell, : columns * cell].reshape(rows, cell, columns, cell)
    full = np.asarray(np.all(np.asarray(np.all(cells, axis=3)), axis=1))
    count = 0
    while full.any():
        count += 1
        full = full[:-1, :-1] & full[1:, :-1] & full[:-1, 1:] & full[1:, 1:]
    return max(1, count) * cell
