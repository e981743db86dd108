"""The model that ships with this package, which every command takes where none is named."""

from __future__ import annotations

from pathlib import Path

from mat_export.contract import UserError

__all__ = ["PRESET", "SHIPPED", "shipped_model"]

PRESET = "mat-tiny-256"
"""Its network, and the one of ``--random-weights`` without a preset."""

SHIPPED = Path(__file__).parent / "data" / f"{PRESET}.safetensors"
"""Its weights: safetensors, float16, the configuration in the metadata."""


def shipped_model() -> Path:
    """Where its weights are.

    Raises:
        UserError: If they are missing from the installation.
    """
    if not SHIPPED.is_file():
        raise UserError(
            f"the weights of {PRESET} are missing from this installation ('{SHIPPED}'): install "
            "mat-export again, or name a model"
        )
    return SHIPPED
