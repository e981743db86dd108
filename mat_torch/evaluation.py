"""A whole data set filled and measured: every metric, by the size of the hole.

A method to be judged is a `Fill`: a function of arrays, so that the PyTorch model
(`generator_fill`), an exported one behind any runtime, and classical methods (`opencv_fill`) stand
in one table:

    features = open_features("auto", weights)          # mat_torch.features
    model = evaluate(generator_fill(generator), pictures, masks, features, name="mat-512")
    telea = evaluate(opencv_fill("telea"), pictures, masks, features, name="Telea")
    print(comparison_table([model, telea]))

Every method gets the same pictures with nothing under their holes. What it gives is put into the
hole alone and rounded to 8 bits, as a picture file would hold it, before anything is measured.
torch is imported where it is used: importing this module needs NumPy alone.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mat_torch.metrics import l1, pairwise_diversity, psnr, ssim
from mat_torch.sampling import draw
from mat_torch.scores import (
    HOLE_BINS,
    Evaluation,
    EvaluationError,
    Rows,
    Scores,
    check_bins,
    comparison_table,
    summarise,
)

if TYPE_CHECKING:
    from mat_torch.features import FeatureNetwork, MapFeatures, PooledFeatures
    from mat_torch.generator import Generator

__all__ = [
    "HOLE_BINS",
    "Evaluation",
    "EvaluationError",
    "Fill",
    "Progress",
    "Scores",
    "answer_seed",
    "comparison_table",
    "evaluate",
    "generator_fill",
    "measure",
    "opencv_fill",
]

Array: TypeAlias = NDArray[np.float32]

Fill: TypeAlias = Callable[[Array, Array, Sequence[int]], NDArray[Any]]
"""(image [B, 3, H, W] in [-1, 1] and 0 in the hole, mask [B, 1, H, W] of 1 keep and 0 hole, a seed
an image) → [B, 3, H, W] in [-1, 1]. What it gives outside the hole is not looked at."""

Progress: TypeAlias = Callable[[int, int | None], None]
"""Called with how many pictures are done, and how many there are (None if that is not known)."""

_GOLDEN = 0x9E3779B97F4A7C15
"""2⁶⁴ over the golden ratio, odd: its multiples visit every 64-bit number once, far apart."""

_SEEDS = 2**64


# -- evaluation ------------------------------------------------------------------------------------


def evaluate(
    fill: Fill,
    pictures: Iterable[NDArray[Any]],
    masks: Iterable[NDArray[Any]],
    features: PooledFeatures,
    *,
    name: str = "model",
    perceptual: MapFeatures | None = None,
    batch: int = 8,
    seed: int = 0,
    answers: int = 1,
    bins: Sequence[float] = HOLE_BINS,
    progress: Progress | None = None,
) -> Evaluation:
    """Fill every picture's hole and measure the answers: `measure`, then `scores.summarise`.

    Args:
        fill: The method.
        pictures: Each [3, H, W], floats in [-1, 1]; sizes may differ. A generator serves as well.
        masks: One a picture: [1, H, W] or [H, W], 1 keep and 0 hole, with a hole.
        features: Network of the set metrics, on the device where it is to run.
        name: What to call the method.
        perceptual: Network of the perceptual distance; None: `features` itself if it gives maps.
        batch: Pictures of one size filled at once, at most. Rounding alone depends on it.
        seed: In [0, 2⁶⁴). The same seed, pictures and method give the same numbers.
        answers: Fillings of each picture: with two or more, diversity is measured, at as many times
            the cost.
        bins: Increasing edges of the hole's share, from 0 to 1.
        progress: Told after every batch.

    Returns:
        The scores, overall and by bin.

    Raises:
        EvaluationError: For pictures or masks of the wrong shape or range, a different number of
            them, none at all, an argument out of range, or a method that gives another shape or
            numbers that are not finite.
    """
    check_bins(bins)
    maps = _as_maps(features) if perceptual is None else perceptual
    rows = measure(
        fill,
        pictures,
        masks,
        features,
        perceptual=maps,
        batch=batch,
        seed=seed,
        answers=answers,
        progress=progress,
    )
    return summarise(
        rows, features, name=name, perceptual=maps, seed=seed, answers=answers, bins=bins
    )


def measure(
    fill: Fill,
    pictures: Iterable[NDArray[Any]],
    masks: Iterable[NDArray[Any]],
    features: PooledFeatures,
    *,
    perceptual: MapFeatures | None = None,
    batch: int = 8,
    seed: int = 0,
    answers: int = 1,
    first: int = 0,
    progress: Progress | None = None,
) -> Rows:
    """Fill every picture's hole and measure each answer.

    Pictures are taken one batch at a time and not kept: what grows is two vectors of features a
    picture (10 KB with EfficientNet-Lite0, 16 KB with Inception), and a few copies at the end.

    Args:
        fill, pictures, masks, features, batch, seed, answers, progress: As `evaluate`.
        perceptual: Network of the perceptual distances; None: they are left out.
        first: Number of the first picture, so that parts of a set are measured as the whole is.

    Returns:
        Rows for `scores.summarise`; those of several parts are to be concatenated.

    Raises:
        EvaluationError: As `evaluate`.
    """
    _check_arguments(batch, seed, answers)
    total = len(pictures) if isinstance(pictures, Sized) else None
    parts: list[Rows] = []
    done = 0
    for image, mask in _batches(pictures, masks, batch):
        indices = range(first + done, first + done + len(image))
        fakes = [
            _answer(fill, image, mask, [answer_seed(seed, i, answer) for i in indices])
            for answer in range(answers)
        ]
        parts.append(_measured(image, mask, fakes, features, perceptual))
        done += len(image)
        if progress:
            progress(done, total)
    if not done:
        raise EvaluationError("there are no pictures to evaluate; give one or more")
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def answer_seed(seed: int, picture: int, answer: int = 0) -> int:
    """Seed of one answer to one picture (both from 0): independent of batch and of the others."""
    return (seed + (picture + (answer << 32)) * _GOLDEN) % _SEEDS


def _check_arguments(batch: int, seed: int, answers: int) -> None:
    if batch < 1 or answers < 1:
        raise EvaluationError(f"batch and answers are 1 or more, got {batch} and {answers}")
    if not 0 <= seed < _SEEDS:
        raise EvaluationError(f"a seed is from 0 to 2**64 - 1, got {seed}")


def _as_maps(features: PooledFeatures) -> MapFeatures | None:
    from mat_torch.features import MapFeatures

    return features if isinstance(features, MapFeatures) else None


# -- pictures --------------------------------------------------------------------------------------


def _batches(
    pictures: Iterable[NDArray[Any]], masks: Iterable[NDArray[Any]], size: int
) -> Iterator[tuple[Array, Array]]:
    """(images [B, 3, H, W], masks [B, 1, H, W]): neighbours of one size, at most `size` of them."""
    waiting: list[tuple[Array, Array]] = []
    for image, mask in _pairs(pictures, masks):
        if waiting and (len(waiting) == size or waiting[0][0].shape != image.shape):
            yield _stacked(waiting)
            waiting = []
        waiting.append((image, mask))
    if waiting:
        yield _stacked(waiting)


def _stacked(pairs: Sequence[tuple[Array, Array]]) -> tuple[Array, Array]:
    return np.stack([image for image, _ in pairs]), np.stack([mask for _, mask in pairs])


def _pairs(
    pictures: Iterable[NDArray[Any]], masks: Iterable[NDArray[Any]]
) -> Iterator[tuple[Array, Array]]:
    """Each picture, rounded to 8 bits, with its mask [1, H, W]; checked."""
    for i, (image, mask) in enumerate(itertools.zip_longest(pictures, masks)):
        if image is None or mask is None:
            raise EvaluationError(
                f"there are {i} {'pictures' if image is None else 'masks'} and more "
                f"{'masks' if image is None else 'pictures'}; give one mask a picture"
            )
        if image.ndim != 3 or len(image) != 3 or not np.issubdtype(image.dtype, np.floating):
            raise EvaluationError(
                f"picture {i} is {image.dtype} of shape {[*image.shape]}; floats [3, H, W] in "
                "[-1, 1] are needed"
            )
        # Not "any value outside": NaN is outside of nothing.
        if not np.all(np.abs(image) <= 1.0):
            raise EvaluationError(f"picture {i} has values outside [-1, 1]; scale it to that range")
        kept = mask[None] if mask.ndim == 2 else mask
        if kept.shape != (1, *image.shape[1:]) or not np.all((kept == 0) | (kept == 1)):
            raise EvaluationError(
                f"mask {i} has shape {[*mask.shape]}; it is 0 or 1 (1 keep, 0 hole) of shape "
                f"{[1, *image.shape[1:]]}, like its picture"
            )
        if kept.all():
            raise EvaluationError(f"mask {i} has no hole, so nothing can be measured; leave it out")
        yield _rounded(image), kept.astype(np.float32)


def _rounded(image: NDArray[Any]) -> Array:
    """[-1, 1] to the 256 levels of 8 bits, clipped."""
    levels = np.clip(np.rint((image.astype(np.float32) + 1.0) * np.float32(127.5)), 0.0, 255.0)
    return np.asarray(levels / np.float32(127.5) - np.float32(1.0), dtype=np.float32)


def _answer(fill: Fill, image: Array, mask: Array, seeds: Sequence[int]) -> Array:
    """The method's answer in the hole, the picture around it; rounded to 8 bits."""
    # A method gets copies, so that nothing it does to them reaches the measurement.
    output = np.asarray(fill(image * mask, mask.copy(), seeds))
    if output.shape != image.shape:
        raise EvaluationError(
            f"the method gave an array of shape {[*output.shape]} for pictures {[*image.shape]}; "
            "it has to give the same shape"
        )
    broken = int(np.count_nonzero(~np.isfinite(output)))
    if broken:
        raise EvaluationError(
            f"the method gave {broken} of {output.size} numbers that are not finite (NaN or "
            "infinite); its weights or its precision are at fault"
        )
    return np.where(mask > 0.5, image, _rounded(output))


