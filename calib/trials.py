"""One layer at a time, exact and as INT8 makes it.

What runs is what ONNX Runtime's quantizing operators compute: the input rounded to its scale, the
weights to theirs, the product in FP32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from calib.candidates import Candidate
from calib.stages import open_session
from calib.weights import quantize_weight

__all__ = ["LayerTrials"]

_Array = NDArray[np.float32]


class LayerTrials:
    """Every candidate of a model, alone.

    Args:
        model: The FP32 graph.
        threads: CPU threads, ONNX Runtime's choice if None.
    """

    def __init__(self, model: onnx.ModelProto, threads: int | None = None) -> None:
        self._nodes = {node.name: node for node in model.graph.node}
        self._weights = {t.name: t for t in model.graph.initializer}
        self._opsets, self._ir = model.opset_import, model.ir_version
        self._threads = threads
        self._sessions: dict[tuple[str, bool], Any] = {}

    def exact(self, candidate: Candidate, values: _Array) -> _Array:
        """What the layer makes of its input; of a sum, just the input's part of it."""
        if candidate.kind == "skip":
            return values
        return self._run(candidate, False, {"x": values})

    def quantized(self, candidate: Candidate, values: _Array, scale: float) -> _Array:
        """The same in INT8, its input at this scale."""
        return self._run(candidate, True, {"x": values, "scale": np.array(scale, np.float32)})

    def _run(self, candidate: Candidate, int8: bool, feeds: dict[str, Any]) -> _Array:
        key = (candidate.name, int8)
        if key not in self._sessions:
            self._sessions[key] = open_session(self._model(candidate, int8), self._threads)
        result: _Array = self._sessions[key].run(["y"], feeds)[0]
        return result

    def _model(self, candidate: Candidate, int8: bool) -> onnx.ModelProto:
        """The layer's graph."""
        inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None] * 4)]
        nodes, weights, last = [], [], "x"
        if int8:
            inputs.append(helper.make_tensor_value_info("scale", TensorProto.FLOAT, []))
            weights.append(numpy_helper.from_array(np.array(0, np.int8), "zero"))
            nodes += [
                helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["integers"]),
                helper.make_node("DequantizeLinear", ["integers", "scale", "zero"], ["rounded"]),
            ]
            last = "rounded"
        if candidate.kind == "skip":
            nodes.append(helper.make_node("Identity", [last], ["y"]))
        else:
            node = onnx.NodeProto()
            node.CopyFrom(self._nodes[candidate.name])
            node.input[:] = [last, "weight", *node.input[2:]]
            node.output[:] = ["y"]
            nodes.append(node)
            value = numpy_helper.to_array(self._weights[candidate.weight])
            if int8:
                integers, scales = quantize_weight(value)
                value = integers * scales.reshape(-1, *[1] * (value.ndim - 1))
            weights.append(numpy_helper.from_array(value.astype(np.float32), "weight"))
            weights += [self._weights[name] for name in node.input[2:] if name]
        output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * 4)
        graph = helper.make_graph(nodes, candidate.name, inputs, [output], weights)
        opsets = [opset for opset in self._opsets if opset.domain == ""]
        return helper.make_model(graph, opset_imports=opsets, ir_version=self._ir)
