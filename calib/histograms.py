"""Magnitudes of a tensor, counted, and the ranges that follow from the counts.

The bins end at a power of two and double when a larger value comes, by adding neighbours. So the
counts are the same whatever the order of images, and no value is ever counted again.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from mat_export.contract import UserError

__all__ = ["BINS", "LEAST_SCALE", "LEVELS", "METHODS", "Histogram", "scale_of"]

BINS = 4096
"""Bins up to the next power of two, so 2048 or more up to the largest value."""

LEVELS = 127
"""The largest magnitude in INT8; −128 is not used."""

LEAST_SCALE = 2.0**-14
"""FP16's smallest normal number: scales are exact in half precision."""

_STEP = 8
"""Every so many bins a range is tried."""


def scale_of(threshold: float) -> float:
    """The scale of a range: ``threshold/127``, rounded up to a number that FP16 holds exactly."""
    wanted = max(threshold / LEVELS, LEAST_SCALE)
    rounded = np.float16(wanted)
    if float(rounded) < wanted:
        rounded = np.nextafter(rounded, np.float16(np.inf))
    return float(rounded)


class Histogram:
    """Counts of the magnitudes of a tensor, zeros left out.

    Attributes:
        counts: [BINS], int64.
        largest: The largest magnitude.
    """

    def __init__(self) -> None:
        self.counts: NDArray[np.int64] = np.zeros(BINS, np.int64)
        self.largest = 0.0
        self._log2: int | None = None

    @property
    def top(self) -> float:
        """Where the last bin ends."""
        return 0.0 if self._log2 is None else 2.0**self._log2

    def add(self, values: NDArray[np.float32], name: str) -> None:
        """Count the values of one image.

        Raises:
            UserError: If one is not finite.
        """
        magnitudes = np.abs(values).ravel()
        largest = float(magnitudes.max(initial=0.0))
        if not math.isfinite(largest):
            raise UserError(f"the model gives NaN or infinity at '{name}': it cannot be calibrated")
        if largest == 0.0:
            return
        self._reach(largest)
        self.largest = max(self.largest, largest)
        magnitudes = magnitudes[magnitudes > 0.0]
        bins = (magnitudes * np.float32(BINS / self.top)).astype(np.int32)
        self.counts += np.bincount(np.minimum(bins, BINS - 1), minlength=BINS)

    def _reach(self, largest: float) -> None:
        """Double the bins until a value fits."""
        needed = math.frexp(largest)[1]  # largest < 2**needed
        if self._log2 is None:
            self._log2 = needed
        while self._log2 < needed:
            pairs = self.counts.reshape(-1, 2).sum(axis=1)
            self.counts = np.concatenate([pairs, np.zeros(BINS // 2, np.int64)])
            self._log2 += 1

    def edge(self, bins: int) -> float:
        """The value where that many bins end, the largest magnitude at most."""
        return min(bins / BINS * self.top, self.largest)

    def percentile(self, share: float) -> float:
        """The magnitude that so large a share of the values does not exceed."""
        total = np.cumsum(self.counts)
        return self.edge(int(np.searchsorted(total, share * total[-1])) + 1)

    def least_squares(self) -> float:
        """The range with the least squared error of rounding and clipping together."""
        middles = (np.arange(BINS) + 0.5) / BINS * self.top

        def error(bins: int) -> float:
            step = self.edge(bins) / LEVELS
            rounded = np.minimum(np.rint(middles / step), LEVELS) * step
            return float(self.counts @ np.square(rounded - middles))

        return self._best(error)

    def least_divergence(self) -> float:
        """The range whose INT8 distribution tells most of the real one (Kullback and Leibler).

        As TensorRT's entropy calibration: what lies outside counts at the edge, and what falls on
        one level is spread evenly over the bins that had values.
        """
        counts = self.counts.astype(np.float64)

        def divergence(bins: int) -> float:
            real = counts[:bins].copy()
            starts = (np.arange(LEVELS + 1) * bins) // (LEVELS + 1)
            filled = (real > 0.0).astype(np.float64)
            held = np.maximum(np.add.reduceat(filled, starts), 1.0)
            level = np.add.reduceat(real, starts) / held
            spread = np.repeat(level, np.diff([*starts, bins])) * filled
            real[-1] += counts[bins:].sum()
            seen = real > 0.0
            p, q = real[seen] / real.sum(), spread[seen] / max(spread.sum(), 1.0)
            return float((p * np.log(p / np.maximum(q, 1e-12))).sum())

        return self._best(divergence)

    def _best(self, cost: Callable[[int], float]) -> float:
        """The range of least cost, of those with a bin for each level at least."""
        last = min(BINS, int(self.largest / self.top * BINS) + 1)
        tried = [*range(LEVELS + 1, last, _STEP), last]
        return self.edge(min(tried, key=cost))


METHODS: dict[str, Callable[[Histogram], float]] = {
    "largest": lambda histogram: histogram.largest,
    "99.999 %": lambda histogram: histogram.percentile(0.99999),
    "99.99 %": lambda histogram: histogram.percentile(0.9999),
    "99.9 %": lambda histogram: histogram.percentile(0.999),
    "entropy": Histogram.least_divergence,
    "least squares": Histogram.least_squares,
}
"""Ways to a range, by name."""
