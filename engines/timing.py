"""How long engines take on the GPU, side by side."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines import cuda
from engines.arrays import DeviceArray
from engines.papers import OpenedPlan
from engines.runtime import Engine

__all__ = ["time_engines", "time_plans"]


def time_plans(plans: Iterable[OpenedPlan], inputs: Mapping[str, NDArray[Any]]) -> list[float]:
    """The median milliseconds of each plan, all of them on the GPU at once, as `time_engines`.

    Raises:
        UserError, CudaError, EngineError: As `time_engines`, and if an engine cannot be made.
    """
    with contextlib.ExitStack() as stack:
        engines = [stack.enter_context(Engine(plan.backend, plan.plan)) for plan in plans]
        return [median(times) for times in time_engines(engines, inputs)]


def time_engines(
    engines: Sequence[Engine],
    inputs: Mapping[str, NDArray[Any]],
    *,
    runs: int = 50,
    warmup: int = 10,
) -> list[list[float]]:
    """Time engines by events on the GPU, inputs and outputs there, as CUDA graphs where they can.

    The engines take turns, one run each, so that whatever the GPU's clocks do falls on all of them.

    Args:
        engines: All on one GPU.
        inputs: Arrays by name; those that an engine does not read are left out.
        runs: Timed runs of each.
        warmup: Runs before them, in which graphs are captured.

    Returns:
        For each engine the milliseconds of its timed runs, in order.

    Raises:
        UserError: If the inputs do not fit an engine, or memory is too small.
        CudaError, EngineError: If a run fails.
    """
    times: list[list[float]] = [[] for _ in engines]
    with cuda.on_device(engines[0].device):
        stream, begin, end = cuda.Stream(), cuda.Event(timing=True), cuda.Event(timing=True)
        placed = {name: _placed(array, engines[0].device, stream) for name, array in inputs.items()}
        for turn in range(warmup + runs):
            for engine, own in zip(engines, times, strict=True):
                used = {t.name: placed[t.name] for t in engine.tensors if t.mode == "input"}
                begin.record(stream.handle)
                engine.enqueue(used, stream=stream.handle)
                end.record(stream.handle)
                end.synchronize()
                if turn >= warmup:
                    own.append(end.elapsed_ms(begin))
    return times


def _placed(array: NDArray[Any], device: int, stream: cuda.Stream) -> DeviceArray:
    """A copy of an array on the GPU."""
    staged, memory = cuda.PinnedBuffer(array.nbytes), cuda.DeviceBuffer(array.nbytes)
    np.copyto(staged.view(array.shape, array.dtype), array)
    cuda.copy_to_device(memory.handle, staged.handle, array.nbytes, stream.handle)
    stream.synchronize()
    return DeviceArray(memory.handle, array.shape, array.dtype, device, owner=memory)
