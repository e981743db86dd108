"""What several tests share: the small preset's untrained weights, and one export of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from mat_torch import Checkpoint, preset, random_checkpoint


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
