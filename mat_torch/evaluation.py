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
import math
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mat_torch.metrics import (
    discriminative_scores,
    frechet_distance,
    l1,
    pairwise_diversity,
    precision_recall,
    psnr,
    ssim,
)
from mat_torch.sampling import draw

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
    "opencv_fill",
]

Array: TypeAlias = NDArray[np.float32]

Fill: TypeAlias = Callable[[Array, Array, Sequence[int]], NDArray[Any]]
"""(image [B, 3, H, W] in [-1, 1] and 0 in the hole, mask [B, 1, H, W] of 1 keep and 0 hole, a seed
an image) → [B, 3, H, W] in [-1, 1]. What it gives outside the hole is not looked at."""

Progress: TypeAlias = Callable[[int, int | None], None]
"""Called with how many pictures are done, and how many there are (None if that is not known)."""

HOLE_BINS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
"""Edges of the bins of the hole's share of the picture; an edge belongs to the bin above it."""

_GOLDEN = 0x9E3779B97F4A7C15
"""2⁶⁴ over the golden ratio, odd: its multiples visit every 64-bit number once, far apart."""

_SEEDS = 2**64
_NEIGHBOUR = 3
"""k of precision and recall (Kynkäänniemi et al. 2019)."""


class EvaluationError(ValueError):
    """Pictures, masks or a method that cannot be evaluated. One sentence says what to do."""


# -- results ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scores:
    """Every metric over some pictures, defined in `mat_torch.metrics`.

    Metrics without ``_whole`` that compare picture with picture are of the hole alone. None: there
    are too few pictures, or it was not measured.

    Attributes:
        label: Which pictures: a bin such as ``20–40 %``, or ``all``.
        pictures: How many.
        hole_ratio: Mean share of the hole, 0 to 1.
        frechet: Fréchet distance; `Evaluation.frechet_name` says of what.
        pids, uids: P-IDS and U-IDS, 0 to 1.
        precision, recall: Improved precision and recall, 0 to 1.
        psnr, psnr_whole: Mean of the pictures' dB; infinite if one was restored exactly.
        ssim, ssim_whole: Mean SSIM.
        l1, l1_whole: Mean absolute difference, 0 to 1 of the range.
        perceptual: Mean unweighted perceptual distance (`features.perceptual_distance`).
        diversity: Mean distance of features between answers to the same picture.
    """

    label: str
    pictures: int
    hole_ratio: float
    frechet: float | None
    pids: float | None
    uids: float | None
    precision: float | None
    recall: float | None
    psnr: float
    psnr_whole: float
    ssim: float
    ssim_whole: float
    l1: float
    l1_whole: float
    perceptual: float | None
    diversity: float | None


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found.

    Attributes:
        name: The method.
        features: Network of the set metrics and of diversity.
        features_digest: SHA-256 of its weights.
        frechet_name: What its Fréchet distance is called: FID with FID's own network alone.
        perceptual: Network of the perceptual distance; None if there was none.
        seed: What the answers' seeds come from (`answer_seed`).
        answers: How many answers a picture got; the first is measured, diversity is of all.
        overall: Over all pictures.
        bins: By size of the hole; bins without pictures are left out.
        notes: Sentences a reader of the numbers has to know.
    """

    name: str
    features: str
    features_digest: str
    frechet_name: str
    perceptual: str | None
    seed: int
    answers: int
    overall: Scores
    bins: tuple[Scores, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; numbers that are not finite (a PSNR of equal pictures) are None."""
        plain: dict[str, Any] = _jsonable(asdict(self))
        return plain

    def table(self) -> str:
        """A Markdown table, a row a bin and one for all, that reads as plain text too."""
        rows = [(scores.label, scores) for scores in (*self.bins, self.overall)]
        head = f"{self.name}: {self.overall.pictures} pictures, seed {self.seed}"
        return "\n".join([head, "", *_markdown("hole", self.frechet_name, rows), *self._footer()])

    def _footer(self) -> list[str]:
        notes = [_caption(self), *self.notes]
        return ["", *(f"- {note}" for note in notes)]


def comparison_table(evaluations: Sequence[Evaluation], *, by_bin: bool = False) -> str:
    """Several methods in one Markdown table.

    Args:
        evaluations: Of the same pictures, with the same feature networks.
        by_bin: A row for each bin of each method, beside the one for all pictures.

    Raises:
        EvaluationError: If there are none, or they were measured differently.
    """
    if not evaluations:
        raise EvaluationError("there is nothing to compare; give one evaluation or more")
    first = evaluations[0]
    for other in evaluations[1:]:
        if _measured_by(other) != _measured_by(first):
            raise EvaluationError(
                f"'{first.name}' and '{other.name}' were measured with other networks or other "
                "holes, so their numbers do not compare; evaluate both alike"
            )
    rows = []
    for evaluation in evaluations:
        for scores in (*(evaluation.bins if by_bin else ()), evaluation.overall):
            label = f"{evaluation.name}, {scores.label}" if by_bin else evaluation.name
            rows.append((label, scores))
    notes = dict.fromkeys([_caption(first), *(note for e in evaluations for note in e.notes)])
    lines = _markdown("method", first.frechet_name, rows)
    return "\n".join([*lines, "", *(f"- {note}" for note in notes)])


