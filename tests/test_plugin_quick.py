"""Quick plugins keep to `tensorrt.plugin`'s contract, and what they tell it launches right kernels.

A stand-in takes the place of `tensorrt.plugin`; the kernels run on the CPU, by the grid and the
arguments that it was told.
"""

from __future__ import annotations

import ctypes
import inspect
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any, get_args, get_origin

import pytest
import torch
from attention_cases import BARS, DENSE, Case, draw
from kernel_harness import PAPER, as_integers
from plugin_harness import HERE
from torch import Tensor

from engines.plugins.kernels import SOURCES
from engines.plugins.quick import ENTRY, QuickKernel, register_quick_plugins
from mat_export import ops
from mat_export.contract import UserError

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs CUDA's compiler nvcc")


class DataType(Enum):
    """Of TensorRT's, what the tests use."""

    FLOAT = torch.float32
    HALF = torch.float16
    BF16 = torch.bfloat16
    INT32 = torch.int32
    BOOL = torch.bool
    INT8 = torch.int8


@dataclass
class TensorDesc:
    """A tensor whose expressions are plain numbers."""

    shape_expr: tuple[int, ...]
    dtype: DataType

    def like(self) -> TensorDesc:
        return replace(self)


@dataclass
class KernelLaunchParams:
    grid_x: int = 1
    grid_y: int = 1
    grid_z: int = 1
    block_x: int = 1
    block_y: int = 1
    block_z: int = 1
    shared_mem: int = 0


class SymInt32(int):
    """An expression for a 32-bit argument."""


class SymIntExprs(list[SymInt32]):
    """The scalar arguments of a kernel."""

    @classmethod
    def from_tuple(cls, values: list[SymInt32]) -> SymIntExprs:
        assert all(type(value) is SymInt32 for value in values)
        return cls(values)


@dataclass
class Registered:
    """What was registered, checked by the rules of `tensorrt.plugin`."""

    describe: dict[str, Callable[..., Any]] = field(default_factory=dict)
    implement: dict[str, Callable[..., Any]] = field(default_factory=dict)

    def register(self, name: str) -> Callable[[Callable[..., Any]], None]:
        def decorate(function: Callable[..., Any]) -> None:
            signature = inspect.signature(function)
            kinds = [parameter.annotation for parameter in signature.parameters.values()]
            assert kinds == sorted(kinds, key=[TensorDesc, int].index)
            assert signature.return_annotation is TensorDesc
            self.describe[name] = function

        return decorate

    def aot_impl(self, name: str) -> Callable[[Callable[..., Any]], None]:
        def decorate(function: Callable[..., Any]) -> None:
            signature = inspect.signature(function)
            described = inspect.signature(self.describe[name]).parameters
            assert list(signature.parameters) == [*described, "outputs", "tactic"]
            assert get_origin(signature.return_annotation) is tuple
            kinds = [str, str, KernelLaunchParams, SymIntExprs]
            assert list(get_args(signature.return_annotation)) == kinds
            self.implement[name] = function

        return decorate


