"""The inference form: the generator rewritten for export, every rewrite exact and named.

The training form is written to be read against the paper; this one to be run. Each class here
replaces one layer, names the rewrites it stands for, and can be tested alone against that layer.
Between the two lie no approximations: in real arithmetic they are the same function, and in FP32
they differ by rounding only.

The form is also safe in half precision by construction: no quotient has a vanishing denominator,
styles are divided by their own maximum before they touch activations (demodulation cancels it), and
what is selected by a mask or gate is selected, never multiplied by 0.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mat_export import ops
from mat_export.contract import GraphSpec, require_exportable
from mat_export.pixels import KEEP_THRESHOLD
from mat_torch import generator as reference
from mat_torch import layers
from mat_torch.attention import Block
from mat_torch.config import BOTTLENECK, LRELU_SLOPE

__all__ = ["REWRITES", "InferenceGenerator", "rewrite_counts"]

REWRITES: dict[str, str] = {
    "fold-gains": "equalized learning rates and the √2 of lrelu are folded into weights and biases",
    "align-channels": "feature maps of stage one beside the tokens are filled up with channels of "
    "zeros to a multiple of 32, which kernels are made for",
    "modulate-activations": "styles scale activations and demodulation scales outputs, so that "
    "weights are constants",
    "bound-styles": "each style is divided by its largest magnitude, which demodulation cancels",
    "bound-weights": "a demodulated layer's weights are divided by their norm, which demodulation "
    "cancels",
    "batch-styles": "all styles of a stage come from one matrix product: without style mixing "
    "every layer has the same w",
    "subpixel-upsampling": "a convolution to twice the size is four small ones, one a phase, "
    "interleaved and filtered: no zeros, no transposed convolution",
    "image-upsampling": "an image is upsampled by one 3×3 convolution and depth-to-space",
    "constant-filter": "resampling filters are constants",
    "count-ratio": "a partial convolution's ratio comes from the mask's count, without 1e-8",
    "merge-query-key": "queries and keys are one matrix product, 1/√d folded into it",
    "fold-projection": "attention's output projection and the value's bias are folded into the "
    "fuse layer",
    "constant-noise": "noise strengths are folded into the noise maps",
    "select-gate": "a 0/1 gate selects instead of multiplying",
    "select-composite": "the mask selects between image and filling, bit-exact where kept",
    "composite-once": "the coarse image already holds the kept pixels when stage two reads it",
}
"""Every rewrite by name, with what it does, in the order of the export's log."""

_SQRT2 = layers.LRELU_GAIN

_M = TypeVar("_M", bound=nn.Module)


def rewrite_counts(model: nn.Module) -> dict[str, int]:
    """In how many places each rewrite was applied, by name, in the order of REWRITES."""
    found = Counter(name for m in model.modules() for name in getattr(m, "rewrites", ()))
    return {name: found[name] for name in REWRITES if found[name]}


def _constant(value: Tensor) -> Tensor:
    return value.detach().clone().contiguous()


def _as(kind: type[_M], module: object) -> _M:
    """A submodule by its type, which containers of modules forget."""
    if not isinstance(module, kind):
        raise TypeError(f"a {kind.__name__} is needed here, got a {type(module).__name__}")
    return module


def _all_as(kind: type[_M], modules: Iterable[object]) -> list[_M]:
    """The members of a container of modules by their type."""
    return [_as(kind, module) for module in modules]


# -- gains --------------------------------------------------------------------------------------


class Linear(nn.Module):
    """``leaky_relu(x·Wᵀ + b)`` with every gain inside W and b. [..., in] → [..., out].

    Args:
        weight: [out, in], gains folded.
        bias: [out].
        activation: Whether lrelu follows (its √2 folded too).
    """

    rewrites: ClassVar = ("fold-gains",)
    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor, *, activation: bool = False) -> None:
        super().__init__()
        gain = _SQRT2 if activation else 1.0  # lrelu is positively homogeneous
        self.register_buffer("weight", _constant(weight * gain))
        self.register_buffer("bias", _constant(bias * gain))
        self.activation = activation

    @classmethod
    def of(cls, layer: layers.Linear) -> Linear:
        """The inference form of a training layer."""
        weight = layer.weight * layer.weight_gain
        return cls(weight, layer.bias * layer.bias_gain, activation=layer.activation)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        return F.leaky_relu(y, LRELU_SLOPE) if self.activation else y


