"""Cases of the fused epilogue on which every form of it is held against one formula in FP64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engines.plugins.kernels import EPILOGUE_PARTS

__all__ = [
    "FORMS",
    "HARD",
    "LIFE",
    "NETWORK",
    "Epilogue",
    "any_epilogue",
    "draw",
    "holds",
    "in_double",
    "reference",
]

ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""Of a type, relative: what one rounding costs at most."""

_SLACK = 1e-5
"""Beside that, for what FP32 loses on the way to numbers of the order of 1."""


@dataclass(frozen=True)
class Epilogue:
    """One call, and how its numbers are drawn.

    Attributes:
        shape: B, C, H and W of x.
        pad: Zeros around x for the filter; None does not filter.
        gain: Of the filter.
        slope: Of negative numbers in the leaky ReLU.
        parts: Which of EPILOGUE_PARTS there are.
        shared: Those with one entry for all images.
        channels_last: x, skip and y lie as [B, H, W, C].
    """

    shape: tuple[int, int, int, int] = (1, 8, 6, 8)
    pad: int | None = None
    gain: float = 1.0
    slope: float = 1.0
    parts: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    channels_last: bool = False
    dtype: torch.dtype = torch.float16
    seed: int = 0

    @property
    def shape_of_y(self) -> tuple[int, int, int, int]:
        """B, C, H and W of the result."""
        batch, channels, height, width = self.shape
        more = 0 if self.pad is None else 2 * self.pad - 2
        return (batch, channels, height + more, width + more)

    def shape_of(self, part: str) -> tuple[int, int, int, int]:
        """Of a part."""
        batch, channels, height, width = self.shape_of_y
        batch = 1 if part in self.shared else batch
        if part == "skip":
            return (batch, channels, height, width)
        by_pixel = part in ("noise", "ratio")
        return (batch, 1, height, width) if by_pixel else (batch, channels, 1, 1)


FORMS: dict[str, dict[str, Any]] = {
    "float, linear": {"dtype": torch.float32},
    "half, linear": {"dtype": torch.float16},
    "half, channels last": {"dtype": torch.float16, "channels_last": True},
    "bfloat16, linear": {"dtype": torch.bfloat16},
    "bfloat16, channels last": {"dtype": torch.bfloat16, "channels_last": True},
}
"""Types and layouts of the maps that the kernels have."""

_UP = ("scale", "bias", "skip", "style")

HARD = {
    "a copy": Epilogue(),
    "up": Epilogue((1, 16, 10, 18), 0, 4.0, 0.2, _UP),
    "down": Epilogue((1, 16, 8, 16), 2),
    "the filter keeps the size": Epilogue((1, 8, 7, 9), 1, slope=0.2),
    "the ratio of a partial convolution": Epilogue((1, 8, 12, 8), slope=0.2, parts=("ratio",)),
    "every part": Epilogue((2, 24, 9, 11), 0, 2.0, 0.2, EPILOGUE_PARTS),
    "every part, shared": Epilogue((3, 8, 8, 8), 1, 1.0, 0.2, EPILOGUE_PARTS, EPILOGUE_PARTS),
    "odd channels": Epilogue((2, 13, 6, 10), 2, 1.0, 0.2, EPILOGUE_PARTS, ("noise", "bias")),
    "fewer than eight channels": Epilogue((1, 3, 5, 7), None, 1.0, 0.2, EPILOGUE_PARTS),
    "one pixel of one channel": Epilogue((1, 1, 3, 3), 0, parts=("noise",)),
    "rows that no vector divides": Epilogue((1, 8, 9, 15), None, 1.0, 0.2, EPILOGUE_PARTS),
    "many rows": Epilogue((1, 8, 70, 4), 0, 1.0, 0.2, ("noise", "bias")),
    "a grid of long columns": Epilogue((1, 128, 40, 102), 0, 4.0, 0.2, _UP),
}

LIFE = {name: HARD[name] for name in ("up", "down", "every part", "odd channels")}
"""For plugins, whose kernels hold the others by themselves."""

