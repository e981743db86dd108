"""The operators as quickly deployable plugins of TensorRT, from 10.9 on: PTX inside the engine.

An engine that is built so needs no plugin library where it runs. The price is the PTX of one kernel
for each kind of node, which the driver translates when the engine is loaded.

**No TensorRT has run this yet.** It follows the documentation of ``tensorrt.plugin`` and NVIDIA's
Python sources of it (10.9 to 11.1). Tests compile the PTX, and run the same kernels on a CPU with
the grid and the arguments that a stand-in for TensorRT was told.

    import tensorrt
    from engines.plugins.quick import register_quick_plugins

    register_quick_plugins((9, 0))
    flags = 1 << int(tensorrt.NetworkDefinitionCreationFlag.PREFER_AOT_PYTHON_PLUGINS)
    network = builder.create_network(flags)
    # parse a graph of `prepare_engine_graph(…, plugins=True, quick=True)`: its nodes' domain is
    # ``mat``, and those of which there is no quick plugin are not among them
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from inspect import Parameter, Signature
from pathlib import Path
from typing import Any

from engines.plugins.kernels import compile_once
from mat_export.contract import OPERATOR_DOMAIN, UserError

__all__ = ["ENTRY", "QuickKernel", "register_quick_plugins"]

ENTRY = "mat_quick"
"""The kernel's name in its PTX."""

_INPUTS = {
    "MaskedWindowAttention": ("q", "k", "v", "mask"),
    "WindowAttention": ("q", "k", "v"),
    "MaskPropagation": ("mask",),
}
"""What each operator takes, in the order of ``MAT_OPERATOR`` in quick.cu; a mask comes last."""

_TYPES = {"FLOAT": "float", "HALF": "__half", "BF16": "__nv_bfloat16"}
"""CUDA's types by TensorRT's."""


@dataclass(frozen=True)
class QuickKernel:
    """The kernel of one kind of node.

    Attributes:
        operator: Its name.
        window: 8 or 16.
        dtype: CUDA's type of an attention's tensors, one of ``_TYPES``; None where there is none.
    """

    operator: str
    window: int
    dtype: str | None = None

    @property
    def threads(self) -> int:
        """Threads of a block."""
        if self.dtype is None:
            return self.window**2
        if self.dtype == "float":
            return 64
        return 128 if self.window == 8 else 256

    @property
    def blocks(self) -> int:
        """Blocks of a window, and of a head where there are heads."""
        if self.dtype == "float":
            return self.window**2 // 64
        return 8 if self.dtype is not None and self.window == 16 else 1

    @property
    def definitions(self) -> tuple[str, ...]:
        """What quick.cu is compiled with."""
        number = list(_INPUTS).index(self.operator)
        given = (f"-DMAT_OPERATOR={number}", f"-DMAT_WINDOW={self.window}")
        return given if self.dtype is None else (*given, f"-DMAT_TYPE={self.dtype}")

    def compile(self, capability: tuple[int, int], folder: Path | None = None) -> Path:
        """Its PTX, for GPUs of a compute capability and later.

        Args:
            capability: Such as (9, 0).
            folder: Where PTX is kept; by default the user's cache folder.

        Raises:
            UserError: Without nvcc, or if it fails.
        """
        target = f"compute_{capability[0]}{capability[1]}"
        arguments = ("-std=c++17", "-O3", "-ptx", f"-arch={target}", *self.definitions)
        return compile_once("quick.cu", arguments, f"quick-{target}", ".ptx", folder)


def register_quick_plugins(capability: tuple[int, int], folder: Path | None = None) -> None:
    """Make TensorRT's Python build the operators as kernels in the engine; once in a process.

    Args:
        capability: Compute capability of the GPU that engines are built for.
        folder: Where PTX is kept; by default the user's cache folder.

    Raises:
        UserError: If TensorRT is missing or older than 10.9.
    """
    try:
        tensorrt = importlib.import_module("tensorrt")
    except ModuleNotFoundError as error:
        raise UserError("quick plugins need TensorRT: pip install 'mat-export[trt]'") from error
    if not hasattr(tensorrt, "QuickPluginCreationRequest"):
        raise UserError(
            f"TensorRT {tensorrt.__version__} has no Python plugins with kernels of their own: "
            "they came with 10.9"
        )
    api = importlib.import_module("tensorrt.plugin")
    for operator in _INPUTS:
        _register(operator, tensorrt, api, capability, folder)


