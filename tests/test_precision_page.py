"""The page on precision says what was measured."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from mat_export.contract import UserError

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"

REPORT = {
    "date": "2026-01-02T03:04:05+00:00",
    "machine": {"cpu": "some CPU"},
    "checkpoint": "ab" * 32,
    "network": "mat-tiny-256",
    "crops": 50,
    "runs": 10,
    "pictures": "precision",
    "forms": {
        "fp32": {
            "file": "a.onnx",
            "bytes": 31_000_000,
            "runner": "ONNX Runtime",
            "feature_distance": 10.0,
            "feature_distance_of": "EfficientNet distance",
        },
        "int8": {
            "file": "b.onnx",
            "bytes": 16_000_000,
            "runner": "ONNX Runtime",
            "hole_db_mean": 36.25,
            "hole_db_worst": 30.0,
            "masks_equal": True,
            "p50_ms": 1.5,
            "p99_ms": 2.0,
            "feature_distance": 10.4,
        },
    },
}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """benchmarks/precision.py as a module."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("precision")


def test_every_form_has_its_row(script: Any) -> None:
    text = script.figures(REPORT)
    assert "some CPU" in text
    assert "2026-01-02" in text
    assert "| FP32 | 31.0 | – | the reference |  | 10.00 |" in text
    assert "| INT8 | 16.0 | 1.50 (2.00) | 36.2 (30.0) | equal | 10.40 (+4.0 %) |" in text
    assert "50 crops" in text
    shown = script.pictures(REPORT)
    assert "![int8](precision/int8.png)" in shown
    assert "![hole](precision/hole.png)" in shown


def test_layers_are_those_of_a_calibration(script: Any) -> None:
    layers = [
        {"name": "a/Conv", "int8": True, "noise": [1e-5, 3e-5], "range": "entropy"},
        {"name": "b/Conv", "int8": False, "noise": [1e-3, 1e-3], "range": "largest"},
    ]
    report = {"int8_layers": 1, "int8_share": 0.9, "target_db": 35.0, "layers": layers}
    text = script.layers({**report, "mean_db": 36.0, "worst_db": 31.0})
    assert "1 of 2 layers in INT8, 90 %" in text
    assert text.index("| `b/Conv` | half | 30.0 |") < text.index("| `a/Conv` | INT8 | 47.0 |")


def test_the_page_is_what_its_files_make_of_it(script: Any) -> None:
    page = script.PAGE.read_text(encoding="utf-8")
    assert script.rendered(page, None, script.SECTIONS) == page
    assert all(f"<!-- {name} from " in page for name in script.SECTIONS)


def test_forms_are_measured_against_fp32(
    script: Any, small_fp32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = script.cases
    names = ("random-large", "one-pixel-hole")
    monkeypatch.setattr(script, "cases", lambda *s: [c for c in suite(*s) if c.name in names])
    monkeypatch.setattr(script, "PAGE", tmp_path / "docs" / "precision.md")
    output, drawn = tmp_path / "figures.json", tmp_path / "docs" / "drawn"
    words = ["measure", small_fp32, "fp16", "-o", output, "--pictures", drawn]
    assert script.main([str(word) for word in words]) == 0
    report = json.loads(output.read_text())
    assert list(report["forms"]) == ["fp32", "fp16"]
    assert report["forms"]["fp16"]["hole_db_mean"] > 45.0
    assert report["forms"]["fp16"]["masks_equal"]
    assert {path.name for path in drawn.iterdir()} == {"hole.png", "fp32.png", "fp16.png"}
    assert "| FP16 |" in script.figures(report)


@pytest.mark.parametrize(
    ("form", "message"),
    [("int8", "NAME=FILE"), ("fp8=x.onnx", "a form is one of"), ("fp16=no.onnx", "no file")],
)
def test_a_form_that_is_none_is_said(
    script: Any, small_fp32: Path, tmp_path: Path, form: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        script._forms([form], small_fp32, tmp_path)
