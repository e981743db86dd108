"""Masked window attention on a GPU: our kernel beside PyTorch's ways, for the network's blocks.

    python benchmarks/attention.py -o attention.json [--batches 1,8] [--compile-seconds 70]

What is timed is everything between q, k, v and the map of valid tokens, which are ready, and the
result in its place: roll, cut, masks, attention and the way back, in FP16. The others are

- ``SDPA``: ``scaled_dot_product_attention`` between roll and cut, its additive mask made of the
  constant region mask and the valid tokens; heads of 30 features as they are, or padded to 32,
  which its fused kernels ask for. ``mask given`` has that mask ready, which no network has;
- ``reference``: the PyTorch reference, its region mask ready;
- both under ``torch.compile`` (max-autotune), begun while ``--compile-seconds`` last, and shifted
  blocks at the first batch first; the file says which were left out. FlexAttention is not there.

Each is captured as a CUDA graph of many calls on rotating inputs, larger together than twice the
cache (``cold``), or on two inputs that stay in it (``warm``); times are medians of replays, a call.
The floor is the larger of bytes over bandwidth and FLOP over rate, both measured in the same run;
``launch`` is what the smallest kernel takes in such a graph. ``--tensorrt FILE`` joins what
``attention_tensorrt.py`` measured of TensorRT on the same GPU just before.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from attention_blocks import BAR, HEAD_SIZE, HEADS, Block, blocks, count_of_sets
from torch import Tensor

from engines.plugins.kernels import KernelLibrary, Tokens, open_kernels
from mat_export.files import atomic_write
from mat_torch import attention
from mat_torch.config import MASKED_LOGIT

KERNEL, PROPAGATING = "kernel", "kernel, and propagation"


# -- the ways --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inputs:
    """What one call reads, and where the kernel writes.

    Attributes:
        q: [B, H, W, C], scaled; k and v likewise.
        valid: Bool [B, 1, H, W].
        mask: The additive mask of SDPA, [B·windows, 1, n, n].
        y: Like q.
        propagated: Bool, like valid.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    valid: Tensor
    mask: Tensor
    y: Tensor
    propagated: Tensor


Way = Callable[[Inputs], Tensor]
TensorWay = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""Called with q, k, v, valid and mask, as torch.compile likes it."""


def region_mask(block: Block, device: str) -> Tensor:
    """The constant region mask [windows, n, n], FP16."""
    side = block.side
    return attention.region_bias(side, side, block.window, block.shift).to(device, torch.float16)


def additive_mask(valid: Tensor, regions: Tensor, window: int, shift: int) -> Tensor:
    """SDPA's mask [B·windows, 1, n, n] of the region mask and bool [B, 1, H, W]."""
    tokens = valid.permute(0, 2, 3, 1)
    tokens = torch.roll(tokens, (-shift, -shift), (1, 2)) if shift else tokens
    keys = attention.cut_windows(tokens, window)[..., 0]  # [B, windows, n]
    invalid = torch.where(keys, 0.0, MASKED_LOGIT).to(regions.dtype)
    return (regions[None] + invalid[:, :, None, :]).flatten(0, 1)[:, None]


def by_sdpa(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, window: int, shift: int, head_size: int
) -> Tensor:
    """Roll, cut, attend, and the same way back; heads padded with zeros to `head_size`."""
    batch, height, width, _ = q.shape

    def split(x: Tensor) -> Tensor:  # [B·windows, heads, n, head_size]
        x = torch.roll(x, (-shift, -shift), (1, 2)) if shift else x
        x = torch.unflatten(attention.cut_windows(x, window).flatten(0, 1), 2, (HEADS, HEAD_SIZE))
        return F.pad(x.transpose(1, 2), (0, head_size - HEAD_SIZE))

    y = F.scaled_dot_product_attention(split(q), split(k), split(v), attn_mask=mask, scale=1.0)
    y = torch.unflatten(y[..., :HEAD_SIZE].transpose(1, 2).flatten(2), 0, (batch, -1))
    y = attention.join_windows(y, window, height, width)
    return torch.roll(y, (shift, shift), (1, 2)) if shift else y


