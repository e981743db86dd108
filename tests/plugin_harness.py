"""Compiles a harness that plays TensorRT's part, with the plugins and the kernels, and calls it.

On the CPU, where the kernels run on paper (`cuda_on_cpu`), or with nvcc on a GPU.
"""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import torch
from attention_cases import BARS, Case, draw
from kernel_harness import as_integers, compile_on_paper
from torch import Tensor

from engines.plugins.kernels import SOURCES, find_nvcc
from mat_export import ops

HERE = Path(__file__).parent

TYPES = {torch.float32: 0, torch.float16: 1, torch.int32: 3, torch.bool: 4, torch.bfloat16: 7}
"""``nvinfer1::DataType``."""

_NO_FORMAT = {"v2": -3, "v3": -6}
"""The stage of `play` at which a plugin is asked for types and formats, in each harness."""


class Harness:
    """A compiled harness.

    Args:
        version: ``v2`` or ``v3``.
        headers: Folder of TensorRT's headers, of 8.6 or from 10 on.
        folder: Where the library goes.
        gpu: Compile for the GPU of this machine rather than for the CPU.

    Attributes:
        path: The library.
    """

    def __init__(self, version: str, headers: Path | str, folder: Path, *, gpu: bool = False):
        self.path = folder / f"lib{version}.so"
        self._no_format = _NO_FORMAT[version]
        sources = [SOURCES / f"plugin_{version}.cpp", HERE / f"plugin_{version}_harness.cpp"]
        given = ["-shared", "-isystem", str(headers), *map(str, sources), "-ldl"]
        if gpu:
            _compile_for_gpu(self.path, *given)
        else:
            compile_on_paper(self.path, "-fPIC", "-Wno-deprecated-declarations", *given)
        self.library = ctypes.CDLL(str(self.path))
        self.library.last_line.restype = ctypes.c_char_p

    def play(
        self, name: str, cut: tuple[int, int], heads: int, tensors: list[Tensor], out: Tensor
    ) -> int:
        """Run an operator through a plugin's life, its result into `out`.

        Args:
            name: Of the operator.
            cut: Window and shift.
            heads: Of an attention; -1 is none.
            tensors: Its inputs, on the CPU.
            out: Like the first of them.

        Returns:
            0, the kernel's status, or the number of the stage that went wrong.
        """
        count = len(tensors)
        shapes = (ctypes.c_int32 * (4 * count))(*(d for t in tensors for d in t.shape))
        types = (ctypes.c_int32 * count)(*(TYPES[t.dtype] for t in tensors))
        pointers = (ctypes.c_void_p * count)(*(t.data_ptr() for t in tensors))
        where = ctypes.c_void_p(out.data_ptr())
        return int(
            self.library.play(name.encode(), *cut, heads, count, shapes, types, pointers, where)
        )

    def check(self, case: Case) -> float:
        """Hold the operators of a case against the PyTorch reference in FP32.

        Returns:
            The attention's error, ‖a − b‖ / ‖b‖.

        Raises:
            AssertionError: If a stage fails, the error is above its bar, or a mask differs.
        """
        q, k, v, valid = draw(case)
        cut = (case.window, case.shift)
        name = "WindowAttention" if valid is None else "MaskedWindowAttention"
        given = [q, k, v] if valid is None else [q, k, v, as_integers(valid)]
        y = torch.full_like(v, torch.nan)
        status = self.play(name, cut, case.heads, given, y)
        assert status == 0, (case, status, self.last_line)
        wide = (x.float() for x in (q, k, v))
        expected = ops.masked_window_attention(*wide, valid, *cut, case.heads)
        error = float((y.float() - expected).norm() / expected.norm())
        assert error <= BARS[case.dtype], (case, error)
        if valid is not None:
            mask = torch.full_like(given[3], -1)
            status = self.play("MaskPropagation", cut, -1, [given[3]], mask)
            assert status == 0, (case, status, self.last_line)
            assert torch.equal(mask, ops.mask_propagation(valid, *cut).to(mask.dtype)), case
        return error

    def check_masks(self) -> None:
        """Hold the plugins to masks of integers, as TensorRT has no plugin with bools.

        Raises:
            AssertionError: If an operator takes a mask of bools, or none of integers.
        """
        q, k, v, valid = draw(Case())
        assert valid is not None
        for mask, status in ((valid, self._no_format), (as_integers(valid), 0)):
            for name, heads, tensors in (
                ("MaskedWindowAttention", 2, [q, k, v, mask]),
                ("MaskPropagation", -1, [mask]),
            ):
                out = torch.empty_like(tensors[0])
                assert self.play(name, (8, 0), heads, tensors, out) == status, (name, mask.dtype)

    def refused(self, name: str, window: int, shift: int, heads: int) -> bool:
        """Whether a node with these attributes is refused."""
        return bool(self.library.refused(name.encode(), window, shift, heads))

    @property
    def last_line(self) -> str:
        """What the logger heard last."""
        line: bytes = self.library.last_line()
        return line.decode()


def _compile_for_gpu(target: Path, *arguments: str) -> None:
    """Compile the kernels, and what else the arguments name, with nvcc for this machine's GPU."""
    command = [
        *(find_nvcc(), "-std=c++17", "-O2", "-arch=native", "-DMAT_ON_GPU", "-I", str(SOURCES)),
        *("-Xcompiler=-fPIC", "-Xcompiler=-Wno-deprecated-declarations", *arguments),
        *(str(SOURCES / "kernels.cu"), "-o", str(target)),
    ]
    subprocess.run(command, check=True)
