"""What may be quantized: the nodes of the graph, their work, and what INT8 would save.

Rules name what is left out, as they do for FP32 islands (`mat_export.precision`). Everything that
remains is a candidate; whether it becomes INT8 is decided by what it costs (`calib.recipe`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from onnx import helper

from mat_export.contract import GraphSpec, UserError, axes_of_size
from mat_export.precision import Island

__all__ = ["BALANCE", "LEFT_OUT", "Candidate", "Candidates", "find_candidates"]

LEFT_OUT: tuple[Island, ...] = (
    Island("rgb", "three channels that are summed over every level", r"\.toRGB[./]"),
    Island("style", "small maps that end in the one style of all layers", r"\.(pool|to_style)\."),
)
"""Convolutions that stay as they are. Mapping, styles, demodulation, masks, attention and the
products of tokens are no convolutions and have no rule: only what is listed as a kind is looked
at."""

BALANCE = 300.0
"""Half-precision operations a GPU does while it moves a byte (H100: 989 TFLOP/s, 3.35 TB/s). INT8
does twice as many."""


@dataclass(frozen=True)
class Candidate:
    """A node that could read an INT8 tensor.

    Attributes:
        name: The node's.
        kind: ``conv``; ``filter`` (a resampling filter, one channel at a time); or ``skip`` (a sum
            that reads a tensor which a convolution reads quantized anyway).
        tensor: What it reads quantized.
        weight: Its weights, by the initializer's name; empty for a sum.
        output: What it makes.
        flop: Its operations, two a multiply-add.
        gain: Share of the least time of all convolutions in half precision that INT8 saves: the
            larger of operations and bytes moved at BALANCE, half precision less INT8.
    """

    name: str
    kind: str
    tensor: str
    weight: str
    output: str
    flop: float
    gain: float


@dataclass(frozen=True)
class Candidates:
    """What a graph offers.

    Attributes:
        all: In the graph's order.
        flop: Operations of every convolution, candidates or not.
        left_out: Convolutions left out, by rule.
    """

    all: tuple[Candidate, ...]
    flop: float
    left_out: Mapping[str, int]

    def named(self, name: str) -> Candidate:
        """The candidate of that name.

        Raises:
            UserError: If there is none.
        """
        for candidate in self.all:
            if candidate.name == name:
                return candidate
        filters = " (resampling filters and skips could with --filters alone)"
        raise UserError(
            f"the model has no layer '{name}' that could be INT8"
            + (filters if "filter" in self.left_out else "")
        )

    def share(self, names: frozenset[str]) -> float:
        """Which share of the convolutions' operations these layers do."""
        return sum(c.flop for c in self.all if c.name in names) / self.flop


def find_candidates(
    model: onnx.ModelProto, spec: GraphSpec, *, filters: bool = False
) -> Candidates:
    """The candidates of a graph, their work that of one image of the native size.

    Args:
        model: An FP32 graph of ours, resampling said densely.
        spec: What it takes.
        filters: Resampling filters and skips may be INT8 too. They move bytes and do little
            else, so it depends on the TensorRT whether they gain: RTX 1.7 makes dense groups of
            a filter's channels (mat-tiny-256: a plan of 119 MB instead of 39).

    Raises:
        UserError: If the graph has no convolution to quantize, or it is quantized already.
    """
    graph = _of_native_size(model, spec)
    if any(node.op_type == "QuantizeLinear" for node in graph.node):
        raise UserError("the model is quantized already: start from the FP32 file")
    finder = _Finder(graph)
    left_out: Counter[str] = Counter()
    found: list[Candidate] = []
    half, flop = 0.0, 0.0
    for node in graph.node:
        if node.op_type != "Conv":
            continue
        candidate = finder.convolution(node)
        flop += candidate.flop
        half += candidate.gain  # its whole time for now
        rule = next((rule.name for rule in LEFT_OUT if rule.holds(node)), None)
        if rule is None and candidate.kind == "filter" and not filters:
            rule = "filter"
        if rule is None:
            found.append(candidate)
        else:
            left_out[rule] += 1
    if not found:
        raise UserError("the model has no convolution that could be INT8")
    if filters:
        found += finder.skips(graph, found)
    order = {node.name: i for i, node in enumerate(graph.node)}
    found.sort(key=lambda candidate: order[candidate.name])
    saved = [replace(c, gain=finder.saved(c) / half) for c in found]
    return Candidates(tuple(saved), flop, dict(left_out))


def _of_native_size(model: onnx.ModelProto, spec: GraphSpec) -> onnx.GraphProto:
    """The graph with the sizes of all its tensors."""
    sized = onnx.ModelProto()
    sized.CopyFrom(model)
    side = spec.config.resolution
    axes = {"batch": 1, "height": side, "width": side, **axes_of_size(spec.config, side, side)}
    for value in sized.graph.input:
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param:
                axis.dim_value = axes[axis.dim_param]
    if spec.dynamic_size:  # what was inferred for any size
        del sized.graph.value_info[:]
        for value in sized.graph.output:
            value.type.tensor_type.ClearField("shape")
    return onnx.shape_inference.infer_shapes(sized, data_prop=spec.dynamic_size).graph


class _Finder:
    """Sizes of a graph's tensors, and the work of its nodes."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        values = (*graph.value_info, *graph.input, *graph.output)
        self._sizes = {
            v.name: float(np.prod([d.dim_value or 1 for d in v.type.tensor_type.shape.dim]))
            for v in values
        }
        self._weights = {t.name: tuple(t.dims) for t in graph.initializer}
        self._sizes.update({k: float(np.prod(dims)) for k, dims in self._weights.items()})

    def convolution(self, node: onnx.NodeProto) -> Candidate:
        """A convolution; for now its gain is its least time in half precision."""
        tensor, weight, output = node.input[0], node.input[1], node.output[0]
        shape = self._weights.get(weight)
        if shape is None or output not in self._sizes:
            raise UserError(
                f"'{node.name}' is not a convolution of a model that mat-export wrote: "
                "its weights are no constant or its size is not known"
            )
        flop = 2.0 * self._sizes[output] * float(np.prod(shape[1:]))
        kind = "filter" if _group(node) == shape[0] and shape[1] == 1 else "conv"
        candidate = Candidate(node.name, kind, tensor, weight, output, flop, 0.0)
        return replace(candidate, gain=self._time(candidate, int8=False))

    def skips(self, graph: onnx.GraphProto, found: list[Candidate]) -> list[Candidate]:
        """Sums that read what a candidate reads, besides something else."""
        quantized = {candidate.tensor for candidate in found}
        return [
            Candidate(node.name, "skip", tensor, "", node.output[0], 0.0, 0.0)
            for node in graph.node
            if node.op_type == "Add" and not any(name in self._weights for name in node.input)
            for tensor in node.input
            if tensor in quantized
        ]

    def saved(self, candidate: Candidate) -> float:
        """Least time in half precision less that in INT8."""
        return self._time(candidate, int8=False) - self._time(candidate, int8=True)

    def _time(self, candidate: Candidate, *, int8: bool) -> float:
        """The larger of moving and computing, in bytes."""
        element = 1.0 if int8 else 2.0
        read = element * self._sizes[candidate.tensor]
        if candidate.kind == "skip":
            return read
        read += element * self._sizes[candidate.weight] + 2.0 * self._sizes[candidate.output]
        return max(read, candidate.flop / (BALANCE * (2.0 if int8 else 1.0)))


def _group(node: onnx.NodeProto) -> int:
    attributes: dict[str, Any] = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    return int(attributes.get("group", 1))
