"""The MAT reference model: configuration, randomness, network and checkpoints.

`config` and `sampling` need NumPy alone; the rest needs torch and is imported on first use, so that
exported models run where torch is not installed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mat_torch.config import PRESETS, ConfigError, GeneratorConfig, preset
from mat_torch.sampling import draw

if TYPE_CHECKING:
    from mat_torch.checkpoint import (
        Checkpoint,
        CheckpointError,
        load_checkpoint,
        random_checkpoint,
        save_checkpoint,
    )
    from mat_torch.generator import Generator

__all__ = [
    "PRESETS",
    "Checkpoint",
    "CheckpointError",
    "ConfigError",
    "Generator",
    "GeneratorConfig",
    "draw",
    "load_checkpoint",
    "preset",
    "random_checkpoint",
    "save_checkpoint",
]

_LAZY = {
    "Generator": "mat_torch.generator",
    "Checkpoint": "mat_torch.checkpoint",
    "CheckpointError": "mat_torch.checkpoint",
    "load_checkpoint": "mat_torch.checkpoint",
    "random_checkpoint": "mat_torch.checkpoint",
    "save_checkpoint": "mat_torch.checkpoint",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
