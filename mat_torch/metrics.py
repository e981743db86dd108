"""Measures of filled pictures: arrays in, numbers out (NumPy, SciPy and scikit-learn, no torch).

Two kinds. Measures of *sets* compare the features of many fakes with those of many reals, [n, d]
each, whatever network made them (`mat_torch.features`): Fréchet distance, P-IDS and U-IDS,
precision and recall. Measures of *pictures* compare two batches [B, C, H, W] in [-1, 1] and give a
number a picture: PSNR, SSIM and L1, over the whole picture, or with a mask over its hole.

Masks are [B, 1, H, W], 1 keep and 0 hole. SciPy and scikit-learn are imported where they are used:
``pip install 'mat-export[train]'`` brings them, and `require_packages` says so where they are not.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "DiscriminativeScores",
    "MetricError",
    "PrecisionRecall",
    "discriminative_scores",
    "frechet_distance",
    "l1",
    "pairwise_diversity",
    "precision_recall",
    "psnr",
    "require_packages",
    "ssim",
    "ssim_map",
]

Floats: TypeAlias = NDArray[np.floating[Any]]

_RANGE = 2.0
"""Width of the range of pictures, [-1, 1]."""

_SSIM_SIGMA = 1.5
_SSIM_RADIUS = 5
"""A Gaussian window of 11×11 pixels (Wang et al. 2004, section III-B)."""

_SSIM_C1 = (0.01 * _RANGE) ** 2
_SSIM_C2 = (0.03 * _RANGE) ** 2
"""(K₁L)² and (K₂L)², with the K of Wang et al. 2004 and L the width of the range."""


class MetricError(ValueError):
    """Arrays that cannot be compared. One sentence says what was got and what is needed."""


class DiscriminativeScores(NamedTuple):
    """How well a linear classifier tells fakes from reals; larger is better for both.

    Attributes:
        pids: P-IDS, 0 to 1: the share of pairs whose fake looks more real than its own real.
        uids: U-IDS, 0 to 0.5 or so: the share of all pictures that are taken for the other kind.
    """

    pids: float
    uids: float


class PrecisionRecall(NamedTuple):
    """Improved precision and recall; larger is better for both.

    Attributes:
        precision: Share of fakes that lie among the reals (fidelity), 0 to 1.
        recall: Share of reals that lie among the fakes (variety), 0 to 1.
    """

    precision: float
    recall: float


_PACKAGES = {"scipy.ndimage": "SciPy", "sklearn.svm": "scikit-learn"}
"""Modules that some of the measures need, and what to call them."""


def require_packages() -> None:
    """Raise MetricError now, rather than after a long evaluation, if a package is missing."""
    for module, name in _PACKAGES.items():
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            raise MetricError(
                f"the measures need {name}, which is not installed: install mat-export[train]"
            ) from error


# -- sets of features ------------------------------------------------------------------------------


def frechet_distance(fake: Floats, real: Floats) -> float:
    """Fréchet distance of the Gaussians that fit two sets of features (FID, Heusel et al. 2017).

    ``‖μ_f − μ_r‖² + Tr(Σ_f + Σ_r − 2·(Σ_f Σ_r)^½)``, with covariances divided by n, as in the
    published evaluation. It is called FID for one feature network only: see
    `mat_torch.features.PooledFeatures.frechet_name`.

    No matrix root is taken. With centred features A and B, each divided by its √n, ``Σ = AᵀA``,
    so the eigenvalues of ``Σ_f Σ_r`` are the squared singular values of ``A·Bᵀ``, and the trace of
    the root is their sum. QR makes A and B triangles of the same covariance first. That holds for
    singular covariances (fewer pictures than dimensions) too, and never leaves the real numbers.

    Args:
        fake: [n, d] features, n ≥ 2; float64 copies of both sets are made.
        real: [m, d], m ≥ 2; the numbers may differ.

    Returns:
        From 0 (the same mean and covariance) up; biased upwards for few pictures.

    Raises:
        MetricError: If the arrays are no two sets of finite features of one width.
    """
    fakes, reals = _features(fake, real, at_least=2)
    distance = float(np.sum(np.square(fakes.mean(axis=0) - reals.mean(axis=0))))
    a, b = _covariance_factor(fakes), _covariance_factor(reals)
    root = float(np.linalg.svd(a @ b.T, compute_uv=False).sum())
    # Of equal sets, only rounding is left, and that has either sign.
    return max(distance + float(np.square(a).sum() + np.square(b).sum()) - 2.0 * root, 0.0)


def _covariance_factor(features: NDArray[np.float64]) -> NDArray[np.float64]:
    """R, [min(n, d), d], with ``RᵀR`` the covariance of the features."""
    centred = features - features.mean(axis=0)
    return np.asarray(np.linalg.qr(centred / np.sqrt(len(features)), mode="r"))


def discriminative_scores(fake: Floats, real: Floats) -> DiscriminativeScores:
    """P-IDS and U-IDS (Zhao et al. 2021, CoModGAN, section 4) with a linear SVM on all features.

    U-IDS is one minus the accuracy of the SVM on the set it was fitted to; P-IDS the share of pairs
    whose fake gets a higher score (more real) than its own real. With fewer pairs than features
    a linear classifier separates nearly any two sets, and both scores are near 0 whatever the
    pictures.

    Args:
        fake: [n, d] features of the filled pictures.
        real: [n, d] of the pictures they were made from, in the same order.

    Raises:
        MetricError: If the arrays are no such pairs.
        ModuleNotFoundError: If scikit-learn is not installed.
    """
    from sklearn.svm import LinearSVC

    fakes, reals = _features(fake, real, at_least=1)
    pairs = len(fakes)
    if len(reals) != pairs:
        raise MetricError(
            f"P-IDS compares each fake with its own real, got {pairs} fakes and {len(reals)} "
            "reals; give as many, in the same order"
        )
    features = np.concatenate([fakes, reals])
    is_real = np.repeat([0, 1], pairs)
    svm = LinearSVC(dual=False).fit(features, is_real)
    realness = svm.decision_function(features)
    return DiscriminativeScores(
        pids=float(np.mean(realness[:pairs] > realness[pairs:])),
        uids=1.0 - float(svm.score(features, is_real)),
    )


def precision_recall(fake: Floats, real: Floats, *, k: int = 3) -> PrecisionRecall:
    """Improved precision and recall (Kynkäänniemi et al. 2019, equations 1 and 2).

    A set's manifold is the union of balls around its features, each reaching to the k-th nearest
    other feature of the set. Precision is the share of fakes in the manifold of the reals, recall
    the share of reals in that of the fakes. Distances are made 1,024 rows at a time.

    Args:
        fake: [n, d] features, n > k.
        real: [m, d], m > k; the paper takes as many of both.
        k: Neighbour that a ball reaches to; the paper's is 3.

    Raises:
        MetricError: If a set has no k-th neighbour, or the arrays are no two sets of features.
    """
    if k < 1:
        raise MetricError(f"k is the number of a neighbour, from 1 up, got {k}")
    fakes, reals = _features(fake, real, at_least=k + 1)
    # Distances come from products, which lose digits far from the origin.
    centre = reals.mean(axis=0)
    fakes, reals = fakes - centre, reals - centre
    return PrecisionRecall(
        precision=_covered(fakes, reals, _radii(reals, k)),
        recall=_covered(reals, fakes, _radii(fakes, k)),
    )


def _radii(points: NDArray[np.float64], k: int) -> NDArray[np.float64]:
    """Squared distance of each point to its k-th nearest other, [n]."""
    radii = []
    for start, squared in _squared_distances(points, points):
        rows = np.arange(len(squared))
        squared[rows, start + rows] = np.inf  # the point itself
        radii.append(np.partition(squared, k - 1, axis=1)[:, k - 1])
    return np.concatenate(radii)


def _covered(
    points: NDArray[np.float64], centres: NDArray[np.float64], radii: NDArray[np.float64]
) -> float:
    """Share of the points that lie in at least one ball."""
    inside = [
        np.any(squared <= radii, axis=1) for _, squared in _squared_distances(points, centres)
    ]
    return float(np.mean(np.concatenate(inside)))


def _squared_distances(
    a: NDArray[np.float64], b: NDArray[np.float64], rows: int = 1024
) -> Iterator[tuple[int, NDArray[np.float64]]]:
    """(first row, ‖aᵢ − bⱼ‖² of some rows [≤ rows, m]) until all rows of a have been met."""
    b_norms = np.square(b).sum(axis=1)
    for start in range(0, len(a), rows):
        part = a[start : start + rows]
        squared = np.square(part).sum(axis=1)[:, None] + b_norms - 2.0 * (part @ b.T)
        yield start, np.maximum(squared, 0.0)


def pairwise_diversity(features: Floats) -> NDArray[np.float64]:
    """How far several fillings of the same hole lie apart: mean distance over all pairs.

    ``2 / (S·(S − 1)) · Σ_{i<j} ‖f_i − f_j‖₂`` for each picture, in units of the feature network: to
    be compared between models, not between networks.

    Args:
        features: [N, S, d]: S ≥ 2 fillings of each of N pictures.

    Returns:
        [N], from 0 (all fillings have the same features) up.

    Raises:
        MetricError: If there are no pairs, or the features are not finite.
    """
    values = np.asarray(features, dtype=np.float64)
    if values.ndim != 3 or values.shape[1] < 2:
        raise MetricError(
            "diversity needs features [pictures, fillings, width] with two fillings or more, got "
            f"an array of shape {list(values.shape)}"
        )
    _require_finite(values)
    first, second = np.triu_indices(values.shape[1], k=1)
    return np.asarray(
        [np.linalg.norm(each[first] - each[second], axis=1).mean() for each in values],
        dtype=np.float64,
    )


def _features(
    fake: Floats, real: Floats, *, at_least: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Both sets as float64, checked."""
    a, b = np.asarray(fake, dtype=np.float64), np.asarray(real, dtype=np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or a.shape[1] == 0:
        raise MetricError(
            "two sets of features [n, d] of the same width d are needed, got shapes "
            f"{list(a.shape)} and {list(b.shape)}"
        )
    if min(len(a), len(b)) < at_least:
        raise MetricError(
            f"this measure needs {at_least} pictures or more in each set, got {len(a)} fakes and "
            f"{len(b)} reals"
        )
    _require_finite(a)
    _require_finite(b)
    return a, b


def _require_finite(values: NDArray[np.float64]) -> None:
    broken = int(np.count_nonzero(~np.isfinite(values)))
    if broken:
        raise MetricError(
            f"{broken} of {values.size} numbers are not finite (NaN or infinite); look for the "
            "pictures that gave them"
        )


# -- pictures --------------------------------------------------------------------------------------


def l1(a: Floats, b: Floats, mask: NDArray[Any] | None = None) -> NDArray[np.float64]:
    """Mean absolute difference as a share of the range: ``mean(|a − b|) / 2``.

    Args:
        a: [B, C, H, W] in [-1, 1].
        b: The same shape.
        mask: [B, 1, H, W], 1 keep and 0 hole: measures in the hole alone. None: the whole picture.

    Returns:
        [B], from 0 (equal) to 1 (black against white).

    Raises:
        MetricError: If shapes differ, the mask is not 0/1, or a picture has no hole.
    """
    a, b = _pictures(a, b)
    return _mean(np.abs(a - b).mean(axis=1), mask) / _RANGE


def psnr(a: Floats, b: Floats, mask: NDArray[Any] | None = None) -> NDArray[np.float64]:
    """Peak signal-to-noise ratio in dB: ``10·log₁₀(L² / mean((a − b)²))``, with L = 2 the range.

    Args:
        a, b, mask: As `l1`.

    Returns:
        [B], infinite for equal pictures (or holes).

    Raises:
        MetricError: As `l1`.
    """
    a, b = _pictures(a, b)
    error = _mean(np.square(a - b).mean(axis=1), mask)
    with np.errstate(divide="ignore"):
        return np.asarray(10.0 * np.log10(_RANGE**2 / error), dtype=np.float64)


def ssim(a: Floats, b: Floats, mask: NDArray[Any] | None = None) -> NDArray[np.float64]:
    """Structural similarity (Wang et al. 2004, equation 13), the mean over colour channels.

    Of the whole picture, the mean is taken where the window fits (5 pixels from the border on), as
    the paper does; of the hole, over every pixel of it, the picture mirrored at its borders.
    Windows at the edge of a hole see the kept pixels beside it.

    Args:
        a, b, mask: As `l1`, with sides of 11 pixels or more.

    Returns:
        [B], at most 1 (equal); about 0 for pictures that have nothing in common.

    Raises:
        MetricError: As `l1`, or if the picture is smaller than the window.
    """
    values = ssim_map(a, b)
    if mask is None:
        inside = slice(_SSIM_RADIUS, -_SSIM_RADIUS)
        return np.asarray(values[:, inside, inside].mean(axis=(1, 2)))
    return _mean(values, mask)


def ssim_map(a: Floats, b: Floats) -> NDArray[np.float64]:
    """Structural similarity around every pixel, the mean over colour channels.

    ``(2μ_a μ_b + C₁)(2σ_ab + C₂) / ((μ_a² + μ_b² + C₁)(σ_a² + σ_b² + C₂))`` in a Gaussian window
    of 11×11 with σ = 1.5; C₁ = (0.01·2)² and C₂ = (0.03·2)² for the range [-1, 1], which gives
    what [0, 255] would.

    Args:
        a, b: As `l1`, with sides of 11 pixels or more.

    Returns:
        [B, H, W].

    Raises:
        MetricError: As `ssim`.
    """
    a, b = _pictures(a, b)
    window = 2 * _SSIM_RADIUS + 1
    if min(a.shape[2:]) < window:
        raise MetricError(
            f"SSIM needs sides of {window} pixels or more, got {a.shape[2]}x{a.shape[3]}"
        )
    # One picture a thread, for there are half a dozen arrays of its size.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return np.stack(list(pool.map(_ssim_of_one, a, b)))


def _ssim_of_one(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """[H, W] of two pictures [C, H, W]. The range is shifted to [0, 2], for μ is of light."""
    from scipy.ndimage import correlate1d

    offsets = np.arange(-_SSIM_RADIUS, _SSIM_RADIUS + 1)
    weights = np.exp(-0.5 * np.square(offsets / _SSIM_SIGMA))
    weights /= weights.sum()

    def blurred(x: NDArray[np.float64]) -> NDArray[np.float64]:
        rows = correlate1d(x, weights, axis=1, mode="reflect")
        return np.asarray(correlate1d(rows, weights, axis=2, mode="reflect"))

    a, b = a + 1.0, b + 1.0
    mean_a, mean_b = blurred(a), blurred(b)
    variances = blurred(a * a) - mean_a**2 + blurred(b * b) - mean_b**2
    covariance = blurred(a * b) - mean_a * mean_b
    light = (2.0 * mean_a * mean_b + _SSIM_C1) / (mean_a**2 + mean_b**2 + _SSIM_C1)
    structure = (2.0 * covariance + _SSIM_C2) / (variances + _SSIM_C2)
    return np.asarray((light * structure).mean(axis=0), dtype=np.float64)


def _pictures(a: Floats, b: Floats) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if x.ndim != 4 or x.shape != y.shape or 0 in x.shape:
        raise MetricError(
            "two batches of pictures [B, C, H, W] of the same shape are needed, got "
            f"{list(x.shape)} and {list(y.shape)}"
        )
    return x, y


def _mean(values: NDArray[np.float64], mask: NDArray[Any] | None) -> NDArray[np.float64]:
    """Mean of [B, H, W] over each picture, or over its hole."""
    if mask is None:
        return np.asarray(values.mean(axis=(1, 2)))
    batch, height, width = values.shape
    if mask.shape != (batch, 1, height, width) or not np.all((mask == 0) | (mask == 1)):
        raise MetricError(
            f"the mask is 0 or 1 (1 keep, 0 hole) of shape {[batch, 1, height, width]}, got "
            f"shape {list(mask.shape)} with values from {np.min(mask)} to {np.max(mask)}"
        )
    hole = mask[:, 0] == 0
    pixels = hole.sum(axis=(1, 2))
    if not pixels.all():
        raise MetricError(
            f"picture {int(np.argmin(pixels))} of the batch has no hole to measure in; leave it "
            "out, or measure the whole picture"
        )
    return np.asarray(np.where(hole, values, 0.0).sum(axis=(1, 2)) / pixels)
