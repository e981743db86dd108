"""What a training step draws, as functions of (seed, purpose, sample number) alone.

Nothing here reads or moves the global generators, and no draw depends on the batch, the process or
what was drawn before. So a resumed run, and one spread over other processes, meets the same values.

A stream's seed is the first word of `sampling.words` at the run's seed and the name
``PURPOSE.NUMBER``; torch's own generators of the device draw from there, a call an image and kind.
Their bits differ between CPU and CUDA, unlike those of `sampling.draw`, which is for inference and
a hundred times slower than a training step can wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mat_torch.config import BOTTLENECK, GeneratorConfig
from mat_torch.sampling import words

__all__ = ["Draws", "draw_for_training", "stream"]


def stream(seed: int, name: str, device: torch.device) -> torch.Generator:
    """A generator of its own for (seed, name)."""
    # torch's own CPU generator uses 32 bits of it.
    start = int(words(seed, name, 1)[0]) & (2**63 - 1)
    return torch.Generator(device).manual_seed(start)


@dataclass(frozen=True)
class Draws:
    """The random inputs of a batch.

    Attributes:
        z: Two latents an image, [B, 2, latent_dim].
        cutoff: [B] int64: layers from this number on take the second latent.
        gate_tokens: 0/1, [B, h·w, token_dim].
        gate_bottleneck: 0/1, [B, C, h, w].
        noise: A fresh map for each of the config's noise inputs, [B, 1, r, r].
    """

    z: Tensor
    cutoff: Tensor
    gate_tokens: Tensor
    gate_bottleneck: Tensor
    noise: dict[str, Tensor]


def draw_for_training(
    config: GeneratorConfig,
    seed: int,
    purpose: str,
    numbers: Sequence[int],
    *,
    style_mixing: float,
    device: torch.device,
) -> Draws:
    """Latents, mixing cutoffs, gates and noise of these samples at the native size, float32.

    Args:
        config: The network.
        seed: The run's.
        purpose: What the images are for: each purpose has its own draws.
        numbers: The samples' numbers in the run.
        style_mixing: Probability of a cutoff before the last layer; it is uniform from 1 on.
        device: Where to draw.
    """
    side, channels = BOTTLENECK, config.channels(BOTTLENECK)
    tokens, pixels = side * side * config.token_dim, channels * side * side
    maps = config.noise_resolutions
    sizes = [2 * config.latent_dim, *(r * r for r in maps.values())]
    normals, coins, uniforms = [], [], []
    for number in numbers:
        source = stream(seed, f"{purpose}.{number}", device)
        normals.append(torch.randn(sum(sizes), generator=source, device=device))
        coins.append(torch.rand(tokens + pixels, generator=source, device=device) < 0.5)
        uniforms.append(torch.rand(2, generator=source, device=device))
    z, *noise = torch.split(torch.stack(normals), sizes, dim=1)
    gates = torch.stack(coins).float()
    return Draws(
        z=z.reshape(-1, 2, config.latent_dim),
        cutoff=_cutoffs(torch.stack(uniforms), config.num_ws, style_mixing),
        gate_tokens=gates[:, :tokens].reshape(-1, side * side, config.token_dim),
        gate_bottleneck=gates[:, tokens:].reshape(-1, channels, side, side),
        noise={
            name: values.reshape(-1, 1, r, r)
            for (name, r), values in zip(maps.items(), noise, strict=True)
        },
    )


def _cutoffs(uniforms: Tensor, layers: int, style_mixing: float) -> Tensor:
    """Uniform in 1 … layers − 1 with this probability, else `layers`: all take the first latent."""
    mixed = 1 + (uniforms[:, 1] * (layers - 1)).long().clamp(max=layers - 2)
    return torch.where(uniforms[:, 0] < style_mixing, mixed, layers)