class Blur(nn.Module):
    """The resampling filter over each of `channels` channels, its weights a constant."""

    rewrites: ClassVar = ("constant-filter",)
    weight: Tensor

    def __init__(self, channels: int, padding: tuple[int, int, int, int], gain: float) -> None:
        super().__init__()
        kernel = layers.fir_kernel(gain).expand(channels, 1, 4, 4)
        self.register_buffer("weight", _constant(kernel))
        self.channels, self.padding = channels, padding

    def forward(self, x: Tensor) -> Tensor:
        left, right, top, bottom = self.padding
        if left == right == top == bottom:
            return F.conv2d(x, self.weight, padding=left, groups=self.channels)
        return F.conv2d(F.pad(x, self.padding), self.weight, groups=self.channels)


class SubpixelConv(nn.Module):
    """The 3×3 convolution to twice the size without its zeros. [B, in, H, W] → [B, out, 2H, 2W].

    Where zeros lie between samples, an even output line sees the kernel's outer taps and an odd one
    its middle tap. So the four phases are convolutions of 2×2, 2×1, 1×2 and 1×1 over the samples
    themselves: nine taps in all, a quarter of the zero-stuffed work.

    Args:
        weight: [out, in, 3, 3], gains folded.
    """

    rewrites: ClassVar = ("subpixel-upsampling",)

    # Name, kernel rows and columns, and padding (left, right, top, bottom) of each phase: an even
    # line needs the sample before the first; every phase covers one line after the last.
    _PHASES: ClassVar = (
        ("even_even", slice(0, 3, 2), slice(0, 3, 2), (1, 1, 1, 1)),
        ("even_odd", slice(0, 3, 2), slice(1, 2), (0, 1, 1, 1)),
        ("odd_even", slice(1, 2), slice(0, 3, 2), (1, 1, 0, 1)),
        ("odd_odd", slice(1, 2), slice(1, 2), (0, 1, 0, 1)),
    )

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        for name, rows, columns, _ in self._PHASES:
            self.register_buffer(name, _constant(weight[:, :, rows, columns]))
        # The interleaved map starts where the image does and ends one line of zeros after it.
        self.blur = Blur(weight.shape[0], (1, 0, 1, 0), gain=4.0)

    def forward(self, x: Tensor) -> Tensor:
        phases = [
            F.conv2d(F.pad(x, padding), self.get_buffer(name))
            for name, _, _, padding in self._PHASES
        ]
        y: Tensor = self.blur(ops.depth_to_space(torch.cat(phases, dim=1)))
        return y