# -- measuring -------------------------------------------------------------------------------------


def _measured(
    real: Array,
    mask: Array,
    fakes: Sequence[Array],
    features: PooledFeatures,
    maps: MapFeatures | None,
) -> Rows:
    """Rows of a batch: the first answer against the picture, the answers against each other."""
    fake = fakes[0]
    # Not one minus the kept share, which would not be 0.2 where 80 % are kept.
    rows: Rows = {"hole_ratio": (mask == 0).mean(axis=(1, 2, 3))}
    for name, metric in (("psnr", psnr), ("ssim", ssim), ("l1", l1)):
        rows[name] = metric(fake, real, mask)
        rows[f"{name}_whole"] = metric(fake, real)
    vectors = [_pooled(features, answer) for answer in fakes]
    rows["fake"], rows["real"] = vectors[0], _pooled(features, real)
    if len(fakes) > 1:
        rows["feature_diversity"] = pairwise_diversity(np.stack(vectors, axis=1))
    if maps is not None:
        rows |= _perceptual(maps, real, mask, fakes)
    return rows


def _device(network: FeatureNetwork) -> Any:
    return next(network.parameters()).device


def _pooled(features: PooledFeatures, images: Array) -> Array:
    import torch

    with torch.inference_mode():
        found = features.pooled(torch.from_numpy(images).to(_device(features)))
        return np.asarray(found.float().cpu().numpy())