def _register(
    operator: str, tensorrt: Any, api: Any, capability: tuple[int, int], folder: Path | None
) -> None:
    """Register one operator: the shape of its output, and the launch of its kernel."""
    inputs = _INPUTS[operator]
    attributes = ("window", "shift", *(() if operator == "MaskPropagation" else ("heads",)))
    types = {getattr(tensorrt.DataType, name): _TYPES[name] for name in _TYPES}

    def describe(*tensors: Any, **values: int) -> Any:
        return tensors[0].like()

    def implement(*arguments: Any) -> tuple[str, str, Any, Any]:
        tensors, values = arguments[: len(inputs)], arguments[len(inputs) : -2]
        node = dict(zip(attributes, values, strict=True))
        if "mask" in inputs and tensors[-1].dtype != tensorrt.DataType.INT32:
            raise UserError(f"mat::{operator}: its mask is INT32, got {tensors[-1].dtype}")
        kernel = _kernel_of(operator, node, types.get(tensors[0].dtype), capability)
        launch, scalars = _launch(api, kernel, tensors[0].shape_expr, node)
        return ENTRY, kernel.compile(capability, folder).read_text(), launch, scalars

    # TensorRT reads the names and types of both functions' parameters.
    given = [*((name, api.TensorDesc) for name in inputs), *((name, int) for name in attributes)]
    result = tuple[str, str, api.KernelLaunchParams, api.SymIntExprs]
    _sign(describe, given, api.TensorDesc)
    _sign(implement, [*given, ("outputs", Parameter.empty), ("tactic", int)], result)
    name = f"{OPERATOR_DOMAIN}::{operator}"
    api.register(name)(describe)
    api.aot_impl(name)(implement)


def _kernel_of(
    operator: str, node: dict[str, int], dtype: str | None, capability: tuple[int, int]
) -> QuickKernel:
    """The kernel of a node, if there is one. Raises UserError, as plugins refuse attributes."""
    if node["window"] not in (8, 16):
        raise UserError(f"mat::{operator}: attribute 'window' is 8 or 16, got {node['window']}")
    if not 0 <= node["shift"] < node["window"]:
        raise UserError(
            f"mat::{operator}: attribute 'shift' is from 0 to below the window, got {node['shift']}"
        )
    if operator == "MaskPropagation":
        return QuickKernel(operator, node["window"])
    if node["heads"] < 1:
        raise UserError(f"mat::{operator}: attribute 'heads' is from 1 up, got {node['heads']}")
    if dtype is None:
        raise UserError(f"mat::{operator}: its tensors are FP32, FP16 or BF16")
    if dtype == _TYPES["BF16"] and capability < (8, 0):
        raise UserError(
            f"mat::{operator}: BF16 needs a GPU of compute capability 8.0 or later, got "
            f"{capability[0]}.{capability[1]}: build in FP16 or FP32"
        )
    return QuickKernel(operator, node["window"], dtype)


def _launch(api: Any, kernel: QuickKernel, shape: Any, node: dict[str, int]) -> tuple[Any, Any]:
    """Grid, block and scalar arguments, as expressions of the first tensor's shape."""
    if kernel.dtype is None:  # [B, 1, H, W]
        height, width = shape[2], shape[3]
        heads: tuple[Any, ...] = ()
    else:  # [B, H, W, C]
        height, width = shape[1], shape[2]
        heads = (node["heads"], shape[3] // node["heads"])
    launch = api.KernelLaunchParams()
    launch.grid_x = (height // kernel.window) * (width // kernel.window) * kernel.blocks
    launch.block_x = kernel.threads
    if heads:
        launch.grid_y, launch.grid_z = node["heads"], shape[0]
    else:
        launch.grid_y = shape[0]
    scalars = (height, width, *heads, node["shift"])
    return launch, api.SymIntExprs.from_tuple([api.SymInt32(scalar) for scalar in scalars])


def _sign(function: Any, parameters: list[tuple[str, Any]], result: Any) -> None:
    """Give a function a signature that tells what it takes."""
    listed = [
        Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, annotation=annotation)
        for name, annotation in parameters
    ]
    function.__signature__ = Signature(listed, return_annotation=result)
