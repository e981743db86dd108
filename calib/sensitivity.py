"""What INT8 costs: noise in the hole, of one layer alone and of a whole file.

Noise is the mean squared error over the squared range, so that −10·log₁₀ of it is the PSNR that a
parity check shows (`mat_export.parity.compare`). Noises of layers add up, nearly: that is how a
decision is predicted before it is measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from calib.candidates import Candidate
from calib.ranges import Range
from calib.samples import Sample
from calib.stages import StagedModel, Values, open_session
from calib.trials import LayerTrials
from mat_export.parity import compare

__all__ = ["MOST_DB", "Quality", "decibel", "measure_costs", "measure_quality", "noise"]


MOST_DB = 100.0
"""Beyond this lies the rounding of FP32."""

_SHOWN = 10
"""Progress is told before every so many layers."""


def decibel(noise: float) -> float:
    """PSNR of a noise, MOST_DB at most: a mean must not hang on one sample that is exact."""
    return -10.0 * math.log10(max(noise, 10.0 ** (-MOST_DB / 10.0)))


def noise(expected: NDArray[Any], actual: NDArray[Any], hole: NDArray[np.bool_]) -> float:
    """Noise of an output in the hole, NaN if a value is not finite.

    Args:
        expected: [B, 3, H, W] in [-1, 1], or [B, H, W, 3] in bytes.
        actual: Likewise.
        hole: [H, W], True somewhere.
    """
    error = compare(_as_unit(expected), _as_unit(actual), hole)
    if error.psnr is None:
        raise ValueError("there is no noise in an empty hole")
    return float(10.0 ** (-error.psnr / 10.0))


def _as_unit(image: NDArray[Any]) -> NDArray[Any]:
    if image.dtype != np.uint8:
        return image
    pixels = image.astype(np.float32).transpose(0, 3, 1, 2)
    return np.asarray(pixels / np.float32(127.5) - np.float32(1.0))


def measure_costs(
    model: StagedModel,
    trials: LayerTrials,
    ranges: Mapping[str, Range],
    sample: Sample,
    progress: Callable[[str], None],
) -> dict[str, float]:
    """Noise of each candidate when it alone is INT8, for one sample.

    Args:
        model: The model.
        trials: Its layers.
        ranges: Of what they read.
        sample: With a hole.
        progress: Called with a layer's name now and then.
    """
    erring: dict[str, NDArray[Any]] = {}

    def run_with_error(candidate: Candidate, x: NDArray[np.float32], values: Values) -> None:
        if len(erring) % _SHOWN == 0:
            progress(candidate.name)
        error = trials.quantized(candidate, x, ranges[candidate.tensor].scale)
        error = error - trials.exact(candidate, x)
        erring[candidate.name] = model.with_error(values, candidate, error)

    output = model.run(sample.feeds, run_with_error)
    return {name: noise(output, actual, sample.hole) for name, actual in erring.items()}


@dataclass(frozen=True)
class Quality:
    """PSNR in the hole against FP32.

    Attributes:
        mean_db: Mean over samples.
        worst_db: The least of any.
    """

    mean_db: float
    worst_db: float


def measure_quality(
    model: onnx.ModelProto,
    expected: Sequence[NDArray[Any]],
    samples: Sequence[Sample],
    threads: int | None = None,
) -> Quality:
    """The quality of a quantized model.

    Args:
        model: The model.
        expected: Output of the FP32 model for each sample.
        samples: All with a hole.
        threads: CPU threads.
    """
    session = open_session(model, threads)
    values = [
        decibel(noise(wanted, session.run(["output"], dict(sample.feeds))[0], sample.hole))
        for sample, wanted in zip(samples, expected, strict=True)
    ]
    return Quality(float(np.mean(values)), min(values))
