"""The plugins of TensorRT 8.6, driven through their life as TensorRT does, on the CPU.

TensorRT 8.6's headers are no part of this project: TENSORRT86_INCLUDE says where they are.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engines.plugins.kernels import SOURCES
from mat_export import ops

HERE = Path(__file__).parent
HEADERS = os.environ.get("TENSORRT86_INCLUDE")

pytestmark = pytest.mark.skipif(
    HEADERS is None or shutil.which("g++") is None,
    reason="needs g++ and TensorRT 8.6's headers in TENSORRT86_INCLUDE",
)

TYPES = {torch.float32: 0, torch.float16: 1, torch.bool: 4}
"""``nvinfer1::DataType``."""


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    target = tmp_path_factory.mktemp("plugin") / "libharness.so"
    paper = HERE / "cuda_on_cpu"
    command = [
        *("g++", "-std=c++17", "-O2", "-Wall", "-Werror", "-shared", "-fPIC"),
        *("-Wno-unknown-pragmas", "-Wno-deprecated-declarations"),
        *("-isystem", str(HEADERS), "-I", str(paper), "-I", str(SOURCES)),
        *("-include", str(paper / "tensor_cores.h"), "-x", "c++"),
        *(str(SOURCES / name) for name in ("kernels.cu", "plugin_v2.cpp")),
        *(str(HERE / "plugin_v2_harness.cpp"), "-o", str(target), "-ldl"),
    ]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(target))


def play(
    harness: ctypes.CDLL, name: str, cut: tuple[int, int], heads: int, tensors: list[Tensor]
) -> Tensor:
    """The output of an operator; the harness's number of what went wrong fails the test."""
    out = torch.zeros_like(tensors[0])
    count = len(tensors)
    shapes = (ctypes.c_int32 * (4 * count))(*(d for t in tensors for d in t.shape))
    types = (ctypes.c_int32 * count)(*(TYPES[t.dtype] for t in tensors))
    pointers = (ctypes.c_void_p * count)(*(t.data_ptr() for t in tensors))
    status = harness.play(
        name.encode(), *cut, heads, count, shapes, types, pointers, ctypes.c_void_p(out.data_ptr())
    )
    assert status == 0
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("cut", [(8, 0), (8, 4), (16, 8)], ids=str)
def test_every_operator_lives_through_build_and_run(
    harness: ctypes.CDLL, cut: tuple[int, int], dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    side, heads = 2 * cut[0], 1
    q, k, v = (torch.randn(1, side, side, 30, generator=generator).to(dtype) for _ in range(3))
    valid = torch.rand(1, 1, side, side, generator=generator) < 0.1
    bar = 1e-5 if dtype == torch.float32 else 2e-3
    wide = (q.float(), k.float(), v.float())
    for name, mask in (("MaskedWindowAttention", valid), ("WindowAttention", None)):
        given = [q, k, v] if mask is None else [q, k, v, mask]
        y = play(harness, name, cut, heads, given).float()
        expected = ops.masked_window_attention(*wide, mask, *cut, heads)
        assert (y - expected).norm() <= bar * expected.norm()
    out = play(harness, "MaskPropagation", cut, 0, [valid])
    assert torch.equal(out, ops.mask_propagation(valid, *cut))


@pytest.mark.parametrize(("window", "shift", "heads"), [(7, 0, 6), (8, 8, 6), (8, -1, 6)])
def test_attributes_that_no_kernel_has_are_refused(
    harness: ctypes.CDLL, window: int, shift: int, heads: int
) -> None:
    assert harness.refused(b"WindowAttention", window, shift, heads)
    assert not harness.refused(b"WindowAttention", 8, 4, heads)
