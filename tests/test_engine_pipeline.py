"""An engine where a model is wanted: `inpaint` and `parity`, on a GPU of paper.

The engine's arithmetic is ONNX Runtime's on the file it stands for; memory, streams, graphs and
TensorRT's calls are the stand-ins of `fake_gpu`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_gpu import FakeBackend, FakeEngine, FakeGpu, FakeTensor
from numpy.typing import NDArray
from PIL import Image
from small import SMALL
from test_cli import Run, one_sentence, picture, run
from test_engine_runtime import gpu, use

from engines.papers import OpenedPlan, save_engine
from mat_export.contract import GraphSpec
from mat_export.runners import OrtRunner

__all__ = ["gpu", "picture", "run"]  # the fixtures

TYPES = {"float32": "FLOAT", "float16": "HALF", "uint8": "UINT8", "bool": "BOOL"}

Arrays = Mapping[str, NDArray[Any]]


PAPERS: dict[str, Any] = {
    "key": "k" * 64,
    "request": {
        "backend": "tensorrt",
        "version": "8.6.0",
        "model": "m" * 64,
        "plugin": None,
        "profiles": {},
        "gpu": {"name": "Paper GPU 0", "capability": [8, 6], "driver": "12"},
        "options": {"version_compatible": False, "hardware_compatible": False, "target": None},
    },
    "graph": json.loads(GraphSpec(SMALL).to_json()),
    "sources": {},
    "command": ["mat-export", "trt", "mat.onnx"],
}


class Papers:
    """`open_plan` for engines that are not files: which were asked for, and what they compute."""

    def __init__(
        self, gpu: FakeGpu, runner: OrtRunner, batches: tuple[int, int, int] | None = None
    ) -> None:
        self.asked: list[Path] = []
        self.ran = 0
        self.spec: GraphSpec = runner.spec
        self._runner = runner
        self._batches = batches
        outputs = {tensor.name for tensor in self.spec.outputs}
        tensors = [
            FakeTensor(
                name=tensor.name,
                mode="OUTPUT" if tensor.name in outputs else "INPUT",
                dtype=TYPES[tensor.dtype],
                shape=tuple(axis if isinstance(axis, int) else -1 for axis in tensor.shape),
            )
            for tensor in (*self.spec.inputs, *self.spec.outputs)
        ]
        profile = {
            tensor.name: tuple(
                tuple(batch if axis == -1 else axis for axis in tensor.shape) for batch in batches
            )
            for tensor in tensors
            if batches and -1 in tensor.shape
        }
        engine = FakeEngine(
            gpu, tensors, profiles=(profile,) if profile else (), compute=self.compute
        )
        self.backend = FakeBackend(engine, context_bytes=1 << 20)

    def compute(self, inputs: Arrays) -> Arrays:
        self.ran += 1
        return self._runner.run({name: array.copy() for name, array in inputs.items()})

    def __call__(self, path: Path) -> OpenedPlan:
        self.asked.append(path)
        profiles: dict[str, Any] = {}
        if self._batches:
            side = self.spec.config.resolution
            profiles["image"] = [[batch, 3, side, side] for batch in self._batches]
        manifest = {"request": {"profiles": profiles}}
        return OpenedPlan(path, b"plan", self.spec, self.backend, manifest, notes=())


@pytest.fixture
def papers(gpu: FakeGpu, small_onnx: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """`mat.plan`, an engine of the smallest network."""
    monkeypatch.chdir(tmp_path)
    save_engine(b"plan", "mat.plan", PAPERS)
    with OrtRunner(small_onnx) as runner:
        found = Papers(gpu, runner)
        monkeypatch.setattr("engines.runner.open_plan", found)
        yield found


def pixels(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.asarray(image)


def test_inpaint_fills_with_an_engine_as_with_its_file(
    run: Run, papers: Papers, small_onnx: Path, picture: tuple[Path, Path], tmp_path: Path
) -> None:
    ours, theirs = tmp_path / "engine.png", tmp_path / "file.png"
    code, _, error = run("inpaint", *picture, "-o", ours, "--model", "mat.plan", "--seed", 3)
    assert code == 0, error
    assert papers.asked == [Path("mat.plan")]
    assert papers.ran == 1
    code, _, error = run("inpaint", *picture, "-o", theirs, "--model", small_onnx, "--seed", 3)
    assert code == 0, error
    np.testing.assert_array_equal(pixels(ours), pixels(theirs))
    assert not np.array_equal(pixels(ours), pixels(picture[0]))


def test_parity_judges_an_engine(run: Run, papers: Papers, small_onnx: Path) -> None:
    code, out, error = run("parity", "mat.plan", "--reference", small_onnx)
    assert code == 0, out + error
    assert papers.ran >= 12
    assert json.loads(Path("mat.plan.json").read_text())["parity"]["passed"] is True
    honest = papers.compute

    def off(inputs: Arrays) -> Arrays:
        return {name: value * np.float32(1.01) for name, value in honest(inputs).items()}

    papers.backend.engine.compute = off
    code, out, error = run("parity", "mat.plan", "--reference", small_onnx)
    assert code == 1, out + error
    assert json.loads(Path("mat.plan.json").read_text())["parity"]["passed"] is False


def test_inpaint_says_when_gpu_memory_is_too_small(
    run: Run,
    papers: Papers,
    gpu: FakeGpu,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    picture: tuple[Path, Path],
) -> None:
    use(monkeypatch, gpu)
    gpu.memory = 1 << 20
    code, _, error = run("inpaint", *picture, "-o", "filled.png", "--model", "mat.plan")
    one_sentence(code, error)
    assert "memory" in error
    assert not Path("filled.png").exists()


def test_an_engine_for_larger_batches_says_what_it_takes(
    run: Run,
    gpu: FakeGpu,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    picture: tuple[Path, Path],
    small_batches: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mat.plan").write_bytes(b"plan")
    with OrtRunner(small_batches) as runner:
        monkeypatch.setattr("engines.runner.open_plan", Papers(gpu, runner, (2, 2, 4)))
        code, _, error = run("inpaint", *picture, "-o", "filled.png", "--model", "mat.plan")
    one_sentence(code, error)
    assert not Path("filled.png").exists()


@pytest.fixture(scope="module")
def small_batches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest network for any number of pictures."""
    from mat_export.export import export_onnx
    from mat_torch import random_checkpoint

    path = tmp_path_factory.mktemp("batches") / "small.onnx"
    export_onnx(random_checkpoint(SMALL, 0), path, GraphSpec(SMALL, batch=None))
    return path
