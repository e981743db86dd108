"""Write Q/DQ nodes: one pair for each tensor that INT8 layers read, one DQ for each weight.

TensorRT's rules: symmetric, zero point 0, one scale for a tensor, one an output channel for
weights, scales as FP32 constants. A tensor has one pair however many layers read it quantized, so
that skips and convolutions share its scale; a concatenation is quantized as a whole, so its parts
share one. Where a tensor is an enlarged one, the small one gets a pair of the same scale besides,
which changes nothing and lets the enlarging move bytes. Who is not INT8 goes on reading the exact
tensor.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import onnx
from onnx import helper, numpy_helper

from calib.candidates import Candidate
from calib.weights import quantize_weight
from mat_export.graphs import write_graph

__all__ = ["place"]


def place(
    model: onnx.ModelProto,
    layers: Collection[Candidate],
    scales: Mapping[str, float],
    *,
    fold: bool = False,
) -> onnx.ModelProto:
    """A copy of a model in which these layers are INT8.

    Args:
        model: The FP32 graph; it is left as it is.
        layers: Its candidates to quantize.
        scales: Of what they read, by tensor.
        fold: Keep weights as the FP32 numbers that their integers stand for: the same results,
            sooner, in a runtime that has no INT8.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    placer = _Placer(result.graph, scales, fold)
    chosen = {layer.name: layer for layer in layers}
    for node in list(result.graph.node):
        if node.name in chosen:
            placer.quantize(node, chosen[node.name])
        placer.nodes.append(node)
    write_graph(result.graph, placer.nodes, placer.weights.values())
    return onnx.shape_inference.infer_shapes(result)


class _Placer:
    """The nodes of the new graph so far, and its constants."""

    def __init__(self, graph: onnx.GraphProto, scales: Mapping[str, float], fold: bool) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights = {t.name: t for t in graph.initializer}
        self._makers = {name: node for node in graph.node for name in node.output}
        self._scales, self._fold = scales, fold
        self._rounded: dict[str, str] = {}

    def quantize(self, node: onnx.NodeProto, layer: Candidate) -> None:
        """Let a node read its tensor, and its weights, quantized."""
        place = list(node.input).index(layer.tensor)
        node.input[place] = self._pair(layer.tensor, self._scales[layer.tensor])
        if layer.weight:
            node.input[1] = self._weight(layer)

    def _pair(self, tensor: str, scale: float) -> str:
        """The tensor, rounded; the same for whoever asks."""
        if tensor in self._rounded:
            return self._rounded[tensor]
        maker = self._makers.get(tensor)
        if maker is not None and maker.op_type == "Resize" and maker.input[0] not in self._scales:
            self._round_before(maker, scale)
        self._rounded[tensor] = self._add_pair(tensor, scale)
        return self._rounded[tensor]

    def _round_before(self, maker: onnx.NodeProto, scale: float) -> None:
        """Give what an enlarging node reads a pair too."""
        index = next(i for i, node in enumerate(self.nodes) if node.name == maker.name)
        behind = self.nodes[index:]
        del self.nodes[index:]
        behind[0].input[0] = self._add_pair(maker.input[0], scale)
        self.nodes += behind

    def _add_pair(self, tensor: str, scale: float) -> str:
        step = self._constant(f"{tensor}/scale", np.array(scale, np.float32))
        zero = self._constant(f"{tensor}/zero", np.array(0, np.int8))
        integers, rounded = f"{tensor}/int8", f"{tensor}/dequantized"
        self.nodes += [
            helper.make_node(
                "QuantizeLinear", [tensor, step, zero], [integers], f"{tensor}/QuantizeLinear"
            ),
            helper.make_node(
                "DequantizeLinear", [integers, step, zero], [rounded], f"{tensor}/DequantizeLinear"
            ),
        ]
        return rounded

    def _weight(self, layer: Candidate) -> str:
        """The layer's weights: integers and a DQ node, or the numbers they stand for."""
        value = numpy_helper.to_array(self.weights[layer.weight])
        integers, scales = quantize_weight(value)
        rounded = f"{layer.weight}/dequantized"
        if self._fold:
            shape = (-1, *[1] * (value.ndim - 1))
            return self._constant(rounded, integers * scales.reshape(shape))
        if rounded not in self._rounded.values():
            inputs = [
                self._constant(f"{layer.weight}/int8", integers),
                self._constant(f"{layer.weight}/scale", scales),
                self._constant(f"{layer.weight}/zero", np.zeros(len(scales), np.int8)),
            ]
            self.nodes.append(
                helper.make_node(
                    "DequantizeLinear",
                    inputs,
                    [rounded],
                    f"{layer.weight}/DequantizeLinear",
                    axis=0,
                )
            )
            self._rounded[layer.weight] = rounded
        return rounded

    def _constant(self, name: str, value: np.ndarray) -> str:
        self.weights[name] = numpy_helper.from_array(value, name)
        return name
