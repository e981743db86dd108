"""Weights in INT8: one scale an output channel, zero point 0."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from calib.histograms import LEVELS, scale_of

__all__ = ["quantize_weight"]

_DIVISORS = np.arange(108, 172, 2)
"""What a channel's largest weight is divided by. Below 127 nothing is clipped and the largest
weight may fall on a level (a resampling filter of 1, 2 and 4 is exact at 124); above, it is."""


def quantize_weight(
    weight: NDArray[np.float32],
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """A convolution's weights with the scales of least squared error.

    Args:
        weight: [out, ...].

    Returns:
        The integers, of the same shape, and the scales [out], exact in FP16.
    """
    rows = weight.reshape(len(weight), -1).astype(np.float64)
    largest = np.abs(rows).max(axis=1)
    best = np.full(len(rows), np.inf)
    scales = np.ones(len(rows))
    integers = np.zeros(rows.shape, np.int8)
    for divisor in (LEVELS, *_DIVISORS):
        scale = np.array([scale_of(value * LEVELS / divisor) for value in largest])
        tried = np.clip(np.rint(rows / scale[:, None]), -LEVELS, LEVELS)
        error = np.square(tried * scale[:, None] - rows).sum(axis=1)
        better = error < best
        best[better], scales[better] = error[better], scale[better]
        integers[better] = tried[better].astype(np.int8)
    return integers.reshape(weight.shape), scales.astype(np.float32)