def _measured_by(evaluation: Evaluation) -> tuple[Any, ...]:
    """What has to be equal for two evaluations to compare."""
    holes = [(s.label, s.pictures, s.hole_ratio) for s in (*evaluation.bins, evaluation.overall)]
    return evaluation.features_digest, evaluation.frechet_name, evaluation.perceptual, holes


def _caption(evaluation: Evaluation) -> str:
    network = f"Features: {evaluation.features} ({evaluation.features_digest[:8]})."
    return f"PSNR, SSIM and L1 are of the hole, in brackets of the whole picture. {network}"


def _markdown(first: str, frechet: str, rows: Sequence[tuple[str, Scores]]) -> list[str]:
    """Lines of a table, its columns padded; a column without any number is left out."""
    columns: list[tuple[str, Callable[[Scores], str]]] = [
        ("pictures", lambda s: str(s.pictures)),
        (frechet, lambda s: _number(s.frechet, ".2f")),
        ("P-IDS %", lambda s: _number(s.pids, ".1f", 100.0)),
        ("U-IDS %", lambda s: _number(s.uids, ".1f", 100.0)),
        ("precision", lambda s: _number(s.precision, ".3f")),
        ("recall", lambda s: _number(s.recall, ".3f")),
        ("PSNR dB", lambda s: _pair(s.psnr, s.psnr_whole, ".2f")),
        ("SSIM", lambda s: _pair(s.ssim, s.ssim_whole, ".3f")),
        ("L1 %", lambda s: _pair(s.l1, s.l1_whole, ".2f", 100.0)),
        ("perceptual", lambda s: _number(s.perceptual, ".4f")),
        ("diversity", lambda s: _number(s.diversity, ".3f")),
    ]
    table = [[first, *(label for label, _ in rows)]]
    for heading, shown in columns:
        cells = [shown(scores) for _, scores in rows]
        if any(cell != "–" for cell in cells):
            table.append([heading, *cells])
    widths = [max(map(len, column)) for column in table]
    lines = [
        f"| {cells[0]:<{widths[0]}} |"
        + "".join(f" {cell:>{width}} |" for cell, width in zip(cells[1:], widths[1:], strict=True))
        for cells in zip(*table, strict=True)
    ]
    rule = f"|{'-' * (widths[0] + 2)}|" + "".join(f"{'-' * (w + 1)}:|" for w in widths[1:])
    return [lines[0], rule, *lines[1:]]


def _number(value: float | None, form: str, factor: float = 1.0) -> str:
    if value is None:
        return "–"
    return "∞" if math.isinf(value) else format(value * factor, form)


