"""Resampling as GPUs like it: the same convolutions, said with fewer kinds of memory traffic.

The exported graph halves a map by a 4×4 filter and a 3×3 convolution, and doubles one by four small
convolutions whose results are interleaved. That is the least arithmetic, and right for a CPU. A GPU
has arithmetic to spare: there the filter's depthwise kernel and the interleaving take most of the
time (CHANGELOG.md has figures). The filter is separable further, ``[1, 3, 3, 1] = [1, 2, 1] ∗
[1, 1]``, and its ``[1, 1]`` costs nothing elsewhere:

- down: a 3×3 filter ``[1, 2, 1]``, and ``[1, 1]`` inside a 4×4 convolution of stride 2;
- up: doubling by repetition is zero stuffing and ``[1, 1]``; then one 3×3 convolution, and the 3×3
  filter. Nothing is interleaved.

Convolutions commute, and every map is padded by as much as they reach, so both are exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from mat_export.graphs import readers_of, write_graph

__all__ = ["FILTER", "resample_densely"]

_DOUBLED = "resample/scales"
FILTER = np.outer([1.0, 2.0, 1.0], [1.0, 2.0, 1.0]) / 16.0
"""The 3×3 filter that is left of the 4×4 one."""


def resample_densely(model: onnx.ModelProto) -> tuple[onnx.ModelProto, dict[str, int]]:
    """Rewrite every up- and downsampling convolution of an inlined FP32 graph.

    Args:
        model: What ``inline_functions`` gives of an exported model; it is left as it is.

    Returns:
        The rewritten copy, and how many maps it halves and doubles: ``{"down": n, "up": n}``.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    pass_ = _Pass(graph)
    for node in list(graph.node):
        if _is_filter(node, pass_.weights):
            pass_.rewrite(node)
    nodes = [n for node in graph.node for n in pass_.replaced.get(node.name, [node])]
    write_graph(graph, nodes, pass_.weights.values())
    return onnx.shape_inference.infer_shapes(result), pass_.counts


class _Pass:
    """Weights, who makes and who reads each tensor, and what stands for which node."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.weights = {t.name: t for t in graph.initializer}
        self.makers = {o: node for node in graph.node for o in node.output}
        self.readers = readers_of(graph)
        self.replaced: dict[str, list[onnx.NodeProto]] = {}
        self.counts = {"down": 0, "up": 0}

    def rewrite(self, blur: onnx.NodeProto) -> None:
        """Rewrite what a 4×4 filter belongs to; a filter of another kind stays."""
        before = self.makers.get(blur.input[0])
        readers = self.readers[blur.output[0]]
        if before is not None and before.op_type == "DepthToSpace":
            self._up(blur, before)
        elif len(readers) == 1 and _attributes(readers[0]).get("strides") == [2, 2]:
            self._down(blur, readers[0])

    def _down(self, blur: onnx.NodeProto, conv: onnx.NodeProto) -> None:
        """``conv3(filter4(x))`` → ``conv4(filter3(x))``."""
        weight = self._array(conv.input[1]).astype(np.float64)
        wider = np.zeros((*weight.shape[:2], 4, 4))
        for y in (0, 1):
            for x in (0, 1):
                wider[:, :, y : y + 3, x : x + 3] += weight / 4.0
        channels = self._array(blur.input[1]).shape[0]
        gain = self._gain(blur)
        filtered = self._filter(blur, blur.input[0], blur.output[0], [2] * 4, channels, gain)
        fused = onnx.NodeProto()
        fused.CopyFrom(conv)
        fused.input[1] = self._constant(f"{conv.input[1]}/wider", wider)
        attributes = {**_attributes(conv), "kernel_shape": [4, 4]}
        del fused.attribute[:]
        fused.attribute.extend(helper.make_attribute(k, v) for k, v in attributes.items())
        self.replaced[blur.name] = [filtered]
        self.replaced[conv.name] = [fused]
        self.counts["down"] += 1

    def _up(self, blur: onnx.NodeProto, interleave: onnx.NodeProto) -> None:
        """Four phases, interleaved and filtered → repetition, ``conv3``, ``filter3``."""
        concat = self.makers[interleave.input[0]]
        phases = [self.makers[name] for name in concat.input]
        parts = {self._array(p.input[1]).shape[2:]: self._array(p.input[1]) for p in phases}
        out, inside = parts[1, 1].shape[:2]
        weight = np.zeros((out, inside, 3, 3), np.float32)
        # Even lines see a kernel's outer taps, odd ones the one between.
        weight[:, :, 0::2, 0::2], weight[:, :, 0::2, 1:2] = parts[2, 2], parts[2, 1]
        weight[:, :, 1:2, 0::2], weight[:, :, 1:2, 1:2] = parts[1, 2], parts[1, 1]
        module = concat.name.rpartition("/")[0]
        if _DOUBLED not in self.weights:
            scales = np.array([1, 1, 2, 2], np.float32)
            self.weights[_DOUBLED] = numpy_helper.from_array(scales, _DOUBLED)
        doubled, mixed = f"{module}/Resize", f"{module}/Conv"
        repeat = helper.make_node(
            "Resize",
            [phases[0].input[0], "", _DOUBLED],
            [doubled],
            doubled,
            mode="nearest",
            coordinate_transformation_mode="asymmetric",
            nearest_mode="floor",
        )
        conv = helper.make_node(
            "Conv",
            [doubled, self._constant(f"{module}.weight", weight)],
            [mixed],
            mixed,
            kernel_shape=[3, 3],
            pads=[2, 2, 2, 2],
            strides=[1, 1],
            dilations=[1, 1],
            group=1,
        )
        gain = self._gain(blur) / 4.0
        last = self._filter(blur, mixed, blur.output[0], [0] * 4, out, gain)
        for node in (*phases, concat, interleave):
            self.replaced[node.name] = []
        self.replaced[blur.name] = [repeat, conv, last]
        self.counts["up"] += 1

    def _filter(
        self, blur: onnx.NodeProto, x: str, y: str, pads: list[int], channels: int, gain: float
    ) -> onnx.NodeProto:
        """The 3×3 filter of each channel, under the name of the 4×4 one."""
        kernel = np.broadcast_to(FILTER * gain, (channels, 1, 3, 3))
        return helper.make_node(
            "Conv",
            [x, self._constant(f"{blur.input[1]}/narrower", kernel)],
            [y],
            blur.name,
            kernel_shape=[3, 3],
            pads=pads,
            strides=[1, 1],
            dilations=[1, 1],
            group=channels,
        )

    def _gain(self, blur: onnx.NodeProto) -> float:
        """The sum of a filter's taps, 1 or 4."""
        return float(self._array(blur.input[1])[0].sum(dtype=np.float64))

    def _array(self, name: str) -> NDArray[Any]:
        return numpy_helper.to_array(self.weights[name])

    def _constant(self, name: str, value: NDArray[Any]) -> str:
        self.weights[name] = numpy_helper.from_array(value.astype(np.float32), name)
        return name


def _is_filter(node: onnx.NodeProto, weights: Mapping[str, onnx.TensorProto]) -> bool:
    """Whether a node is the depthwise ``[1, 3, 3, 1]`` filter."""
    if node.op_type != "Conv" or node.input[1] not in weights:
        return False
    shape = list(weights[node.input[1]].dims)
    return shape[1:] == [1, 4, 4] and _attributes(node).get("group") == shape[0]


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}
