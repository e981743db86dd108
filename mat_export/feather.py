"""Feathering: a fill made to meet its surroundings, without touching them. NumPy only.

A network's fill may be a shade off along the edge of the hole. The shade is measured there,
smoothed along the edge, and taken off the fill, in full at the edge and less and less further in:

``fill + ramp(depth) · (mean of kept pixels just outside − mean of the fill just inside)``

Both means are taken over the pixels next to the edge, weighted by a smooth kernel about as wide as
the ramp is long, so grain averages out and an edge of the picture that runs into the hole does not
smear. Kept pixels are not changed, nor anything deeper in the hole than the ramp.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["feathered"]

Mask = NDArray[np.bool_]
Field = NDArray[np.float64]


def feathered(
    fill: NDArray[np.float32], rgb: NDArray[np.uint8], keep: Mask, width: int
) -> NDArray[np.float32]:
    """The fill with its edge shaded to match the kept surroundings.

    Args:
        fill: [n, n, 3], 0 to 255, meaningful in the hole.
        rgb: [n, n, 3] the surroundings, looked at where kept.
        keep: [n, n] True where kept.
        width: Pixels from the edge to where the fill is as it was; 0 changes nothing.

    Returns:
        [n, n, 3], equal to `fill` outside the hole and from `width` pixels inside.
    """
    hole = ~keep
    inner = hole & _grown(keep, corners=True)
    if width == 0 or not inner.any():
        return fill
    outer = keep & _grown(hole, corners=True)
    ramp = _ramp(keep, width)
    shade = _local_mean(rgb, outer, width) - _local_mean(fill, inner, width)
    return np.asarray(fill + ramp[..., None] * shade, dtype=np.float32)


def _ramp(keep: Mask, width: int) -> Field:
    """Weight of the shade: 1 next to the edge, 0 from `width` pixels further in, and when kept.

    Depth is counted in steps that go to four and to eight neighbours in turn, so that contours are
    octagons rather than squares.
    """
    ramp = np.zeros(keep.shape)
    reached = keep
    for depth in range(width):
        grown = _grown(reached, corners=depth % 2 == 0)
        ramp[grown & ~reached] = 0.5 + 0.5 * np.cos(np.pi * depth / width)
        reached = grown
    return ramp


def _grown(mask: Mask, *, corners: bool) -> Mask:
    """The mask and its four (with corners: eight) neighbours."""
    rows = np.array(mask)
    rows[1:] |= mask[:-1]
    rows[:-1] |= mask[1:]
    both = np.array(rows)
    source = rows if corners else mask
    both[:, 1:] |= source[:, :-1]
    both[:, :-1] |= source[:, 1:]
    return both


def _local_mean(values: NDArray[Any], where: Mask, radius: int) -> Field:
    """[n, n, 3] weighted mean of the values `where` True, around each pixel; 0 with none near."""
    weight = where.astype(np.float64)[..., None]
    total = _blurred(np.where(where[..., None], values.astype(np.float64), 0.0), radius)
    count = _blurred(weight, radius)
    return np.divide(total, count, out=np.zeros_like(total), where=count > 0.5)


def _blurred(field: Field, radius: int) -> Field:
    """Two box sums of 2·radius + 1 pixels along each axis: a tent, not normalised."""
    for _ in range(2):
        for axis in (0, 1):
            field = _box_sum(field, radius, axis)
    return field


def _box_sum(field: Field, radius: int, axis: int) -> Field:
    length = field.shape[axis]
    sums = np.cumsum(field, axis=axis)
    zero = np.zeros_like(np.take(sums, [0], axis=axis))
    sums = np.concatenate([zero, sums], axis=axis)
    i = np.arange(length)
    last = np.minimum(i + radius + 1, length)
    first = np.maximum(i - radius, 0)
    return np.asarray(np.take(sums, last, axis=axis) - np.take(sums, first, axis=axis))
