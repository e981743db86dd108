"""What an engine takes and gives: tensors, ranges of shapes, and the state that a call asks for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from engines.arrays import DeviceArray, bfloat16
from mat_export.contract import UserError

__all__ = ["EngineTensor", "Layout", "Request", "Shape", "Source", "is_aligned"]

ALIGNMENT = 256
"""TensorRT wants the address of a tensor to be a multiple of this many bytes."""

_NUMPY_TYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "INT8": "int8",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
    "UINT8": "uint8",
}
"""TensorRT's types by NumPy's names. Its own ``nptype`` fails in 8.6 with NumPy 1.24 and later."""

Shape = tuple[int, ...]
Source = NDArray[Any] | DeviceArray


@dataclass(frozen=True)
class EngineTensor:
    """One input or output of an engine.

    Attributes:
        name: Its name in the network.
        mode: Which of the two it is.
        dtype: Type of its elements.
        shape: Its lengths, -1 where they may vary.
    """

    name: str
    mode: Literal["input", "output"]
    dtype: np.dtype[Any]
    shape: Shape


@dataclass(frozen=True)
class Request:
    """The state that a call needs a context in.

    Attributes:
        profile: Index of the optimization profile.
        shapes: Of the inputs, in the engine's order.
        pointers: Of all tensors, in the engine's order; None for the context's own buffer.
    """

    profile: int
    shapes: tuple[Shape, ...]
    pointers: tuple[int | None, ...]


def _read_tensors(engine: Any) -> tuple[EngineTensor, ...]:
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    return tuple(
        EngineTensor(
            name=name,
            mode="input" if engine.get_tensor_mode(name).name == "INPUT" else "output",
            dtype=_numpy_type(engine.get_tensor_dtype(name), name),
            shape=tuple(engine.get_tensor_shape(name)),
        )
        for name in names
    )


def _numpy_type(dtype: Any, name: str) -> np.dtype[Any]:
    if dtype.name == "BF16":
        return bfloat16()
    if dtype.name not in _NUMPY_TYPES:
        raise UserError(
            f"the engine's tensor '{name}' is of type {dtype.name}, which has no counterpart in "
            "NumPy: build it with float or uint8 inputs and outputs"
        )
    return np.dtype(_NUMPY_TYPES[dtype.name])


class Layout:
    """The tensors of an engine and the ranges that it was built for."""

    def __init__(self, engine: Any) -> None:
        self.tensors = tensors = _read_tensors(engine)
        self.inputs = tuple(tensor for tensor in tensors if tensor.mode == "input")
        self.outputs = tuple(tensor for tensor in tensors if tensor.mode == "output")
        self.dynamic = tuple(tensor for tensor in self.inputs if -1 in tensor.shape)
        self.profiles = tuple(
            {tensor.name: _read_range(engine, tensor, index) for tensor in self.inputs}
            for index in range(max(1, engine.num_optimization_profiles))
        )

    def check_names(self, inputs: Mapping[str, Any]) -> list[str]:
        """Names of the engine's inputs, if exactly these were given; else UserError."""
        names = [tensor.name for tensor in self.inputs]
        for missing in (name for name in names if name not in inputs):
            raise UserError(f"input '{missing}' is missing; the engine takes {', '.join(names)}")
        for unknown in (name for name in inputs if name not in names):
            raise UserError(f"the engine has no input '{unknown}'; it takes {', '.join(names)}")
        return names

    def request(self, sources: Mapping[str, Source], targets: Mapping[str, DeviceArray]) -> Request:
        """The state for these arrays.

        Raises:
            UserError: If an input's type, or its shape, is none that the engine takes.
        """
        for tensor in self.inputs:
            source = sources[tensor.name]
            if source.dtype != tensor.dtype or len(source.shape) != len(tensor.shape):
                raise UserError(
                    f"input '{tensor.name}' is {source.dtype} {list(source.shape)}, "
                    f"the engine takes {tensor.dtype} {self._ranges(tensor)}"
                )
        shapes = {tensor.name: tuple(sources[tensor.name].shape) for tensor in self.inputs}
        given: dict[str, Source] = {**sources, **targets}
        return Request(
            profile=self._profile_for(shapes),
            shapes=tuple(shapes.values()),
            pointers=tuple(
                array.pointer
                if isinstance(array := given.get(tensor.name), DeviceArray) and is_aligned(array)
                else None
                for tensor in self.tensors
            ),
        )

    def check_targets(self, targets: Mapping[str, DeviceArray], shapes: tuple[Shape, ...]) -> None:
        """Raise UserError unless every array is as the engine writes that output."""
        written = {
            tensor.name: (tensor.dtype, shape)
            for tensor, shape in zip(self.outputs, shapes, strict=True)
        }
        for name, target in targets.items():
            if name not in written:
                raise UserError(f"the engine has no output '{name}'; it gives {', '.join(written)}")
            dtype, shape = written[name]
            if (target.dtype, target.shape) != (dtype, shape):
                raise UserError(
                    f"output '{name}' is {target.dtype} {list(target.shape)}, "
                    f"the engine writes {dtype} {list(shape)}"
                )

    def describe(self, shapes: tuple[Shape, ...]) -> str:
        """Shapes of the inputs, with their names."""
        pairs = zip(self.inputs, shapes, strict=True)
        return ", ".join(f"'{tensor.name}' {list(shape)}" for tensor, shape in pairs)

    def _profile_for(self, shapes: Mapping[str, Shape]) -> int:
        """The profile that takes these shapes and was tuned for the sizes nearest to them."""
        fitting = [
            index
            for index, ranges in enumerate(self.profiles)
            if all(_within(shape, ranges[name]) for name, shape in shapes.items())
        ]
        if fitting:
            return min(fitting, key=lambda index: self._distance(shapes, index))
        for tensor in self.inputs:
            shape = shapes[tensor.name]
            if not any(_within(shape, ranges[tensor.name]) for ranges in self.profiles):
                raise UserError(
                    f"input '{tensor.name}' has shape {list(shape)} and the engine was built for "
                    f"{self._ranges(tensor)}: give such a shape, or build an engine for yours"
                )
        ranges = "; ".join(
            ", ".join(f"'{t.name}' {_range_text(profile[t.name])}" for t in self.dynamic)
            for profile in self.profiles
        )
        raise UserError(
            f"the shapes {self.describe(tuple(shapes.values()))} do not go together: "
            f"the engine was built for {ranges}"
        )

    def _distance(self, shapes: Mapping[str, Shape], index: int) -> int:
        """Elements by which the shapes differ from those that a profile was tuned for."""
        ranges = self.profiles[index]
        return sum(
            abs(math.prod(shape) - math.prod(ranges[name][1])) for name, shape in shapes.items()
        )

    def _ranges(self, tensor: EngineTensor) -> str:
        texts = [_range_text(ranges[tensor.name]) for ranges in self.profiles]
        return " or ".join(dict.fromkeys(texts))


_Range = tuple[Shape, Shape, Shape]
"""Smallest, best and largest shape."""


def _read_range(engine: Any, tensor: EngineTensor, profile: int) -> _Range:
    if -1 not in tensor.shape:
        return tensor.shape, tensor.shape, tensor.shape
    low, best, high = engine.get_tensor_profile_shape(tensor.name, profile)
    return tuple(low), tuple(best), tuple(high)


def _range_text(limits: _Range) -> str:
    low, _, high = limits
    return f"{list(low)}" if low == high else f"{list(low)} to {list(high)}"


def _within(shape: Shape, limits: _Range) -> bool:
    low, _, high = limits
    return len(shape) == len(low) and all(
        a <= length <= b for a, length, b in zip(low, shape, high, strict=True)
    )


def is_aligned(array: DeviceArray) -> bool:
    return array.pointer % ALIGNMENT == 0
