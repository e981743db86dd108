"""The range of every tensor that is read quantized.

Each method (`calib.histograms`) proposes a range from the counts of all samples. Which one is taken
is measured: the layers that read the tensor run on other samples, and the range with the least
relative error of what they make is chosen. Rounding and clipping weigh differently in every
layer: what is rare may be what a layer listens to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calib.candidates import Candidate
from calib.histograms import METHODS, Histogram, scale_of
from calib.samples import Sample
from calib.stages import StagedModel, Values
from calib.trials import LayerTrials

__all__ = ["Progress", "Range", "choose_ranges", "count_magnitudes"]

Progress = Callable[[str, int, int], None]
"""Called with what is worked on, how much is done, and of how much."""


@dataclass(frozen=True)
class Range:
    """The range of one tensor.

    Attributes:
        scale: Of its INT8 values, exact in FP16.
        method: Which way to a range was chosen.
        largest: The largest magnitude seen.
        errors: For each method, squared error of what the tensor's readers make, relative to its
            square: the mean over samples, summed over the readers.
    """

    scale: float
    method: str
    largest: float
    errors: Mapping[str, float]


def count_magnitudes(
    model: StagedModel, samples: Sequence[Sample], progress: Progress
) -> dict[str, Histogram]:
    """Histograms of what candidates read, by tensor, over all samples.

    Raises:
        UserError: If the model gives NaN or infinity.
    """
    histograms: dict[str, Histogram] = {}
    for i, sample in enumerate(samples):
        progress("counting activations", i, len(samples))
        counted: set[str] = set()

        def count(
            candidate: Candidate, x: NDArray[np.float32], _: Values, counted: set[str] = counted
        ) -> None:
            if candidate.tensor not in counted:
                counted.add(candidate.tensor)
                histogram = histograms.setdefault(candidate.tensor, Histogram())
                histogram.add(x, candidate.tensor)

        model.run(sample.feeds, count)
    return histograms


def choose_ranges(
    histograms: Mapping[str, Histogram],
    model: StagedModel,
    trials: LayerTrials,
    samples: Sequence[Sample],
    progress: Progress,
) -> dict[str, Range]:
    """The best range of each tensor.

    Args:
        histograms: Of `count_magnitudes`.
        model: The model.
        trials: Its layers.
        samples: Others than were counted.
        progress: Called on the way.
    """
    scales = {
        name: {way: scale_of(find(histogram)) for way, find in METHODS.items()}
        for name, histogram in histograms.items()
    }
    errors = {name: dict.fromkeys(METHODS, 0.0) for name in histograms}

    def compare(candidate: Candidate, x: NDArray[np.float32], _: Values) -> None:
        exact = trials.exact(candidate, x)
        power = max(_power(exact), 1e-30)
        seen: dict[float, float] = {}
        for way, scale in scales[candidate.tensor].items():
            if scale not in seen:
                seen[scale] = _power(trials.quantized(candidate, x, scale) - exact) / power
            errors[candidate.tensor][way] += seen[scale] / len(samples)

    for i, sample in enumerate(samples):
        progress("comparing ranges", i, len(samples))
        model.run(sample.feeds, compare)
    result = {}
    for name, histogram in histograms.items():
        method = min(errors[name], key=errors[name].__getitem__)
        result[name] = Range(scales[name][method], method, histogram.largest, errors[name])
    return result


def _power(values: NDArray[np.float32]) -> float:
    return float(np.square(values).sum(dtype=np.float64))
