"""What several tests share: the small preset's untrained weights, and one export of them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from kernel_harness import compile_on_paper
from small import SMALL

from engines.plugins.kernels import KernelLibrary
from mat_torch import (
    Checkpoint,
    load_checkpoint,
    preset,
    random_checkpoint,
    save_checkpoint,
)

if TYPE_CHECKING:
    from calib.calibrate import Calibration


@pytest.fixture(scope="session")
def tiny_checkpoint() -> Checkpoint:
    """Untrained weights of the small preset, seed 0, every tensor non-zero."""
    return random_checkpoint(preset("mat-tiny-256"), 0)


@pytest.fixture(scope="session")
def tiny_onnx(tiny_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small preset exported with the default options; never write to it."""
    from mat_export.export import export_onnx

    path = tmp_path_factory.mktemp("tiny") / "tiny.onnx"
    export_onnx(tiny_checkpoint, path)
    return path


@pytest.fixture(scope="session")
def small_onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest network, its checkpoint beside it, for what does not ask how large it is."""
    from mat_export.export import export_onnx

    folder = tmp_path_factory.mktemp("small")
    save_checkpoint(random_checkpoint(SMALL, 0), folder / "small.safetensors")
    export_onnx(load_checkpoint(folder / "small.safetensors"), folder / "small.onnx")
    return folder / "small.onnx"


@pytest.fixture(scope="session")
def stand_in_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest network's untrained weights, stored as the shipped model's are."""
    path = tmp_path_factory.mktemp("shipped") / "mat-tiny-256.safetensors"
    save_checkpoint(random_checkpoint(SMALL, 0), path, dtype="float16")
    return path


@pytest.fixture
def stand_in(stand_in_file: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A shipped model for tests of what commands do with it, whatever it has learned."""
    monkeypatch.setattr("mat_export.shipped.SHIPPED", stand_in_file)
    return stand_in_file


@pytest.fixture(scope="session")
def paper_kernels(tmp_path_factory: pytest.TempPathFactory) -> KernelLibrary:
    """The CUDA kernels, compiled for a CPU that plays a GPU."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++ to run the kernels on the CPU")
    target = tmp_path_factory.mktemp("kernels") / "libpaper.so"
    return KernelLibrary(compile_on_paper(target, "-shared", "-fPIC"))


@pytest.fixture(scope="session")
def small_fp32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The network of the quantization tests, exported in FP32; never write to it."""
    from small_calibration import NETWORK

    from mat_export.export import export_onnx

    path = tmp_path_factory.mktemp("fp32") / "model.onnx"
    export_onnx(random_checkpoint(NETWORK, 0), path)
    return path


@pytest.fixture(scope="session")
def small_calibration(
    small_fp32: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Calibration]:
    """That network quantized, and what was measured and decided."""
    from small_calibration import OPTIONS

    from calib.calibrate import calibrate

    path = tmp_path_factory.mktemp("int8") / "model-int8.onnx"
    return path, calibrate(small_fp32, path, OPTIONS)
