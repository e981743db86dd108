"""Which layers are INT8."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from calib.candidates import Candidate, Candidates
from calib.recipe import Recipe, choose_layers, predicted_db
from calib.sensitivity import MOST_DB, Quality, decibel
from mat_export.contract import UserError

COSTS = {"cheap": (1e-6, 2e-6), "fair": (1e-5, 1e-5), "dear": (4e-4, 1e-4), "small": (3e-5, 3e-5)}
GAINS = {"cheap": 0.1, "fair": 0.2, "dear": 0.2, "small": 0.001}


def candidate(name: str, kind: str = "conv", tensor: str = "") -> Candidate:
    return Candidate(name, kind, tensor or f"x/{name}", "", f"y/{name}", 1.0, GAINS.get(name, 0.01))


CANDIDATES = Candidates(tuple(map(candidate, COSTS)), 4.0, {})


def measured(worse_by: float, tries: list[frozenset[str]]) -> Callable[[frozenset[str]], Quality]:
    """What is predicted, less some decibels."""

    def measure(layers: frozenset[str]) -> Quality:
        tries.append(layers)
        value = predicted_db(COSTS, layers) - worse_by
        return Quality(value, value - 3.0)

    return measure


def test_noises_add_up() -> None:
    assert predicted_db(COSTS, ["fair"]) == pytest.approx(50.0)
    expected = (decibel(1.1e-5) + decibel(1.2e-5)) / 2
    assert predicted_db(COSTS, ["cheap", "fair"]) == pytest.approx(expected)


def test_one_exact_sample_does_not_make_a_mean() -> None:
    assert decibel(0.0) == MOST_DB
    assert predicted_db({"a": (0.0, 1e-4)}, ["a"]) == pytest.approx((MOST_DB + 40.0) / 2)


@pytest.mark.parametrize("worse_by", [0.0, 2.0, -2.0])
@pytest.mark.parametrize("target", [0.0, 40.0, 45.0, 52.0, 55.0])
def test_the_fewest_drops_that_meet_the_target_are_found(target: float, worse_by: float) -> None:
    tries: list[frozenset[str]] = []
    measure = measured(worse_by, tries)
    layers, quality = choose_layers(CANDIDATES, COSTS, target, measure)
    assert quality.mean_db >= target
    assert quality == measure(layers)
    # The costliest for what they save go first.
    nested = [{"cheap", "fair", "dear", "small"}, {"cheap", "fair", "dear"}, {"cheap", "fair"}]
    nested += [{"cheap"}]
    place = nested.index(set(layers))
    if place:
        assert measure(frozenset(nested[place - 1])).mean_db < target
    assert len(tries) < len(COSTS) + 3


def test_what_cannot_be_met_tells_what_was_measured() -> None:
    tries: list[frozenset[str]] = []
    words = r"no layer can be INT8 with 90 dB .*'cheap' alone, .* was measured at 55\.5 dB"
    with pytest.raises(UserError, match=words):
        choose_layers(CANDIDATES, COSTS, 90.0, measured(3.0, tries))
    assert len(tries) == len(set(tries)), "nothing is measured twice"


QUIET = {"quiet": (1e-6, 1e-6), "useful": (1e-4, 1e-4), "skip": (1e-9, 1e-9)}


@pytest.mark.parametrize(("lost", "found"), [(0.0, 60.0), (20.0, 40.0)])
def test_the_layer_that_costs_least_is_measured_before_all_are_refused(
    lost: float, found: float
) -> None:
    """It goes first, for it saves nothing; a sum that costs less is none without a convolution."""
    layers = (
        replace(candidate("quiet", tensor="t"), gain=1e-9),
        replace(candidate("useful", tensor="u"), gain=0.5),
        candidate("skip", "skip", "t"),
    )

    def measure(names: frozenset[str]) -> Quality:
        value = predicted_db(QUIET, names) - lost
        return Quality(value, value)

    candidates = Candidates(layers, 3.0, {})
    if found >= 50.0:
        chosen, quality = choose_layers(candidates, QUIET, 50.0, measure)
        assert chosen == {"quiet"}
        assert quality.mean_db == pytest.approx(found)
    else:
        with pytest.raises(UserError, match=rf"'quiet' alone, .* measured at {found:.1f} dB"):
            choose_layers(candidates, QUIET, 50.0, measure)


def test_a_skip_goes_with_the_last_layer_that_quantizes_its_tensor() -> None:
    layers = (candidate("dear", tensor="t"), candidate("skip", "skip", "t"), candidate("cheap"))
    costs = {**COSTS, "skip": (1e-9, 1e-9)}
    chosen, _ = choose_layers(
        Candidates(layers, 3.0, {}),
        costs,
        50.0,
        lambda names: Quality(predicted_db(costs, names), 0.0),
    )
    assert chosen == {"cheap"}


def test_a_recipe_goes_through_its_file(tmp_path: Path) -> None:
    recipe = Recipe("mat-512", ("a/Conv", "b/Conv"), 35.0, filters=True)
    path = tmp_path / "recipe.json"
    path.write_text(recipe.to_json())
    assert Recipe.from_file(path, "mat-512") == recipe


def test_a_recipe_that_does_not_speak_of_filters_has_none(tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    path.write_text('{"format": 1, "network": "mat-512", "layers": ["a"], "target_db": 35.0}')
    assert Recipe.from_file(path, "mat-512") == Recipe("mat-512", ("a",), 35.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no recipe"),
        ("[]", "no recipe"),
        ('{"format": 1, "network": "mat-512"}', "no recipe"),
        ('{"format": 1, "network": "mat-512", "layers": 3}', "no recipe"),
        ('{"format": 1, "network": "mat-512", "layers": ["a"], "filters": 1}', "no recipe"),
        ('{"format": 2, "network": "mat-512", "layers": []}', "of version 2"),
        ('{"format": 1, "network": "mat-256", "layers": []}', "for mat-256, the model is mat-512"),
        ('{"format": 1, "network": "mat-512", "layers": []}', "names no layer"),
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        Recipe.from_file(path, "mat-512")


def test_a_missing_recipe_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no file"):
        Recipe.from_file(tmp_path / "none.json", "mat-512")


def test_a_recipe_is_plain_json() -> None:
    entries = json.loads(Recipe("n", ("a",)).to_json())
    expected = {"format": 1, "network": "n", "layers": ["a"], "target_db": None, "filters": False}
    assert entries == expected
