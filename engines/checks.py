"""What of TensorRT this machine has, for `mat-export doctor`."""

from __future__ import annotations

from engines.backend import Absent, Backend, Gpu, find_backends, find_gpu
from engines.plugins.library import cached_library
from mat_export.contract import UserError

__all__ = ["Row", "examine_engines"]

Row = tuple[str, bool | None, str]
"""What was looked at; whether it works, None where it is optional and absent; the details."""


def examine_engines() -> list[Row]:
    """The GPU that engines would run on, every backend, and the plugin library for it."""
    rows: list[Row] = []
    gpu = None
    try:
        gpu = find_gpu()
    except UserError as error:
        rows.append(("GPU for engines", None, str(error)))
    else:
        capability = ".".join(map(str, gpu.capability))
        words = f"{gpu.name}, compute capability {capability}, driver for CUDA {gpu.driver}"
        memory = f"{gpu.free_mib} of {gpu.total_mib} MiB free"
        rows.append(("GPU for engines", True, f"{words}, {memory}"))
    for found in find_backends():
        if isinstance(found, Absent):
            works = False if "does not import" in found.why else None
            rows.append((found.name, works, found.why))
            continue
        runs = gpu is not None and found.runs_on(gpu.capability)
        rows.append(
            (found.name, True if runs or found.builds_without_gpu else None, _words(found, runs))
        )
        if gpu is not None and runs and found.has_plugin_layers:
            rows.append(_plugin_library(found, gpu))
    return rows


def _plugin_library(found: Backend, gpu: Gpu) -> Row:
    """The library that engines of a backend would call here."""
    name = f"plugin library for {found.name}"
    try:
        library = cached_library(found.major, gpu.capability)
    except UserError as error:
        return name, None, str(error)
    if library is None:
        return name, None, "not built yet: 'mat-export trt' does where nvcc, CMake and headers are"
    return name, True, str(library)


def _words(found: Backend, runs: bool) -> str:
    """A usable backend in a line."""
    parts = [f"{found.version}: {', '.join(sorted(found.precisions))}, ONNX opset {found.opset}"]
    parts.append("runs on this GPU" if runs else "does not run on this machine")
    if found.builds_without_gpu:
        parts.append(f"builds without a GPU for {', '.join(found.targets)}")
    return "; ".join(parts)
