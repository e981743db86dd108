"""A typed graph for a builder that chooses types itself, as TensorRT 8.6 does.

There quantized graphs do better without casts: between a convolution and the Q node behind it a
cast keeps the two from being one kernel. So every float tensor is FP32, the builder may take half
where it is faster, and the file names the tensors that must not be in half.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from mat_export.contract import SINGLE_KEY
from mat_export.graphs import attribute_of, prune
from mat_export.precision import ISLANDS

__all__ = ["free_types"]


def free_types(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph without casts between floats, and its islands' tensors named in the metadata.

    Weights keep the values that they have in half.
    """
    result = _without_casts(model)
    held = (node for node in model.graph.node if any(rule.holds(node) for rule in ISLANDS))
    names = sorted({name for node in held for name in node.output})
    result.metadata_props.add(key=SINGLE_KEY, value=" ".join(names))
    return result


def _without_casts(model: onnx.ModelProto) -> onnx.ModelProto:
    """Every float tensor in FP32 under its own name."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph, half = result.graph, TensorProto.FLOAT16
    types, kept = _tensor_types(model), {value.name for value in graph.output}
    renamed: dict[str, str] = {}
    nodes = list(graph.node)
    del graph.node[:], graph.value_info[:]
    for node in nodes:
        for i, name in enumerate(node.input):
            node.input[i] = renamed.get(name, name)
        to = attribute_of(node, "to")
        if node.op_type == "Cast" and to in (half, TensorProto.FLOAT):
            between = types.get(node.input[0]) in (half, TensorProto.FLOAT)
            if between and node.output[0] not in kept:
                renamed[node.output[0]] = node.input[0]
                continue
        for attribute in node.attribute:
            if attribute.name == "to" and attribute.i == half:
                attribute.i = TensorProto.FLOAT
            if attribute.t.data_type == half:
                attribute.t.CopyFrom(_as_float(attribute.t))
        graph.node.append(node)
    for i, tensor in enumerate(graph.initializer):
        if tensor.data_type == half:
            graph.initializer[i].CopyFrom(_as_float(tensor))
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type == half:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    prune(graph)
    return result


def _as_float(tensor: onnx.TensorProto) -> onnx.TensorProto:
    return numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name)


def _tensor_types(model: onnx.ModelProto) -> dict[str, int]:
    inferred = onnx.shape_inference.infer_shapes(model).graph
    values = (*inferred.input, *inferred.value_info, *inferred.output)
    return {value.name: value.type.tensor_type.elem_type for value in values}
