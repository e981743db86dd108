"""A trial run in TensorRT builds, runs and leaves nothing."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

from engines.options import BuildOptions
from engines.trial import run_tensorrt


class Engine:
    """Reads ``x`` alone, and doubles it."""

    closed = 0

    def __init__(self, backend: str, plan: bytes) -> None:
        assert (backend, plan) == ("backend", b"plan")
        names = (("x", "input"), ("y", "output"))
        self.tensors = [SimpleNamespace(name=name, mode=mode) for name, mode in names]

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        Engine.closed += 1

    def run(self, inputs: dict[str, Any]) -> dict[str, Any]:
        assert set(inputs) == {"x"}
        return {"y": inputs["x"] * 2}


def test_a_trial_run(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[bytes, Path, BuildOptions]] = []

    def check_build(model: bytes, output: Path, options: BuildOptions) -> str:
        asked.append((model, output, options))
        return "build"

    def run_build(build: str, output: Path) -> None:
        assert build == "build"
        output.write_bytes(b"plan")

    def open_plan(path: Path) -> SimpleNamespace:
        return SimpleNamespace(backend="backend", plan=path.read_bytes())

    monkeypatch.setattr("engines.trial.check_build", check_build)
    monkeypatch.setattr("engines.trial.run_build", run_build)
    monkeypatch.setattr("engines.trial.open_plan", open_plan)
    monkeypatch.setattr("engines.trial.Engine", Engine)
    model = onnx.ModelProto(producer_name="test")
    inputs: dict[str, Any] = {"x": np.ones(3, np.float32), "unread": np.zeros(1)}
    before = Engine.closed
    results = run_tensorrt(model, inputs, "tensorrt", tf32=True)
    assert np.array_equal(results["y"], np.full(3, 2.0))
    ((data, output, options),) = asked
    assert data == model.SerializeToString()
    assert options == BuildOptions(backend="tensorrt", level=0, tf32=True)
    assert Engine.closed == before + 1
    assert not output.parent.exists()
