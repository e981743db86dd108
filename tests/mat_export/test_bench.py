"""The benchmark measures each model in its own process, and says when it cannot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mat_export.bench import bench, example_inputs
from mat_export.contract import GraphSpec, UserError, check_inputs
from mat_torch import Checkpoint, preset, save_checkpoint


def test_example_inputs_fit_a_dynamic_batch_and_size() -> None:
    spec = GraphSpec(preset("mat-tiny-256"), batch=None, dynamic_size=True, noise="input")
    for size in (None, (256, 512)):
        inputs = example_inputs(spec, 3, size)
        check_inputs(spec, inputs)
        assert inputs["image"].shape == (3, 3, *(size or (256, 256)))


def test_models_are_timed_side_by_side(
    tiny_checkpoint: Checkpoint, tiny_onnx: Path, tmp_path: Path
) -> None:
    weights = tmp_path / "tiny.safetensors"
    save_checkpoint(tiny_checkpoint, weights)
    seen: list[str] = []
    report = bench(
        [weights, tiny_onnx],
        runs=3,
        warmup=1,
        threads=2,
        progress=lambda name, done, total: seen.append(Path(name).name),
    )
    # Turns: one run of each after the other.
    assert seen[:4] == ["tiny.safetensors", "tiny.onnx"] * 2
    torch, onnx = report.models
    assert "PyTorch" in torch.runner
    assert "ONNX Runtime" in onnx.runner
    for model in report.models:
        assert len(model.milliseconds) == 3
        assert 0 < model.p50 <= model.p90 <= model.p99
        assert model.peak_mib > 30
    # A process that never loads torch holds less; shared figures would be equal.
    assert torch.peak_mib != onnx.peak_mib
    figures = json.loads(report.to_json())
    assert figures["models"][0]["ratio_to_first"] == 1.0
    assert figures["models"][1]["ratio_to_first"] == pytest.approx(onnx.p50 / torch.p50)
    assert figures["machine"]["versions"]["onnxruntime"]


def test_a_file_that_does_not_open_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.onnx"):
        bench([tmp_path / "absent.onnx"], runs=1)


def test_no_runs_is_refused() -> None:
    with pytest.raises(UserError, match="at least one run"):
        bench([], runs=0)
