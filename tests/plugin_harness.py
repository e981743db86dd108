"""Compiles a harness that plays TensorRT's part, with the plugins and the kernels, and calls it.

On the CPU, where the kernels run on paper (`cuda_on_cpu`), or with nvcc on a GPU.
"""

from __future__ import annotations

import ctypes
import itertools
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from attention_cases import BARS, Case, draw
from epilogue_cases import Epilogue, holds, in_double
from epilogue_cases import draw as draw_epilogue
from kernel_harness import as_integers, compile_on_paper, packed, unpacked
from torch import Tensor

from engines.plugins.kernels import EPILOGUE_PARTS, SOURCES, find_nvcc
from mat_export import ops

HERE = Path(__file__).parent

TYPES = {torch.float32: 0, torch.float16: 1, torch.int32: 3, torch.bool: 4, torch.bfloat16: 7}
"""``nvinfer1::DataType``."""

LINEAR, HWC8 = 0, 2
"""``nvinfer1::TensorFormat``."""

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
        self,
        name: str,
        attributes: str,
        tensors: list[Tensor],
        out: Tensor,
        shapes: list[tuple[int, ...]] | None = None,
        formats: list[int] | None = None,
    ) -> int:
        """Run an operator through a plugin's life, its result into `out`.

        Args:
            name: Of the operator.
            attributes: As "window=8 shift=4"; a number with a point is a float.
            tensors: Its inputs, on the CPU.
            out: Where the result goes.
            shapes: Of the inputs and the result, as TensorRT sees them; by default their own.
            formats: Of the inputs and the result, by LINEAR or HWC8; by default linear.

        Returns:
            0, the kernel's status, or the number of the stage that went wrong.
        """
        described = _described([*tensors, out], shapes, formats)
        pointers = (ctypes.c_void_p * len(tensors))(*(t.data_ptr() for t in tensors))
        where = ctypes.c_void_p(out.data_ptr())
        call = (name.encode(), attributes.encode(), len(tensors), *described, pointers, where)
        return int(self.library.play(*call))

    def play_in_turns(
        self, name: str, attributes: str, contexts: list[list[Tensor]], outs: list[Tensor]
    ) -> int:
        """Run one node in several contexts of an engine, in turns and twice each.

        Args:
            name: Of the operator.
            attributes: As `play` takes them.
            contexts: The inputs of each, on the CPU, linear and of the same types.
            outs: Where the result of each goes.

        Returns:
            0, the kernel's status, or the number of the stage that went wrong.
        """
        tensors = [[*given, out] for given, out in zip(contexts, outs, strict=True)]
        shapes = [tuple(t.shape) for t in itertools.chain.from_iterable(tensors)]
        numbers = (ctypes.c_int32 * (4 * len(shapes)))(*itertools.chain.from_iterable(shapes))
        _, types, formats = _described(tensors[0], None, None)
        addresses = [t.data_ptr() for t in itertools.chain.from_iterable(contexts)]
        given = (ctypes.c_void_p * len(addresses))(*addresses)
        where = (ctypes.c_void_p * len(outs))(*(out.data_ptr() for out in outs))
        sizes = (len(contexts[0]), len(contexts))
        call = (name.encode(), attributes.encode(), *sizes, numbers, types, formats, given, where)
        return int(self.library.play_in_turns(*call))

    def fit(self, name: str, attributes: str, tensors: list[Tensor], formats: list[int]) -> bool:
        """Whether an operator takes and gives tensors, the result last, in these formats."""
        described = _described(tensors, None, formats)
        call = (name.encode(), attributes.encode(), len(tensors) - 1, *described)
        return bool(self.library.formats_fit(*call))

    def check(self, case: Case) -> float:
        """Hold the operators of a case against the PyTorch reference in FP32.

        Returns:
            The attention's error, ‖a − b‖ / ‖b‖.

        Raises:
            AssertionError: If a stage fails, the error is above its bar, or a mask differs.
        """
        q, k, v, valid = draw(case)
        cut = (case.window, case.shift)
        window = f"window={case.window} shift={case.shift}"
        name = "WindowAttention" if valid is None else "MaskedWindowAttention"
        given = [q, k, v] if valid is None else [q, k, v, as_integers(valid)]
        y = torch.full_like(v, torch.nan)
        status = self.play(name, f"{window} heads={case.heads}", given, y)
        assert status == 0, (case, status, self.last_line)
        wide = (x.float() for x in (q, k, v))
        expected = ops.masked_window_attention(*wide, valid, *cut, case.heads)
        error = float((y.float() - expected).norm() / expected.norm())
        assert error <= BARS[case.dtype], (case, error)
        if valid is not None:
            mask = torch.full_like(given[3], -1)
            status = self.play("MaskPropagation", window, [given[3]], mask)
            assert status == 0, (case, status, self.last_line)
            assert torch.equal(mask, ops.mask_propagation(valid, *cut).to(mask.dtype)), case
        return error

    def check_contexts(self) -> None:
        """Hold contexts that run in turns, each with its shapes, to the bits of each alone.

        Raises:
            AssertionError: If a stage fails, or a bit differs.
        """
        cases = [
            Case(8, 4, (2, 3)),
            Case(8, 4, (1, 2), batch=2, seed=1),
            Case(8, 4, (3, 2), seed=2),
        ]
        drawn = [draw(case) for case in cases]
        masks = [[as_integers(valid)] for _, _, _, valid in drawn if valid is not None]
        tokens = [[q, k, v] for q, k, v, _ in drawn]
        both = [[*qkv, *mask] for qkv, mask in zip(tokens, masks, strict=True)]
        cut = "window=8 shift=4"
        for name, attributes, contexts in (
            ("MaskedWindowAttention", f"{cut} heads=2", both),
            ("WindowAttention", f"{cut} heads=2", tokens),
            ("MaskPropagation", cut, masks),
        ):
            alone = [torch.full_like(given[0], 9) for given in contexts]
            for given, out in zip(contexts, alone, strict=True):
                assert self.play(name, attributes, given, out) == 0, (name, self.last_line)
            together = [torch.full_like(out, 7) for out in alone]
            status = self.play_in_turns(name, attributes, contexts, together)
            assert status == 0, (name, status, self.last_line)
            for case, a, b in zip(cases, alone, together, strict=True):
                assert torch.equal(a.view(torch.int16), b.view(torch.int16)), (name, case)

    def check_maps(self, case: Case) -> None:
        """Hold the operators on maps against the PyTorch reference in FP32.

        Queries and keys of tokens of length one, values, and a mask, as a block has them.

        Raises:
            AssertionError: If a stage fails, or an error is above its bar.
        """
        q, k, v, valid = (None if x is None else x.contiguous() for x in draw(case))
        assert q is not None
        assert k is not None
        assert v is not None
        channels = v.shape[3]
        # A norm, of tokens among which one has no length.
        x = v.permute(0, 3, 1, 2).clone()
        x[0, :, 0, 0] = 0.0
        y = self._play_on_maps("TokenNorm", "floor=0.25", [packed(x)], x)
        wide = x.float()
        unit = wide / wide.norm(dim=1, keepdim=True).clamp(min=0.25)
        torch.testing.assert_close(y.float(), unit, rtol=2 * BARS[case.dtype], atol=1e-6)
        # Attention.
        both = torch.cat([q, k], dim=3).permute(0, 3, 1, 2)
        value = v.permute(0, 3, 1, 2)
        given = [packed(both), packed(value)]
        name, attributes = "MapAttention", f"window={case.window} shift={case.shift}"
        if valid is not None:
            name = "MaskedMapAttention"
            given.append(as_integers(valid.expand(v.shape[0], -1, -1, -1).contiguous()))
        y = self._play_on_maps(name, f"{attributes} heads={case.heads}", given, value, both)
        expected = ops.masked_window_attention(
            *(t.float() for t in (q, k, v)), valid, case.window, case.shift, case.heads
        ).permute(0, 3, 1, 2)
        error = float((y.float() - expected).norm() / expected.norm())
        assert y.shape[1] == channels
        assert error <= BARS[case.dtype], (case, error)

    def _play_on_maps(
        self,
        name: str,
        attributes: str,
        given: list[Tensor],
        like: Tensor,
        first: Tensor | None = None,
    ) -> Tensor:
        """The result of an operator whose floating-point tensors have their channels last."""
        maps = [like if first is None else first, like][: len(given)]
        shapes = [tuple(t.shape) for t in maps] + [tuple(t.shape) for t in given[len(maps) :]]
        formats = [HWC8 if t.is_floating_point() else LINEAR for t in given]
        y = torch.full_like(packed(like), torch.nan)
        shapes, formats = [*shapes, tuple(like.shape)], [*formats, HWC8]
        status = self.play(name, attributes, given, y, shapes, formats)
        assert status == 0, (name, attributes, status, self.last_line)
        return unpacked(y, like.shape[1])

    def check_map_formats(self) -> None:
        """Hold the operators on maps to half precision with the channels last.

        Raises:
            AssertionError: If that is refused, or anything else taken.
        """
        mask = torch.ones((1, 1, 8, 8), dtype=torch.int32)
        for dtype in (torch.float32, torch.float16):
            x, both = torch.zeros((1, 4, 8, 8), dtype=dtype), torch.zeros((1, 8, 8, 8), dtype=dtype)
            for name, attributes, tensors in (
                ("TokenNorm", "floor=0.5", [x, x]),
                ("MapAttention", "window=8 shift=0 heads=2", [both, x, x]),
                ("MaskedMapAttention", "window=8 shift=0 heads=2", [both, x, mask, x]),
            ):
                good = [HWC8 if t.is_floating_point() else LINEAR for t in tensors]
                for formats in itertools.product((LINEAR, HWC8), repeat=len(tensors)):
                    fits = dtype == torch.float16 and [*formats] == good
                    assert self.fit(name, attributes, tensors, [*formats]) == fits, (name, formats)

    def check_masks(self) -> None:
        """Hold the plugins to masks of integers, as TensorRT has no plugin with bools.

        Raises:
            AssertionError: If an operator takes a mask of bools, or none of integers.
        """
        q, k, v, valid = draw(Case())
        assert valid is not None
        for mask, status in ((valid, self._no_format), (as_integers(valid), 0)):
            for name, attributes, tensors in (
                ("MaskedWindowAttention", "window=8 shift=0 heads=2", [q, k, v, mask]),
                ("MaskPropagation", "window=8 shift=0", [mask]),
            ):
                out = torch.empty_like(tensors[0])
                assert self.play(name, attributes, tensors, out) == status, (name, mask.dtype)

    def check_epilogue(self, case: Epilogue) -> None:
        """Hold the fused epilogue of a case against the formula in FP64.

        Raises:
            AssertionError: If a stage fails, or a number is more than its rounding off.
        """
        x, parts = draw_epilogue(case)
        tensors = {"x": x, **parts, "y": torch.full(case.shape_of_y, torch.nan, dtype=x.dtype)}
        maps = ("x", "skip", "y") if case.channels_last else ()
        shapes = [tuple(t.shape) for t in tensors.values()]
        formats = [HWC8 if name in maps else LINEAR for name in tensors]
        *given, y = (packed(t) if name in maps else t for name, t in tensors.items())
        status = self.play("FusedEpilogue", epilogue_attributes(case), given, y, shapes, formats)
        assert status == 0, (case, status, self.last_line)
        y = unpacked(y, x.shape[1]) if case.channels_last else y
        holds(case, y, in_double(case, x, parts))

    def check_epilogue_formats(self) -> None:
        """Hold the fused epilogue to what TensorRT may choose from.

        Maps are linear or all kHWC8 in half precision, parts by channel or pixel linear, and all of
        one type.

        Raises:
            AssertionError: If one of these is refused, or anything else taken.
        """
        case = Epilogue((1, 8, 6, 6), 1, parts=("scale", "noise", "skip"))
        attributes = epilogue_attributes(case)
        for dtype in (torch.float32, torch.float16, torch.int32):
            x, parts = draw_epilogue(replace(case, dtype=dtype))
            tensors = [x, *parts.values(), x]
            for formats in itertools.product((LINEAR, HWC8), repeat=len(tensors)):
                good = [(LINEAR,) * 5] if dtype.is_floating_point else []
                good += [(HWC8, LINEAR, LINEAR, HWC8, HWC8)] if dtype == torch.float16 else []
                found = self.fit("FusedEpilogue", attributes, tensors, list(formats))
                assert found == (formats in good), (dtype, formats)
            for i in range(len(tensors)):
                mixed = [t.to(torch.bool) if j == i else t for j, t in enumerate(tensors)]
                assert not self.fit("FusedEpilogue", attributes, mixed, [LINEAR] * 5), (dtype, i)

    def refused(self, name: str, attributes: str) -> bool:
        """Whether a node with these attributes is refused."""
        return bool(self.library.refused(name.encode(), attributes.encode()))

    @property
    def last_line(self) -> str:
        """What the logger heard last."""
        line: bytes = self.library.last_line()
        return line.decode()


