"""The MAT generator: stage one on tokens, stage two on pixels (paper, figure 2).

The module tree carries the names of the published checkpoints, so their state dicts load as they
are. What stands in for the parts that the paper's ablations leave out is in `mat_torch.ablations`.
"""

from __future__ import annotations

from collections.abc import Mapping as MappingType
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mat_torch.ablations import ConvBlock, LayerNormBlock, LinearHead, PatchExpand, PatchMerge
from mat_torch.attention import Block, mask_propagation
from mat_torch.config import BOTTLENECK, TOKEN_GRID, ConfigError, GeneratorConfig
from mat_torch.layers import (
    Conv,
    Linear,
    Mapping,
    PartialConv,
    StyleConv,
    ToRGB,
    mask_count,
    update_mask,
)

__all__ = ["Generator"]


class Resample(nn.Module):
    """A partial conv to half or twice the size, between two transformer stages."""

    def __init__(self, dim: int, *, up: int = 1, down: int = 1) -> None:
        super().__init__()
        self.conv = PartialConv(dim, dim, up=up, down=down)

    def forward(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        y: tuple[Tensor, Tensor | None] = self.conv(x, mask)
        return y


def _block(config: GeneratorConfig, stage: int, number: int) -> nn.Module:
    """Block `number` of a stage: tokens [B, H, W, C] and validity to the same."""
    if config.body == "convolution":
        return ConvBlock(config.token_dim)
    window = config.windows[stage]
    kind = Block if config.block == "mat" else LayerNormBlock
    return kind(
        config.token_dim,
        config.heads,
        window=window,
        shift=window // 2 if number % 2 else 0,
        grid=config.stage_grids[stage],
    )


class TokenStage(nn.Module):
    """Resample, blocks (odd ones shifted by half a window), partial conv, + the stage's own input.

    [B, C, H, W] → [B, C, H', W'], with the mask [B, 1, H, W] along if there is one.
    """

    def __init__(self, config: GeneratorConfig, index: int) -> None:
        super().__init__()
        dim, linear = config.token_dim, config.tokens == "linear"
        # The published name, though 3 and 4 go up.
        self.downsample: Resample | PatchMerge | PatchExpand | None = None
        if index in (1, 2):
            self.downsample = PatchMerge(dim) if linear else Resample(dim, down=2)
        elif index in (3, 4):
            self.downsample = PatchExpand(dim) if linear else Resample(dim, up=2)
        self.blocks = nn.ModuleList(_block(config, index, i) for i in range(config.depths[index]))
        self.conv = PartialConv(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.downsample is not None:
            x, mask = self.downsample(x, mask)
        # Blocks see tokens and a bool validity map.
        tokens = x.permute(0, 2, 3, 1)
        valid = None if mask is None else mask > 0.5
        for block in self.blocks:
            tokens, valid = block(tokens, valid)
        # Back to a feature map.
        mask = None if valid is None else valid.to(x.dtype)
        y, mask = self.conv(tokens.permute(0, 3, 1, 2), mask)
        return x + y, mask


class TokenDecoderLevel(nn.Module):
    """StyleConv up 2, + skip, StyleConv, ToRGB; none has noise."""

    def __init__(self, dim: int, style_dim: int) -> None:
        super().__init__()
        self.conv0 = StyleConv(dim, dim, style_dim, up=2)
        self.conv1 = StyleConv(dim, dim, style_dim)
        self.toRGB = ToRGB(dim, style_dim)

    def forward(
        self, x: Tensor, rgb: Tensor | None, style: Tensor, skip: Tensor
    ) -> tuple[Tensor, Tensor]:
        x = self.conv1(self.conv0(x, style) + skip, style)
        return x, self.toRGB(x, style, rgb)


class FirstStage(nn.Module):
    """The transformer body: image and mask to a coarse image (paper, sections 3.1 to 3.3)."""

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.token_dim
        levels = config.log2_resolution - TOKEN_GRID.bit_length() + 1
        if config.tokens == "linear":
            self.head = LinearHead(dim, levels)
        else:
            self.conv_first = PartialConv(4, dim)
            self.enc_conv = nn.ModuleList(PartialConv(dim, dim, down=2) for _ in range(levels))
        self.tran = nn.ModuleList(TokenStage(config, i) for i in range(5))
        if config.style == "full":
            self.down_conv = nn.Sequential(*(Conv(dim, dim, 3, down=2) for _ in range(4)))
            self.to_style = Linear(dim, 2 * dim, activation=True)
            self.ws_style = Linear(config.latent_dim, dim, activation=True)
            self.to_square = Linear(dim, BOTTLENECK**2, activation=True)
        self.dec_conv = nn.ModuleList(
            TokenDecoderLevel(dim, config.style_dim_tokens) for _ in range(levels)
        )

    def forward(self, image: Tensor, mask: Tensor, w: Tensor, gate: Tensor) -> Tensor:
        # Encoder: the feature maps before the token grid are skips of the decoder.
        maps, m = self._encode(torch.cat([mask - 0.5, image * mask], dim=1), mask)
        *skips, x = maps
        # Tokens, down to the bottleneck. The mask goes along through stages 0 and 1.
        x, m = skip_64, m = self.tran[0](x, m)
        x, m = skip_32, _ = self.tran[1](x, m)
        x, _ = self.tran[2](x, None)
        x, style = self._style(x, w, gate)
        # Tokens, back up.
        x = self.tran[3](x, None)[0] + skip_32
        x = self.tran[4](x, None)[0] + skip_64
        # Decoder to pixels.
        rgb = None
        for level, skip in zip(self.dec_conv, reversed(skips), strict=True):
            x, rgb = level(x, rgb, style, skip)
        assert rgb is not None, "a native size of 128 or more has at least one level"
        coarse: Tensor = rgb * (1.0 - mask) + image * mask
        return coarse

    def _encode(self, pixels: Tensor, mask: Tensor) -> tuple[list[Tensor], Tensor | None]:
        """Feature maps from the native size down to the tokens, and the mask of the tokens."""
        m: Tensor | None
        if self.config.tokens == "linear":
            maps, m = self.head(pixels, mask)
        else:
            x, m = self.conv_first(pixels, mask)
            maps = [x]
            for conv in self.enc_conv:
                x, m = conv(x, m)
                maps.append(x)
        return maps, m if self.config.attention == "masked" else None

    def _style(self, x: Tensor, w: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
        """v from w mixes into the tokens by a random gate, t from the mixture: tokens, [t, v]."""
        if self.config.style == "none":
            return x, w[:, :0]
        v = self.ws_style(w)
        x = _mix_tokens(x, self.to_square(v), gate)
        t = self.to_style(self.down_conv(x).mean(dim=(2, 3)))
        return x, torch.cat([t, v], dim=1)


def _mix_tokens(x: Tensor, square: Tensor, gate: Tensor) -> Tensor:
    """``x·g + a·(1 − g)``, ``a`` [B, 256] resized linearly to the tokens, for all channels."""
    _, _, h, w = x.shape
    a = square[:, None, :]
    if h * w != BOTTLENECK**2:
        a = F.interpolate(a, size=h * w, mode="linear", align_corners=False)
    g = torch.unflatten(gate.transpose(1, 2), 2, (h, w))
    return x * g + torch.unflatten(a, 2, (h, w)) * (1.0 - g)


class EncoderLevel(nn.Module):
    """Conv (1×1 at the native size, else 3×3 down 2), Conv 3×3."""

    def __init__(self, in_channels: int, out_channels: int, *, first: bool) -> None:
        super().__init__()
        self.conv0 = (
            Conv(in_channels, out_channels, 1)
            if first
            else Conv(in_channels, out_channels, 3, down=2)
        )
        self.conv1 = Conv(out_channels, out_channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv1(self.conv0(x))
        return y


class PooledStyle(nn.Module):
    """Three Convs down 2, global average, Linear: [B, C, h, w] → [B, 2·C]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(*(Conv(channels, channels, 3, down=2) for _ in range(3)))
        self.fc = Linear(channels, 2 * channels, activation=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(self.conv(x).mean(dim=(2, 3)))
        return y


class BottleneckLevel(nn.Module):
    """Conv 3×3 + skip, StyleConv, ToRGB on the smallest grid."""

    def __init__(self, channels: int, style_dim: int) -> None:
        super().__init__()
        self.conv0 = Conv(channels, channels, 3)
        self.conv1 = StyleConv(channels, channels, style_dim, noise_resolution=BOTTLENECK)
        self.toRGB = ToRGB(channels, style_dim)

    def forward(
        self, e16: Tensor, styles: Sequence[Tensor], noise: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        x = self.conv1(self.conv0(e16) + e16, styles[0], noise)
        return x, self.toRGB(x, styles[1], None)


class DecoderLevel(nn.Module):
    """StyleConv up 2, + skip, StyleConv, ToRGB; both StyleConvs have noise."""

    def __init__(self, in_channels: int, out_channels: int, style_dim: int, resolution: int):
        super().__init__()
        self.conv0 = StyleConv(
            in_channels, out_channels, style_dim, up=2, noise_resolution=resolution
        )
        self.conv1 = StyleConv(out_channels, out_channels, style_dim, noise_resolution=resolution)
        self.toRGB = ToRGB(out_channels, style_dim)

    def forward(
        self,
        x: Tensor,
        rgb: Tensor,
        styles: Sequence[Tensor],
        skip: Tensor,
        noise: Sequence[Tensor | None],
    ) -> tuple[Tensor, Tensor]:
        x = self.conv0(x, styles[0], noise[0]) + skip
        x = self.conv1(x, styles[1], noise[1])
        return x, self.toRGB(x, styles[2], rgb)


class Synthesis(nn.Module):
    """Both stages: image, mask and per-layer w to the filled image (paper, figure 2)."""

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.channels
        self.first_stage = FirstStage(config)
        self.enc = nn.ModuleDict()
        previous = 7
        for i, r in enumerate(config.encoder_resolutions):
            self.enc[f"EncConv_Block_{r}x{r}"] = EncoderLevel(previous, channels(r), first=i == 0)
            previous = channels(r)
        if config.style == "full":
            self.to_square = Linear(config.latent_dim, BOTTLENECK**2, activation=True)
            self.to_style = PooledStyle(previous)
        style_dim = config.style_dim_pixels
        self.dec = nn.ModuleDict(
            {f"Dec_{BOTTLENECK}x{BOTTLENECK}": BottleneckLevel(previous, style_dim)}
        )
        for r in reversed(config.encoder_resolutions[:-1]):
            self.dec[f"Dec_{r}x{r}"] = DecoderLevel(previous, channels(r), style_dim, r)
            previous = channels(r)

    def forward(
        self,
        image: Tensor,
        mask: Tensor,
        ws: Tensor,
        gate_tokens: Tensor,
        gate_bottleneck: Tensor,
        noise: MappingType[str, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(output, coarse); shapes as in Generator.forward, ws [B, num_ws, latent_dim]."""
        config = self.config
        w = ws.unbind(dim=1)
        # Stage one.
        coarse = self.first_stage(image, mask, w[-1], gate_tokens)
        # Encoder.
        x = torch.cat([mask - 0.5, coarse * (1.0 - mask) + image * mask, image * mask], dim=1)
        skips: dict[int, Tensor] = {}
        for r in config.encoder_resolutions:
            x = skips[r] = self.enc[f"EncConv_Block_{r}x{r}"](x)
        e16, style = self._styles(x, w, gate_bottleneck)
        # Decoder.
        noise = noise or {}
        level = self.dec[f"Dec_{BOTTLENECK}x{BOTTLENECK}"]
        x, rgb = level(e16, style[:2], noise.get("noise_16"))
        for n, r in enumerate(reversed(config.encoder_resolutions[:-1]), start=5):
            level = self.dec[f"Dec_{r}x{r}"]
            maps = noise.get(f"noise_{r}_0"), noise.get(f"noise_{r}_1")
            x, rgb = level(x, rgb, style[2 * n - 9 : 2 * n - 6], skips[r], maps)
        return rgb * (1.0 - mask) + image * mask, coarse

    def _styles(
        self, x: Tensor, w: Sequence[Tensor], gate: Tensor
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """w mixes into the bottleneck by a random gate, t from the mixture: it, [w_i, t]."""
        if self.config.style == "none":
            return x, [w_i[:, :0] for w_i in w]
        a = self.to_square(w[0]).view(-1, 1, BOTTLENECK, BOTTLENECK)
        if x.shape[-2:] != a.shape[-2:]:
            a = F.interpolate(a, size=x.shape[-2:], mode="bilinear", align_corners=False)
        e16 = x * gate + a * (1.0 - gate)
        t = self.to_style(e16)
        return e16, [torch.cat([w_i, t], dim=1) for w_i in w]


class Generator(nn.Module):
    """MAT. Every random quantity is an argument, so the network is a pure function.

    Args:
        config: Its sizes and choices (``mat_torch.PRESETS`` has the published ones). Without
            styles it takes the same arguments: z, truncation and gates then change nothing.
    """

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.config = config
        self.synthesis = Synthesis(config)
        # Without styles nothing reads w: the mapping has no layers and hands on z, normalised.
        layers = config.mapping_layers if config.style == "full" else 0
        self.mapping = Mapping(config.latent_dim, layers)

    def forward(
        self,
        image: Tensor,
        mask: Tensor,
        z: Tensor,
        truncation: Tensor | float,
        gate_tokens: Tensor,
        gate_bottleneck: Tensor,
        noise: MappingType[str, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Fill the hole.

        Args:
            image: [B, 3, H, W] in [-1, 1], H and W multiples of the native size; what lies under
                the hole does not matter.
            mask: [B, 1, H, W], 1 keep and 0 hole.
            z: Latent [B, latent_dim], standard normal.
            truncation: ψ, a number or a tensor [1]: 1 draws freely, 0 gives the mean style.
            gate_tokens: 0/1 gate [B, h·w, token_dim] on the smallest token grid.
            gate_bottleneck: 0/1 gate [B, C, h, w] on stage two's smallest grid.
            noise: Maps [B or 1, 1, r, r] by the names of ``config.noise_resolutions``; those that
                are absent are the checkpoint's constants (native size only).

        Returns:
            (output, coarse), each [B, 3, H, W]; kept pixels are the image's own.

        Raises:
            ConfigError: If H or W is no multiple of the native size.
            ValueError: If noise is missing off the native size.
        """
        height, width = image.shape[-2:]
        self.config.check_size(height, width)
        missing = [name for name in self.config.noise_resolutions if name not in (noise or {})]
        if missing and (height, width) != (self.config.resolution, self.config.resolution):
            raise ValueError(
                f"the noise constants fit {self.config.resolution}x{self.config.resolution} only; "
                f"at {height}x{width} pass noise (missing: {', '.join(missing)})"
            )
        w = self.mapping(z, truncation)
        ws = w[:, None, :].expand(-1, self.config.num_ws, -1)
        output: tuple[Tensor, Tensor] = self.synthesis(
            image, mask, ws, gate_tokens, gate_bottleneck, noise
        )
        return output

    @torch.no_grad()
    def mask_states(self, mask: Tensor) -> dict[str, Tensor]:
        """Every mask of stage one, by the layer that made it, as 0/1 maps [B, 1, h, w].

        Names: ``conv_first``, ``enc_conv.i``, ``tran.i.downsample``, ``tran.i.blocks.j``,
        ``tran.i.conv``.

        Raises:
            ConfigError: For an ablation: its masks take other ways.
        """
        if self.config.ablations:
            raise ConfigError(
                f"mask states are those of the published network, and this one has "
                f"{self.config.describe_ablations()}"
            )
        states: dict[str, Tensor] = {}

        def partial(name: str, mask: Tensor, stride: int = 1) -> Tensor:
            states[name] = update_mask(mask_count(mask, stride))
            return states[name]

        stage = self.synthesis.first_stage
        mask = partial("conv_first", mask)
        for i in range(len(stage.enc_conv)):
            mask = partial(f"enc_conv.{i}", mask, 2)
        for i in (0, 1):
            if i == 1:
                mask = partial("tran.1.downsample", mask, 2)
            for j, module in enumerate(cast(TokenStage, stage.tran[i]).blocks):
                block = cast(Block, module)
                valid = mask_propagation(mask > 0.5, window=block.window, shift=block.shift)
                mask = states[f"tran.{i}.blocks.{j}"] = valid.to(mask.dtype)
            mask = partial(f"tran.{i}.conv", mask)
        return states
