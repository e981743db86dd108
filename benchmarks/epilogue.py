"""The fused epilogue on a GPU: our kernel beside PyTorch's ways, on the largest maps of mat-512.

    python benchmarks/epilogue.py -o epilogue.json [--batch 1] [--compile-seconds 120]

What is timed stands between two convolutions, in FP16: a filter where the layer resamples, then
demodulation, noise, bias, leaky ReLU, a mask's ratio, the skip connection and the next style, as
each shape has them. The ways are our kernel on maps with channels last (TensorRT's kHWC8) and on
linear ones, and the same expression by PyTorch with channels last, eager and under
``torch.compile`` (max-autotune), begun while ``--compile-seconds`` last.

Each is captured as a CUDA graph of many calls on rotating inputs, larger together than twice the
cache; times are medians of replays, a call. The floor is what is read and written once, over the
bandwidth of a copy in the same run. Exit code 1 if a way is not the expression.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from attention import conditions, microseconds
from torch import Tensor

from engines.plugins.kernels import KernelLibrary, open_kernels
from mat_export.files import atomic_write

BAR = 5e-3
"""Largest ‖a − b‖ / ‖b‖ against FP64, where rounding after each operation lies."""

KERNEL, LINEAR, EAGER, COMPILED = "kernel", "kernel, linear", "eager", "compiled"
SLOPE = 0.2


@dataclass(frozen=True)
class Shape:
    """A layer's epilogue.

    Attributes:
        name: What tables and files call it.
        channels: Of the maps.
        side: Height and width of x.
        pad: Zeros around x for the filter; None where there is none.
        parts: Which of EPILOGUE_PARTS follow.
        relu: Whether there is a leaky ReLU.
    """

    name: str
    channels: int
    side: int
    pad: int | None
    parts: tuple[str, ...] = ()
    relu: bool = True

    @property
    def side_of_y(self) -> int:
        """Height and width of the result."""
        return self.side if self.pad is None else self.side + 2 * self.pad - 2

    def bytes(self, batch: int) -> float:
        """x, y and the parts by map and by pixel in FP16, each once; the noise is all images'."""
        x, y = (batch * self.channels * side**2 for side in (self.side, self.side_of_y))
        pixels = ("noise" in self.parts) + batch * ("ratio" in self.parts)
        return 2.0 * (x + y * (1 + ("skip" in self.parts)) + pixels * self.side_of_y**2)


_STAGE_ONE, _STAGE_TWO = ("scale", "bias"), ("scale", "noise", "bias")
SHAPES = (
    Shape("stage one, 512², up", 192, 514, 0, (*_STAGE_ONE, "skip", "style")),
    Shape("stage one, 512², style", 192, 512, None, (*_STAGE_ONE, "style")),
    Shape("stage one, 512², down", 192, 512, 2, relu=False),
    Shape("stage one, 512², ratio", 192, 512, None, ("ratio",)),
    Shape("stage one, 256², up", 192, 258, 0, (*_STAGE_ONE, "skip", "style")),
    Shape("stage two, 512², up", 64, 514, 0, (*_STAGE_TWO, "skip", "style")),
    Shape("stage two, 512², style", 64, 512, None, (*_STAGE_TWO, "style")),
    Shape("stage two, 512², down", 64, 512, 2, relu=False),
    Shape("stage two, 256², up", 128, 258, 0, (*_STAGE_TWO, "skip", "style")),
    Shape("stage two, 256², down", 128, 256, 2, relu=False),
)


# -- the ways --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inputs:
    """What one call reads, and where the kernel writes: maps with channels last, or linear."""

    x: Tensor
    parts: dict[str, Tensor]
    y: Tensor

    def linear(self) -> Inputs:
        """The same numbers as [B, C, H, W]."""
        parts = {name: part.contiguous() for name, part in self.parts.items()}
        return Inputs(self.x.contiguous(), parts, self.y.contiguous())


def draw(shape: Shape, batch: int, generator: torch.Generator) -> Inputs:
    """Random numbers, maps with channels last."""
    side, channels = shape.side_of_y, shape.channels
    sizes = {
        "noise": (1, 1, side, side),
        "ratio": (batch, 1, side, side),
        "skip": (batch, channels, side, side),
    }

    def numbers(size: tuple[int, ...]) -> Tensor:
        made = torch.randn(size, dtype=torch.float16, device=generator.device, generator=generator)
        return made.to(memory_format=torch.channels_last)

    x = numbers((batch, channels, shape.side, shape.side))
    parts = {name: numbers(sizes.get(name, (batch, channels, 1, 1))) for name in shape.parts}
    y = x.new_full(sizes["skip"], torch.nan).to(memory_format=torch.channels_last)
    return Inputs(x, parts, y)