def epilogue_attributes(case: Epilogue) -> str:
    """A case as the attributes of a node."""
    given: dict[str, int | float] = {"filter": int(case.pad is not None), "pad": case.pad or 0}
    given |= {"gain": case.gain, "slope": case.slope}
    given |= {name: int(name in case.parts) for name in EPILOGUE_PARTS}
    return " ".join(f"{name}={value}" for name, value in given.items())


def _described(
    tensors: list[Tensor], shapes: list[tuple[int, ...]] | None, formats: list[int] | None
) -> tuple[ctypes.Array[Any], ...]:
    """Shapes, types and formats of tensors, as the harnesses take them."""
    count = len(tensors)
    shapes = [tuple(t.shape) for t in tensors] if shapes is None else shapes
    return (
        (ctypes.c_int32 * (4 * count))(*itertools.chain.from_iterable(shapes)),
        (ctypes.c_int32 * count)(*(TYPES[t.dtype] for t in tensors)),
        (ctypes.c_int32 * count)(*(formats or [LINEAR] * count)),
    )


def _compile_for_gpu(target: Path, *arguments: str) -> None:
    """Compile the kernels, and what else the arguments name, with nvcc for this machine's GPU."""
    command = [
        *(find_nvcc(), "-std=c++17", "-O2", "-arch=native", "-DMAT_ON_GPU", "-I", str(SOURCES)),
        *("-Xcompiler=-fPIC", "-Xcompiler=-Wno-deprecated-declarations", *arguments),
        *(str(SOURCES / "kernels.cu"), "-o", str(target)),
    ]
    subprocess.run(command, check=True)
