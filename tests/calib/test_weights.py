"""Weights in INT8."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from calib.histograms import LEAST_SCALE
from calib.weights import quantize_weight


def error(
    weight: NDArray[np.float32], integers: NDArray[np.int8], scales: NDArray[np.float32]
) -> NDArray[np.float32]:
    rounded = integers * scales.reshape(-1, *[1] * (weight.ndim - 1))
    return np.asarray(np.square((rounded - weight).reshape(len(weight), -1)).sum(axis=1))


def test_each_output_channel_has_its_own_scale() -> None:
    weight = np.random.default_rng(0).normal(size=(5, 7, 3, 3)).astype(np.float32)
    weight *= np.logspace(-2, 2, 5).astype(np.float32)[:, None, None, None]
    integers, scales = quantize_weight(weight)
    assert integers.dtype == np.int8
    assert integers.shape == weight.shape
    assert scales.shape == (5,)
    assert np.abs(integers.astype(int)).max() <= 127
    assert (error(weight, integers, scales) < 2e-4 * np.square(weight).sum(axis=(1, 2, 3))).all()
    assert (scales.astype(np.float16) == scales).all()


def test_the_scale_is_better_than_that_of_the_largest_weight() -> None:
    weight = np.random.default_rng(1).normal(size=(64, 200)).astype(np.float32)
    plain = (np.abs(weight).max(axis=1) / 127.0).astype(np.float32)
    rounded = np.rint(weight / plain[:, None]).astype(np.int8)
    chosen = error(weight, *quantize_weight(weight))
    assert chosen.sum() < error(weight, rounded, plain).sum()


def test_a_resampling_filter_keeps_its_ratios() -> None:
    taps = np.outer([1.0, 2.0, 1.0], [1.0, 2.0, 1.0]).astype(np.float32) / 16.0
    integers, _ = quantize_weight(np.repeat(taps[None, None], 3, axis=0))
    one = int(integers[0, 0, 0, 0])
    assert one > 25
    assert (integers[:, 0] == one * np.outer([1, 2, 1], [1, 2, 1])).all()


def test_a_channel_without_weights_stays_zero() -> None:
    integers, scales = quantize_weight(np.zeros((2, 3), np.float32))
    assert not integers.any()
    assert (scales == np.float32(LEAST_SCALE)).all()