def _perceptual(maps: MapFeatures, real: Array, mask: Array, fakes: Sequence[Array]) -> Rows:
    import torch

    from mat_torch.perceptual import pairwise_perceptual, perceptual_distance

    with torch.inference_mode():
        x, keep, *answers = (
            torch.from_numpy(array).to(_device(maps)) for array in (real, mask, *fakes)
        )
        found = {
            "perceptual": perceptual_distance(maps, answers[0], x, keep),
            "perceptual_whole": perceptual_distance(maps, answers[0], x),
        }
        if len(answers) > 1:
            found["diversity"] = pairwise_perceptual(maps, answers, keep)
        return {name: np.asarray(values.float().cpu().numpy()) for name, values in found.items()}


# -- methods ---------------------------------------------------------------------------------------


def generator_fill(generator: Generator, *, truncation: float = 1.0) -> Fill:
    """The PyTorch model as a method: its random inputs are those that each seed names.

    Args:
        generator: On the device where it is to run, in eval mode; gradients are off.
        truncation: ψ: 1 draws freely, 0 gives the mean style.
    """

    def fill(image: Array, mask: Array, seeds: Sequence[int]) -> NDArray[Any]:
        import torch

        height, width = image.shape[2:]
        native = generator.config.resolution
        random = draw(
            generator.config, seeds, height, width, noise=(height, width) != (native, native)
        )
        device = next(generator.parameters()).device
        tensors = {name: torch.from_numpy(array).to(device) for name, array in random.items()}
        with torch.inference_mode():
            output, _ = generator(
                torch.from_numpy(image).to(device),
                torch.from_numpy(mask).to(device),
                tensors.pop("z"),
                truncation,
                tensors.pop("gate_tokens"),
                tensors.pop("gate_bottleneck"),
                tensors or None,
            )
            return np.asarray(output.float().cpu().numpy())

    return fill


def opencv_fill(
    method: Literal["telea", "navier-stokes"] = "telea", *, radius: float = 5.0
) -> Fill:
    """A classical method, to compare with: no learning, and the same answer for every seed.

    Args:
        method: ``telea`` (Telea 2004, fast marching) or ``navier-stokes`` (Bertalmio et al. 2001).
        radius: Pixels around each filled one that are looked at.

    Raises:
        EvaluationError: For another method, or if OpenCV is not installed.
    """
    try:
        import cv2
    except ModuleNotFoundError as error:
        raise EvaluationError(
            "the classical methods need OpenCV, which is not installed: install mat-export[train], "
            "which brings opencv-python-headless"
        ) from error
    flags = {"telea": cv2.INPAINT_TELEA, "navier-stokes": cv2.INPAINT_NS}
    if method not in flags:
        raise EvaluationError(f"unknown method '{method}'; choose one of {', '.join(flags)}")

    def fill(image: Array, mask: Array, seeds: Sequence[int]) -> NDArray[Any]:
        del seeds  # there is nothing to draw
        levels = np.rint((image + 1.0) * 127.5).astype(np.uint8).transpose(0, 2, 3, 1)
        holes = (mask[:, 0] == 0).astype(np.uint8)

        def filled(picture: NDArray[np.uint8], hole: NDArray[np.uint8]) -> NDArray[Any]:
            return np.asarray(
                cv2.inpaint(np.ascontiguousarray(picture), hole, radius, flags[method])
            )

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            answers = list(pool.map(filled, levels, holes))
        result = np.stack(answers).transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1.0
        return np.asarray(result)

    return fill
