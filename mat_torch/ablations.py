"""What stands in for the parts of MAT that its ablations leave out (paper, section 4.3).

The paper says in words what each ablation takes away; how what is left is joined again is our
reading. Each is one field of `GeneratorConfig`, they combine, and everything else stays published:
sizes, training, discriminators, and the arguments of the network.

===========  ===============  ====================================================================
field        ablation         what is built
===========  ===============  ====================================================================
             (published)
attention    ``plain``        Plain window attention. The partial convolutions before the tokens
                              keep their mask; from the first transformer stage on there is none,
                              neither in attention nor in the convolutions around the blocks.
block        ``layernorm``    `LayerNormBlock`: norms and residuals, masks as published.
body         ``convolution``  `ConvBlock` for each transformer block, on the grids of the same five
                              stages and of their width. Heads and windows are then without meaning;
                              ``depths`` counts blocks still.
style        ``none``         No latent style in either decoder: each StyleConv and ToRGB is a plain
                              convolution of the same size (noise maps stay), and the gated mixing
                              and pooled styles go. The mapping network has no layers: its w is the
                              normalised z, which nothing reads. z, truncation and gates change
                              nothing; noise is the only randomness.
tokens       ``linear``       `LinearHead` in place of the convolutional head, `PatchMerge` and
                              `PatchExpand` in place of the convolutions that resample tokens. The
                              convolution at each stage's end stays.
===========  ===============  ====================================================================

Parameters of ``mat-512``, alone and with one field changed (measured):

=========================  ==========  ===================
network                    parameters  of these, stage one
=========================  ==========  ===================
published                  61,562,518           12,063,865
attention ``plain``        61,562,518           12,063,865
block ``layernorm``        60,662,878           11,164,225
body ``convolution``       65,176,198           15,677,545
style ``none``             40,427,974            9,816,489
tokens ``linear``          60,095,518           10,596,865
=========================  ==========  ===================

Of the weights as files, only safetensors of ours say which ablation they are: ``plain`` has the
tensors of the published network, and a bare state dict of it is read as that.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from mat_torch.attention import Mlp, WindowBlock
from mat_torch.layers import Conv, Linear

__all__ = ["ConvBlock", "LayerNormBlock", "LinearHead", "PatchExpand", "PatchMerge"]


# -- blocks: tokens [B, H, W, C] and validity [B, 1, H, W] to the same -----------------------------


class LayerNormBlock(WindowBlock):
    """``x' = x + attention(norm(x))``, ``x' + mlp(norm(x'))``: the usual block (Liu et al. 2021).

    Masked attention, its propagation and the MLP are those of the published block. Queries and keys
    come from the normed tokens as they are: the norm does what unit length does in the published
    block, and a token of zeros (invalid, before it has attended) has no finite slope to unit length
    once the norm's bias is all that is left of it.
    """

    def __init__(self, dim: int, heads: int, *, window: int, shift: int, grid: int) -> None:
        super().__init__(dim, heads, window=window, shift=shift, grid=grid, unit=False)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        x = x + self.attend(self.norm1(x), valid)
        x = x + self.mlp(self.norm2(x))
        return x, self.propagate(valid)


class ConvBlock(nn.Module):
    """``(x + conv(conv(x)))/√2``, both 3×3 with lrelu; a token is valid if one of its 5×5 was.

    Tokens that nothing valid has reached stay 0, as partial convolutions leave them. These ones are
    plain: the ratio 9/u of partial ones triples the variance at each step into a hole, and with ten
    more such steps the untrained network's pictures were a hundred times as bright. The divisor
    keeps the variance likewise.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv0 = Conv(dim, dim, 3)
        self.conv1 = Conv(dim, dim, 3)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        y = self.conv1(self.conv0(x.permute(0, 3, 1, 2)))
        x = (x + y.permute(0, 2, 3, 1)) * math.sqrt(0.5)
        if valid is None:
            return x, None
        reached = F.max_pool2d(valid.to(x.dtype), 5, 1, padding=2)
        return x * reached.permute(0, 2, 3, 1), reached > 0.5


# -- linear tokens: maps [B, C, H, W] and masks [B, 1, H, W] ---------------------------------------


def _project(linear: nn.Module, x: Tensor) -> Tensor:
    """A Linear over the channels of a map."""
    y: Tensor = linear(x.permute(0, 2, 3, 1))
    return y.permute(0, 3, 1, 2)


class LinearHead(nn.Module):
    """``Linear(4·p² → C)`` of each p×p patch of the input, for p = 1, 2, 4, … up to a token's.

    No map is made from another one, and there is no activation: tokens are the linear projection of
    their patches, and so is each skip of the decoder. A patch without any kept pixel is invalid and
    its features are 0, as a partial convolution leaves them.

    Args:
        dim: Channels C.
        levels: Octaves from the native size down to the tokens.
    """

    def __init__(self, dim: int, levels: int) -> None:
        super().__init__()
        self.patch = nn.ModuleList(Linear(4 * 4**i, dim) for i in range(levels + 1))

    def forward(self, pixels: Tensor, mask: Tensor) -> tuple[list[Tensor], Tensor]:
        """[B, 4, H, W] to the maps of sides H, H/2, … and the mask of the last one."""
        maps, valid = [], mask
        for i, linear in enumerate(self.patch):
            side = 2**i
            valid = F.max_pool2d(mask, side, side)
            x = _project(linear, F.pixel_unshuffle(pixels, side))
            maps.append(x * valid.to(x.dtype))
        return maps, valid


class PatchMerge(nn.Module):
    """Half the size: ``Linear(4·C → C)`` of each 2×2 tokens, valid and not 0 if any of them is."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = Linear(4 * dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        y = _project(self.linear, F.pixel_unshuffle(x, 2))
        if mask is None:
            return y, None
        mask = F.max_pool2d(mask, 2, 2)
        return y * mask.to(y.dtype), mask


class PatchExpand(nn.Module):
    """Twice the size: each token becomes 2×2 by ``Linear(C → 4·C)``. Without a mask, as it goes up.

    Raises:
        ValueError: If there is a mask: tokens go up where there is none any more.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = Linear(dim, 4 * dim)

    def forward(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, None]:
        if mask is not None:
            raise ValueError("tokens go up without a mask, and this has one")
        return F.pixel_shuffle(_project(self.linear, x), 2), None