def pytorch_ways(block: Block, regions: Tensor) -> dict[str, TensorWay]:
    """PyTorch's ways, by name."""
    window, shift = block.window, block.shift

    def sdpa(head_size: int) -> TensorWay:
        def way(q: Tensor, k: Tensor, v: Tensor, valid: Tensor, mask: Tensor) -> Tensor:
            made = additive_mask(valid, regions, window, shift)
            return by_sdpa(q, k, v, made, window, shift, head_size)

        return way

    def mask_given(head_size: int) -> TensorWay:
        def way(q: Tensor, k: Tensor, v: Tensor, valid: Tensor, mask: Tensor) -> Tensor:
            return by_sdpa(q, k, v, mask, window, shift, head_size)

        return way

    def reference(q: Tensor, k: Tensor, v: Tensor, valid: Tensor, mask: Tensor) -> Tensor:
        bias = regions if shift else None
        return attention.masked_window_attention(
            q, k, v, valid, window=window, shift=shift, heads=HEADS, regions=bias
        )

    return {
        "SDPA, heads of 30": sdpa(30),
        "SDPA, heads of 32": sdpa(32),
        "SDPA, mask given, heads of 30": mask_given(30),
        "SDPA, mask given, heads of 32": mask_given(32),
        "reference": reference,
    }


COMPILED = ("SDPA, heads of 32", "reference", "SDPA, mask given, heads of 32")
"""The ways that are compiled too, first things first."""


def kernel_ways(block: Block, library: KernelLibrary) -> dict[str, Way]:
    """Our kernel alone, and with the mask behind the block."""

    def run(x: Inputs, *, propagate: bool) -> Tensor:
        tokens = (Tokens(t.data_ptr(), t.stride(2)) for t in (x.q, x.k, x.v, x.y))
        library.attention(
            *tokens,
            shape=block.shape[:3],
            heads=HEADS,
            head_size=HEAD_SIZE,
            window=block.window,
            shift=block.shift,
            dtype="float16",
            valid=x.valid.data_ptr(),
            propagated=x.propagated.data_ptr() if propagate else None,
            stream=torch.cuda.current_stream().cuda_stream if x.y.is_cuda else 0,
        )
        return x.y

    return {
        KERNEL: functools.partial(run, propagate=False),
        PROPAGATING: functools.partial(run, propagate=True),
    }


def draw(block: Block, regions: Tensor, generator: torch.Generator) -> Inputs:
    """Random tokens, a tenth of them valid."""
    device = regions.device
    options: dict[str, Any] = {"device": device, "generator": generator}
    q, k, v = (torch.randn(block.shape, dtype=torch.float16, **options) for _ in range(3))
    q = q * HEAD_SIZE**-0.5
    valid = torch.rand(block.batch, 1, block.side, block.side, **options) < 0.1
    mask = additive_mask(valid, regions, block.window, block.shift)
    y = torch.full_like(q, torch.nan)
    return Inputs(q, k, v, valid, mask, y, torch.zeros_like(valid))


def expected(block: Block, x: Inputs) -> Tensor:
    """The reference in FP64."""
    q, k, v = x.q.double(), x.k.double(), x.v.double()
    return attention.masked_window_attention(
        q, k, v, x.valid, window=block.window, shift=block.shift, heads=HEADS
    )


# -- time ------------------------------------------------------------------------------------------


def microseconds(run: Callable[[int], Any], calls: int) -> float:
    """Median time of a call in a CUDA graph of `calls` calls, ``run(0)`` to ``run(calls − 1)``."""
    stream: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        for i in range(3):
            run(i % calls)
        torch.cuda.synchronize()
        graph.capture_begin()
        for i in range(calls):
            run(i)
        graph.capture_end()
        times: list[float] = []
        started = time.perf_counter()
        while len(times) < 13 or (time.perf_counter() - started < 0.08 and len(times) < 103):
            begin, end = torch.cuda.Event(True), torch.cuda.Event(True)  # type: ignore[no-untyped-call]
            begin.record(stream)
            graph.replay()
            end.record(stream)
            end.synchronize()
            times.append(begin.elapsed_time(end))
    return 1e3 * statistics.median(times[3:]) / calls


def conditions() -> dict[str, Any]:
    """Where a report's times come from, and what the GPU can do there."""
    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "type": "float16",
        "limits": ceilings(),
    }


