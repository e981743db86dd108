"""What TensorRT-RTX wrote into a plan, read from its text.

The engine inspector needs the GPU that a plan is for. But a plan holds the listing of its compiled
program as text: each tensor with its type, each convolution with what it reads, each other kernel
with the ONNX nodes in it. Its form is that of TensorRT-RTX 1.7 and documented nowhere, so tests
ask first that it was understood (every convolution of the graph is there).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx

__all__ = ["PlanListing", "convolution_work", "read_int8_plan", "read_plan"]

_TENSOR = re.compile(r' tensor=\{.*? name="([^"]+)".*? type=(\w+) \}')
_CONVOLUTION = re.compile(
    r' corrltn=\{ name="([^"]+?)(?:_U\d+)?" output=\{"[^"]+" \} input=\{"([^"]+)" "([^"]+)"'
)
_KERNEL = re.compile(r' function=\{ name=\S+ .*?layers="([^"]*)"', re.DOTALL)
_LAYER = re.compile(r"\[ONNX Layer: ([^\]]+)\]")


@dataclass(frozen=True)
class PlanListing:
    """A plan's program.

    Attributes:
        convolutions: Types of input and weights of each convolution, by its node's name.
        kernels: The ONNX nodes in each of the other kernels.
    """

    convolutions: dict[str, tuple[str, str]]
    kernels: tuple[tuple[str, ...], ...]

    @property
    def int8(self) -> set[str]:
        """The convolutions that read INT8 and INT8 weights."""
        return {name for name, types in self.convolutions.items() if types == ("int8", "int8")}


def read_plan(plan: bytes) -> PlanListing:
    """The listing in a plan; empty where it has another form."""
    text = plan.decode("latin1")
    types = dict(_TENSOR.findall(text))
    return PlanListing(
        convolutions={
            name: (types.get(x, "?"), types.get(w, "?"))
            for name, x, w in _CONVOLUTION.findall(text)
        },
        kernels=tuple(tuple(_LAYER.findall(layers)) for layers in _KERNEL.findall(text)),
    )


def read_int8_plan(build: Callable[[], bytes]) -> PlanListing:
    """The listing in a plan of a quantized graph.

    Once, beside much other work, a plan's listing had no INT8 at all; what there is to read is
    documented nowhere, so a plan that tells nothing is built again, twice at most.
    """
    for _ in range(3):
        listing = read_plan(build())
        if listing.int8:
            break
    return listing


def convolution_work(model: onnx.ModelProto) -> dict[str, float]:
    """Multiply-adds of each convolution of a graph, by its node's name."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    values = (*graph.value_info, *graph.input, *graph.output)
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}
    shapes |= {t.name: list(t.dims) for t in graph.initializer}
    return {
        node.name: float(np.prod(shapes[node.output[0]]) * np.prod(shapes[node.input[1]][1:]))
        for node in graph.node
        if node.op_type == "Conv"
    }
