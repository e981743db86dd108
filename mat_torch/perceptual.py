"""Comparing pictures by deep features: a loss to train with, and distances to measure by.

The networks are in `mat_torch.features`. All here is differentiable.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mat_torch.features import (
    EfficientNetLite0Features,
    FeatureError,
    MapFeatures,
    VGG19Features,
)
from mat_torch.layers import full_precision

__all__ = [
    "PERCEPTUAL_WEIGHTS",
    "PerceptualLoss",
    "pairwise_perceptual",
    "perceptual_distance",
]

PERCEPTUAL_WEIGHTS: dict[str, dict[str, float]] = {
    VGG19Features.name: {"conv4_4": 1 / 4, "conv5_4": 1 / 2},
    # Strides 4, 8 and 16. Each map differs by about 7 between unrelated photographs, at 256 and at
    # 512 pixels a side, so this loss is about 1 there, each layer a third of it.
    EfficientNetLite0Features.name: {"stage2": 0.05, "stage3": 0.05, "stage5": 0.05},
}
"""Layer → weight of its L1, by the name of the network; VGG-19's are the published ones."""


class PerceptualLoss(nn.Module):
    """Perceptual loss: ``Σ_l λ_l · (mean|φ_l(x̂) − φ_l(x)| + γ · mean|G_l(x̂) − G_l(x)|/rms)``.

    The published one has VGG-19's conv4_4 × ¼ and conv5_4 × ½, before their ReLU, no G, and counts
    0.1 times in the generator's loss; that factor is the trainer's. G are Gram matrices: how strong
    each pair of channels is together, wherever (Gatys et al. 2016; Liu et al. 2018, equation 4).
    They ask for texture where the first term, place by place, is content with a blur. With
    ``rms = √mean φ_l(x)²`` both terms grow alike with the maps.

    An instance moves with ``.to(device)``, and learns nothing: leave it out of checkpoints.

    Args:
        backbone: Whose feature maps φ; its `name` is this loss's `name`.
        weights: Layer → λ. None: the preset of the backbone in `PERCEPTUAL_WEIGHTS`.
        gram_weight: γ; 0, as published: without Gram matrices.

    Attributes:
        name: The network that gives the maps, for reports.
        weights: Layer → λ.
        gram_weight: γ.

    Raises:
        FeatureError: For unknown layers, or a backbone without a preset where one is needed.
    """

    def __init__(
        self,
        backbone: MapFeatures,
        weights: Mapping[str, float] | None = None,
        *,
        gram_weight: float = 0.0,
    ) -> None:
        super().__init__()
        if weights is None:
            weights = PERCEPTUAL_WEIGHTS.get(backbone.name)
        if weights is None:
            raise FeatureError(
                f"no layers are known for a perceptual loss of {backbone.name}; give weights, or "
                f"take one of {', '.join(PERCEPTUAL_WEIGHTS)}"
            )
        backbone.require_layers(list(weights))
        self.backbone = backbone
        self.name = backbone.name
        self.weights = dict(weights)
        self.gram_weight = gram_weight

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """The loss, a scalar.

        Args:
            output: x̂, [B, 3, H, W] in [-1, 1]; gradients flow into it.
            target: x, the same shape.

        Raises:
            FeatureError: If the shapes differ, or these are no pictures.
        """
        _require_same_shape(output, target)
        found = self.backbone.maps(output, list(self.weights))
        wanted = self.backbone.maps(target, list(self.weights))
        terms = []
        for layer, weight in self.weights.items():
            terms.append(weight * F.l1_loss(found[layer], wanted[layer]))
            if self.gram_weight:
                difference = F.l1_loss(_gram(found[layer]), _gram(wanted[layer]))
                size = wanted[layer].float().square().mean().sqrt()
                terms.append(weight * self.gram_weight * difference / size)
        return torch.stack(terms).sum()


def _gram(maps: Tensor) -> Tensor:
    """``mean_places φ·φᵀ``: [B, C, H, W] → float32 [B, C, C]."""
    with full_precision(maps):
        places = maps.float().flatten(2)
        return places @ places.mT / places.shape[2]


_DISTANCE_LAYERS = {
    VGG19Features.name: ("conv1_2", "conv2_2", "conv3_4", "conv4_4", "conv5_4"),
    EfficientNetLite0Features.name: ("stage1", "stage2", "stage3", "stage5", "stage7"),
}
"""One layer of each resolution: the last one that has it."""


def perceptual_distance(
    backbone: MapFeatures, a: Tensor, b: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Distance of pictures by deep features, unweighted: not LPIPS, which has learned weights.

    As Zhang et al. 2018, equation 1, with w = 1: at every place of a layer the channels are divided
    by their norm; the squared difference is summed over channels and averaged over places; and the
    layers (one of each resolution) are averaged.

    Args:
        backbone: Whose feature maps.
        a, b: [B, 3, H, W] in [-1, 1].
        mask: [B, 1, H, W], 1 keep and 0 hole, with a hole: places count by how much of the hole
            they cover. None: all alike.

    Returns:
        [B], 0 (the same features) to 4 (opposite ones).

    Raises:
        FeatureError: If the shapes differ, or these are no pictures.
    """
    _require_same_shape(a, b)
    return _distance(_unit_maps(backbone, a), _unit_maps(backbone, b), mask)


def pairwise_perceptual(
    backbone: MapFeatures, pictures: Sequence[Tensor], mask: Tensor | None = None
) -> Tensor:
    """Mean `perceptual_distance` over all pairs of S versions of each picture.

    Args:
        backbone: Whose feature maps, made once a version.
        pictures: S ≥ 2 versions, each [B, 3, H, W] in [-1, 1].
        mask: As `perceptual_distance`.

    Returns:
        [B], 0 (all versions have the same features) to 4.

    Raises:
        FeatureError: If there are no pairs, the shapes differ, or these are no pictures.
    """
    if len(pictures) < 2:
        raise FeatureError(f"pairs need two pictures or more, got {len(pictures)}")
    for other in pictures[1:]:
        _require_same_shape(pictures[0], other)
    maps = [_unit_maps(backbone, picture) for picture in pictures]
    pairs = [_distance(one, other, mask) for one, other in itertools.combinations(maps, 2)]
    return torch.stack(pairs).mean(dim=0)


def _unit_maps(backbone: MapFeatures, images: Tensor) -> list[Tensor]:
    """One map of each resolution, the channels at each place divided by their norm."""
    layers = _DISTANCE_LAYERS.get(backbone.name, backbone.layers)
    found = backbone.maps(images, layers)
    return [F.normalize(found[layer], dim=1) for layer in layers]


def _distance(a: Sequence[Tensor], b: Sequence[Tensor], mask: Tensor | None) -> Tensor:
    """[B]: the layers' squared differences, averaged over places and layers."""
    distances = []
    for one, other in zip(a, b, strict=True):
        places = (one - other).square().sum(dim=1)
        if mask is not None:
            height, width = places.shape[1:]
            share = F.adaptive_avg_pool2d(1.0 - mask, (height, width))[:, 0]
            places = places * share / share.mean(dim=(1, 2), keepdim=True)
        distances.append(places.mean(dim=(1, 2)))
    return torch.stack(distances).mean(dim=0)


def _require_same_shape(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape:
        raise FeatureError(
            f"two batches of pictures of one shape are needed, got {[*a.shape]} and {[*b.shape]}"
        )