def _pair(hole: float, whole: float, form: str, factor: float = 1.0) -> str:
    return f"{_number(hole, form, factor)} ({_number(whole, form, factor)})"


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _jsonable(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


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
    """Fill every picture's hole and measure the answers.

    Pictures are taken one batch at a time and not kept: what grows is two vectors of features a
    picture (10 KB with EfficientNet-Lite0, 16 KB with Inception), and a few copies at the end.

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
    _check_arguments(batch, seed, answers, bins)
    maps = _as_maps(features) if perceptual is None else perceptual
    total = len(pictures) if isinstance(pictures, Sized) else None
    rows = _Rows()
    done = 0
    for image, mask in _batches(pictures, masks, batch):
        indices = range(done, done + len(image))
        fakes = [
            _answer(fill, image, mask, [answer_seed(seed, i, answer) for i in indices])
            for answer in range(answers)
        ]
        rows.add(image, mask, fakes, features, maps)
        done += len(image)
        if progress:
            progress(done, total)
    if not done:
        raise EvaluationError("there are no pictures to evaluate; give one or more")
    arrays = rows.arrays()
    everything = np.ones(done, dtype=bool)
    overall = _scores("all", arrays, everything)
    by_bin = tuple(_binned(arrays, bins))
    return Evaluation(
        name=name,
        features=features.name,
        features_digest=features.digest,
        frechet_name=features.frechet_name,
        perceptual=None if maps is None else maps.name,
        seed=seed,
        answers=answers,
        overall=overall,
        bins=by_bin,
        notes=_notes((overall, *by_bin), features.dimensions),
    )


def answer_seed(seed: int, picture: int, answer: int = 0) -> int:
    """Seed of one answer to one picture (both from 0): independent of batch and of the others."""
    return (seed + (picture + (answer << 32)) * _GOLDEN) % _SEEDS


def _check_arguments(batch: int, seed: int, answers: int, bins: Sequence[float]) -> None:
    if batch < 1 or answers < 1:
        raise EvaluationError(f"batch and answers are 1 or more, got {batch} and {answers}")
    if not 0 <= seed < _SEEDS:
        raise EvaluationError(f"a seed is from 0 to 2**64 - 1, got {seed}")
    increasing = all(low < high for low, high in itertools.pairwise(bins))
    if len(bins) < 2 or bins[0] != 0.0 or bins[-1] != 1.0 or not increasing:
        raise EvaluationError(f"edges of bins increase from 0 to 1, got {[*bins]}")


def _as_maps(features: PooledFeatures) -> MapFeatures | None:
    from mat_torch.features import MapFeatures

    return features if isinstance(features, MapFeatures) else None


def _notes(scores: Sequence[Scores], dimensions: int) -> tuple[str, ...]:
    few = [f"{each.label} ({each.pictures})" for each in scores if each.pictures <= dimensions]
    if not few:
        return ()
    note = (
        f"No more pictures than the {dimensions} features in: {', '.join(few)}. There the Fréchet "
        "distance is biased upwards, P-IDS and U-IDS are near 0 whatever the pictures, and they "
        "compare between methods on these very pictures at most."
    )
    return (note,)


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


# -- collecting ------------------------------------------------------------------------------------


@dataclass
class _Rows:
    """What is kept of each batch: a row of numbers or of features a picture."""

    parts: dict[str, list[NDArray[Any]]] = field(default_factory=dict)

    def add(
        self,
        real: Array,
        mask: Array,
        fakes: Sequence[Array],
        features: PooledFeatures,
        maps: MapFeatures | None,
    ) -> None:
        """Measure the first answer against the picture, and the answers against each other."""
        fake = fakes[0]
        # Not one minus the kept share, which would not be 0.2 where 80 % are kept.
        new: dict[str, NDArray[Any]] = {"hole_ratio": (mask == 0).mean(axis=(1, 2, 3))}
        for name, metric in (("psnr", psnr), ("ssim", ssim), ("l1", l1)):
            new[name] = metric(fake, real, mask)
            new[f"{name}_whole"] = metric(fake, real)
        vectors = [_pooled(features, answer) for answer in fakes]
        new["fake"], new["real"] = vectors[0], _pooled(features, real)
        if len(fakes) > 1:
            new["diversity"] = pairwise_diversity(np.stack(vectors, axis=1))
        if maps is not None:
            new["perceptual"] = _perceptual(maps, fake, real)
        for name, values in new.items():
            self.parts.setdefault(name, []).append(values)

    def arrays(self) -> dict[str, NDArray[Any]]:
        return {name: np.concatenate(parts) for name, parts in self.parts.items()}


def _device(network: FeatureNetwork) -> Any:
    return next(network.parameters()).device


def _pooled(features: PooledFeatures, images: Array) -> Array:
    import torch

    with torch.inference_mode():
        found = features.pooled(torch.from_numpy(images).to(_device(features)))
        return np.asarray(found.float().cpu().numpy())


def _perceptual(maps: MapFeatures, a: Array, b: Array) -> Array:
    import torch

    from mat_torch.features import perceptual_distance

    with torch.inference_mode():
        x, y = (torch.from_numpy(images).to(_device(maps)) for images in (a, b))
        return np.asarray(perceptual_distance(maps, x, y).float().cpu().numpy())


def _binned(arrays: dict[str, NDArray[Any]], edges: Sequence[float]) -> Iterator[Scores]:
    for low, high in itertools.pairwise(edges):
        ratio = arrays["hole_ratio"]
        chosen = (ratio >= low) & ((ratio < high) | (high == 1.0))
        if chosen.any():
            yield _scores(f"{100 * low:g}–{100 * high:g} %", arrays, chosen)


def _scores(label: str, arrays: dict[str, NDArray[Any]], chosen: NDArray[np.bool_]) -> Scores:
    """Every metric over the chosen pictures."""

    def mean(name: str) -> float:
        return float(np.mean(arrays[name][chosen], dtype=np.float64))

    fake, real = arrays["fake"][chosen], arrays["real"][chosen]
    # What a measure of sets needs at least; fewer than a handful say little anyway.
    several, enough = len(fake) >= 2, len(fake) > _NEIGHBOUR
    pids, uids = discriminative_scores(fake, real) if several else (None, None)
    precision, recall = precision_recall(fake, real, k=_NEIGHBOUR) if enough else (None, None)
    return Scores(
        label=label,
        pictures=len(fake),
        hole_ratio=mean("hole_ratio"),
        frechet=frechet_distance(fake, real) if several else None,
        pids=pids,
        uids=uids,
        precision=precision,
        recall=recall,
        psnr=mean("psnr"),
        psnr_whole=mean("psnr_whole"),
        ssim=mean("ssim"),
        ssim_whole=mean("ssim_whole"),
        l1=mean("l1"),
        l1_whole=mean("l1_whole"),
        perceptual=mean("perceptual") if "perceptual" in arrays else None,
        diversity=mean("diversity") if "diversity" in arrays else None,
    )


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
        filled = [
            cv2.inpaint(np.ascontiguousarray(picture), hole, radius, flags[method])
            for picture, hole in zip(levels, holes, strict=True)
        ]
        result = np.stack(filled).transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1.0
        return np.asarray(result)

    return fill
