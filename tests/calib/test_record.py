"""The calibration record."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from calib.ranges import Range
from calib.record import Record, load_record
from mat_export.contract import UserError

KEY: dict[str, Any] = {"model": "ab" * 32, "seed": 0, "samples": {"count": 6, "sha256": "cd" * 32}}
RECORD = Record(
    key=KEY,
    powers={"a/Conv": (0, 2, 1)},
    ranges={"x": Range(0.5, "entropy", 60.0, {"entropy": 1e-4, "largest": 2e-4})},
    costs={"a/Conv": (1e-5, 0.0)},
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    target = tmp_path / "model.calibration.json"
    RECORD.save(target)
    return target


def test_a_record_of_the_same_calibration_is_taken(path: Path) -> None:
    assert load_record(path, KEY) == RECORD
    assert RECORD.scales == {"x": 0.5}
    text = path.read_text()
    RECORD.save(path)
    assert path.read_text() == text


def test_no_record_is_none(tmp_path: Path) -> None:
    assert load_record(tmp_path / "none.json", KEY) is None


def test_one_of_another_calibration_is_refused_with_the_difference(path: Path) -> None:
    other = {**KEY, "seed": 3, "model": "ef" * 32}
    with pytest.raises(UserError, match=r"model: abab.*…, now efef.*…; seed: 0, now 3\): delete"):
        load_record(path, other)


@pytest.mark.parametrize(
    "change",
    [
        {"ranges": {"x": {"scale": 0.5}}},
        {"ranges": {"x": {"scale": -1.0, "method": "", "largest": 1.0, "errors": {}}}},
        {"ranges": {"x": {"scale": "1", "method": "", "largest": 1.0, "errors": {}}}},
        {"costs": {"a/Conv": [-1.0]}},
        {"costs": {"a/Conv": ["x"]}},
        {"powers": 3},
        {"key": None, "format": None},
        {"format": 7},
    ],
)
def test_a_damaged_one_is_refused(path: Path, change: dict[str, Any]) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match=r"is no calibration record.*delete it"):
        load_record(path, KEY)


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"', "\x00"])
def test_another_file_is_refused(path: Path, text: str) -> None:
    path.write_text(text)
    with pytest.raises(UserError, match="is no calibration record"):
        load_record(path, KEY)


def test_costs_come_in_sample_by_sample(path: Path) -> None:
    layers = ["a/Conv", "b/Conv"]
    record = replace(RECORD, costs={})
    assert record.samples_done(layers) == 0
    for i in range(2):
        record = record.with_costs(i, {"a/Conv": 0.5 * i, "b/Conv": 1.0})
        assert record.samples_done(layers) == i + 1
    assert record.costs == {"a/Conv": (0.0, 0.5), "b/Conv": (1.0, 1.0)}
    uneven = replace(record, costs={**record.costs, "b/Conv": (1.0,)})
    assert uneven.samples_done(layers) == 1
    assert uneven.with_costs(1, {"a/Conv": 0.5, "b/Conv": 1.0}) == record


def test_a_record_without_costs_goes_through_its_file(path: Path) -> None:
    without = replace(RECORD, costs={})
    without.save(path)
    assert load_record(path, KEY) == without
