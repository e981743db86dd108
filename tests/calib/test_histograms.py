"""Counts of magnitudes, and the ranges that follow from them."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from calib.histograms import BINS, LEAST_SCALE, LEVELS, METHODS, Histogram, scale_of
from mat_export.contract import UserError


def values(seed: int, spread: float, count: int = 20_000) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).laplace(size=count) * spread).astype(np.float32)


def histogram_of(*arrays: NDArray[np.float32]) -> Histogram:
    histogram = Histogram()
    for array in arrays:
        histogram.add(array, "x")
    return histogram


def test_the_order_of_images_changes_nothing() -> None:
    arrays = [values(0, 0.1), values(1, 30.0), values(2, 1.0)]
    one, other = histogram_of(*arrays), histogram_of(*reversed(arrays))
    assert (one.counts == other.counts).all()
    assert one.largest == other.largest == max(float(np.abs(a).max()) for a in arrays)
    assert one.top >= one.largest > one.top / 2


def test_bins_count_what_numpy_counts() -> None:
    x = values(3, 2.0)
    histogram = histogram_of(x)
    counts, _ = np.histogram(np.abs(x), bins=BINS, range=(0.0, histogram.top))
    assert (histogram.counts == counts).all()


def test_zeros_do_not_count() -> None:
    x = np.array([0.0, 0.0, 1.0, -1.0], np.float32)
    assert histogram_of(x).counts.sum() == 2
    assert histogram_of(np.zeros(4, np.float32)).largest == 0.0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_model_that_is_not_finite_is_named(bad: float) -> None:
    with pytest.raises(UserError, match="NaN or infinity at 'first/Conv'"):
        Histogram().add(np.array([1.0, bad], np.float32), "first/Conv")


def test_a_percentile_leaves_out_its_share() -> None:
    x = values(4, 1.0, 200_000)
    histogram = histogram_of(x)
    for share in (0.99, 0.999, 0.9999):
        exact = float(np.quantile(np.abs(x), share))
        assert histogram.percentile(share) == pytest.approx(exact, abs=2 * histogram.top / BINS)
    assert histogram.percentile(1.0) == histogram.largest


def test_percentiles_are_those_of_onnxruntime() -> None:
    from onnxruntime.quantization.calibrate import HistogramCollector

    x = values(5, 1.0, 100_000)
    theirs = HistogramCollector("percentile", True, 2048, 128, 99.9, "same")
    theirs.collect({"x": x})
    _, high, *_ = theirs.compute_percentile()["x"]
    assert histogram_of(x).percentile(0.999) == pytest.approx(float(high), rel=0.01)


def test_least_squares_beats_every_other_range() -> None:
    x = np.concatenate([values(6, 1.0), np.full(3, 60.0, np.float32)])
    histogram = histogram_of(x)

    def error(threshold: float) -> float:
        step = threshold / LEVELS
        rounded = np.clip(np.rint(x / step), -LEVELS, LEVELS) * step
        return float(np.square(rounded - x, dtype=np.float64).sum())

    chosen = error(histogram.least_squares())
    tried = np.linspace(histogram.top / 64, histogram.largest, 200)
    assert chosen <= 1.02 * min(error(float(threshold)) for threshold in tried)
    assert chosen < error(histogram.largest)


def test_entropy_clips_a_lone_outlier() -> None:
    x = np.concatenate([values(7, 1.0, 200_000), np.full(1, 500.0, np.float32)])
    histogram = histogram_of(x)
    assert float(np.quantile(np.abs(x), 0.99)) < histogram.least_divergence() < 100.0


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_a_range_within_the_values(method: str) -> None:
    for x in (values(8, 1e-3), np.full(5, 2.0, np.float32), values(9, 1e4)):
        histogram = histogram_of(x)
        assert 0.0 < METHODS[method](histogram) <= histogram.largest


@pytest.mark.parametrize("threshold", [0.0, 1e-9, 0.01, 1.0, 127.0, 1234.5, 60_000.0])
def test_scales_are_exact_in_half_precision_and_lose_no_range(threshold: float) -> None:
    scale = scale_of(threshold)
    assert float(np.float16(scale)) == scale >= LEAST_SCALE
    assert scale * LEVELS >= threshold
    assert scale <= max(1.001 * threshold / LEVELS, LEAST_SCALE)
