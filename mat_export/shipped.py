"""The model that ships with this package, which every command takes where none is named."""

from __future__ import annotations

from pathlib import Path

from mat_export.console import note
from mat_export.files import cache_folder

__all__ = ["PRESET", "SHIPPED", "shipped_model"]

PRESET = "mat-tiny-256"
"""Its network, and the one of ``--random-weights`` without a preset."""

SHIPPED = Path(__file__).parent / "data" / f"{PRESET}.safetensors"
"""Its weights: safetensors, float16, the configuration in the metadata."""


def shipped_model() -> Path:
    """Where its weights are.

    While they are still in training, a file of untrained ones in the user's cache folder stands in
    for them, and a note says so.
    """
    if SHIPPED.is_file():
        return SHIPPED
    note(f"the weights of {PRESET} are untrained in this version: pictures will be noise")
    return _stand_in()


def _stand_in() -> Path:
    """Untrained weights of seed 0, written once."""
    from mat_torch.checkpoint import random_checkpoint, save_checkpoint
    from mat_torch.config import preset

    path = cache_folder() / "untrained" / SHIPPED.name
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        save_checkpoint(random_checkpoint(preset(PRESET), 0), path, dtype="float16")
    return path