def register(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> Registered:
    """The plugins for a GPU, registered with a stand-in for TensorRT 10.9 or later."""
    found = Registered()
    tensorrt, api = ModuleType("tensorrt"), ModuleType("tensorrt.plugin")
    for part in (TensorDesc, KernelLaunchParams, SymInt32, SymIntExprs):
        setattr(api, part.__name__, part)
    api.__dict__.update(register=found.register, aot_impl=found.aot_impl)
    tensorrt.__dict__.update(DataType=DataType, QuickPluginCreationRequest=object, plugin=api)
    with monkeypatch.context() as there:  # torch looks for TensorRT too, and would not like it
        there.setitem(sys.modules, "tensorrt", tensorrt)
        there.setitem(sys.modules, "tensorrt.plugin", api)
        register_quick_plugins(capability)
    return found


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Registered:
    """The plugins for a GPU that has every type."""
    return register(monkeypatch, (9, 0))


KERNELS = {
    "masked, half, 8": QuickKernel("MaskedWindowAttention", 8, "__half"),
    "masked, half, 16": QuickKernel("MaskedWindowAttention", 16, "__half"),
    "masked, float, 16": QuickKernel("MaskedWindowAttention", 16, "float"),
    "unmasked, bfloat16, 8": QuickKernel("WindowAttention", 8, "__nv_bfloat16"),
    "propagation, 8": QuickKernel("MaskPropagation", 8),
}

TYPES = {"float": torch.float32, "__half": torch.float16, "__nv_bfloat16": torch.bfloat16}


def cases(kernel: QuickKernel) -> list[Case]:
    """The hard cases that a kernel is for."""
    unmasked = kernel.operator == "WindowAttention"
    dtype = torch.float16 if kernel.dtype is None else TYPES[kernel.dtype]
    return [
        replace(case, dtype=dtype, kept=None if unmasked else case.kept)
        for case in DENSE.values()
        if case.window == kernel.window and (unmasked or case.kept is not None)
    ]


def run(
    registered: Registered, library: ctypes.CDLL, operator: str, case: Case, tensors: list[Tensor]
) -> Tensor:
    """Launch what was told of a node, as an engine does."""
    attributes = {"window": case.window, "shift": case.shift}
    if operator != "MaskPropagation":
        attributes["heads"] = case.heads
    descriptions = [TensorDesc(tuple(x.shape), DataType(x.dtype)) for x in tensors]
    name = f"mat::{operator}"
    output = registered.describe[name](*descriptions, **attributes)
    entry, ptx, launch, scalars = registered.implement[name](
        *descriptions, *attributes.values(), (output,), 0
    )
    assert (entry, ptx) == (ENTRY, "PTX")
    assert (launch.block_y, launch.block_z, launch.shared_mem) == (1, 1, 0)
    out = torch.zeros(output.shape_expr, dtype=output.dtype.value)
    values: list[Any] = [ctypes.c_void_p(x.data_ptr()) for x in tensors]
    values += [ctypes.c_int32(scalar) for scalar in scalars]
    values += [ctypes.c_void_p(out.data_ptr())]
    addresses = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
    grid = (ctypes.c_int * 3)(launch.grid_x, launch.grid_y, launch.grid_z)
    assert library.run(grid, launch.block_x, addresses) == len(values)
    return out


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS.keys())
def test_what_is_told_of_a_node_launches_the_right_kernel(
    registered: Registered,
    kernel: QuickKernel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    library = on_paper(kernel, tmp_path)
    asked = set()

    def compile_nothing(self: QuickKernel, capability: object, folder: object) -> Path:
        asked.add(self)
        (tmp_path / "kernel.ptx").write_text("PTX")
        return tmp_path / "kernel.ptx"

    monkeypatch.setattr(QuickKernel, "compile", compile_nothing)
    for case in cases(kernel):
        q, k, v, valid = draw(case)
        cut = (case.window, case.shift)
        if kernel.operator == "MaskPropagation":
            assert valid is not None
            out = run(registered, library, kernel.operator, case, [as_integers(valid)])
            assert torch.equal(out, ops.mask_propagation(valid, *cut).to(out.dtype)), case
            continue
        given = [q, k, v] if valid is None else [q, k, v, as_integers(valid)]
        y = run(registered, library, kernel.operator, case, given).float()
        wide = (x.float() for x in (q, k, v))
        expected = ops.masked_window_attention(*wide, valid, *cut, case.heads)
        assert (y - expected).norm() <= BARS[case.dtype] * expected.norm(), case
    assert asked == {kernel}


def on_paper(kernel: QuickKernel, folder: Path) -> ctypes.CDLL:
    """quick.cu for one kind of node, compiled for the CPU."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++ to run the kernels on the CPU")
    command = [
        *("g++", "-std=c++17", "-O2", "-Wall", "-Werror", "-Wno-unknown-pragmas"),
        *("-shared", "-fPIC", "-I", str(PAPER), "-I", str(SOURCES), "-include", "tensor_cores.h"),
        *(*kernel.definitions, str(HERE / "plugin_quick_harness.cpp")),
        *("-o", str(folder / "libquick.so")),
    ]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(folder / "libquick.so"))


@pytest.mark.parametrize(
    ("operator", "attributes", "dtype", "words"),
    [
        ("WindowAttention", (7, 0, 6), DataType.HALF, "attribute 'window' is 8 or 16, got 7"),
        ("WindowAttention", (8, 8, 6), DataType.HALF, "attribute 'shift' is from 0"),
        ("WindowAttention", (8, 0, 0), DataType.HALF, "attribute 'heads' is from 1 up"),
        ("WindowAttention", (8, 0, 6), DataType.INT8, "FP32, FP16 or BF16"),
        ("MaskPropagation", (8, -1), DataType.INT32, "attribute 'shift' is from 0"),
        ("MaskPropagation", (8, 0), DataType.BOOL, "its mask is INT32, got DataType.BOOL"),
    ],
)
def test_nodes_that_no_kernel_is_for_are_refused(
    registered: Registered,
    operator: str,
    attributes: tuple[int, ...],
    dtype: DataType,
    words: str,
) -> None:
    count = 1 if operator == "MaskPropagation" else 3
    tensors = [TensorDesc((1, 16, 16, 180), dtype)] * count
    with pytest.raises(UserError, match=f"mat::{operator}: .*{words}"):
        registered.implement[f"mat::{operator}"](*tensors, *attributes, tensors[:1], 0)


def test_bf16_is_refused_of_a_gpu_without_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def compile_nothing(self: QuickKernel, capability: object, folder: object) -> Path:
        (tmp_path / "kernel.ptx").write_text("PTX")
        return tmp_path / "kernel.ptx"

    monkeypatch.setattr(QuickKernel, "compile", compile_nothing)

    def implement(capability: tuple[int, int], dtype: DataType) -> str:
        tensors = [TensorDesc((1, 16, 16, 180), dtype)] * 3
        found = register(monkeypatch, capability).implement["mat::WindowAttention"]
        return str(found(*tensors, 8, 0, 6, tensors[:1], 0)[1])

    with pytest.raises(UserError, match=r"BF16 needs .* 8\.0 or later, got 7\.5: build in FP16"):
        implement((7, 5), DataType.BF16)
    assert implement((7, 5), DataType.HALF) == "PTX"
    assert implement((8, 0), DataType.BF16) == "PTX"


def test_a_tensorrt_without_such_plugins_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    old = ModuleType("tensorrt")
    old.__dict__["__version__"] = "10.8.0"
    monkeypatch.setitem(sys.modules, "tensorrt", old)
    with pytest.raises(UserError, match=r"TensorRT 10\.8\.0 has no .* came with 10\.9"):
        register_quick_plugins((9, 0))
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(UserError, match="need TensorRT"):
        register_quick_plugins((9, 0))


@needs_nvcc
@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS.keys())
def test_the_ptx_has_one_kernel_with_inputs_scalars_and_output(
    kernel: QuickKernel, tmp_path: Path
) -> None:
    made = kernel.compile((8, 0), tmp_path)
    assert kernel.compile((8, 0), tmp_path) == made
    text = made.read_text()
    found = re.findall(r"\.entry (\w+)\((.*?)\)\s*\.maxntid (\d+)", text, re.DOTALL)
    ((name, parameters, threads),) = found
    assert (name, int(threads)) == (ENTRY, kernel.threads)
    inputs, scalars = {
        "MaskedWindowAttention": (4, 5),
        "WindowAttention": (3, 5),
        "MaskPropagation": (1, 3),
    }[kernel.operator]
    kinds = re.findall(r"\.param \.(\w+)", parameters)
    assert kinds == ["u64"] * inputs + ["u32"] * scalars + ["u64"]
    assert re.search(r"^\.target sm_80$", text, re.MULTILINE)