def ceilings() -> dict[str, float]:
    """What the GPU does at most: copied bytes, products in FP16, and the launch of a kernel."""
    source = torch.randn(1 << 28, device="cuda")
    target, small = torch.empty_like(source), torch.zeros(1, device="cuda")
    a, b = (torch.randn(8192, 8192, device="cuda").half() for _ in range(2))
    copy = microseconds(lambda i: target.copy_(source), 5)
    product = microseconds(lambda i: a @ b, 5)
    return {
        "bytes_per_second": 2.0 * source.nbytes / copy * 1e6,
        "flop_per_second": 2.0 * 8192.0**3 / product * 1e6,
        "launch_us": microseconds(lambda i: small.add_(1.0), 100),
    }


# -- compiling -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compilation:
    """What torch.compile made of a way, or why it made nothing.

    Attributes:
        way: What to call.
        said: For the file: seconds, or the reason.
    """

    way: TensorWay | None
    said: dict[str, Any]


def compile_order(every: list[Block]) -> list[tuple[Block, str]]:
    """What to compile, first things first: early batches, what has most to do, then COMPILED."""
    alike = {(b.side, b.batch): b for b in every}  # the shifted one of each, where there are two

    def rank(job: tuple[Block, str]) -> tuple[int, bool, int]:
        block, name = job
        first = block is not alike[block.side, block.batch]
        batches = list(dict.fromkeys(b.batch for b in every))
        return batches.index(block.batch), first, COMPILED.index(name)

    return sorted(itertools.product(every, COMPILED), key=rank)


def compile_ways(every: list[Block], seconds: float) -> dict[tuple[Block, str], Compilation]:
    """Compile in that order until the time is over."""
    import torch._dynamo.config

    torch._dynamo.config.recompile_limit = 1000  # each block is another shape
    found: dict[tuple[Block, str], Compilation] = {}
    started = time.perf_counter()
    for block, name in compile_order(every):
        begun = time.perf_counter()
        if begun - started > seconds:
            said = {"left_out": "the time for compiling was over"}
            found[block, name] = Compilation(None, said)
            continue
        regions = region_mask(block, "cuda")
        x = draw(block, regions, torch.Generator("cuda").manual_seed(0))
        way = torch.compile(
            pytorch_ways(block, regions)[name], mode="max-autotune-no-cudagraphs", dynamic=False
        )
        try:
            way(x.q, x.k, x.v, x.valid, x.mask)
            torch.cuda.synchronize()
        except Exception as error:  # the compiler's errors share no base
            reason = f"{type(error).__name__}: {str(error)[:300]}"
            found[block, name] = Compilation(None, {"failed": reason})
            continue
        took = time.perf_counter() - begun
        found[block, name] = Compilation(way, {"compile_seconds": took})
        print(f"compiled in {took:4.1f} s: {name}, {block.name}", flush=True)
    return found


# -- one block -------------------------------------------------------------------------------------