NETWORK = {
    "512², 192 channels, up": Epilogue((1, 192, 514, 514), 0, 1.0, 0.2, _UP),
    "512², 192 channels, style": Epilogue(
        (1, 192, 512, 512), None, 1.0, 0.2, ("scale", "bias", "style")
    ),
    "512², 192 channels, down": Epilogue((1, 192, 512, 512), 2),
    "512², 192 channels, ratio": Epilogue((1, 192, 512, 512), None, 1.0, 0.2, ("ratio",)),
    "512², 64 channels, up": Epilogue(
        (1, 64, 514, 514), 0, 1.0, 0.2, ("scale", "noise", "bias", "skip", "style"), ("noise",)
    ),
    "512², 64 channels, style": Epilogue(
        (1, 64, 512, 512), None, 1.0, 0.2, ("scale", "noise", "bias", "style"), ("noise",)
    ),
    "256², 192 channels, up": Epilogue((1, 192, 258, 258), 0, 1.0, 0.2, _UP),
    "256², 128 channels, up": Epilogue(
        (1, 128, 258, 258), 0, 1.0, 0.2, ("scale", "noise", "bias", "skip", "style"), ("noise",)
    ),
    "256², 64 channels, down": Epilogue((1, 64, 256, 256), 2),
}
"""Of mat-512, the largest maps: too large for a GPU of paper."""


def any_epilogue(pick: Callable[[Sequence[Any]], Any], *, large: bool = False) -> Epilogue:
    """Any case that the kernels have.

    Args:
        pick: Chooses one of a sequence, as ``random.choice`` does.
        large: Maps for a GPU rather than for a CPU that plays one.
    """
    sides = range(3, 150 if large else 21)
    dtype = pick([torch.float32, torch.float16, torch.bfloat16])
    return Epilogue(
        (pick((1, 2, 3)), pick(range(1, 100 if large else 26)), pick(sides), pick(sides)),
        pick([None, 0, 1, 2]),
        pick([1.0, 4.0, 0.3]),
        pick([1.0, 0.2]),
        tuple(part for part in EPILOGUE_PARTS if pick([True, False])),
        tuple(part for part in EPILOGUE_PARTS if pick([True, False])),
        dtype != torch.float32 and pick([True, False]),
        dtype,
        pick(range(2**32)),
    )


def draw(case: Epilogue) -> tuple[Tensor, dict[str, Tensor]]:
    """x and the parts, [B, C, H, W] each, of the case's type."""
    generator = torch.Generator().manual_seed(case.seed)
    x = torch.randn(case.shape, generator=generator).to(case.dtype)
    parts = {
        name: torch.randn(case.shape_of(name), generator=generator).to(case.dtype)
        for name in EPILOGUE_PARTS
        if name in case.parts
    }
    return x, parts


def reference(case: Epilogue, x: Tensor, parts: dict[str, Tensor]) -> Tensor:
    """The formula by PyTorch, in the type of x."""
    t = x
    if case.pad is not None:
        tap = torch.tensor([1.0, 2.0, 1.0], dtype=x.dtype, device=x.device)
        weight = (torch.outer(tap, tap) * (case.gain / 16.0)).expand(x.shape[1], 1, 3, 3)
        t = F.conv2d(t, weight, padding=case.pad, groups=x.shape[1])
    t = t * parts["scale"] if "scale" in parts else t
    t = t + parts["noise"] if "noise" in parts else t
    t = t + parts["bias"] if "bias" in parts else t
    t = F.leaky_relu(t, case.slope)
    t = t * parts["ratio"] if "ratio" in parts else t
    t = t + parts["skip"] if "skip" in parts else t
    return t * parts["style"] if "style" in parts else t


def in_double(case: Epilogue, x: Tensor, parts: dict[str, Tensor]) -> Tensor:
    """The formula in FP64, on the same numbers."""
    return reference(case, x.double(), {name: part.double() for name, part in parts.items()})


def holds(case: Epilogue, y: Tensor, expected: Tensor) -> None:
    """Hold each number to one rounding and FP32's own errors.

    Raises:
        AssertionError: If one is further off.
    """
    error = (y.double() - expected).abs()
    bar = ROUNDING[case.dtype] * expected.abs() + _SLACK * expected.abs().amax().clamp(min=1.0)
    worst = float((error / bar).max())
    assert worst <= 1.0, f"{case}: {worst:.2f} times what is allowed"
