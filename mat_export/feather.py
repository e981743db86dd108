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
    part = _surroundings(inner, 3 * width)
    outer = (keep & _grown(hole, corners=True))[part]
    shade = _local_mean(rgb[part], outer, width) - _local_mean(fill[part], inner[part], width)
    result = np.array(fill)
    result[part] += _ramp(keep, width)[part][..., None] * shade
    return result


def _surroundings(where: Mask, reach: int) -> tuple[slice, slice]:
    """The rectangle around all that is True and so many pixels more on every side."""
    spans = []
    for axis in (1, 0):
        lines = np.flatnonzero(where.any(axis=axis))
        spans.append(slice(max(0, int(lines[0]) - reach), int(lines[-1]) + 1 + reach))
    return spans[0], spans[1]


def _ramp(keep: Mask, width: int) -> NDArray[np.float32]:
    """Weight of the shade: 1 next to the edge, 0 from `width` pixels further in, and when kept.

    Depth is counted in steps that go to four and to eight neighbours in turn, so that contours are
    octagons rather than squares.
    """
    ramp = np.zeros(keep.shape, dtype=np.float32)
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


def _local_mean(values: NDArray[Any], where: Mask, radius: int) -> NDArray[np.float32]:
    """[h, w, 3] weighted mean of the values `where` True, around each pixel; 0 with none near."""
    fields = np.zeros((4, *where.shape))
    fields[3] = where
    np.copyto(fields[:3], values.transpose(2, 0, 1), where=where)
    sums = _blurred(fields, radius)
    mean = np.divide(sums[:3], sums[3], out=np.zeros_like(sums[:3]), where=sums[3] > 0.5)
    return np.asarray(mean.transpose(1, 2, 0), dtype=np.float32)


def _blurred(fields: Field, radius: int) -> Field:
    """[C, h, w] summed under a tent that is 0 from 2·radius + 1 pixels away."""
    for _ in range(2):
        fields = _box_sum(_box_sum(fields, radius), radius)
        fields = np.ascontiguousarray(fields.transpose(0, 2, 1))
    return fields


def _box_sum(fields: Field, radius: int) -> Field:
    """Sums over 2·radius + 1 neighbours along the last axis, nothing lying beyond the ends."""
    sums = np.cumsum(np.pad(fields, ((0, 0), (0, 0), (radius + 1, radius))), axis=-1)
    return np.asarray(sums[..., 2 * radius + 1 :] - sums[..., : -2 * radius - 1])
