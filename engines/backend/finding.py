"""Which TensorRTs are installed, and which of them to use."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

from engines.backend.base import Backend, numbers_of
from engines.backend.gpu import capability_text, find_gpu
from engines.backend.rtx import TensorRTRtx
from engines.backend.tensorrt8 import TensorRT8
from engines.options import BACKENDS, parse_target
from mat_export.contract import UserError

__all__ = ["Absent", "find_backends", "is_for_weak_types", "open_backend"]

_EXTRAS = {"tensorrt": "trt", "tensorrt-rtx": "rtx"}
"""The extra of mat-export that installs each backend."""


@dataclass(frozen=True)
class Absent:
    """A backend that cannot be used here.

    Attributes:
        name: One of BACKENDS.
        why: The reason, and what to do.
    """

    name: str
    why: str


def find_backends() -> tuple[Backend | Absent, ...]:
    """Every backend in the order of BACKENDS: usable, or why not."""
    return tuple(_find(name) for name in BACKENDS)


def open_backend(choice: str = "auto", *, target: str | None = None) -> Backend:
    """The backend to use.

    Args:
        choice: One of BACKENDS, or ``auto``: with a target the one that builds without a GPU, else
            the first that is installed and runs on this machine's GPU.
        target: ``sm_NN`` or None.

    Raises:
        UserError: If there is none, with the way to install one; or if it does not know the target.
    """
    if choice not in ("auto", *BACKENDS):
        known = ", ".join(("auto", *BACKENDS))
        raise UserError(f"the backend is one of {known}, got '{choice}'")
    if choice == "auto" and target is None:
        return _open_for_gpu()
    found = _find("tensorrt-rtx" if choice == "auto" else choice)
    if isinstance(found, Absent):
        raise UserError(f"{found.name} is {found.why}")
    if target is not None:
        found.check_target(parse_target(target))
    return found


def is_for_weak_types(opset: int) -> bool:
    """Whether a file of an opset is for a weakly typed backend: one of ours parses no newer."""
    return opset <= TensorRT8.opset


def _open_for_gpu() -> Backend:
    """The preferred backend that runs on this machine's GPU."""
    try:
        gpu = find_gpu()
    except UserError as error:
        raise UserError(
            f"{error}; to build for a GPU that is not here, name it with --target sm_NN "
            "(TensorRT-RTX, pip install 'mat-export[rtx]')"
        ) from error
    reasons = []
    for found in find_backends():
        if isinstance(found, Absent):
            reasons.append(f"{found.name} is {found.why}")
        elif found.runs_on(gpu.capability):
            return found
        else:
            reasons.append(f"{found.label} does not run on it")
    where = f"{gpu.name}, compute capability {capability_text(gpu.capability)}"
    raise UserError(f"no TensorRT for the GPU ({where}): {'; '.join(reasons)}")


def _find(name: str) -> Backend | Absent:
    module_name = name.replace("-", "_")
    extra = f"pip install 'mat-export[{_EXTRAS[name]}]'"
    try:
        module = importlib.import_module(module_name)
        version = str(module.__version__)
    except Exception as error:  # a broken install can raise anything
        if isinstance(error, ModuleNotFoundError) and error.name == module_name:
            return Absent(name, f"not installed: {extra}")
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        return Absent(name, f"installed, but does not import ({reason}): {extra}")
    if name == "tensorrt-rtx":
        return TensorRTRtx(module)
    numbers = numbers_of(version)[:2]
    if numbers == (8, 6):
        return TensorRT8(module)
    if numbers >= (10, 13):
        return Backend(module)
    return Absent(name, f"version {version}, we know 8.6 and from 10.13 on: {extra}")
