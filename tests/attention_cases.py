"""Cases of the two operators on which every form of them is held against the reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["BARS", "DENSE", "HARD", "NETWORK", "Case", "any_case", "draw"]

BARS = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Largest ‖a − b‖ / ‖b‖ against the reference on the same numbers in FP32 or FP64.

Of the short types twice their unit roundoff: weights and results are each rounded once.
"""


@dataclass(frozen=True)
class Case:
    """One call, and how its numbers are drawn.

    Attributes:
        tiles: Rows and columns of the grid, in windows.
        kept: Share of valid tokens; None calls without a mask.
        dead: The first window, as it lies in the rolled grid, has no valid token.
        packed: q, k and v lie side by side in one tensor.
        mask_dtype: Of the masks that kernels take by themselves: torch.bool or torch.int32.
    """

    window: int = 8
    shift: int = 0
    tiles: tuple[int, int] = (1, 1)
    heads: int = 2
    head_size: int = 30
    batch: int = 1
    kept: float | None = 0.5
    dead: bool = False
    packed: bool = False
    dtype: torch.dtype = torch.float16
    mask_dtype: torch.dtype = torch.bool
    seed: int = 0


HARD = {
    "window 8 of the network": Case(8, 0, (2, 2), 6),
    "window 8, shifted": Case(8, 4, (2, 3), 6),
    "window 16 of the network": Case(16, 0, (2, 1), 2),
    "window 16, shifted": Case(16, 8, (2, 2), 1),
    "window 16, shifted, in many blocks": Case(16, 8, (2, 2), 2),
    "all invalid": Case(8, 4, (2, 2), kept=0.0),
    "all valid": Case(8, 4, (2, 2), kept=1.0),
    "a window without a valid token": Case(8, 0, (2, 2), dead=True),
    "a shifted window without a valid token": Case(8, 4, (2, 2), dead=True),
    "no mask": Case(8, 4, (2, 2), kept=None),
    "one window is the grid": Case(16, 0, (1, 1), 1),
    "one row of windows is not shifted": Case(8, 4, (1, 2)),
    "heads without padding": Case(8, 4, (2, 2), head_size=32),
    "heads of one pair": Case(8, 4, (2, 2), head_size=2),
    "several images": Case(8, 4, (2, 2), batch=3),
    "q, k and v side by side": Case(8, 4, (2, 2), packed=True),
    "shift by one": Case(8, 1, (2, 2)),
    "window 8, masks of integers": Case(8, 4, (2, 2), batch=2, mask_dtype=torch.int32),
    "window 16, masks of integers": Case(16, 8, (2, 1), 1, dead=True, mask_dtype=torch.int32),
}


DENSE = {name: case for name, case in HARD.items() if not case.packed}
"""What TensorRT can ask of a plugin: its tensors are packed densely, each by itself."""


NETWORK = {
    f"mat-512, {side}×{side} tokens, window {window}, shift {shift}, {batch} at once": Case(
        window, shift, (side // window,) * 2, 6, batch=batch, kept=0.1
    )
    for side, window in ((64, 8), (32, 16), (16, 16))
    for shift in (0, window // 2)
    for batch in (1, 8)
}
"""The blocks of the network, whose grids are too large for a GPU of paper."""


def any_case(pick: Callable[[Sequence[Any]], Any], *, large: bool = False) -> Case:
    """Any case that the kernels have.

    Args:
        pick: Chooses one of a sequence, as ``random.choice`` does.
        large: Grids, heads and batches for a GPU rather than for a CPU that plays one.
    """
    window = pick([8, 8, 16])
    tiles, heads, batch = (5, 6, 4) if large else (3, 3, 2) if window == 8 else (2, 1, 1)
    return Case(
        window,
        pick(range(window)),
        (pick(range(1, tiles + 1)), pick(range(1, tiles + 1))),
        pick(range(1, heads + 1)),
        pick(range(2, 33, 2)),
        pick(range(1, batch + 1)),
        pick([None, 0.0, 0.02, 0.5, 1.0]),
        pick([False, True]),
        pick([False, True]),
        pick(list(BARS)),
        pick([torch.bool, torch.int32]),
        pick(range(2**32)),
    )


def draw(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """q, k, v [B, H, W, C] of the case's type and valid [B, 1, H, W] or None."""
    generator = torch.Generator().manual_seed(case.seed)
    height, width = (case.window * n for n in case.tiles)
    channels = case.heads * case.head_size
    packed = torch.randn(case.batch, height, width, 3 * channels, generator=generator)
    packed = packed.to(case.dtype)
    q, k, v = torch.split(packed, channels, dim=3)
    if not case.packed:
        q, k, v = (x.contiguous() for x in (q, k, v))
    if case.kept is None:
        return q, k, v, None
    valid = torch.rand(case.batch, 1, height, width, generator=generator) < case.kept
    if case.dead:
        rolled = valid.roll((-case.shift, -case.shift), (2, 3))
        rolled[..., : case.window, : case.window] = False
        valid = rolled.roll((case.shift, case.shift), (2, 3))
    return q, k, v, valid
