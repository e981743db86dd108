"""Custom operators of the inference form, as ``torch.library`` operators.

Being operators keeps them whole in ``torch.export``. They are for inference: the training model
calls the functions they wrap.

- `masked_window_attention` and `mask_propagation` are the two operators of the toolkit. Each has
  four forms: this PyTorch reference, an ONNX function of standard operators
  (`mat_export.functions`), a CUDA kernel and a TensorRT plugin. On a GPU the operators themselves
  run the kernels (`engines.plugins.torch_operators`), which their first call there compiles.
- `query_key_value` and `fuse_mlp` are the two halves of a transformer block around the attention.
  They become ONNX functions too, so that a block is three nodes to the reader; no backend needs to
  know them. `style_scales` is the same for the styles of a stage.
- `depth_to_space` is a standard ONNX operator that torch lacks.

An operator may return neither an input nor a view, of an input or of another output; hence the
clones, for what a small enough grid would make one.
"""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mat_export.functions import LEAST_STYLE
from mat_torch import attention
from mat_torch.config import DEMODULATION_EPS, LRELU_SLOPE

__all__ = [
    "depth_to_space",
    "fuse_mlp",
    "mask_propagation",
    "masked_window_attention",
    "query_key_value",
    "style_scales",
]


@torch.library.custom_op("mat::masked_window_attention", mutates_args=())
def masked_window_attention(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, window: int, shift: int, heads: int
) -> Tensor:
    """Attention within (shifted) windows; see ``mat_torch.attention.masked_window_attention``.

    q, k, v: [B, H, W, C]; valid: bool [B, 1, H, W] or None. Returns [B, H, W, C].
    """
    return attention.masked_window_attention(
        q, k, v, valid, window=window, shift=shift, heads=heads
    )


@masked_window_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, window: int, shift: int, heads: int
) -> Tensor:
    return v.new_empty(v.shape)


def _no_gradient(context: Any, *gradients: Tensor) -> None:
    raise RuntimeError(
        "mat::masked_window_attention is for inference and has no gradient: train with "
        "mat_torch.attention.masked_window_attention"
    )


masked_window_attention.register_autograd(_no_gradient)


@torch.library.custom_op("mat::mask_propagation", mutates_args=())
def mask_propagation(valid: Tensor, window: int, shift: int) -> Tensor:
    """Window-any of a bool map [B, 1, H, W]; see ``mat_torch.attention.mask_propagation``."""
    propagated = attention.mask_propagation(valid, window=window, shift=shift)
    return propagated.clone(memory_format=torch.contiguous_format)


@mask_propagation.register_fake
def _(valid: Tensor, window: int, shift: int) -> Tensor:
    return valid.new_empty(valid.shape)


@torch.library.custom_op("mat::query_key_value", mutates_args=())
def query_key_value(
    x: Tensor, query_key_weight: Tensor, query_key_bias: Tensor, value_weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """``[q, k] = (x/max(‖x‖₂, 1e-12))·W + b`` and ``v = x·W_v``.

    x: [B, H, W, C]; query_key_weight: [C, 2·C]; value_weight: [C, C]. Returns q, k, v like x.
    """
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=1e-12)
    both = (x / norm) @ query_key_weight + query_key_bias
    q, k = (part.clone(memory_format=torch.contiguous_format) for part in both.chunk(2, dim=-1))
    return q, k, x @ value_weight


@query_key_value.register_fake
def _(
    x: Tensor, query_key_weight: Tensor, query_key_bias: Tensor, value_weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x), torch.empty_like(x)


@torch.library.custom_op("mat::fuse_mlp", mutates_args=())
def fuse_mlp(
    x: Tensor,
    y: Tensor,
    fuse_weight: Tensor,
    fuse_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
) -> Tensor:
    """Three Linears over [x, y], leaky_relu after the first two. x, y: [B, H, W, C] → like x.

    Weights are [in, out].
    """
    h = F.leaky_relu(torch.cat([x, y], dim=-1) @ fuse_weight + fuse_bias, LRELU_SLOPE)
    h = F.leaky_relu(h @ fc1_weight + fc1_bias, LRELU_SLOPE)
    return h @ fc2_weight + fc2_bias


@fuse_mlp.register_fake
def _(
    x: Tensor,
    y: Tensor,
    fuse_weight: Tensor,
    fuse_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("mat::style_scales", mutates_args=())
def style_scales(
    style: Tensor, weight: Tensor, bias: Tensor, energy: Tensor, norm: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Styles of L layers of one width, bounded by their maxima, and demodulation of the first c.

    For each layer, ``s = style·W + b``, ``m = max|s|``, the scale is ``s/m`` and the factor
    ``rsqrt((s/m)²·energy + ε/(m·n)²)`` for weights that were divided by n, half the ε of
    demodulation since the energies are halved.

    style: [B, D]; weight: [D, L·in]; bias: [L·in]; energy: [c, in, out], c ≤ L; norm n: [c, 1].
    Returns scale [B, L·in, 1, 1], factor [B, c·out, 1, 1] and magnitude m [B, L, 1, 1].
    """
    count, width, _ = energy.shape
    rows = torch.unflatten(style @ weight + bias, 1, (-1, width))
    m = rows.abs().amax(dim=2, keepdim=True).clamp(min=LEAST_STYLE)
    s = rows / m
    sums = (s[:, :count].square().unsqueeze(2) @ energy).squeeze(2)
    factor = torch.rsqrt(sums + (DEMODULATION_EPS / 2.0) / (m[:, :count] * norm).square())
    scale, factor = (x.flatten(1)[:, :, None, None] for x in (s, factor))
    return scale.clone(), factor.clone(), m.flatten(1)[:, :, None, None].clone()


@style_scales.register_fake
def _(
    style: Tensor, weight: Tensor, bias: Tensor, energy: Tensor, norm: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    (count, width, out), batch = energy.shape, style.shape[0]
    sizes = (bias.shape[0], count * out, bias.shape[0] // width)
    scale, factor, magnitude = (style.new_empty(batch, n, 1, 1) for n in sizes)
    return scale, factor, magnitude


@torch.library.custom_op("mat::depth_to_space", mutates_args=())
def depth_to_space(x: Tensor) -> Tensor:
    """[B, 4·C, H, W] → [B, C, 2·H, 2·W], phases outermost: ONNX ``DepthToSpace`` in mode DCR.

    ``pixel_shuffle`` wants the phases innermost, which a concatenation of them is not.
    """
    b, c, h, w = x.shape
    x = x.reshape(b, 2, 2, c // 4, h, w).permute(0, 3, 4, 1, 5, 2)
    return x.reshape(b, c // 4, 2 * h, 2 * w).clone()


@depth_to_space.register_fake
def _(x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    return x.new_empty(b, c // 4, 2 * h, 2 * w)


def _use_kernels() -> None:
    """Put what is installed for other devices before the operators; nothing is compiled here."""
    for entry in entry_points(group="mat_export.kernels"):
        entry.load()()


_use_kernels()
