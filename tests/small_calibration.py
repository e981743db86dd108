"""A network that calibrates in seconds, shared by the tests of quantization."""

from __future__ import annotations

from dataclasses import replace

from small import SMALL

from calib.calibrate import CalibrationOptions

__all__ = ["NETWORK", "OPTIONS"]

NETWORK = replace(
    SMALL,
    name="calib-128",
    latent_dim=16,
    token_dim=16,
    base_channels=2048,
    max_channels=32,
)
"""Wide enough that a channel is not the whole layer."""

OPTIONS = CalibrationOptions(samples=6, checks=6, target_db=41.0, threads=1)
"""The fewest samples; the target lies above what all layers together reach."""
