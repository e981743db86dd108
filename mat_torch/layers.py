"""Layers of MAT, each headed by the equation it computes. Shapes are [B, C, H, W] unless stated.

Weights are stored at unit variance and scaled when used (equalized learning rate, Karras et al.
2018); ``lrelu(x)`` is ``√2 · max(x, 0.2·x)``. Masks are 1 where a pixel is kept and 0 in the hole.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mat_torch.config import DEMODULATION_EPS, LRELU_SLOPE

__all__ = [
    "DEMODULATION_EPS",
    "LATENT_EPS",
    "LRELU_GAIN",
    "Conv",
    "Linear",
    "Mapping",
    "ModulatedConv",
    "PartialConv",
    "StyleConv",
    "ToRGB",
    "blur",
    "fir_kernel",
    "full_precision",
    "lrelu",
    "mask_count",
    "partial_ratio",
    "update_mask",
    "upsample_image",
]

LRELU_GAIN = math.sqrt(2.0)
LATENT_EPS = 1e-8
_W_AVG_DECAY = 0.995


def lrelu(x: Tensor) -> Tensor:
    """``√2 · max(x, 0.2·x)``."""
    return F.leaky_relu(x, LRELU_SLOPE) * LRELU_GAIN


def full_precision(x: Tensor) -> AbstractContextManager[object]:
    """Autocast off on x's device, for what 16 bits do not carry: sums of squares, RGB, logits."""
    if _is_autocast(x):
        return torch.autocast(x.device.type, enabled=False)
    return contextlib.nullcontext()


def _is_autocast(x: Tensor) -> bool:
    device = x.device.type
    return device != "meta" and torch.is_autocast_enabled(device)


def _is_differentiated(*tensors: Tensor) -> bool:
    """Whether autograd records this, and no compiler or exporter looks on."""
    recorded = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return recorded and not torch.compiler.is_compiling()


def _add_bias(x: Tensor, bias: Tensor) -> Tensor:
    """``x + b`` in x's type: under autocast a float32 bias would make all that follows float32."""
    return x + bias.to(x.dtype)[:, None, None]


# -- resampling ------------------------------------------------------------------------------------


def fir_kernel(gain: float = 1.0) -> Tensor:
    """The 4×4 resampling filter ``gain · [1,3,3,1]ᵀ[1,3,3,1] / 64``, float32."""
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
    return torch.outer(taps, taps) * (gain / 64.0)


def _depthwise(kernel: Tensor, x: Tensor) -> Tensor:
    """One 2-D kernel as a depthwise weight [C, 1, k, k] of x's type, device and channels."""
    channels = x.shape[1]
    return kernel.to(device=x.device, dtype=x.dtype).expand(channels, 1, *kernel.shape)


def blur(x: Tensor, kernel: Tensor, padding: int, stride: int = 1) -> Tensor:
    """x correlated with the (symmetric) resampling filter, channel by channel."""
    if torch.compiler.is_dynamo_compiling():
        return _blur_by_sums(x, kernel, padding, stride)
    weight = _depthwise(kernel, x)
    if _is_differentiated(x):
        filtered: Tensor = _Filter.apply(x, weight, stride, padding)  # type: ignore[no-untyped-call]
        return filtered
    return F.conv2d(x, weight, stride=stride, padding=padding, groups=x.shape[1])


def upsample_image(x: Tensor, kernel: Tensor) -> Tensor:
    """Twice the size: a zero after every sample, padding 2 before and 1 after, FIR with gain 4.

    As one transposed convolution, which never multiplies the zeros.

    Args:
        x: Image [B, C, H, W].
        kernel: ``fir_kernel(4.0)``.
    """
    if torch.compiler.is_dynamo_compiling():
        return _upsample_by_sums(x)
    return F.conv_transpose2d(x, _depthwise(kernel, x), stride=2, padding=1, groups=x.shape[1])


