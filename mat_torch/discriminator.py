"""The MAT discriminator: one network on the output, one of half its width on the coarse image.

Like the generator's, the module tree carries the names of the published checkpoints.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from mat_torch.config import GeneratorConfig
from mat_torch.layers import Conv, Linear, full_precision

__all__ = ["GROUP", "Discriminator", "minibatch_deviation"]

GROUP = 4
"""Images a group of the minibatch standard deviation (Karras et al. 2018, section 3)."""

_DEVIATION_EPS = 1e-8
_EPILOGUE = 4  # side of the last grid


def minibatch_deviation(x: Tensor, group: int = GROUP) -> Tensor:
    """``mean_{c,h,w} √(var_group(x) + 1e-8)`` as one more channel, in x's type.

    Image i of B is in a group with i + B/4, i + B/2 and i + 3B/4. So a batch that is dealt to n
    parts in turn (images i, i + n, i + 2n, … to part i), processes or micro-batches, falls into the
    same groups as the whole, if each part is a multiple of four. A batch of fewer is one group.

    Args:
        x: [B, C, H, W], B at most `group` or a multiple of it.
        group: Images in a group.

    Returns:
        [B, C + 1, H, W].

    Raises:
        ValueError: If the batch does not divide into groups.
    """
    batch, channels, height, width = x.shape
    size = min(group, batch)
    if batch % size:
        raise ValueError(
            f"the discriminator compares images in groups of {group}: "
            f"a batch is at most {group} or a multiple of it, got {batch}"
        )
    groups = x.float().reshape(size, batch // size, channels, height, width)
    deviation = (groups.var(dim=0, correction=0) + _DEVIATION_EPS).sqrt().mean(dim=(1, 2, 3))
    plane = deviation.repeat(size)[:, None, None, None].expand(-1, 1, height, width)
    return torch.cat([x, plane.to(x.dtype)], dim=1)


class FromImage(nn.Module):
    """Conv 1×1 of ``[mask − 0.5, image]``: [B, 4, H, W] → [B, C, H, W]."""

    def __init__(self, out_channels: int) -> None:
        super().__init__()
        self.conv = Conv(4, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return y


class ResidualLevel(nn.Module):
    """``√½·skip(x) + √½·conv1(conv0(x))`` at half the size (Karras et al. 2020, figure 7c)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        gain = 0.5**0.5
        self.conv0 = Conv(in_channels, in_channels, 3)
        self.conv1 = Conv(in_channels, out_channels, 3, down=2, gain=gain)
        self.skip = Conv(
            in_channels, out_channels, 1, down=2, bias=False, activation=False, gain=gain
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.skip(x) + self.conv1(self.conv0(x))
        return y


class MinibatchDeviation(nn.Module):
    """The batch's deviation as a channel: [B, C, H, W] → [B, C + 1, H, W], in groups of four."""

    def forward(self, x: Tensor) -> Tensor:
        return minibatch_deviation(x)


def _trunk(config: GeneratorConfig, divisor: int) -> tuple[nn.Sequential, int]:
    """Everything from the image to 4×4, and the channels there. Widths are the generator's."""

    def channels(resolution: int) -> int:
        width = max(1, config.channels(resolution) // divisor)
        # Tensor cores take channels in eights (all published widths are such).
        return width if width < 16 else -(-width // 8) * 8

    layers: list[nn.Module] = [FromImage(channels(config.resolution))]
    for n in range(config.log2_resolution, 2, -1):
        layers.append(ResidualLevel(channels(2**n), channels(2 ** (n - 1))))
    last = channels(_EPILOGUE)
    layers += [MinibatchDeviation(), Conv(last + 1, last, 3)]
    return nn.Sequential(*layers), last


class Discriminator(nn.Module):
    """Two networks of one shape, which judge the output and the coarse image.

    Args:
        config: Sizes of the generator that it judges; the network of the coarse image has half
            the channels.
    """

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.config = config
        # On the output.
        self.Dis, width = _trunk(config, 1)
        self.fc0 = Linear(width * _EPILOGUE**2, width, activation=True)
        self.fc1 = Linear(width, 1)
        # On the coarse image, at half the width.
        self.Dis_stg1, width = _trunk(config, 2)
        self.fc0_stg1 = Linear(width * _EPILOGUE**2, width, activation=True)
        self.fc1_stg1 = Linear(width, 1)

    def forward(self, image: Tensor, coarse: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """How real the images look: logits, above zero for real.

        Args:
            image: Outputs, or photographs, [B, 3, r, r] in [-1, 1] at the native size.
            coarse: Coarse images, or the same photographs, likewise.
            mask: [B, 1, r, r], 1 keep and 0 hole.

        Returns:
            The logits [B, 1] of the image and of the coarse image, float32.

        Raises:
            ValueError: If the images have another size, or more than four are no multiple of four.
        """
        side = self.config.resolution
        if image.shape[-2:] != (side, side):
            raise ValueError(
                f"the discriminator of {self.config.name} takes {side}x{side} pixels, "
                f"got {image.shape[-2]}x{image.shape[-1]}"
            )
        return (
            _logits(self.Dis, self.fc0, self.fc1, image, mask),
            _logits(self.Dis_stg1, self.fc0_stg1, self.fc1_stg1, coarse, mask),
        )


def _logits(trunk: nn.Sequential, fc0: Linear, fc1: Linear, image: Tensor, mask: Tensor) -> Tensor:
    """The network of one head, [B, 1]."""
    # From pixels to 4×4, in the precision that autocast gives.
    x = torch.cat([mask - 0.5, image], dim=1)
    for level in list(trunk)[:-2]:
        x = level(x)
    # From there to the logit: little work, and in FP32.
    with full_precision(x):
        x = trunk[-1](trunk[-2](x.float()))
        return cast(Tensor, fc1(fc0(x.flatten(1))))
