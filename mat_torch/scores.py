"""What an evaluation found: the scores of one method, by the size of the hole, and their tables.

`mat_torch.evaluation` measures pictures one by one; here their rows become scores (`summarise`),
and scores become Markdown (`Evaluation.table`, `comparison_table`). NumPy alone is needed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mat_torch.metrics import discriminative_scores, frechet_distance, precision_recall

if TYPE_CHECKING:
    from mat_torch.features import MapFeatures, PooledFeatures

__all__ = [
    "HOLE_BINS",
    "Evaluation",
    "EvaluationError",
    "Rows",
    "Scores",
    "check_bins",
    "comparison_table",
    "summarise",
]

Rows: TypeAlias = dict[str, NDArray[Any]]
"""What was measured, by name: [N] numbers or [N, d] features, a row a picture."""

HOLE_BINS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
"""Edges of the bins of the hole's share of the picture; an edge belongs to the bin above it."""

_NEIGHBOUR = 3
"""k of precision and recall (Kynkäänniemi et al. 2019)."""


class EvaluationError(ValueError):
    """Pictures, masks or a method that cannot be evaluated. One sentence says what to do."""


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
        perceptual, perceptual_whole: Mean unweighted perceptual distance
            (`perceptual.perceptual_distance`).
        diversity: Mean perceptual distance between answers to the same picture, in the hole
            (`perceptual.pairwise_perceptual`).
        feature_diversity: Likewise of the set metrics' features (`metrics.pairwise_diversity`).
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
    perceptual_whole: float | None
    diversity: float | None
    feature_diversity: float | None


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
        passed_over: Names of damaged pictures that others took the place of, as far as it is known.
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
    passed_over: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; numbers that are not finite (a PSNR of equal pictures) are None."""
        plain: dict[str, Any] = _jsonable(asdict(self))
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Evaluation:
        """What `to_dict` gave.

        Raises:
            EvaluationError: If it is something else.
        """
        try:
            overall, *by_bin = map(_scores_from, (plain["overall"], *plain["bins"]))
            found = {**plain, "overall": overall, "bins": tuple(by_bin)}
            found["passed_over"] = tuple(plain.get("passed_over", ()))
            return cls(**{**found, "notes": tuple(plain["notes"])})
        except (KeyError, TypeError) as error:
            raise EvaluationError(f"these are no scores of an evaluation: {error}") from error

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
    if evaluation.perceptual not in (None, evaluation.features):
        network += f" Perceptual distance and diversity: {evaluation.perceptual}."
    return (
        "PSNR, SSIM, L1 and perceptual distance are of the hole, in brackets of the whole picture. "
        f"{network}"
    )


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
        ("perceptual", lambda s: _pair(s.perceptual, s.perceptual_whole, ".3f")),
        ("diversity", lambda s: _number(s.diversity, ".3f")),
        ("feature diversity", lambda s: _number(s.feature_diversity, ".2f")),
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


def _pair(hole: float | None, whole: float | None, form: str, factor: float = 1.0) -> str:
    if hole is None:
        return "–"
    return f"{_number(hole, form, factor)} ({_number(whole, form, factor)})"


def _scores_from(plain: Mapping[str, Any]) -> Scores:
    """Scores of plain data, where an infinite PSNR is None."""
    psnrs = {k: math.inf for k in ("psnr", "psnr_whole") if plain[k] is None}
    return Scores(**{**plain, **psnrs})


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _jsonable(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


# -- from rows to scores ---------------------------------------------------------------------------


def summarise(
    rows: Rows,
    features: PooledFeatures,
    *,
    name: str,
    perceptual: MapFeatures | None,
    seed: int = 0,
    answers: int = 1,
    bins: Sequence[float] = HOLE_BINS,
) -> Evaluation:
    """Scores of what `evaluation.measure` measured with the same arguments.

    Args:
        rows: Of all pictures.
        features: Network of the set metrics.
        name: What to call the method.
        perceptual: Network of the perceptual distances, if there was one.
        seed: Of the answers.
        answers: Fillings of each picture.
        bins: Increasing edges of the hole's share, from 0 to 1.

    Raises:
        EvaluationError: If the bins are none.
    """
    check_bins(bins)
    everything = np.ones(len(rows["hole_ratio"]), dtype=bool)
    overall = _scores("all", rows, everything)
    by_bin = tuple(_binned(rows, bins))
    return Evaluation(
        name=name,
        features=features.name,
        features_digest=features.digest,
        frechet_name=features.frechet_name,
        perceptual=None if perceptual is None else perceptual.name,
        seed=seed,
        answers=answers,
        overall=overall,
        bins=by_bin,
        notes=_notes((overall, *by_bin), features.dimensions),
    )


def check_bins(bins: Sequence[float]) -> None:
    """Raise EvaluationError unless these are increasing edges from 0 to 1."""
    increasing = all(low < high for low, high in itertools.pairwise(bins))
    if len(bins) < 2 or bins[0] != 0.0 or bins[-1] != 1.0 or not increasing:
        raise EvaluationError(f"edges of bins increase from 0 to 1, got {[*bins]}")


def _binned(rows: Rows, edges: Sequence[float]) -> Iterator[Scores]:
    for low, high in itertools.pairwise(edges):
        ratio = rows["hole_ratio"]
        chosen = (ratio >= low) & ((ratio < high) | (high == 1.0))
        if chosen.any():
            yield _scores(f"{100 * low:g}–{100 * high:g} %", rows, chosen)


def _scores(label: str, rows: Rows, chosen: NDArray[np.bool_]) -> Scores:
    """Every metric over the chosen pictures."""

    def mean(name: str) -> float:
        return float(np.mean(rows[name][chosen], dtype=np.float64))

    def mean_if_there(name: str) -> float | None:
        return mean(name) if name in rows else None

    fake, real = rows["fake"][chosen], rows["real"][chosen]
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
        perceptual=mean_if_there("perceptual"),
        perceptual_whole=mean_if_there("perceptual_whole"),
        diversity=mean_if_there("diversity"),
        feature_diversity=mean_if_there("feature_diversity"),
    )


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
