"""The model that ships, in INT8: calibrated as a user would, near FP32, and INT8 in an engine."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from rtx_plan import convolution_work, read_int8_plan
from test_shipped import command

import mat_export
from calib.calibrate import recipe_path
from calib.recipe import Recipe
from mat_export import shipped
from mat_export.engine_graph import prepare_engine_graph

CROPS = 40
"""Of the held-out photographs; few for a distance, enough to see that INT8 does not change it."""


@pytest.fixture(scope="module")
def fp32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fp32") / "mat.onnx"
    command("onnx", "-o", path)
    return path


@pytest.fixture(scope="module")
def int8(fp32: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Quantized with every default."""
    path = tmp_path_factory.mktemp("int8") / "mat-int8.onnx"
    said = command("calibrate", fp32, "-o", path)
    assert "layers in INT8" in said
    return path


def test_its_convolutions_are_int8(int8: Path) -> None:
    recipe = Recipe.from_file(recipe_path(int8), shipped.PRESET)
    assert len(recipe.layers) >= 34  # of 36 that can be


def test_it_fills_hard_masks_as_fp32_does(fp32: Path, int8: Path, tmp_path: Path) -> None:
    command("parity", int8, "--reference", fp32, "--json", tmp_path / "parity.json")
    report = json.loads((tmp_path / "parity.json").read_text())
    assert report["passed"]
    cases = [case for case in report["cases"] if case["hole"]["pixels"]]
    values = [np.inf if case["hole"]["psnr"] is None else case["hole"]["psnr"] for case in cases]
    assert len(values) > 10
    assert np.mean([value for value in values if np.isfinite(value)]) >= 32.0
    assert min(values) >= 27.0


def test_its_fillings_are_as_far_from_photographs_as_those_of_fp32(
    fp32: Path, int8: Path, tmp_path: Path
) -> None:
    """On photographs that it was not trained on (docs/model-card.md) and that packages bring."""
    pictures = tmp_path / "photographs"
    pictures.mkdir()
    package = importlib.util.find_spec("sklearn")
    assert package is not None
    assert package.origin is not None
    china = Path(package.origin).parent / "datasets/images/china.jpg"
    for path in (*(Path(mat_export.__file__).parent / "data").glob("*.jpg"), china):
        (pictures / path.name).symlink_to(path)
    assert len(list(pictures.iterdir())) == 4
    models = ["--model", fp32, "--model", int8]
    command(
        "evaluate", "--data", pictures, "--count", CROPS, "--json", tmp_path / "e.json", *models
    )
    found = json.loads((tmp_path / "e.json").read_text())
    exact, quantized = (scores["overall"]["frechet"] for scores in found)
    assert 0.0 < quantized <= 1.05 * exact


def test_tensorrt_rtx_computes_its_convolutions_in_int8(
    int8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    work = convolution_work(prepare_engine_graph(int8, "int8", opset=22).model)
    plan = tmp_path / "mat.plan"

    def build() -> bytes:
        command("trt", int8, "--int8", "--target", "sm_89", "--force", "-o", plan)
        return plan.read_bytes()

    listing = read_int8_plan(build)
    assert set(listing.convolutions) == set(work), "the plan's listing has another form"
    assert sum(work[name] for name in listing.int8) >= 0.8 * sum(work.values())
