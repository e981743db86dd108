"""What MAT is trained with: adversarial and perceptual losses, and R1 (paper, section 3.5).

The reconstruction loss is ours, for short runs; the published recipe does without it.

Each function is headed by its equation. All of them average over the images of a batch, so the mean
of the losses of equal parts of a batch is that of the whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "Critic",
    "Perceptual",
    "fake_loss",
    "generator_loss",
    "gradient_penalty",
    "lazy_r1_weight",
    "real_loss",
    "reconstruction_loss",
]

Perceptual: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Distance of outputs from photographs, both [B, 3, H, W] in [-1, 1], as one number, the mean over
the batch; differentiable in the first."""

Critic: TypeAlias = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(image, coarse, mask) → the logits of both heads, as `Discriminator` gives them."""


def generator_loss(logits: Tensor, logits_coarse: Tensor) -> Tensor:
    """``E[softplus(−D(x̂))] + E[softplus(−D_coarse(x̂_coarse))]``, the non-saturating loss.

    Args:
        logits: Of the outputs, [B, 1] (Goodfellow et al. 2014, section 3; paper, equation 8).
        logits_coarse: Of the coarse images, [B, 1].
    """
    return F.softplus(-logits).mean() + F.softplus(-logits_coarse).mean()


def fake_loss(logits: Tensor, logits_coarse: Tensor) -> Tensor:
    """``E[softplus(D(x̂))] + E[softplus(D_coarse(x̂_coarse))]``: the discriminator's, on fakes."""
    return F.softplus(logits).mean() + F.softplus(logits_coarse).mean()


def real_loss(logits: Tensor, logits_coarse: Tensor) -> Tensor:
    """``E[softplus(−D(x))] + E[softplus(−D_coarse(x))]``: the discriminator's, on photographs."""
    return generator_loss(logits, logits_coarse)  # one formula: whoever wants high logits


def reconstruction_loss(output: Tensor, coarse: Tensor, image: Tensor) -> Tensor:
    """``E|x̂ − x| + E|x̂_coarse − x|``, over all pixels and channels; kept pixels add nothing.

    Args:
        output: [B, 3, r, r] in [-1, 1].
        coarse: Of stage one, likewise.
        image: The photographs.
    """
    return F.l1_loss(output, image) + F.l1_loss(coarse, image)


def gradient_penalty(critic: Critic, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """``‖∂D(x)/∂x‖²`` and ``‖∂D_coarse(x)/∂x‖²`` of each photograph (Mescheder et al. 2018).

    R1 without its factor γ/2 (see `lazy_r1_weight`). Differentiable in the critic's parameters by a
    second backward pass, so call it outside autocast, and with the eager network.

    Args:
        critic: The discriminator.
        image: Photographs [B, 3, r, r] in [-1, 1].
        mask: [B, 1, r, r].

    Returns:
        [B] each.
    """
    image, coarse = image.detach().requires_grad_(), image.detach().clone().requires_grad_()
    logits, logits_coarse = critic(image, coarse, mask)
    # Neither head sees the other's image, so the gradient of the sum is both gradients.
    gradients = torch.autograd.grad(
        logits.sum() + logits_coarse.sum(), (image, coarse), create_graph=True
    )
    penalty, penalty_coarse = (g.square().sum(dim=(1, 2, 3)) for g in gradients)
    return penalty, penalty_coarse


def lazy_r1_weight(gamma: float, interval: int) -> float:
    """``γ/2 · interval``: R1's weight in the steps that have it, one of `interval`.

    Over `interval` steps the discriminator follows γ/2 of it a step on average (Karras et al.
    2020, appendix B). The penalty joins the gradient of that step's main loss instead of having a
    step of its own: with β₁ = 0 Adam's update is linear in the gradient, given its second moments,
    so the two come to the same, and the learning rate and β₂ need no correction for extra steps.
    """
    return gamma / 2.0 * interval
