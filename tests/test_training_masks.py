"""Training masks are those that were published, by the hole ratios of 4,000 draws of each kind."""

from __future__ import annotations

import json
import math
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mat_torch.masks import (
    PRESETS,
    MaskError,
    MaskKind,
    MaskPreset,
    hole_ratio,
    preset_for,
    sample_mask,
    stratified,
)

_LABEL: Any = import_module("scipy.ndimage").label  # SciPy brings no types of its own
_PUBLISHED = json.loads((Path(__file__).parent / "data" / "mask_statistics.json").read_text())
_TABLES: list[tuple[MaskKind, int, str]] = [
    ("large", 512, "mask_generator_512"),
    ("small", 512, "mask_generator_512_small"),
    ("large", 256, "mask_generator_256"),
    ("small", 256, "mask_generator_256_small"),
]
_ALPHA = 1e-3
"""How often a right sampler would fail one comparison, had the seeds not been fixed."""


def _ratios(kind: MaskKind, resolution: int, count: int, seed: int = 0) -> NDArray[np.float64]:
    rng = np.random.default_rng(seed)
    return np.array([hole_ratio(sample_mask(kind, resolution, rng)) for _ in range(count)])


def _distance(ratios: NDArray[np.float64], table: dict[str, Any]) -> float:
    """Largest |F_n(q_p) − p| over the published quantiles."""
    found = [abs((ratios <= q).mean() - float(p)) for p, q in table["quantiles"].items()]
    return float(max(found))


def _bound(ours: int, theirs: int) -> float:
    """c(α)·√(1/n + 1/m) of the two-sample Kolmogorov–Smirnov test, c(α) = √(ln(2/α)/2)."""
    return math.sqrt(math.log(2 / _ALPHA) / 2) * math.sqrt(1 / ours + 1 / theirs)


# -- the published distributions -------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "resolution", "name"), _TABLES)
def test_hole_ratios_are_distributed_as_published(
    kind: MaskKind, resolution: int, name: str
) -> None:
    count, table = 4000, _PUBLISHED[name]
    ratios = _ratios(kind, resolution, count)
    assert _distance(ratios, table) <= _bound(count, table["n"])
    mean_error = table["std"] * math.sqrt(1 / count + 1 / table["n"])
    assert abs(ratios.mean() - table["mean"]) <= 3.3 * mean_error
    # A deviation's own standard error is about σ/√(2n) (exactly so for a normal distribution).
    assert abs(ratios.std() - table["std"]) <= 3.3 * mean_error / math.sqrt(2)


def test_the_small_counts_of_512_do_not_fit_what_was_published_at_256(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counts = PRESETS["small", 512]
    wrong = MaskPreset(256, counts.half_rectangles, counts.full_rectangles, counts.strokes)
    monkeypatch.setitem(PRESETS, ("small", 256), wrong)
    table = _PUBLISHED["mask_generator_256_small"]
    assert _distance(_ratios("small", 256, 800), table) > 1.5 * _bound(800, table["n"])


def test_the_counts_are_the_exclusive_draws_of_the_paper_minus_one() -> None:
    def exclusive(kind: MaskKind, side: int) -> tuple[int, int, int]:
        counts = PRESETS[kind, side]
        return counts.half_rectangles + 1, counts.full_rectangles + 1, counts.strokes + 1

    assert exclusive("large", 512) == (5, 3, 9)
    assert exclusive("small", 512) == (3, 2, 4)
    assert exclusive("large", 256) == (4, 2, 8)


def test_between_the_published_sizes_ratios_stay_those_of_the_size_whose_counts_are_used() -> None:
    table = _PUBLISHED["mask_generator_256"]
    for resolution in (64, 384):
        # Widths are whole pixels, worth up to 0.03 at 64.
        assert _distance(_ratios("large", resolution, 800), table) <= _bound(800, 4000) + 0.03


# -- single masks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("resolution", [32, 100, 256, 512, 700])
@pytest.mark.parametrize("kind", ["large", "small"])
def test_a_mask_is_square_and_both_keeps_and_drops(kind: MaskKind, resolution: int) -> None:
    rng = np.random.default_rng(3)
    for _ in range(10):
        keep = sample_mask(kind, resolution, rng)
        assert keep.shape == (resolution, resolution)
        assert keep.dtype == bool
        assert keep.any()
        assert not keep.all()


def test_the_same_state_gives_the_same_mask_and_the_next_state_another() -> None:
    rng, again = np.random.default_rng(5), np.random.default_rng(5)
    first = sample_mask("large", 128, rng)
    np.testing.assert_array_equal(first, sample_mask("large", 128, again))
    assert (first != sample_mask("large", 128, rng)).any()


def test_masks_without_a_hole_are_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, ("small", 256), MaskPreset(256, 0, 0, strokes=1))
    rng = np.random.default_rng(0)
    assert all(not sample_mask("small", 64, rng).all() for _ in range(40))  # half of them, once


