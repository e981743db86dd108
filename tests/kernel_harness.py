"""Compiles the kernels for a CPU that plays a GPU, and calls them on tensors wherever they lie."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch
from epilogue_cases import Epilogue
from torch import Tensor

from engines.plugins.kernels import SOURCES, KernelLibrary, Tokens
from mat_torch import attention

__all__ = [
    "PAPER",
    "Answer",
    "EpilogueAnswer",
    "as_integers",
    "call_epilogue",
    "call_kernels",
    "compile_on_paper",
    "in_double",
    "packed",
    "unpacked",
]

PAPER = Path(__file__).parent / "cuda_on_cpu"
"""What stands in for CUDA's headers."""

_GUARD = 64
"""Elements before and behind each result."""


def compile_on_paper(target: Path, *arguments: str) -> Path:
    """Compile the kernels, and what else the arguments name, with g++ for the CPU."""
    command = [
        *("g++", "-std=c++17", "-O2", "-Wall", "-Werror", "-Wno-unknown-pragmas"),
        *("-I", str(PAPER), "-I", str(SOURCES), "-include", "tensor_cores.h", *arguments),
        *("-x", "c++", str(SOURCES / "kernels.cu"), "-o", str(target)),
    ]
    subprocess.run(command, check=True)
    return target


def as_integers(valid: Tensor) -> Tensor:
    """A mask as int32; what is valid is a number whose low bytes are 0."""
    return valid.to(torch.int32) << 16


@dataclass(frozen=True)
class Answer:
    """What a call of the kernels wrote.

    Attributes:
        y: The attention, like v.
        behind: The mask behind the block, uint8 or int32 [B, H, W].
        alone: The same from the kernel of its own; None for a call without a mask.
        guards: What lies before and behind each of them, which nothing may write.
    """

    y: Tensor
    behind: Tensor
    alone: Tensor | None
    guards: tuple[Tensor, ...]

    @property
    def tidy(self) -> bool:
        """Whether nothing was written outside the results."""
        poison = (
            guard.isnan() if guard.is_floating_point() else guard == 9 for guard in self.guards
        )
        return all(bool(each.all()) for each in poison)


def call_kernels(
    library: KernelLibrary,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    valid: Tensor | None,
    *,
    window: int,
    shift: int,
    heads: int,
    mask_dtype: torch.dtype = torch.bool,
    stream: int = 0,
) -> Answer:
    """Attention and propagation into poisoned memory.

    Args:
        library: The kernels for the device of the tensors.
        q: Queries [B, H, W, C], tokens at one stride.
        k: Keys, likewise.
        v: Values, likewise.
        valid: Bool [B or 1, 1, H, W], or None.
        window: 8 or 16.
        shift: Tokens the grid is rolled by.
        heads: Attention heads.
        mask_dtype: Of the masks that the kernels take and give, torch.bool or torch.int32.
        stream: A cudaStream_t, the current one of PyTorch.
    """
    batch, height, width, channels = q.shape
    shape = (batch, height, width)
    integers = mask_dtype == torch.int32
    kept = None
    if valid is not None:
        kept = valid.expand(batch, 1, height, width).contiguous()
        kept = as_integers(kept) if integers else kept.to(torch.uint8)
    memory = torch.int32 if integers else torch.uint8
    masks = "int32" if integers else "bool"
    y, *y_guards = _poisoned(tuple(v.shape), torch.nan, v.dtype, v.device)
    behind, *behind_guards = _poisoned(shape, 9, memory, v.device)
    alone, *alone_guards = _poisoned(shape, 9, memory, v.device)
    library.attention(
        *(Tokens(x.data_ptr(), x.stride(2)) for x in (q, k, v, y)),
        shape=shape,
        heads=heads,
        head_size=channels // heads,
        window=window,
        shift=shift,
        dtype=str(q.dtype).removeprefix("torch."),
        valid=None if kept is None else kept.data_ptr(),
        propagated=behind.data_ptr(),
        mask_dtype=masks,
        stream=stream,
    )
    if kept is not None:
        library.propagate(
            kept.data_ptr(),
            alone.data_ptr(),
            shape=shape,
            window=window,
            shift=shift,
            mask_dtype=masks,
            stream=stream,
        )
    guards = (*y_guards, *behind_guards, *alone_guards)
    return Answer(y, behind, None if kept is None else alone, guards)


def packed(x: Tensor) -> Tensor:
    """[B, C, H, W] as TensorRT's kHWC8: [B, H, W, C], C padded with NaN to a multiple of 8."""
    x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % 8), value=torch.nan)
    return x.permute(0, 2, 3, 1).contiguous()


def unpacked(x: Tensor, channels: int) -> Tensor:
    """The way back.

    Raises:
        AssertionError: If what lies behind the channels is not 0.
    """
    assert bool((x[..., channels:] == 0).all()), "what lies behind the channels is not 0"
    return x[..., :channels].permute(0, 3, 1, 2)


@dataclass(frozen=True)
class EpilogueAnswer:
    """What a call of the fused epilogue wrote.

    Attributes:
        case: What was called.
        memory: y as it lies there.
        guards: What lies before and behind it, which nothing may write.
    """

    case: Epilogue
    memory: Tensor
    guards: tuple[Tensor, ...]

    def y(self) -> Tensor:
        """The result [B, C, H, W], once the device is done.

        Raises:
            AssertionError: If anything is written outside it, or its padding is not 0.
        """
        assert all(bool(guard.isnan().all()) for guard in self.guards), "written outside the result"
        if not self.case.channels_last:
            return self.memory
        return unpacked(self.memory, self.case.shape[1])


def call_epilogue(
    library: KernelLibrary, case: Epilogue, x: Tensor, parts: dict[str, Tensor], *, stream: int = 0
) -> EpilogueAnswer:
    """The fused epilogue into poisoned memory.

    Args:
        library: The kernels for the device of the tensors.
        case: What is called.
        x: The map [B, C, H, W].
        parts: The case's parts, by name.
        stream: A cudaStream_t, the current one of PyTorch.
    """
    batch, _, height, width = case.shape_of_y
    kept = {name: part.contiguous() for name, part in parts.items()}
    shape: tuple[int, ...] = case.shape_of_y
    if case.channels_last:
        x = packed(x)
        shape = (batch, height, width, x.shape[3])
        kept |= {"skip": packed(kept["skip"])} if "skip" in kept else {}
    y, *guards = _poisoned(shape, torch.nan, x.dtype, x.device)
    library.epilogue(
        x.data_ptr(),
        y.data_ptr(),
        {name: (part.data_ptr(), part.shape[0] == batch) for name, part in kept.items()},
        shape=case.shape,
        dtype=str(x.dtype).removeprefix("torch."),
        channels_last=case.channels_last,
        pad=case.pad,
        gain=case.gain,
        slope=case.slope,
        stream=stream,
    )
    return EpilogueAnswer(case, y, tuple(guards))


def _poisoned(
    shape: tuple[int, ...], value: float, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """A tensor of a value, and what lies before and behind it."""
    count = torch.Size(shape).numel()
    memory = torch.full((count + 2 * _GUARD,), value, dtype=dtype, device=device)
    return memory[_GUARD:-_GUARD].view(shape), memory[:_GUARD], memory[-_GUARD:]


def in_double(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, *, window: int, shift: int, heads: int
) -> Tensor:
    """The reference on the same numbers in FP64."""
    return attention.masked_window_attention(
        q.double(), k.double(), v.double(), valid, window=window, shift=shift, heads=heads
    )
