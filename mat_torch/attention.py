"""Masked window attention and the block around it (paper, section 3.2, equations 2 to 5).

Tokens are [B, H, W, C]; validity is a bool map [B, 1, H, W], True where a token carries
image content.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mat_torch.config import MASKED_LOGIT
from mat_torch.layers import Linear

__all__ = [
    "Block",
    "Mlp",
    "MultiHeadAttention",
    "WindowBlock",
    "effective_window",
    "mask_propagation",
    "masked_window_attention",
    "region_bias",
]


def effective_window(height: int, width: int, window: int, shift: int) -> tuple[int, int]:
    """Window and shift on a grid: a side of at most the window becomes the window, unshifted."""
    side = min(height, width)
    return (side, 0) if side <= window else (window, shift)


def cut_windows(x: Tensor, window: int) -> Tensor:
    """[B, H, W, C] → [B, windows, window², C], windows in row-major order."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // window, window, w // window, window, c).transpose(2, 3)
    return x.reshape(b, (h // window) * (w // window), window * window, c)


def join_windows(x: Tensor, window: int, height: int, width: int) -> Tensor:
    """The inverse of cut_windows."""
    b, c = x.shape[0], x.shape[-1]
    x = x.reshape(b, height // window, width // window, window, window, c).transpose(2, 3)
    return x.reshape(b, height, width, c)


def region_bias(
    height: int, width: int, window: int, shift: int, device: torch.device | None = None
) -> Tensor:
    """−100 between tokens that only the cyclic shift brought into one window, else 0.

    Regions split the rolled grid at ``H − window`` and ``H − shift``, columns alike.

    Returns:
        [windows, window², window²] float32, zero for ``shift = 0``.
    """

    def bands(size: int) -> Tensor:
        i = torch.arange(size, device=device)
        return (i >= size - window).long() + (i >= size - shift).long()

    if shift == 0:
        n = window * window
        return torch.zeros((height // window) * (width // window), n, n, device=device)
    ids = bands(height)[:, None] * 3 + bands(width)[None, :]
    ids = cut_windows(ids[None, :, :, None], window)[0, :, :, 0]
    return (ids[:, :, None] != ids[:, None, :]).float() * MASKED_LOGIT


def masked_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    valid: Tensor | None,
    *,
    window: int,
    shift: int,
    heads: int,
    regions: Tensor | None = None,
) -> Tensor:
    """``softmax(q·kᵀ + region bias + validity bias)·v`` within (shifted) windows.

    The caller has normalised q and k and scaled q. A window without any valid token gets −100
    on all keys, so it attends to all of them alike.

    Args:
        q: Queries [B, H, W, C], C = heads · head size, H and W multiples of the window.
        k: Keys, likewise.
        v: Values, likewise.
        valid: Bool [B or 1, 1, H, W], or None if every token is valid.
        window: Window side in tokens.
        shift: Cyclic shift towards the origin, in tokens; 0 for none.
        heads: Attention heads.
        regions: ``region_bias`` of this grid if the caller keeps it.

    Returns:
        [B, H, W, C].
    """
    _, height, width, channels = q.shape
    window, shift = effective_window(height, width, window, shift)
    head_dim = channels // heads

    def split(x: Tensor) -> Tensor:  # [B, windows, heads, window², head_dim]
        x = torch.roll(x, (-shift, -shift), (1, 2)) if shift else x
        x = torch.unflatten(cut_windows(x, window), -1, (heads, head_dim))
        return x.transpose(2, 3)

    logits = split(q) @ split(k).transpose(-2, -1)
    if shift:
        if regions is None:
            regions = region_bias(height, width, window, shift, q.device)
        logits = logits + regions.to(q.dtype)[None, :, None]
    if valid is not None:
        mask = valid.permute(0, 2, 3, 1)
        mask = torch.roll(mask, (-shift, -shift), (1, 2)) if shift else mask
        keys = cut_windows(mask, window)[:, :, None, None, :, 0]
        logits = logits + torch.where(keys, 0.0, MASKED_LOGIT).to(q.dtype)
    y = torch.softmax(logits, dim=-1) @ split(v)
    y = join_windows(y.transpose(2, 3).flatten(-2), window, height, width)
    return torch.roll(y, (shift, shift), (1, 2)) if shift else y


def mask_propagation(valid: Tensor, *, window: int, shift: int) -> Tensor:
    """Every token of a (shifted) window is valid if any token of it was (equation 4).

    Args:
        valid: Bool [B, 1, H, W].
        window: Window side in tokens.
        shift: Cyclic shift in tokens.

    Returns:
        Bool [B, 1, H, W].
    """
    height, width = valid.shape[-2:]
    window, shift = effective_window(height, width, window, shift)
    x = torch.roll(valid, (-shift, -shift), (2, 3)) if shift else valid
    x = torch.unflatten(x, 3, (width // window, window))
    x = torch.unflatten(x, 2, (height // window, window))
    x = x.any(dim=5, keepdim=True).any(dim=3, keepdim=True)
    x = x.expand(-1, -1, -1, window, -1, window).reshape(valid.shape)
    return torch.roll(x, (shift, shift), (2, 3)) if shift else x


class MultiHeadAttention(nn.Module):
    """q and k from ``x/max(‖x‖₂, 1e-12)`` per token, v from x; output Linear. [B, H, W, C].

    Args:
        dim: Channels C.
        heads: Attention heads.
        unit: Whether q and k come from unit tokens; else from x, which the caller has normalised.
    """

    def __init__(self, dim: int, heads: int, *, unit: bool = True) -> None:
        super().__init__()
        self.heads, self.unit = heads, unit
        self.scale = (dim // heads) ** -0.5
        self.q = Linear(dim, dim)
        self.k = Linear(dim, dim)
        self.v = Linear(dim, dim)
        self.proj = Linear(dim, dim)

    def forward(
        self, x: Tensor, valid: Tensor | None, window: int, shift: int, regions: Tensor | None
    ) -> Tensor:
        unit = F.normalize(x, p=2.0, dim=-1, eps=1e-12) if self.unit else x
        y = masked_window_attention(
            self.q(unit) * self.scale,
            self.k(unit),
            self.v(x),
            valid,
            window=window,
            shift=shift,
            heads=self.heads,
            regions=regions,
        )
        projected: Tensor = self.proj(y)
        return projected


class Mlp(nn.Module):
    """``fc2(lrelu(fc1(x)))`` with twice the width between."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, 2 * dim, activation=True)
        self.fc2 = Linear(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(self.fc1(x))
        return y


class WindowBlock(nn.Module):
    """What every block over windows has: attention, and the mask's propagation after it.

    Args:
        dim: Channels C.
        heads: Attention heads.
        window: Window side in tokens.
        shift: Cyclic shift in tokens.
        grid: Tokens a side at the native size, whose region bias is kept ready.
        unit: As in MultiHeadAttention.
    """

    def __init__(
        self, dim: int, heads: int, *, window: int, shift: int, grid: int, unit: bool = True
    ) -> None:
        super().__init__()
        self.window, self.shift, self.grid = window, shift, grid
        self.attn = MultiHeadAttention(dim, heads, unit=unit)
        self.regions: Tensor | None
        _, native_shift = effective_window(grid, grid, window, shift)
        bias = region_bias(grid, grid, window, shift) if native_shift else None
        self.register_buffer("regions", bias, persistent=False)

    def attend(self, x: Tensor, valid: Tensor | None) -> Tensor:
        """Attention within this block's windows: [B, H, W, C] → [B, H, W, C]."""
        native = x.shape[1] == self.grid and x.shape[2] == self.grid
        regions = self.regions if native else None
        y: Tensor = self.attn(x, valid, self.window, self.shift, regions)
        return y

    def propagate(self, valid: Tensor | None) -> Tensor | None:
        """The validity after this block, if there is any."""
        if valid is None:
            return None
        return mask_propagation(valid, window=self.window, shift=self.shift)


class Block(WindowBlock):
    """``x' = lrelu(fuse([x, attention(x)]))``, ``mlp(x')``: no norm, no residual (equation 2)."""

    def __init__(self, dim: int, heads: int, *, window: int, shift: int, grid: int) -> None:
        super().__init__(dim, heads, window=window, shift=shift, grid=grid)
        self.fuse = Linear(2 * dim, dim, activation=True)
        self.mlp = Mlp(dim)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        y = self.mlp(self.fuse(torch.cat([x, self.attend(x, valid)], dim=-1)))
        return y, self.propagate(valid)