class _Filter(torch.autograd.Function):
    """A constant depthwise convolution, whose derivative is its transpose, again and again.

    PyTorch's second derivative of a convolution computes the weight's gradient too, asked for or
    not, and channel by channel where it is depthwise: 3.1 of the 3.4 s of a training step with R1
    (mat-tiny-256, a batch of 16, H200).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.how, ctx.dtype, ctx.size = (stride, padding), x.dtype, x.shape[-2:]
        return F.conv2d(x, weight, stride=stride, padding=padding, groups=x.shape[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (weight,), (gradient,) = ctx.saved_tensors, gradients
        weight = weight.to(gradient.dtype)  # under autocast the result may have had fewer bits
        spread = _Spread.apply(gradient, weight, *ctx.how, ctx.size)  # type: ignore[no-untyped-call]
        return spread.to(ctx.dtype), None, None, None


class _Spread(torch.autograd.Function):
    """The transpose of `_Filter`, to maps of `size`."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, weight: Tensor, stride: int, padding: int, size: Sequence[int]
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.how = stride, padding
        sides = zip(size, y.shape[-2:], weight.shape[-2:], strict=True)
        rest = [n - ((m - 1) * stride - 2 * padding + k) for n, m, k in sides]
        return F.conv_transpose2d(
            y, weight, stride=stride, padding=padding, output_padding=rest, groups=y.shape[1]
        )

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (weight,), (gradient,) = ctx.saved_tensors, gradients
        filtered = _Filter.apply(gradient, weight, *ctx.how)  # type: ignore[no-untyped-call]
        return filtered, None, None, None, None


class _Product(torch.autograd.Function):
    """A convolution of x [B, in, H, W] by w [out, in, k, k] that is cheap to differentiate twice.

    It is bilinear, and so are its two derivatives: each of the three has the other two for its own.
    PyTorch's second derivative takes the gradient of the weights as a convolution with a kernel as
    large as the map: 233 of the 340 ms that R1 costs (mat-tiny-256, a batch of 16, H200).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.how = stride, padding
        return F.conv2d(x, weight, stride=stride, padding=padding)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), (gradient,) = ctx.saved_tensors, gradients
        to_x, to_weight = ctx.needs_input_grad[:2]
        x_gradient = _ToInput.apply(gradient, weight, x, *ctx.how) if to_x else None  # type: ignore[no-untyped-call]
        weight_gradient = _ToWeight.apply(gradient, x, weight, *ctx.how) if to_weight else None  # type: ignore[no-untyped-call]
        return x_gradient, weight_gradient, None, None


def _derivative(
    y: Tensor, x: Tensor, weight: Tensor, how: Sequence[int], *, of_input: bool
) -> Tensor:
    """``∂⟨y, x ∗ w⟩/∂x`` or ``∂⟨y, x ∗ w⟩/∂w``; the other's values do not matter."""
    stride, padding = how
    gradients = torch.ops.aten.convolution_backward(
        *(y, x, weight, None, [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], 1),
        [of_input, not of_input, False],
    )
    derivative: Tensor = gradients[0 if of_input else 1]
    return derivative


