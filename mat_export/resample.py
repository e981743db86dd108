"""Between the scale of a picture and that of the network. NumPy and Pillow only.

Down by the mean over each coarse pixel's area, counting only coarse pixels that cover kept pixels
alone; up by bicubic interpolation, a strip at a time. Neither holds a large picture as floats.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mat_export.canvas import Canvas, pick
from mat_export.regions import Box, Window

__all__ = ["NEUTRAL", "enlarged_strips", "shrunk"]

NEUTRAL = 128
"""What stands in the holes of everything a network sees."""

_STRIP = 256
"""Rows enlarged at once."""

Bytes = NDArray[np.uint8]
Mask = NDArray[np.bool_]
Index = NDArray[np.intp]


def shrunk(
    canvas: Canvas, known: Mask | None, rows: Index, columns: Index, height: int, width: int
) -> tuple[Bytes, Mask]:
    """A part of a picture at a lower resolution, or at its own.

    Coarse pixel i spans the rows from i·S/n to (i + 1)·S/n of the S rows given, and takes the mean
    over this span, in which pixels at the ends count by the part that lies within.

    Args:
        canvas: The picture.
        known: [H, W] True where a pixel may be looked at, all if None.
        rows: Which rows of the picture; at least `height` of them.
        columns: Which columns, at least `width` of them.
        height: Rows wanted.
        width: Columns wanted.

    Returns:
        [height, width, 3], and [height, width] True where every pixel covered is known. Elsewhere
        the colour is neutral: nothing of the result depends on unknown pixels.
    """
    if (height, width) == (len(rows), len(columns)):
        rgb, keep = _band(canvas, known, rows, columns)
        return rgb, keep
    result = np.full((height, width, 3), NEUTRAL, dtype=np.uint8)
    keep = np.empty((height, width), dtype=np.bool_)
    for i in range(height):
        first, last = i * len(rows) // height, -(-(i + 1) * len(rows) // height)
        rgb, kept = _band(canvas, known, rows[first:last], columns)
        keep[i] = _all_of(np.asarray(kept.all(axis=0)), width)
        weights = _weights(i, len(rows), height)
        line = np.tensordot(weights, rgb.astype(np.float32), axes=1)
        mean = _means(line, width)
        result[i, keep[i]] = np.rint(mean[keep[i]])
    return result, keep


def _band(canvas: Canvas, known: Mask | None, rows: Index, columns: Index) -> tuple[Bytes, Mask]:
    """Pixels as they are, neutral where unknown, and which are known."""
    rgb = canvas.rgb(rows, columns)
    if known is None:
        return rgb, np.ones(rgb.shape[:2], dtype=np.bool_)
    kept = np.array(pick(known, rows, columns))
    rgb[~kept] = NEUTRAL
    return rgb, kept


def _weights(i: int, length: int, count: int) -> NDArray[np.float32]:
    """Share of each row that coarse row i touches; they add up to 1."""
    start, end = i * length / count, (i + 1) * length / count
    touched = np.arange(i * length // count, -(-(i + 1) * length // count))
    overlap = np.minimum(touched + 1, end) - np.maximum(touched, start)
    return np.asarray(np.maximum(overlap, 0.0) / (end - start), dtype=np.float32)


def _means(line: NDArray[np.float32], count: int) -> NDArray[np.float64]:
    """[length, 3] → [count, 3], the mean over each coarse pixel, from running sums."""
    length = line.shape[0]
    sums = np.zeros((length + 1, 3), dtype=np.float64)
    np.cumsum(line, axis=0, dtype=np.float64, out=sums[1:])
    edges = np.arange(count + 1) * length
    whole, part = edges // count, (edges % count) / count
    after = np.minimum(whole + 1, length)
    at_edges = sums[whole] + part[:, None] * (sums[after] - sums[whole])
    return np.asarray(np.diff(at_edges, axis=0) * (count / length))


def _all_of(kept: Mask, count: int) -> Mask:
    """[length] → [count], True where every pixel that a coarse pixel touches is kept."""
    length = kept.size
    unknown = np.concatenate([[0], np.cumsum(~kept)])
    i = np.arange(count)
    first, last = i * length // count, -(-(i + 1) * length // count)
    return np.asarray(unknown[last] == unknown[first])


def enlarged_strips(
    fill: NDArray[np.float32], window: Window, box: Box
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """The part of a window's fill that lies in a box, at the picture's scale, strip by strip.

    Args:
        fill: [n, n, 3], 0 to 255, the whole window at the network's scale.
        window: Where it lies in the picture.
        box: The part wanted, inside both.

    Yields:
        The strip's first row in the picture, and its pixels [h, box width, 3], 0 to 255.
    """
    planes = [Image.fromarray(np.ascontiguousarray(fill[..., c])) for c in range(3)]
    scale = fill.shape[0] / window.side
    for top in range(box.top, box.bottom, _STRIP):
        bottom = min(top + _STRIP, box.bottom)
        rows = top - window.top, bottom - window.top
        columns = box.left - window.left, box.right - window.left
        if fill.shape[0] == window.side:
            yield top, fill[slice(*rows), slice(*columns)]
            continue
        size = (columns[1] - columns[0], rows[1] - rows[0])
        part = (columns[0] * scale, rows[0] * scale, columns[1] * scale, rows[1] * scale)
        bicubic = Image.Resampling.BICUBIC
        large = [np.asarray(plane.resize(size, bicubic, box=part)) for plane in planes]
        yield top, np.clip(np.stack(large, axis=2), 0.0, 255.0)
