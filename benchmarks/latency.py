"""Latency on a GPU: an engine against PyTorch, in one run on one machine.

    python benchmarks/latency.py torch PRESET -o torch.json [--batch 1] [--wait FILE]
    python benchmarks/latency.py engine MAT.plan -o engine.json [--profile profile.json]
    python benchmarks/latency.py turns A.plan B.plan … -o turns.json

TensorRT and PyTorch may live in different Pythons (TensorRT 8.6 stops at 3.10), so each half writes
its own JSON; run them one right after the other. ``torch`` compiles first; with ``--wait`` it then
waits for FILE to appear, so that the compilation may overlap with the build of the engine and the
measurement with nothing: both halves want the GPU to themselves. ``turns`` times engines of one
network against each other, one call each in turn, three times over.

Times are of the device, by CUDA events around each call, inputs and outputs on the GPU; medians and
99th percentiles of ``--runs`` calls after a warm-up. PyTorch runs three ways: the reference model
eager in FP32 (no TF32); the inference form in half precision, channels_last; and that form under
``torch.compile``, whose modes come from ``--modes``, its resampling filters said so that they fuse.
``--convolutions`` names who may offer convolutions to max-autotune: with Triton among them it takes
many minutes. ``--kernels`` leaves attention and mask propagation to our CUDA kernels. Errors
against FP32 are reported beside.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np

WARMUP = 10


def summary(milliseconds: list[float]) -> dict[str, float]:
    """Median and 99th percentile."""
    p50, p99 = (float(np.percentile(milliseconds, p)) for p in (50, 99))
    return {"p50_ms": p50, "p99_ms": p99, "runs": len(milliseconds)}


# -- PyTorch ---------------------------------------------------------------------------------------


def plain_operators(keep: Collection[str] = ()) -> None:
    """Let torch.compile see into the custom operators: their plain functions in their places."""
    from mat_export import ops

    for name in set(ops.__all__) - set(keep):
        operator = getattr(ops, name)
        setattr(ops, name, operator._init_fn)


def shifted_sums(model: Any) -> int:
    """Say every resampling filter as sums of shifted maps, which torch.compile fuses.

    cuDNN takes 3.2 ms (H200, FP16) for the depthwise convolution of 192 channels at 512², more than
    all the rest of a stage, so as a convolution it would make PyTorch look worse than it is.

    Returns:
        How many filters there were.
    """
    import torch.nn.functional as F

    from mat_export.inference import Blur

    def filtered(x: Any, padding: Any, taps: list[float]) -> Any:
        scale = 1.0 / sum(taps)  # rank one: the filter is the outer product of its row sums, scaled
        x = F.pad(x, padding)
        height, width = x.shape[2] - 3, x.shape[3] - 3
        x = sum(taps[i] * x[:, :, i : i + height] for i in range(4))
        return sum(taps[i] * scale * x[..., i : i + width] for i in range(4))

    blurs = [module for module in model.modules() if isinstance(module, Blur)]
    for blur in blurs:
        sums = blur.weight[0, 0].sum(0).tolist()
        blur.forward = functools.partial(filtered, padding=blur.padding, taps=sums)
    return len(blurs)


def bench_torch(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every PyTorch way, compiled first and timed last."""
    import torch
    import torch._inductor.config

    from mat_export.bench import example_inputs
    from mat_export.contract import GraphSpec
    from mat_export.inference import InferenceGenerator
    from mat_torch import preset, random_checkpoint

    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    torch._inductor.config.max_autotune_conv_backends = arguments.convolutions
    keep: tuple[str, ...] = ()
    if arguments.kernels:
        from engines.plugins.torch_operators import use_kernels, warm_up

        keep = ("masked_window_attention", "mask_propagation")
        use_kernels()
        if not warm_up():
            raise SystemExit("--kernels: there are no kernels for this GPU, see the warning above")
    checkpoint = random_checkpoint(preset(arguments.model[0]), 0)
    spec = GraphSpec(checkpoint.config, batch=arguments.batch)
    arrays = example_inputs(spec, arguments.batch)
    names = [tensor.name for tensor in spec.inputs]
    full = [torch.from_numpy(arrays[name]).cuda() for name in names]
    eager = checkpoint.build().cuda()
    half = InferenceGenerator(checkpoint.build(), spec).cuda().half()
    half = half.to(memory_format=torch.channels_last)
    plain = copy.deepcopy(half)
    halves = [x.half() for x in full]
    halves = [x.to(memory_format=torch.channels_last) if x.ndim == 4 else x for x in halves]
    ways: dict[str, Callable[[], Any]] = {
        "eager FP32": lambda: eager(*full)[0],
        "inference form, FP16 channels_last": lambda: plain(*halves)[0],
    }
    report: dict[str, Any] = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "gpu": torch.cuda.get_device_name(),
        "batch": arguments.batch,
        "preset": arguments.model[0],
        "convolutions": arguments.convolutions,
        "kernels": arguments.kernels,
        "ways": {},
    }
    with torch.inference_mode():
        reference = ways["eager FP32"]()
        half(*halves)
        plain_operators(keep)
        filters = shifted_sums(half)
        print(f"{filters} resampling filters as shifted sums", flush=True)
        for mode in arguments.modes.split(","):
            started = time.perf_counter()
            torch._dynamo.reset()
            compiled = torch.compile(half, mode=mode)
            try:
                for _ in range(3):
                    compiled(*halves)
                torch.cuda.synchronize()
            except Exception as error:
                report["ways"][f"compiled {mode}"] = {"failed": f"{type(error).__name__}: {error}"}
                continue
            seconds = time.perf_counter() - started
            report["ways"][f"compiled {mode}"] = {"compile_seconds": seconds}
            ways[f"compiled {mode}"] = lambda run=compiled: run(*halves)[0]  # type: ignore[misc]
            print(f"compiled {mode} in {seconds:.0f} s", flush=True)
        if arguments.warm:
            return report
        while arguments.wait is not None and not arguments.wait.exists():
            time.sleep(0.2)
        hole = full[1].expand_as(reference) < 0.5
        for name, run in ways.items():
            torch.cuda.reset_peak_memory_stats()
            times = []
            output = run().float().clone()
            for i in range(WARMUP + arguments.runs):
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                run()
                end.record()
                end.synchronize()
                if i >= WARMUP:
                    times.append(begin.elapsed_time(end))
            difference = (output - reference)[hole].double()
            span = float(reference.max() - reference.min())
            error = float(difference.square().mean())
            entry = report["ways"].setdefault(name, {})
            entry |= summary(times)
            entry["finite"] = bool(torch.isfinite(output).all())
            entry["hole_psnr_db"] = 10 * float(np.log10(span**2 / error)) if error else None
            entry["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
            print(name, entry, flush=True)
    return report


# -- TensorRT --------------------------------------------------------------------------------------


def bench_engine(arguments: argparse.Namespace) -> dict[str, Any]:
    """The engine with and without CUDA graphs, and from NumPy to NumPy."""
    from engines import cuda
    from engines.papers import open_plan
    from engines.runtime import Engine
    from engines.timing import time_engines
    from mat_export.bench import example_inputs

    opened = open_plan(arguments.model[0])
    arrays = example_inputs(opened.spec, arguments.batch)
    report: dict[str, Any] = {
        "engine": opened.backend.label,
        "gpu": cuda.device_info().name,
        "batch": int(arrays["image"].shape[0]),
        "precision": opened.spec.precision,
        "build_seconds": opened.manifest.get("build_seconds"),
        "plan_mb": opened.manifest["bytes"] / 1e6,
        "layers": opened.manifest.get("layers"),
        "ways": {},
    }
    for graphs in (False, True):
        before = cuda.free_memory()
        with Engine(opened.backend, opened.plan, graphs=graphs) as engine:
            names = [t.name for t in engine.tensors if t.mode == "input"]
            feed = {name: np.ascontiguousarray(arrays[name]) for name in names}
            host = engine.run(feed)
            taken = (before - cuda.free_memory()) / 2**20
            (times,) = time_engines([engine], feed, runs=arguments.runs, warmup=WARMUP)
            entry = summary(times)
            entry["gpu_mib"] = taken
            entry["captured"] = engine.graphs and engine.graphs_refused is None
            walls = []
            for _ in range(20):
                started = time.perf_counter()
                again = engine.run(feed)
                walls.append(1e3 * (time.perf_counter() - started))
            entry["numpy_to_numpy_p50_ms"] = float(np.median(walls))
            entry["replay_equal"] = all(
                np.array_equal(again[name], host[name], equal_nan=True) for name in host
            )
            name = "with CUDA graph" if graphs else "without CUDA graph"
            report["ways"][name] = entry
            print(name, entry, flush=True)
    if arguments.profile is not None:
        arguments.profile.write_text(json.dumps(profile(opened, arrays), indent=1) + "\n")
    return report


def bench_turns(arguments: argparse.Namespace) -> dict[str, Any]:
    """Medians of engines that take turns, as CUDA graphs, in three rounds."""
    from engines import cuda
    from engines.papers import open_plan
    from engines.timing import time_plans
    from mat_export.bench import example_inputs

    opened = [open_plan(path) for path in arguments.model]
    arrays = example_inputs(opened[0].spec, arguments.batch)
    rounds = [time_plans(opened, arrays) for _ in range(3)]
    report = {
        "engine": opened[0].backend.label,
        "gpu": cuda.device_info().name,
        "batch": int(arrays["image"].shape[0]),
        "p50_ms": dict(zip(arguments.model, zip(*rounds, strict=True), strict=True)),
    }
    for path, times in report["p50_ms"].items():
        print(path, *(f"{time:.2f} ms" for time in times), flush=True)
    return report


def profile(opened: Any, arrays: dict[str, Any]) -> dict[str, float]:
    """Median milliseconds of each of the engine's layers; with a profiler they run one by one."""
    from engines import cuda

    module = opened.backend.module
    engine = opened.backend.deserialize(opened.plan)
    context = opened.backend.create_context(engine)
    stream, held = cuda.Stream(), []
    for i in range(engine.num_io_tensors):
        name = engine.get_tensor_name(i)
        if name in arrays and -1 in tuple(engine.get_tensor_shape(name)):
            context.set_input_shape(name, arrays[name].shape)
    for i in range(engine.num_io_tensors):
        name = engine.get_tensor_name(i)
        dtype = np.dtype(module.nptype(engine.get_tensor_dtype(name)))
        shape = tuple(context.get_tensor_shape(name))
        array = np.ascontiguousarray(arrays.get(name, np.zeros(shape, dtype)))
        memory = cuda.DeviceBuffer(array.nbytes)
        cuda.copy_to_device(memory.handle, array.ctypes.data, array.nbytes, stream.handle)
        stream.synchronize()
        context.set_tensor_address(name, memory.handle)
        held.append(memory)
    times: dict[str, list[float]] = {}

    class Profiler(module.IProfiler):  # type: ignore[misc, name-defined]
        """Collects what TensorRT reports."""

        def __init__(self) -> None:
            module.IProfiler.__init__(self)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            times.setdefault(layer_name, []).append(ms)

    context.profiler = Profiler()
    for _ in range(20):
        context.execute_async_v3(stream.handle)
        stream.synchronize()
    return {name: float(np.median(values[5:])) for name, values in times.items()}


PARTS = {"torch": bench_torch, "engine": bench_engine, "turns": bench_turns}


def main() -> None:
    """Run one part and write its figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("model", nargs="+", help="a preset for torch, a plan for an engine")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--modes", default="reduce-overhead,max-autotune")
    parser.add_argument("--convolutions", default="ATEN", help="of max-autotune: ATEN,TRITON")
    parser.add_argument("--kernels", action="store_true", help="attention by our CUDA kernels")
    parser.add_argument("--warm", action="store_true", help="compile, which fills torch's cache")
    parser.add_argument("--wait", type=Path)
    parser.add_argument("--profile", type=Path)
    arguments = parser.parse_args()
    if arguments.part != "turns" and len(arguments.model) > 1:
        parser.error(f"{arguments.part} takes one model")
    report = PARTS[arguments.part](arguments)
    arguments.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