class _ToInput(torch.autograd.Function):
    """A product's derivative by x: bilinear in y and w; x gives the shape alone."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, weight: Tensor, x: Tensor, stride: int, padding: int
    ) -> Tensor:
        ctx.save_for_backward(y, weight)
        ctx.how = stride, padding
        return _derivative(y, x, weight, ctx.how, of_input=True)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (y, weight), (gradient,) = ctx.saved_tensors, gradients
        to_y = _Product.apply(gradient, weight, *ctx.how)  # type: ignore[no-untyped-call]
        to_weight = _ToWeight.apply(y, gradient, weight, *ctx.how)  # type: ignore[no-untyped-call]
        return to_y, to_weight, None, None, None


class _ToWeight(torch.autograd.Function):
    """A product's derivative by w: bilinear in y and x; w gives the shape alone."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int
    ) -> Tensor:
        ctx.save_for_backward(y, x)
        ctx.how = stride, padding
        return _derivative(y, x, weight, ctx.how, of_input=False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (y, x), (gradient,) = ctx.saved_tensors, gradients
        to_y = _Product.apply(x, gradient, *ctx.how)  # type: ignore[no-untyped-call]
        to_x = _ToInput.apply(y, gradient, x, *ctx.how)  # type: ignore[no-untyped-call]
        return to_y, to_x, None, None, None


def _convolve(
    x: Tensor, weight: Tensor, *, stride: int = 1, padding: int = 0, groups: int = 1
) -> Tensor:
    """``F.conv2d``; in full precision one whose second derivative is cheap, which R1 takes."""
    if groups > 1 or _is_autocast(x) or not _is_differentiated(x, weight):
        return F.conv2d(x, weight, stride=stride, padding=padding, groups=groups)
    product: Tensor = _Product.apply(x, weight, stride, padding)  # type: ignore[no-untyped-call]
    return product


# Compiled, the filter is sums of shifted copies, rows and columns apart: they fuse with what is
# around them. cuDNN's depthwise convolutions took a third of a training step (H200, bfloat16).


def _blur_by_sums(x: Tensor, kernel: Tensor, padding: int, stride: int) -> Tensor:
    """`blur` with ``[1, 3, 3, 1]/8`` along each side, times the kernel's gain."""
    x = F.pad(x, [padding] * 4)
    size = x.shape[2] - 3
    a, b, c, d = (x[:, :, i : i + size : stride] for i in range(4))
    x = (a + d) * 0.125 + (b + c) * 0.375
    size = x.shape[3] - 3
    a, b, c, d = (x[..., i : i + size : stride] for i in range(4))
    x = (a + d) * 0.125 + (b + c) * 0.375
    return x * (kernel[0, 0] * 64.0).to(x.dtype)


def _upsample_by_sums(x: Tensor) -> Tensor:
    """`upsample_image`: ``y[2i] = ¼x[i−1] + ¾x[i]``, ``y[2i+1] = ¾x[i] + ¼x[i+1]``, both ways."""
    padded = F.pad(x, [0, 0, 1, 1])
    near = 0.75 * x
    x = torch.stack([0.25 * padded[:, :, :-2] + near, near + 0.25 * padded[:, :, 2:]], dim=3)
    x = x.flatten(2, 3)
    padded = F.pad(x, [1, 1])
    near = 0.75 * x
    x = torch.stack([0.25 * padded[..., :-2] + near, near + 0.25 * padded[..., 2:]], dim=4)
    return x.flatten(3, 4)


def _up_conv(x: Tensor, weight: Tensor, kernel: Tensor, groups: int = 1) -> Tensor:
    """3×3 convolution at twice the size: zeros after every sample, pad 3 and 2, the 3×3, FIR · 4.

    The 3×3 over zero-stuffed samples is a transposed convolution with the flipped kernel, whose
    first and last lines are the zeros that the FIR then needs.

    Args:
        x: [B, groups·in, H, W].
        weight: [groups·out, in, 3, 3].
        kernel: ``fir_kernel(4.0)``.
        groups: Independent groups (one a sample, for modulated weights).
    """
    out, cin = weight.shape[0] // groups, weight.shape[1]
    flipped = weight.flip(2, 3).reshape(groups, out, cin, 3, 3).transpose(1, 2)
    y = F.conv_transpose2d(x, flipped.reshape(groups * cin, out, 3, 3), stride=2, groups=groups)
    return blur(y, kernel, padding=1)


def resampled_conv(
    x: Tensor, weight: Tensor, kernel: Tensor | None, up: int = 1, down: int = 1, groups: int = 1
) -> Tensor:
    """Convolution of 1×1 or 3×3 at the same size, half or twice the size.

    Args:
        x: [B, groups·in, H, W].
        weight: [groups·out, in, k, k], already scaled.
        kernel: ``fir_kernel(up²)``; None where nothing is resampled.
        up: 1, or 2 for twice the size (k = 3).
        down: 1, or 2 for half the size.
        groups: As in conv2d.
    """
    k = weight.shape[-1]
    if kernel is None:
        return _convolve(x, weight, padding=k // 2, groups=groups)
    if up == 2:
        return _up_conv(x, weight, kernel, groups)
    if k == 1:
        return _convolve(blur(x, kernel, padding=1, stride=2), weight, groups=groups)
    return _convolve(blur(x, kernel, padding=2), weight, stride=2, groups=groups)


# -- plain layers ----------------------------------------------------------------------------------


class Linear(nn.Module):
    """``y = x · (W·lr/√in)ᵀ + b·lr``, then lrelu if `activation`. x: [..., in] → [..., out]."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        activation: bool = False,
        lr: float = 1.0,
        bias_init: float = 0.0,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / lr)
        self.bias = nn.Parameter(torch.full((out_features,), bias_init / lr))
        self.activation = activation
        self.weight_gain = lr / math.sqrt(in_features)
        self.bias_gain = lr

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight * self.weight_gain, self.bias * self.bias_gain)
        return lrelu(y) if self.activation else y


class Conv(nn.Module):
    """``lrelu(resample(x) ∗ W/√(in·k²) + b) · gain``, with activation and bias optional."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        up: int = 1,
        down: int = 1,
        activation: bool = True,
        bias: bool = True,
        gain: float = 1.0,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self.up, self.down = up, down
        self.activation = activation
        self.weight_gain = 1.0 / math.sqrt(in_channels * kernel_size**2)
        self.gain = gain
        self.fir: Tensor | None
        self.register_buffer(
            "fir", fir_kernel(up**2) if max(up, down) > 1 else None, persistent=False
        )

    def forward(self, x: Tensor) -> Tensor:
        y = resampled_conv(x, self.weight * self.weight_gain, self.fir, self.up, self.down)
        if self.bias is not None:
            y = _add_bias(y, self.bias)
        if self.activation:
            y = lrelu(y)
        return y if self.gain == 1.0 else y * self.gain


# -- partial convolution (Liu et al. 2018; paper, section 3.1) -------------------------------------


def mask_count(mask: Tensor, stride: int = 1) -> Tensor:
    """How many of the 3×3 neighbours are kept: [B, 1, H, W] → [B, 1, H/stride, W/stride], 0 … 9."""
    return F.conv2d(mask, mask.new_ones(1, 1, 3, 3), stride=stride, padding=1)


def update_mask(count: Tensor) -> Tensor:
    """The next layer's mask: 1 where any neighbour is kept."""
    return count.clamp(0.0, 1.0)


def partial_ratio(count: Tensor) -> Tensor:
    """``9/u`` where u ≥ 1, else 0: exact for binary masks in every precision.

    The published ``9/(u + 1e-8)·mask'`` is the same number in FP32, but the 1e-8 vanishes in half
    precision and the quotient is then inf·0.
    """
    return update_mask(count) * 9.0 / count.clamp(min=1.0)


class PartialConv(nn.Module):
    """A Conv whose activated result is multiplied by ``9/u``; without a mask the plain Conv."""

    def __init__(self, in_channels: int, out_channels: int, *, up: int = 1, down: int = 1) -> None:
        super().__init__()
        self.conv = Conv(in_channels, out_channels, 3, up=up, down=down)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        y = self.conv(x)
        if mask is None:
            return y, None
        count = mask_count(mask, self.conv.down)
        return y * partial_ratio(count), update_mask(count)


# -- modulated convolution (Karras et al. 2020, equations 1 and 3) ---------------------------------


class ModulatedConv(nn.Module):
    """Convolution whose weights are ``w·s`` per sample, ``s`` an affine function of the style.

    With `demodulate`, each output channel's weights are divided by ``√(Σ (w·s)² + 1e-8)``.
    With `style_dim` 0 there is no style [B, 0] to modulate by: the plain convolution ``w``.

    Attributes:
        scale_activations: Compute the same as ``conv(x·s, w) · rsqrt(s²·Σ_k w² + 1e-8)``: one set
            of weights for the whole batch, which is what training in batches wants.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        style_dim: int,
        *,
        up: int = 1,
        demodulate: bool = True,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            torch.randn(1, out_channels, in_channels, kernel_size, kernel_size)
        )
        self.styled = style_dim > 0
        if self.styled:
            self.affine = Linear(style_dim, in_channels, bias_init=1.0)
        self.up = up
        self.demodulate = demodulate
        self.scale_activations = False
        self.weight_gain = 1.0 / math.sqrt(in_channels * kernel_size**2)
        self.fir: Tensor | None
        self.register_buffer("fir", fir_kernel(up**2) if up > 1 else None, persistent=False)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        if not self.styled:
            return resampled_conv(x, self.weight[0] * self.weight_gain, self.fir, up=self.up)
        if self.scale_activations:
            return self._with_scaled_activations(x, style)
        batch, cin, height, width = x.shape
        out, k = self.weight.shape[1], self.weight.shape[-1]
        # Modulate: one set of weights a sample, [B, out, in, k, k].
        weight = self.weight * self.weight_gain * self.affine(style)[:, None, :, None, None]
        if self.demodulate:
            norm = weight.square().sum(dim=(2, 3, 4), keepdim=True)
            weight = weight * torch.rsqrt(norm + DEMODULATION_EPS)
        # Convolve: samples become groups.
        y = resampled_conv(
            x.reshape(1, batch * cin, height, width),
            weight.reshape(batch * out, cin, k, k),
            self.fir,
            up=self.up,
            groups=batch,
        )
        return y.reshape(batch, out, height * self.up, width * self.up)

    def _with_scaled_activations(self, x: Tensor, style: Tensor) -> Tensor:
        weight = self.weight[0] * self.weight_gain
        with full_precision(x):
            scale = self.affine(style.to(weight.dtype))
        y = resampled_conv(x * scale.to(x.dtype)[:, :, None, None], weight, self.fir, up=self.up)
        if not self.demodulate:
            return y
        # The norms of the weights that the styles would give: a small product, in FP32.
        with full_precision(x):
            norm = scale.square() @ weight.square().sum(dim=(2, 3)).T
            norm = torch.rsqrt(norm + DEMODULATION_EPS)
        return y * norm.to(y.dtype)[:, :, None, None]


class StyleConv(nn.Module):
    """``lrelu(demodulated conv(x, style) + noise_strength·noise + bias)``.

    Layers of stage one have no noise; those of stage two own a constant map [r, r].
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        style_dim: int,
        *,
        up: int = 1,
        noise_resolution: int | None = None,
    ) -> None:
        super().__init__()
        self.conv = ModulatedConv(in_channels, out_channels, 3, style_dim, up=up)
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.noise_strength: Tensor | None
        self.noise_const: Tensor | None
        if noise_resolution is None:
            self.noise_strength, self.noise_const = None, None
        else:
            self.noise_strength = nn.Parameter(torch.zeros(()))
            self.register_buffer("noise_const", torch.randn(noise_resolution, noise_resolution))

    def forward(self, x: Tensor, style: Tensor, noise: Tensor | None = None) -> Tensor:
        y = self.conv(x, style)
        if self.noise_strength is not None and self.noise_const is not None:
            noise = self.noise_strength * (self.noise_const if noise is None else noise)
            y = y + noise.to(y.dtype)
        return lrelu(_add_bias(y, self.bias))


class ToRGB(nn.Module):
    """``modulated 1×1(x, style) + bias + upsampled previous RGB``; no demodulation, no lrelu."""

    def __init__(self, in_channels: int, style_dim: int) -> None:
        super().__init__()
        self.conv = ModulatedConv(in_channels, 3, 1, style_dim, demodulate=False)
        self.bias = nn.Parameter(torch.zeros(3))
        self.fir: Tensor
        self.register_buffer("fir", fir_kernel(4.0), persistent=False)

    def forward(self, x: Tensor, style: Tensor, previous: Tensor | None) -> Tensor:
        # Under autocast the bias makes RGB float32, and RGB stays so: 8 bits would show.
        rgb: Tensor = self.conv(x, style) + self.bias[:, None, None]
        if previous is None:
            return rgb
        with full_precision(x):
            return rgb + upsample_image(previous, self.fir)


# -- mapping network -------------------------------------------------------------------------------


class Mapping(nn.Module):
    """``w = w_avg + ψ·(MLP(z·rsqrt(mean(z²) + 1e-8)) − w_avg)``: z [B, D] → w [B, D]."""

    def __init__(self, latent_dim: int, layers: int) -> None:
        super().__init__()
        self.layers = layers
        for i in range(layers):
            self.add_module(f"fc{i}", Linear(latent_dim, latent_dim, activation=True, lr=0.01))
        self.w_avg: Tensor
        self.register_buffer("w_avg", torch.zeros(latent_dim))

    def forward(self, z: Tensor, truncation: Tensor | float = 1.0) -> Tensor:
        x = z * torch.rsqrt(z.square().mean(dim=1, keepdim=True) + LATENT_EPS)
        for i in range(self.layers):
            x = self.get_submodule(f"fc{i}")(x)
        w_avg = self.w_avg.to(x.dtype)
        if isinstance(truncation, Tensor):
            return torch.lerp(w_avg, x, truncation.to(x))
        # A number stays one: as a tensor on the GPU it would be copied there, and waited for.
        return torch.lerp(w_avg, x, truncation)

    @torch.no_grad()
    def track_average(self, w: Tensor, decay: float = _W_AVG_DECAY) -> None:
        """Move w_avg towards the mean of a batch of untruncated w [B, latent_dim] (training)."""
        self.w_avg.lerp_(w.mean(dim=0).to(self.w_avg.dtype), 1.0 - decay)