def bench(
    block: Block,
    library: KernelLibrary,
    limits: dict[str, float],
    compiled: dict[tuple[Block, str], Compilation],
) -> dict[str, Any]:
    """Every way through one block."""
    regions = region_mask(block, "cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    sets = [draw(block, regions, generator) for _ in range(count_of_sets(block, cache))]
    truth = expected(block, sets[0])
    plain = pytorch_ways(block, regions)
    ways = kernel_ways(block, library)
    entries: dict[str, dict[str, Any]] = {}
    for name in COMPILED:
        made = compiled[block, name]
        entries[f"{name}, compiled"] = dict(made.said)
        if made.way is not None:
            plain[f"{name}, compiled"] = made.way
    for name, of_tensors in plain.items():
        ways[name] = functools.partial(_on_tensors, of_tensors)
    for name, way in ways.items():
        entry = entries.setdefault(name, {})
        try:
            entry["error"] = float((way(sets[0]).double() - truth).norm() / truth.norm())
            entry["right"] = entry["error"] <= BAR
            entry["cold_us"] = microseconds(lambda i, way=way: way(sets[i]), len(sets))
            entry["warm_us"] = microseconds(lambda i, way=way: way(sets[i % 2]), 32)
        except RuntimeError as error:
            entry["failed"] = str(error)[:300]
            torch.cuda.synchronize()
    floor = {
        "bytes_us": 1e6 * block.bytes / limits["bytes_per_second"],
        "flop_us": 1e6 * block.flop / limits["flop_per_second"],
    }
    return {
        "name": block.name,
        "batch": block.batch,
        "sets": len(sets),
        "mflop": block.flop / 1e6,
        "mb": block.bytes / 1e6,
        "floor_us": max(floor.values()),
        **floor,
        "ways": entries,
    }


def _on_tensors(way: TensorWay, x: Inputs) -> Tensor:
    return way(x.q, x.k, x.v, x.valid, x.mask)


def compare(report: dict[str, Any]) -> None:
    """Add to each block the best of the others and the kernel's ratios, cold and warm."""
    for block in report["blocks"]:
        own = block["ways"][KERNEL]
        for state in ("cold_us", "warm_us"):
            others = {
                name: way[state]
                for name, way in block["ways"].items()
                if name not in (KERNEL, PROPAGATING) and state in way and way.get("right", True)
            }
            if state not in own or not others:
                continue
            best = min(others, key=lambda name: others[name])
            block[state.removesuffix("_us")] = {
                "kernel_us": own[state],
                "best_of_the_others": best,
                "best_us": others[best],
                "times_faster": others[best] / own[state],
                "share_of_the_floor": block["floor_us"] / own[state],
            }


def join_tensorrt(report: dict[str, Any], measured: dict[str, Any]) -> None:
    """Add the ways of ``attention_tensorrt.py``'s file to the blocks of the same names."""
    report["tensorrt"] = {name: fact for name, fact in measured.items() if name != "blocks"}
    for block in report["blocks"]:
        block["ways"].update(measured["blocks"].get(block["name"], {}))


def table(report: dict[str, Any]) -> str:
    """The comparison in lines: times in µs, cold and warm."""
    heads = ("block", "kernel", "floor", "share", "best other", "faster", "which, cold / warm")
    lines = ["{:40} {:>15} {:>6} {:>6} {:>15} {:>13}  {}".format(*heads)]
    for block in report["blocks"]:
        if "cold" not in block:
            lines.append(f"{block['name']:40} {block['ways'][KERNEL]}")
            continue
        cold, warm = block["cold"], block["warm"]
        lines.append(
            f"{block['name']:40} {cold['kernel_us']:7.2f}/{warm['kernel_us']:7.2f} "
            f"{block['floor_us']:6.2f} {cold['share_of_the_floor']:6.0%} "
            f"{cold['best_us']:7.2f}/{warm['best_us']:7.2f} "
            f"{cold['times_faster']:5.2f}×/{warm['times_faster']:5.2f}×  "
            f"{cold['best_of_the_others']} / {warm['best_of_the_others']}"
        )
        wrong = [name for name, way in block["ways"].items() if not way.get("right", True)]
        lines += [f"  above its bar, not compared: {name}" for name in wrong]
    return "\n".join(lines)


def main() -> int:
    """Measure every block, write the file and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--batches", default="1,8", help="separated by commas")
    parser.add_argument("--compile-seconds", type=float, default=70.0, help="for torch.compile")
    parser.add_argument("--tensorrt", type=Path, help="JSON of attention_tensorrt.py")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("this measures on a GPU, and PyTorch finds none here", file=sys.stderr)
        return 2
    started = time.perf_counter()
    library = open_kernels(torch.cuda.get_device_capability())
    with torch.inference_mode():
        report = {**conditions(), "blocks": []}
        every = blocks([int(n) for n in arguments.batches.split(",")])
        compiled = compile_ways(every, arguments.compile_seconds)
        for block in every:
            report["blocks"].append(bench(block, library, report["limits"], compiled))
            print(f"{time.perf_counter() - started:5.0f} s  {block.name}", flush=True)
            torch.cuda.empty_cache()
    if arguments.tensorrt is not None:
        join_tensorrt(report, json.loads(arguments.tensorrt.read_text(encoding="utf-8")))
    compare(report)
    report["seconds"] = time.perf_counter() - started
    atomic_write(arguments.output, json.dumps(report, indent=1) + "\n")
    for name, value in report["limits"].items():
        print(f"{name}: {value:.4g}")
    print(table(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