class ImageUpsample(nn.Module):
    """Twice the size of an image by the filter: one 3×3 convolution and depth-to-space.

    Even lines are ``(x[i−1] + 3·x[i])/4``, odd ones ``(3·x[i] + x[i+1])/4``, zeros outside.
    """

    rewrites: ClassVar = ("image-upsampling",)
    weight: Tensor
    bias: Tensor | None

    def __init__(self, channels: int = 3, bias: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("bias", None if bias is None else bias.repeat_interleave(4).detach())
        taps = torch.tensor([[1.0, 3.0, 0.0], [0.0, 3.0, 1.0]]) / 4.0
        phases = torch.einsum("ay,bx->abyx", taps, taps).reshape(4, 3, 3)
        weight = torch.zeros(channels, 4, channels, 3, 3)
        for c in range(channels):
            weight[c, :, c] = phases
        self.register_buffer("weight", weight.reshape(4 * channels, channels, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(F.conv2d(x, self.weight, self.bias, padding=1), 2)


class Conv(nn.Module):
    """A plain convolution at the same, half or twice the size, every gain folded.

    Args:
        layer: The training layer.
    """

    rewrites: ClassVar = ("fold-gains",)
    weight: Tensor
    bias: Tensor | None

    def __init__(self, layer: layers.Conv) -> None:
        super().__init__()
        gain = layer.gain * (_SQRT2 if layer.activation else 1.0)
        weight = layer.weight * (layer.weight_gain * gain)
        self.activation = layer.activation
        bias = None if layer.bias is None else layer.bias * gain
        self.subpixel: SubpixelConv | None = None
        self.blur: Blur | None = None
        self.stride = layer.down
        if layer.up == 2:
            self.subpixel = SubpixelConv(weight)
            bias = None if bias is None else bias[None, :, None, None]  # for a feature map
        else:
            self.register_buffer("weight", _constant(weight))
        self.register_buffer("bias", None if bias is None else _constant(bias))
        if layer.down == 2:
            if weight.shape[-1] != 3:
                raise NotImplementedError("the generator has no 1x1 convolution down")
            self.blur = Blur(weight.shape[1], (2, 2, 2, 2), gain=1.0)

    def forward(self, x: Tensor) -> Tensor:
        if self.subpixel is not None:
            y = self.subpixel(x)
            y = y if self.bias is None else y + self.bias
        elif self.blur is not None:
            y = F.conv2d(self.blur(x), self.weight, self.bias, stride=self.stride)
        else:
            y = F.conv2d(x, self.weight, self.bias, padding=self.weight.shape[-1] // 2)
        return F.leaky_relu(y, LRELU_SLOPE) if self.activation else y


class PartialConv(nn.Module):
    """A convolution times ``9/u``: ``u/9`` is a mean of 0/1 values, so no quotient can overflow."""

    rewrites: ClassVar = ("count-ratio",)

    def __init__(self, layer: layers.PartialConv) -> None:
        super().__init__()
        self.conv = Conv(layer.conv)
        self.stride = layer.conv.down

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        y = self.conv(x)
        if mask is None:
            return y, None
        mean = F.avg_pool2d(mask, 3, self.stride, padding=1)
        mask = F.max_pool2d(mask, 3, self.stride, padding=1)
        # The mean is 0 or at least 1/9, so half of that never changes a ratio.
        return y * (mask / mean.clamp(min=1.0 / 18.0)), mask


# -- tokens -------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Queries, keys and values, and the attention operator. [B, H, W, C] → [B, H, W, C].

    The output projection and the value's bias are the next layer's (`FusedBlock`).
    """

    rewrites: ClassVar = ("merge-query-key",)
    query_key_weight: Tensor
    query_key_bias: Tensor
    value_weight: Tensor

    def __init__(self, block: Block) -> None:
        super().__init__()
        attn = block.attn
        self.heads, self.window, self.shift = attn.heads, block.window, block.shift
        q, k = Linear.of(attn.q), Linear.of(attn.k)
        weight = torch.cat([q.weight * attn.scale, k.weight])
        self.register_buffer("query_key_weight", _constant(weight.T))
        self.register_buffer("query_key_bias", torch.cat([q.bias * attn.scale, k.bias]).detach())
        self.register_buffer("value_weight", _constant((attn.v.weight * attn.v.weight_gain).T))

    def forward(self, x: Tensor, valid: Tensor | None) -> Tensor:
        q, k, v = ops.query_key_value(
            x, self.query_key_weight, self.query_key_bias, self.value_weight
        )
        y: Tensor = ops.masked_window_attention(q, k, v, valid, self.window, self.shift, self.heads)
        return y


class FusedBlock(nn.Module):
    """A transformer block whose attention projection is inside the fuse layer.

    ``fuse([x, P·y + p])`` is ``F_x·x + (F_y·P)·y + (F_y·p + f)``. The value's bias b comes out of
    the attention as it went in, since every softmax row sums to 1, and so joins as ``F_y·P·b``.
    """

    rewrites: ClassVar = ("fold-projection", "fold-gains")
    fuse_weight: Tensor
    fuse_bias: Tensor
    fc1_weight: Tensor
    fc1_bias: Tensor
    fc2_weight: Tensor
    fc2_bias: Tensor

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.window, self.shift = block.window, block.shift
        self.attn = Attention(block)
        fuse, proj = block.fuse, Linear.of(block.attn.proj)
        value_bias = (block.attn.v.bias * block.attn.v.bias_gain).double()
        from_x, from_y = (fuse.weight * fuse.weight_gain).double().chunk(2, dim=1)
        projected = from_y @ proj.weight.double()
        bias = fuse.bias * fuse.bias_gain + from_y @ proj.bias.double() + projected @ value_bias
        steps = (
            Linear(torch.cat([from_x, projected], dim=1).float(), bias.float(), activation=True),
            Linear.of(block.mlp.fc1),
            Linear.of(block.mlp.fc2),
        )
        for name, step in zip(("fuse", "fc1", "fc2"), steps, strict=True):
            self.register_buffer(f"{name}_weight", _constant(step.weight.T))
            self.register_buffer(f"{name}_bias", _constant(step.bias))

    def forward(self, x: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor | None]:
        y = ops.fuse_mlp(
            x,
            self.attn(x, valid),
            self.fuse_weight,
            self.fuse_bias,
            self.fc1_weight,
            self.fc1_bias,
            self.fc2_weight,
            self.fc2_bias,
        )
        if valid is None:
            return y, None
        return y, ops.mask_propagation(valid, self.window, self.shift)


class TokenStage(nn.Module):
    """One transformer stage; see ``mat_torch.generator.TokenStage``."""

    def __init__(self, stage: reference.TokenStage) -> None:
        super().__init__()
        self.downsample = None
        if stage.downsample is not None:
            self.downsample = PartialConv(_as(reference.Resample, stage.downsample).conv)
        self.blocks = nn.ModuleList(FusedBlock(block) for block in _all_as(Block, stage.blocks))
        self.conv = PartialConv(stage.conv)

    def forward(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.downsample is not None:
            x, mask = self.downsample(x, mask)
        tokens = x.permute(0, 2, 3, 1)
        valid = None if mask is None else mask > 0.5
        for block in self.blocks:
            tokens, valid = block(tokens, valid)
        mask = None if valid is None else valid.to(x.dtype)
        y, mask = self.conv(tokens.permute(0, 3, 1, 2), mask)
        return x + y, mask


# -- styles -------------------------------------------------------------------------------------


def bounded_weight(conv: layers.ModulatedConv) -> tuple[Tensor, float]:
    """The weight of a demodulated layer divided by its norm, which demodulation cancels.

    Returns:
        [out, in, k, k], no output channel's norm above 1, and the norm: the largest of any output
        channel.
    """
    weight = conv.weight[0].detach() * conv.weight_gain
    norm = float(weight.flatten(1).norm(dim=1).max().clamp(min=torch.finfo(torch.float32).tiny))
    return weight / norm, norm


class StyleGroup(nn.Module):
    """Styles and demodulation factors of the layers of one input width (`ops.style_scales`).

    Args:
        convs: The layers, those with demodulation first.
    """

    weight: Tensor
    bias: Tensor
    energy: Tensor
    norm: Tensor

    def __init__(self, convs: Sequence[layers.ModulatedConv]) -> None:
        super().__init__()
        affine = [Linear.of(conv.affine) for conv in convs]
        self.register_buffer("weight", _constant(torch.cat([a.weight for a in affine]).T))
        self.register_buffer("bias", _constant(torch.cat([a.bias for a in affine])))
        width = convs[0].weight.shape[2]
        demodulated = [conv for conv in convs if conv.demodulate]
        outs = [conv.weight.shape[1] for conv in demodulated]
        # Σ_k w² per input and output channel, halved, which makes the factor √2 larger. Narrower
        # layers are filled up, so that one product serves all.
        energy = torch.zeros(max(len(outs), 1), width, max(outs, default=1))
        norms = torch.ones(energy.shape[0], 1)
        for i, conv in enumerate(demodulated):
            weight, norms[i] = bounded_weight(conv)
            energy[i, :, : outs[i]] = weight.double().square().sum((2, 3)).T / 2.0
        # A channel without weights is 0 times its factor: any finite one will do.
        energy += (energy.sum(dim=1, keepdim=True) == 0.0) / width
        self.register_buffer("energy", _constant(energy))
        self.register_buffer("norm", _constant(norms))
        self._width, self._outs = width, outs

    def forward(self, style: Tensor) -> list[tuple[Tensor, Tensor]]:
        """[B, D] → (scale, factor or magnitude) of each layer, in order."""
        scale, factor, magnitude = ops.style_scales(
            style, self.weight, self.bias, self.energy, self.norm
        )
        scales = torch.split(scale, self._width, dim=1)
        rows = torch.split(factor, self.energy.shape[2], dim=1)
        factors = [row[:, :out] for row, out in zip(rows, self._outs, strict=False)]
        magnitudes = torch.split(magnitude, 1, dim=1)[len(factors) :]
        return list(zip(scales, (*factors, *magnitudes), strict=True))


class StyleBank(nn.Module):
    """Every style and demodulation factor of a stage, from one style vector.

    For a layer with weights w, style s, ``m = max|s|`` and n the largest norm of an output channel:
    ``conv(x·s, w)·rsqrt(Σ w²s² + ε) = conv(x·s/m, w/n)·rsqrt(Σ (w/n)²(s/m)² + ε/(m·n)²)``.
    Layers of one width lie side by side, so that two products and one pass of arithmetic serve them
    all. These are a few thousand numbers an image and may stay in FP32.

    Args:
        convs: The modulated convolutions of the stage, all fed by the same style.
    """

    rewrites: ClassVar = ("batch-styles", "bound-styles", "bound-weights")

    def __init__(self, convs: Sequence[layers.ModulatedConv]) -> None:
        super().__init__()
        widths = [conv.weight.shape[2] for conv in convs]
        self._members = [
            sorted(
                (i for i, own in enumerate(widths) if own == width),
                key=lambda i: not convs[i].demodulate,
            )
            for width in sorted(set(widths), reverse=True)
        ]
        self.groups = nn.ModuleList(
            StyleGroup([convs[i] for i in members]) for members in self._members
        )

    def forward(self, style: Tensor) -> list[tuple[Tensor, Tensor]]:
        """[B, D] → (scale, factor) of each layer, in the order they were given.

        The scale is s/m [B, in, 1, 1]. The factor is what the result is multiplied by: for a
        demodulated layer [B, out, 1, 1] with lrelu's √2 in it, else m itself [B, 1, 1, 1].
        """
        results: dict[int, tuple[Tensor, Tensor]] = {}
        for members, group in zip(self._members, self.groups, strict=True):
            results.update(zip(members, group(style), strict=True))
        return [results[i] for i in range(len(results))]


class StyleConv(nn.Module):
    """``leaky_relu(conv(x·scale)·factor + noise + bias)`` with constant weights.

    The bias has four axes like a map: broadcast by a reshape, TensorRT 8.6 does not fuse its sum.

    Args:
        layer: The training layer.
        noise: ``const`` keeps its noise map, ``input`` takes one; ignored where it has none.
    """

    rewrites: ClassVar = ("modulate-activations", "fold-gains")
    weight: Tensor
    bias: Tensor

    def __init__(self, layer: layers.StyleConv, noise: str = "const") -> None:
        super().__init__()
        weight, _ = bounded_weight(layer.conv)
        self.subpixel: SubpixelConv | None = None
        if layer.conv.up == 2:
            self.subpixel = SubpixelConv(weight)
        else:
            self.register_buffer("weight", _constant(weight))
        self.register_buffer("bias", _constant(layer.bias[None, :, None, None] * _SQRT2))
        self.noise: ConstantNoise | InputNoise | None = None
        if layer.noise_strength is not None and layer.noise_const is not None:
            strength = layer.noise_strength * _SQRT2
            self.noise = (
                ConstantNoise(layer.noise_const * strength)
                if noise == "const"
                else InputNoise(strength)
            )

    def forward(
        self, x: Tensor, scale: Tensor, factor: Tensor, noise: Tensor | None = None
    ) -> Tensor:
        x = x * scale
        y = self.subpixel(x) if self.subpixel is not None else F.conv2d(x, self.weight, padding=1)
        y = y * factor
        if self.noise is not None:
            y = y + self.noise(noise)
        return F.leaky_relu(y + self.bias, LRELU_SLOPE)


class ConstantNoise(nn.Module):
    """A layer's own noise map, its strength inside."""

    rewrites: ClassVar = ("constant-noise",)
    map: Tensor

    def __init__(self, noise: Tensor) -> None:
        super().__init__()
        self.register_buffer("map", _constant(noise[None, None]))

    def forward(self, noise: Tensor | None) -> Tensor:
        return self.map


class InputNoise(nn.Module):
    """The caller's noise map times the layer's strength."""

    strength: Tensor

    def __init__(self, strength: Tensor) -> None:
        super().__init__()
        self.register_buffer("strength", _constant(strength))

    def forward(self, noise: Tensor | None) -> Tensor:
        if noise is None:
            raise ValueError("this model takes its noise as input")
        return noise * self.strength


class ToRGB(nn.Module):
    """``conv(x·scale)·magnitude + bias + upsampled previous RGB``."""

    rewrites: ClassVar = ("modulate-activations",)
    weight: Tensor
    bias: Tensor

    def __init__(self, layer: layers.ToRGB, *, first: bool) -> None:
        super().__init__()
        self.register_buffer("weight", _constant(layer.conv.weight[0] * layer.conv.weight_gain))
        self.upsample: ImageUpsample | None = None
        if first:
            self.register_buffer("bias", _constant(layer.bias[None, :, None, None]))
        else:
            self.upsample = ImageUpsample(bias=layer.bias)  # one addition less

    def forward(
        self, x: Tensor, scale: Tensor, magnitude: Tensor, previous: Tensor | None
    ) -> Tensor:
        rgb = F.conv2d(x * scale, self.weight) * magnitude
        return rgb + (self.bias if self.upsample is None else self.upsample(previous))


# -- the two stages -----------------------------------------------------------------------------


class GatedStyle(nn.Module):
    """``x·g + a·(1 − g)`` as a selection, ``a`` a square of 256 numbers resized to the grid.

    Args:
        layer: The Linear that makes the square.
        resize: How it meets another grid than 16×16: None (never), ``linear`` over the flattened
            tokens, or ``bilinear``.
    """

    rewrites: ClassVar = ("select-gate",)

    def __init__(self, layer: layers.Linear, resize: str | None) -> None:
        super().__init__()
        self.to_square = Linear.of(layer)
        self.resize = resize

    def forward(self, x: Tensor, style: Tensor, gate: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        a = self.to_square(style)
        if self.resize == "linear":
            # As an image of one line, which exports as one Resize.
            a = torch.unflatten(a, 1, (1, 1, -1))
            a = F.interpolate(a, size=(1, h * w), mode="bilinear", align_corners=False)
            a = a.reshape(-1, 1, h, w)
        else:
            a = torch.unflatten(a, 1, (1, BOTTLENECK, BOTTLENECK))
            if self.resize == "bilinear":
                a = F.interpolate(a, size=(h, w), mode="bilinear", align_corners=False)
        return torch.where(gate > 0.5, x, a)


class PooledStyle(nn.Module):
    """Convs down, global average, Linear: [B, C, h, w] → [B, D]."""

    def __init__(self, convs: nn.Module, fc: layers.Linear) -> None:
        super().__init__()
        self.conv = nn.Sequential(*(Conv(conv) for conv in _all_as(layers.Conv, convs.children())))
        self.fc = Linear.of(fc)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(self.conv(x).mean(dim=(2, 3)))
        return y


class DecoderLevel(nn.Module):
    """StyleConv up 2, + skip, StyleConv, ToRGB, in either stage."""

    def __init__(
        self,
        level: reference.TokenDecoderLevel | reference.DecoderLevel,
        *,
        first: bool,
        noise: str,
    ) -> None:
        super().__init__()
        self.conv0 = StyleConv(level.conv0, noise)
        self.conv1 = StyleConv(level.conv1, noise)
        self.toRGB = ToRGB(level.toRGB, first=first)

    def forward(
        self,
        x: Tensor,
        rgb: Tensor | None,
        skip: Tensor,
        styles: Sequence[tuple[Tensor, Tensor]],
        noise: Sequence[Tensor | None] = (None, None),
    ) -> tuple[Tensor, Tensor]:
        x = self.conv0(x, *styles[0], noise[0]) + skip
        x = self.conv1(x, *styles[1], noise[1])
        return x, self.toRGB(x, *styles[2], rgb)


CHANNEL_MULTIPLE = 32
"""What the channels of stage one's convolutional maps are filled up to."""


def align_channels(stage: reference.FirstStage) -> reference.FirstStage:
    """A copy of stage one with more channels in its encoder and decoder, all of them zero.

    The maps that meet tokens keep theirs. A new channel has no weights, no bias and no style, so it
    stays zero through every layer, and nothing reads it.
    """
    stage = copy.deepcopy(stage)
    dim = stage.conv_first.conv.weight.shape[0]
    wide = -(-dim // CHANNEL_MULTIPLE) * CHANNEL_MULTIPLE
    _widen(stage.conv_first.conv, 4, wide)
    encoder = [conv.conv for conv in _all_as(layers.PartialConv, stage.enc_conv)]
    for conv in encoder:
        _widen(conv, wide, dim if conv is encoder[-1] else wide)
    for i, level in enumerate(_all_as(reference.TokenDecoderLevel, stage.dec_conv)):
        for layer, inside in ((level.conv0, wide if i else dim), (level.conv1, wide)):
            _widen(layer.conv, inside, wide)
            layer.bias = _filled(layer.bias, wide)
        _widen(level.toRGB.conv, wide, 3)
    return stage


def _widen(conv: layers.Conv | layers.ModulatedConv, inside: int, out: int) -> None:
    """Give a layer more input and output channels; its gain stays what it was."""
    conv.weight = _filled(conv.weight, out, inside, *conv.weight.shape[-2:])
    if isinstance(conv, layers.ModulatedConv):
        affine = conv.affine
        affine.weight = _filled(affine.weight, inside, affine.weight.shape[1])
        affine.bias = _filled(affine.bias, inside)
    elif conv.bias is not None:
        conv.bias = _filled(conv.bias, out)


def _filled(values: Tensor, *sizes: int) -> nn.Parameter:
    """The values at the start of a tensor of zeros whose last axes have these sizes."""
    missing = [0] * (values.ndim - len(sizes)) + [
        size - own for size, own in zip(sizes, values.shape[-len(sizes) :], strict=True)
    ]
    padding = [n for axis in reversed(missing) for n in (0, axis)]
    return nn.Parameter(F.pad(values.detach(), padding), requires_grad=False)


class FirstStage(nn.Module):
    """Stage one; see ``mat_torch.generator.FirstStage``. Returns the RGB before compositing."""

    rewrites: ClassVar = ("align-channels",)

    def __init__(self, stage: reference.FirstStage, dynamic_size: bool) -> None:
        super().__init__()
        stage = align_channels(stage)
        self.conv_first = PartialConv(stage.conv_first)
        self.enc_conv = nn.ModuleList(
            PartialConv(conv) for conv in _all_as(layers.PartialConv, stage.enc_conv)
        )
        self.tran = nn.ModuleList(
            TokenStage(tran) for tran in _all_as(reference.TokenStage, stage.tran)
        )
        self.ws_style = Linear.of(stage.ws_style)
        self.mix = GatedStyle(stage.to_square, "linear" if dynamic_size else None)
        self.pool = PooledStyle(stage.down_conv, stage.to_style)
        levels = _all_as(reference.TokenDecoderLevel, stage.dec_conv)
        self.dec_conv = nn.ModuleList(
            DecoderLevel(level, first=i == 0, noise="const") for i, level in enumerate(levels)
        )
        self.styles = StyleBank(
            [
                conv
                for level in levels
                for conv in (level.conv0.conv, level.conv1.conv, level.toRGB.conv)
            ]
        )

    def forward(
        self, image: Tensor, centred: Tensor, mask: Tensor, w: Tensor, gate: Tensor
    ) -> Tensor:
        # Encoder.
        x, m = self.conv_first(torch.cat([centred, image], dim=1), mask)
        skips = [x]
        for conv in self.enc_conv:
            x, m = conv(x, m)
            skips.append(x)
        # Tokens, down.
        x, m = skip_64, m = self.tran[0](x, m)
        x, m = skip_32, _ = self.tran[1](x, m)
        x, _ = self.tran[2](x, None)
        # Style.
        v = self.ws_style(w)
        grid = x.shape[-2:]
        x = self.mix(x, v, torch.unflatten(gate.transpose(1, 2), 2, grid))
        styles = self.styles(torch.cat([self.pool(x), v], dim=1))
        # Tokens, up.
        x = self.tran[3](x, None)[0] + skip_32
        x = self.tran[4](x, None)[0] + skip_64
        # Decoder.
        rgb: Tensor | None = None
        for i, level in enumerate(self.dec_conv):
            x, rgb = level(x, rgb, skips[-2 - i], styles[3 * i : 3 * i + 3])
        assert rgb is not None, "a native size of 128 or more has at least one level"
        return rgb


class SecondStage(nn.Module):
    """Stage two; see ``mat_torch.generator.Synthesis``. Returns the RGB before compositing."""

    def __init__(self, synthesis: reference.Synthesis, dynamic_size: bool, noise: str) -> None:
        super().__init__()
        encoder = zip(
            synthesis.enc, _all_as(reference.EncoderLevel, synthesis.enc.values()), strict=True
        )
        self.enc = nn.ModuleDict(
            {name: nn.Sequential(Conv(level.conv0), Conv(level.conv1)) for name, level in encoder}
        )
        self.mix = GatedStyle(synthesis.to_square, "bilinear" if dynamic_size else None)
        self.to_style = PooledStyle(synthesis.to_style.conv, synthesis.to_style.fc)
        first, *others = synthesis.dec.values()
        smallest = _as(reference.BottleneckLevel, first)
        levels = _all_as(reference.DecoderLevel, others)
        self.conv0 = Conv(smallest.conv0)
        self.conv1 = StyleConv(smallest.conv1, noise)
        self.toRGB = ToRGB(smallest.toRGB, first=True)
        self.dec = nn.ModuleDict(
            {
                name: DecoderLevel(level, first=False, noise=noise)
                for name, level in zip(list(synthesis.dec)[1:], levels, strict=True)
            }
        )
        convs = [smallest.conv1.conv, smallest.toRGB.conv]
        for level in levels:
            convs += [level.conv0.conv, level.conv1.conv, level.toRGB.conv]
        self.styles = StyleBank(convs)

    def forward(
        self,
        x: Tensor,
        w: Tensor,
        gate: Tensor,
        noise: Sequence[Tensor | None],
    ) -> Tensor:
        # Encoder.
        skips = []
        for level in self.enc.values():
            x = level(x)
            skips.append(x)
        # Style.
        x = self.mix(x, w, gate)
        styles = self.styles(torch.cat([w, self.to_style(x)], dim=1))
        # Decoder.
        x = self.conv1(self.conv0(x) + x, *styles[0], noise[0])
        rgb: Tensor = self.toRGB(x, *styles[1], None)
        for i, level in enumerate(self.dec.values()):
            own = styles[3 * i + 2 : 3 * i + 5]
            x, rgb = level(x, rgb, skips[-2 - i], own, noise[2 * i + 1 : 2 * i + 3])
        return rgb


class Mapping(nn.Module):
    """z to the truncated w: [B, D] → [B, D]."""

    w_avg: Tensor

    def __init__(self, mapping: layers.Mapping) -> None:
        super().__init__()
        fully_connected = (mapping.get_submodule(f"fc{i}") for i in range(mapping.layers))
        self.fc = nn.Sequential(*map(Linear.of, _all_as(layers.Linear, fully_connected)))
        self.register_buffer("w_avg", _constant(mapping.w_avg))

    def forward(self, z: Tensor, truncation: Tensor) -> Tensor:
        x = z * torch.rsqrt(z.square().mean(dim=1, keepdim=True) + layers.LATENT_EPS)
        w: Tensor = self.fc(x)
        return self.w_avg + truncation * (w - self.w_avg)


class InferenceGenerator(nn.Module):
    """The whole network in its inference form, following one GraphSpec.

    Args:
        generator: The training form; its weights are copied.
        spec: What the graph takes and gives.

    Raises:
        UserError: If the generator is an ablation of the published network.
    """

    rewrites: ClassVar = ("select-composite", "composite-once")

    def __init__(self, generator: reference.Generator, spec: GraphSpec) -> None:
        super().__init__()
        require_exportable(generator.config)
        self.spec = spec
        self.mapping = Mapping(generator.mapping)
        with torch.no_grad():
            self.first_stage = FirstStage(generator.synthesis.first_stage, spec.dynamic_size)
            self.second_stage = SecondStage(generator.synthesis, spec.dynamic_size, spec.noise)
        self.requires_grad_(False).eval()

    def forward(
        self,
        image: Tensor,
        mask: Tensor,
        z: Tensor,
        truncation: Tensor,
        gate_tokens: Tensor,
        gate_bottleneck: Tensor,
        *noise: Tensor,
    ) -> tuple[Tensor, ...]:
        """Inputs and outputs as in the GraphSpec, in its order."""
        if self.spec.io == "uint8":
            image, mask = _to_unit(image, mask)
        keep = mask > 0.5
        known = torch.where(keep, image, 0.0)
        centred = mask - 0.5
        w = self.mapping(z, truncation)
        rgb = self.first_stage(known, centred, mask, w, gate_tokens)
        coarse = torch.where(keep, image, rgb)
        maps: Sequence[Tensor | None] = noise or [None] * len(self.spec.config.noise_resolutions)
        x = torch.cat([centred, coarse, known], dim=1)
        rgb = self.second_stage(x, w, gate_bottleneck, maps)
        results = [torch.where(keep, image, rgb)]
        if self.spec.coarse:
            results.append(coarse)
        if self.spec.io == "uint8":
            results = [_from_unit(result) for result in results]
        return tuple(results)


def _to_unit(image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """``mat_export.pixels.to_unit`` in torch; TensorRT has bytes at the graph's ends only."""
    x = image.float().permute(0, 3, 1, 2) * (1.0 / 127.5) - 1.0
    return x, (mask.float() >= KEEP_THRESHOLD).float()[:, None]


def _from_unit(x: Tensor) -> Tensor:
    """``mat_export.pixels.from_unit`` in torch."""
    x = ((x + 1.0) * 127.5).round().clamp(0.0, 255.0)
    return x.permute(0, 2, 3, 1).to(torch.uint8)
