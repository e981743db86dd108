"""This machine's GPU, and what compute capabilities mean to every TensorRT."""

from __future__ import annotations

from dataclasses import dataclass

from mat_export.contract import UserError

__all__ = ["AMPERE", "Capability", "Gpu", "capability_text", "find_gpu"]

Capability = tuple[int, int]
"""CUDA compute capability of a GPU: (8, 9) is written sm_89 or 8.9."""

AMPERE: Capability = (8, 0)
"""The first GPUs with bfloat16, and the first that hardware-compatible engines run on."""


@dataclass(frozen=True)
class Gpu:
    """This machine's GPU.

    Attributes:
        name: NVIDIA's name for it.
        capability: Its compute capability.
        driver: Newest CUDA version that its driver knows, such as ``12.4``.
        total_mib: Its memory in MiB.
        free_mib: What was free of it when this was asked, in MiB.
    """

    name: str
    capability: Capability
    driver: str
    total_mib: int
    free_mib: int


def find_gpu() -> Gpu:
    """The GPU that engines are built for and run on here.

    Raises:
        UserError: If there is no usable GPU, driver or cuda-python.
    """
    from engines.cuda import CudaError, device_info

    try:
        found = device_info()
    except CudaError as error:
        raise UserError(f"the GPU does not answer: {error}") from error
    return Gpu(
        found.name,
        found.compute_capability,
        f"{found.driver[0]}.{found.driver[1]}",
        found.total >> 20,
        found.free >> 20,
    )


def capability_text(capability: Capability) -> str:
    """A compute capability as NVIDIA writes it: ``8.9``."""
    return f"{capability[0]}.{capability[1]}"