def test_masks_that_keep_nothing_are_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, ("small", 256), MaskPreset(256, 0, 0, strokes=400))
    rng = np.random.default_rng(0)
    assert all(sample_mask("small", 32, rng).any() for _ in range(20))


def test_rectangles_reach_half_the_side_or_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for preset, most in ((MaskPreset(256, 1, 0, 0), 64), (MaskPreset(256, 0, 1, 0), 128)):
        monkeypatch.setitem(PRESETS, ("small", 256), preset)
        rng = np.random.default_rng(1)
        longest = 0
        for _ in range(300):
            hole = ~sample_mask("small", 128, rng)
            rows, columns = np.flatnonzero(hole.any(1)), np.flatnonzero(hole.any(0))
            assert hole.sum() == len(rows) * len(columns)  # filled: a rectangle, and one alone
            longest = max(longest, len(rows), len(columns))
        assert 0.9 * most < longest < most


def test_rectangles_may_lie_partly_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, ("small", 256), MaskPreset(256, 1, 0, 0))
    rng = np.random.default_rng(1)
    holes = [~sample_mask("small", 128, rng) for _ in range(200)]
    edges = [
        hole[0].any() or hole[-1].any() or hole[:, 0].any() or hole[:, -1].any() for hole in holes
    ]
    assert 0.2 < np.mean(edges) < 0.8


def test_a_stroke_is_one_piece_that_grows_with_the_side(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, ("small", 256), MaskPreset(256, 0, 0, 1))
    eight = np.ones((3, 3), int)
    ratios = []
    for resolution in (64, 256):
        rng = np.random.default_rng(2)
        holes = [~sample_mask("small", resolution, rng) for _ in range(60)]
        assert all(_LABEL(hole, eight)[1] == 1 for hole in holes)
        ratios.append(np.mean(holes))
    assert ratios[0] == pytest.approx(ratios[1], abs=0.04)


# -- masks by hole ratio ---------------------------------------------------------------------------


def test_stratified_masks_lie_in_their_bins() -> None:
    bins = [(0.0, 0.2), (0.2, 0.4), (0.4, 0.6)]
    masks = stratified(bins, 6, 64, np.random.default_rng(0))
    assert masks.shape == (3, 6, 64, 64)
    for (low, high), group in zip(bins, masks, strict=True):
        assert all(low <= hole_ratio(keep) < high for keep in group)


def test_stratified_masks_are_the_same_for_the_same_state() -> None:
    bins = [(0.1, 0.3), (0.3, 0.5)]
    first = stratified(bins, 3, 64, np.random.default_rng(9))
    np.testing.assert_array_equal(first, stratified(bins, 3, 64, np.random.default_rng(9)))


def test_stratified_names_the_bins_it_could_not_fill() -> None:
    with pytest.raises(MaskError, match=r"after 40 draws .* 0\.999 … 1 \(0 of 2\)"):
        stratified([(0.0, 1.0), (0.999, 1)], 2, 64, np.random.default_rng(0), max_draws=40)


@pytest.mark.parametrize("bins", [[], [(0.5, 0.5)], [(-0.1, 0.2)], [(0.5, 1.2)]])
def test_stratified_refuses_bins_that_hold_no_ratio(bins: list[tuple[float, float]]) -> None:
    with pytest.raises(MaskError, match="bin"):
        stratified(bins, 1, 64, np.random.default_rng(0))


def test_unknown_kinds_and_tiny_sizes_are_refused() -> None:
    with pytest.raises(MaskError, match="choose 'large' or 'small'"):
        preset_for("huge", 256)  # type: ignore[arg-type]
    with pytest.raises(MaskError, match="32 pixels a side or more, got 31"):
        sample_mask("large", 31, np.random.default_rng(0))
