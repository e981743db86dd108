"""The smallest network, shared by tests of what does not depend on sizes."""

from __future__ import annotations

from mat_torch.config import GeneratorConfig

__all__ = ["SMALL"]

SMALL = GeneratorConfig(
    "test-128",
    128,
    latent_dim=4,
    token_dim=4,
    heads=2,
    depths=(2, 1, 1, 1, 1),
    base_channels=256,
    max_channels=4,
    mapping_layers=1,
)
"""Some 230 tensors in half a megabyte; it runs in a few milliseconds."""
