"""Metrics equal the published evaluation's, and do on simple data what their definitions say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.spatial.distance import cdist
from skimage import metrics as skimage_metrics

from mat_torch.metrics import (
    MetricError,
    discriminative_scores,
    frechet_distance,
    l1,
    pairwise_diversity,
    precision_recall,
    psnr,
    ssim,
    ssim_map,
)

DATA = Path(__file__).parent / "data"
Floats = NDArray[np.floating[Any]]


def normal(seed: int, *shape: int) -> NDArray[np.float64]:
    return np.random.default_rng(seed).standard_normal(shape)


# -- sets of features ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["metrics_a", "metrics_b"])
def test_scores_equal_those_of_the_published_evaluation(name: str) -> None:
    with np.load(DATA / f"{name}.npz") as file:
        fake, real = file["fake"], file["real"]
        fid, pids, uids = float(file["fid"]), float(file["pids"]), float(file["uids"])
    assert frechet_distance(fake, real) == pytest.approx(fid, abs=1e-8)
    assert discriminative_scores(fake, real) == pytest.approx((pids, uids), abs=1e-12)


def test_a_shift_has_the_frechet_distance_of_its_squared_length() -> None:
    real = normal(0, 50, 6)
    shift = np.array([3.0, 0.0, 0.0, 4.0, 0.0, 0.0])
    assert frechet_distance(real + shift, real) == pytest.approx(25.0, rel=1e-12)


def test_a_stretch_about_the_mean_has_its_closed_frechet_distance() -> None:
    real = normal(0, 50, 6)
    mean = real.mean(axis=0)
    expected = (3.0 - 1.0) ** 2 * real.var(axis=0).sum()
    assert frechet_distance(mean + 3.0 * (real - mean), real) == pytest.approx(expected, rel=1e-12)


def test_frechet_distance_holds_for_fewer_pictures_than_dimensions() -> None:
    fake, real = normal(0, 8, 30) * 2.0 + 0.5, normal(1, 12, 30)
    # The textbook's way, by symmetric roots of the (singular) covariances.
    a, b = np.cov(fake.T, ddof=0), np.cov(real.T, ddof=0)
    values, vectors = np.linalg.eigh(a)
    root = vectors * np.sqrt(np.clip(values, 0.0, None)) @ vectors.T
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(root @ b @ root), 0.0, None)).sum()
    gap = np.square(fake.mean(axis=0) - real.mean(axis=0)).sum()
    expected = gap + np.trace(a) + np.trace(b) - 2.0 * cross
    assert frechet_distance(fake, real) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("shape", [(5, 40), (40, 5), (2, 1)])
def test_equal_sets_have_no_frechet_distance_and_never_a_negative_one(
    shape: tuple[int, int],
) -> None:
    features = 100.0 * normal(0, *shape)
    assert 0.0 <= frechet_distance(features, features[::-1]) < 1e-8


def test_discriminative_scores_are_shares_of_pairs_and_of_pictures() -> None:
    # One feature, 10 pairs; only in the last one the fake is the more real of the two.
    fake, real = np.zeros((10, 1)), np.ones((10, 1))
    fake[9], real[9] = 1.0, 0.0
    assert discriminative_scores(fake, real) == pytest.approx((0.1, 0.1))


def test_pids_depends_on_the_pairs_and_uids_does_not() -> None:
    fake = normal(0, 200, 3) + 0.3
    real = fake - 0.1 * np.abs(normal(1, 200, 3))
    paired, shuffled = discriminative_scores(fake, real), discriminative_scores(fake, real[::-1])
    assert paired.uids == pytest.approx(shuffled.uids)
    assert abs(paired.pids - shuffled.pids) > 0.1


def test_fewer_pairs_than_features_are_told_apart_whatever_they_are() -> None:
    assert discriminative_scores(normal(0, 20, 60), normal(1, 20, 60)) == (0.0, 0.0)


def test_a_model_that_knows_half_of_the_reals_has_full_precision_and_half_the_recall() -> None:
    cluster = normal(0, 60, 4)
    real = np.concatenate([cluster, cluster + 1000.0])
    assert precision_recall(cluster, real) == pytest.approx((1.0, 0.5))
    assert precision_recall(real, cluster) == pytest.approx((0.5, 1.0))


def test_precision_and_recall_are_those_of_all_distances_at_once() -> None:
    fake, real = normal(0, 1300, 3) * 1.5 + 50.0, normal(1, 1100, 3) + 50.0

    def covered(points: Floats, centres: Floats) -> float:
        radii = np.sort(cdist(centres, centres), axis=1)[:, 3]  # column 0 is the point itself
        return float(np.mean(np.any(cdist(points, centres) <= radii, axis=1)))

    expected = (covered(fake, real), covered(real, fake))
    assert 0.1 < expected[0] < expected[1] < 1.0
    assert precision_recall(fake, real) == pytest.approx(expected)


def test_diversity_is_the_mean_distance_of_pairs() -> None:
    triangle = [[0.0, 0.0], [3.0, 0.0], [3.0, 4.0]]
    same = [[1.0, 2.0]] * 3
    assert pairwise_diversity(np.array([triangle, same])) == pytest.approx([4.0, 0.0])


# -- pictures --------------------------------------------------------------------------------------


def pictures(seed: int, *shape: int) -> NDArray[np.float64]:
    return np.random.default_rng(seed).uniform(-1.0, 1.0, shape)


def quarter_hole(batch: int, side: int) -> NDArray[np.float32]:
    mask = np.ones((batch, 1, side, side), np.float32)
    mask[:, :, : side // 2, : side // 2] = 0.0
    return mask


def test_l1_is_a_share_of_the_range() -> None:
    black, white = np.full((1, 3, 4, 4), -1.0), np.full((1, 3, 4, 4), 1.0)
    assert l1(black, white) == pytest.approx([1.0])
    assert l1(black, black) == pytest.approx([0.0])


def test_psnr_is_that_of_8_bits() -> None:
    dark, light = np.full((1, 3, 4, 4), 10 / 127.5 - 1.0), np.full((1, 3, 4, 4), 15 / 127.5 - 1.0)
    assert psnr(dark, light) == pytest.approx([10.0 * np.log10(255.0**2 / 25.0)])
    assert psnr(dark, dark) == [np.inf]


def test_only_the_hole_counts_under_a_mask() -> None:
    real = pictures(0, 2, 3, 16, 16)
    mask = quarter_hole(2, 16)
    fake = np.where(mask > 0, real, np.clip(real + 0.5, -1.0, 1.0))
    spoilt = np.where(mask > 0, -real, fake)
    for metric in (l1, psnr):
        assert metric(spoilt, real, mask) == pytest.approx(metric(fake, real, mask))
    # The hole is a quarter of each picture, and nothing else differs.
    assert l1(fake, real, mask) == pytest.approx(4.0 * l1(fake, real))
    assert psnr(fake, real, mask) == pytest.approx(psnr(fake, real) - 10.0 * np.log10(4.0))


def test_ssim_equals_scikit_image_on_8_bits() -> None:
    a = pictures(0, 2, 3, 20, 24)
    b = np.clip(a + 0.3 * pictures(1, 2, 3, 20, 24), -1.0, 1.0)
    structural_similarity: Any = skimage_metrics.structural_similarity
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    for i in range(2):
        mean, full = structural_similarity(
            (a[i] + 1.0) * 127.5,
            (b[i] + 1.0) * 127.5,
            data_range=255.0,
            channel_axis=0,
            full=True,
            **options,
        )
        assert ssim(a, b)[i] == pytest.approx(mean, abs=1e-9)
        np.testing.assert_allclose(ssim_map(a, b)[i], full.mean(axis=0), atol=1e-9)


def test_ssim_of_a_hole_is_the_mean_over_its_pixels() -> None:
    a, b = pictures(0, 2, 3, 16, 16), pictures(1, 2, 3, 16, 16)
    expected = ssim_map(a, b)[:, :8, :8].mean(axis=(1, 2))
    assert ssim(a, b, quarter_hole(2, 16)) == pytest.approx(expected)
    assert ssim(a, a, quarter_hole(2, 16)) == pytest.approx([1.0, 1.0])


# -- bad input -------------------------------------------------------------------------------------

NAN = np.full((4, 2), np.nan)
FLAT = np.zeros((1, 3, 12, 12))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: frechet_distance(normal(0, 9, 3), normal(0, 9, 4)), "same width"),
        (lambda: frechet_distance(normal(0, 9, 3), normal(0, 1, 3)), "2 pictures or more"),
        (lambda: frechet_distance(NAN, normal(0, 9, 2)), "8 of 8 numbers are not finite"),
        (lambda: discriminative_scores(normal(0, 9, 3), normal(0, 8, 3)), "9 fakes and 8 reals"),
        (lambda: precision_recall(normal(0, 3, 2), normal(0, 9, 2)), "4 pictures or more"),
        (lambda: precision_recall(normal(0, 9, 2), normal(0, 9, 2), k=0), "from 1 up, got 0"),
        (lambda: pairwise_diversity(normal(0, 5, 1, 2)), "two fillings or more"),
        (lambda: l1(FLAT, FLAT[:, :, 1:]), "same shape"),
        (lambda: psnr(FLAT, FLAT, np.ones((1, 1, 12, 12))), "picture 0 of the batch has no hole"),
        (lambda: psnr(FLAT, FLAT, np.full((1, 1, 12, 12), 0.5)), "the mask is 0 or 1"),
        (lambda: psnr(FLAT, FLAT, np.zeros((1, 3, 12, 12))), "the mask is 0 or 1"),
        (lambda: ssim(FLAT[..., :10], FLAT[..., :10]), "11 pixels or more, got 12x10"),
    ],
)
def test_what_cannot_be_measured_is_said_in_a_sentence(
    call: Callable[[], object], says: str
) -> None:
    with pytest.raises(MetricError, match=says):
        call()