def expression(shape: Shape) -> Callable[[Tensor, dict[str, Tensor]], Tensor]:
    """The epilogue by PyTorch."""

    def run(x: Tensor, parts: dict[str, Tensor]) -> Tensor:
        t = x
        if shape.pad is not None:
            tap = torch.tensor([1.0, 2.0, 1.0], dtype=x.dtype, device=x.device) / 4.0
            weight = torch.outer(tap, tap).expand(shape.channels, 1, 3, 3)
            t = F.conv2d(t, weight, padding=shape.pad, groups=shape.channels)
        for name in ("scale", "noise", "bias"):
            if name in parts:
                t = t * parts[name] if name == "scale" else t + parts[name]
        t = F.leaky_relu(t, SLOPE) if shape.relu else t
        for name in ("ratio", "skip", "style"):
            if name in parts:
                t = t + parts[name] if name == "skip" else t * parts[name]
        return t

    return run


def kernel(
    shape: Shape, library: KernelLibrary, *, channels_last: bool
) -> Callable[[Inputs], Tensor]:
    """Our kernel."""

    def run(x: Inputs) -> Tensor:
        batch = x.x.shape[0]
        library.epilogue(
            x.x.data_ptr(),
            x.y.data_ptr(),
            {name: (part.data_ptr(), part.shape[0] == batch) for name, part in x.parts.items()},
            shape=(batch, shape.channels, shape.side, shape.side),
            dtype="float16",
            channels_last=channels_last,
            pad=shape.pad,
            slope=SLOPE if shape.relu else 1.0,
            stream=torch.cuda.current_stream().cuda_stream if x.y.is_cuda else 0,
        )
        return x.y

    return run


# -- one shape -------------------------------------------------------------------------------------


def bench(
    shape: Shape, batch: int, library: KernelLibrary, limits: dict[str, float], compiling: bool
) -> dict[str, Any]:
    """Every way through one shape."""
    size, cache = shape.bytes(batch), torch.cuda.get_device_properties(0).L2_cache_size
    generator = torch.Generator("cuda").manual_seed(0)
    sets = [draw(shape, batch, generator) for _ in range(max(4, 1 + int(2 * cache / size)))]
    plain = expression(shape)
    x = sets[0]
    wide = {name: part.double() for name, part in x.parts.items()}
    truth = plain(x.x.double(), wide)
    linear = [own.linear() for own in sets]
    by_kernel = {
        KERNEL: (kernel(shape, library, channels_last=True), sets),
        LINEAR: (kernel(shape, library, channels_last=False), linear),
    }
    ways: dict[str, tuple[Callable[[Inputs], Tensor], list[Inputs]]] = {
        **by_kernel,
        EAGER: (lambda own: plain(own.x, own.parts), sets),
    }
    if compiling:
        torch._dynamo.reset()
        made = torch.compile(plain, mode="max-autotune-no-cudagraphs", dynamic=False)
        ways[COMPILED] = (lambda own: made(own.x, own.parts), sets)
    floor = 1e6 * size / limits["bytes_per_second"]
    entry: dict[str, Any] = {"name": shape.name, "batch": batch, "mb": size / 1e6}
    entry |= {"sets": len(sets), "floor_us": floor, "ways": {}}
    for name, (way, inputs) in ways.items():
        error = float((way(inputs[0]).double() - truth).norm() / truth.norm())
        time_us = microseconds(
            lambda i, way=way, inputs=inputs: way(inputs[i]),  # type: ignore[misc]
            len(inputs),
        )
        entry["ways"][name] = {"error": error, "right": error <= BAR, "us": time_us}
    return entry


def table(report: dict[str, Any]) -> str:
    """The shapes in lines, times in µs; a way that is not the expression has a ``!``."""
    names = (KERNEL, LINEAR, EAGER, COMPILED)
    lines = ["{:26} {:>8} {:>6}".format("shape", "floor", "share")]
    lines[0] += "".join(f"{name:>16}" for name in names)
    for entry in report["shapes"]:
        ways = entry["ways"]
        line = f"{entry['name']:26} {entry['floor_us']:8.1f}"
        line += f" {entry['floor_us'] / ways[KERNEL]['us']:6.0%}"
        for name in names:
            mark = "" if name not in ways or ways[name]["right"] else "!"
            line += f"{ways[name]['us']:15.1f}{mark or ' '}" if name in ways else f"{'—':>15} "
        lines.append(line.rstrip())
    return "\n".join(lines)


def main() -> int:
    """Measure every shape, write the file and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--batch", type=int, default=1, help="images at once")
    parser.add_argument("--compile-seconds", type=float, default=120.0, help="for torch.compile")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("this measures on a GPU, and PyTorch finds none here", file=sys.stderr)
        return 2
    started = time.perf_counter()
    library = open_kernels(torch.cuda.get_device_capability())
    with torch.inference_mode():
        report = {**conditions(), "shapes": []}
        for shape in SHAPES:
            seconds = time.perf_counter() - started
            compiling = seconds < arguments.compile_seconds
            entry = bench(shape, arguments.batch, library, report["limits"], compiling)
            report["shapes"].append(entry)
            print(f"{seconds:5.0f} s  {shape.name}", flush=True)
            torch.cuda.empty_cache()
    atomic_write(arguments.output, json.dumps(report, indent=1) + "\n")
    print(table(report))
    right = all(way["right"] for entry in report["shapes"] for way in entry["ways"].values())
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
