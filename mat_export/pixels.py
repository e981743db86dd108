"""Pixels to numbers and back: 0 … 255 and [-1, 1]. NumPy only.

The same arithmetic stands in graphs exported with ``--io uint8``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["KEEP_THRESHOLD", "from_unit", "to_unit"]

KEEP_THRESHOLD = 128
"""A mask value of this and above is kept, below is the hole."""


def to_unit(
    image: NDArray[np.uint8], mask: NDArray[np.uint8]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """NHWC image and NHW mask, uint8 → [B, 3, H, W] in [-1, 1] and [B, 1, H, W] of 0 and 1."""
    x = np.ascontiguousarray(image.transpose(0, 3, 1, 2)).astype(np.float32)
    x = x * np.float32(1.0 / 127.5) - np.float32(1.0)
    return x, (mask >= KEEP_THRESHOLD).astype(np.float32)[:, None]


def from_unit(image: NDArray[Any]) -> NDArray[np.uint8]:
    """[B, 3, H, W] in [-1, 1] → NHWC uint8, rounded to nearest and clipped."""
    x = np.rint((image.astype(np.float32) + np.float32(1.0)) * np.float32(127.5))
    return np.ascontiguousarray(np.clip(x, 0.0, 255.0).astype(np.uint8).transpose(0, 2, 3, 1))
