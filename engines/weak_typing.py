"""Make TensorRT 8.6 follow the types in the ONNX file.

Networks of that version are weakly typed: the parser reads types, but the builder chooses each
layer's own unless it is told. So each layer gets the type that the file gives its outputs, and the
flag OBEY_PRECISION_CONSTRAINTS makes that binding. Layers that the parser adds between (shuffles,
broadcasts) take the type of what they read. Q/DQ layers and what reads a dequantized tensor stay
free: a convolution that was told its type would not become INT8. Plugins stay free too: with their
types bound, 8.6.0 found "No supported formats for ...MaskedWindowAttention" on an H200; free, the
mat-512 engine was built, ran, and was faster than the one without plugins. From TensorRT 10 on
networks are strongly typed and nothing of this is needed.

A quantized graph comes without casts (`mat_export.free_types`) and names the tensors that have to
be FP32: their layers alone are bound, and all others are free to be INT8 or half. Binding more to
half, to spare the builder kernels in FP32, is refused by 8.6.0 (seen on an H200): with all layers
but those around Q/DQ it found "No supported formats for" a reshape of the styles, with convolutions
and products alone for one behind a product of the mapping.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

import onnx
from onnx import TensorProto

from mat_export.contract import SINGLE_KEY

__all__ = ["constrain", "tensor_types"]

_FREE = re.compile(r"/MaskPropagation/")
"""Layers left free: counts of at most 256, exact in half precision too. With their types bound,
8.6 found no implementation for the block around them (seen on an H100)."""


def tensor_types(model: onnx.ModelProto) -> dict[str, int]:
    """ONNX element type of every tensor of a graph, by name."""
    inferred = onnx.shape_inference.infer_shapes(model).graph
    values = (*inferred.input, *inferred.value_info, *inferred.output)
    return {value.name: value.type.tensor_type.elem_type for value in values}


def constrain(module: Any, network: Any, model: onnx.ModelProto) -> tuple[int, int]:
    """Give each layer of a parsed network the type that the file gives its outputs.

    Of a graph that names what has to be FP32, the layers that give those tensors alone.

    Args:
        module: TensorRT 8.6's Python module.
        network: The INetworkDefinition that the parser made of `model`.
        model: The graph.

    Returns:
        How many layers were set to half precision and how many to FP32.
    """
    types = tensor_types(model)
    wanted = {int(TensorProto.FLOAT16): module.float16, int(TensorProto.FLOAT): module.float32}
    kinds = ("CONSTANT", "SHAPE", "CAST", "QUANTIZE", "DEQUANTIZE", "PLUGIN_V2")
    skipped = {getattr(module.LayerType, kind) for kind in kinds}
    dequantized = {
        name
        for node in model.graph.node
        if node.op_type == "DequantizeLinear"
        for name in node.output
    }
    only = _named(model)
    counts = dict.fromkeys(wanted, 0)
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if layer.type in skipped:
            continue
        first = layer.get_input(0) if layer.num_inputs else None
        if first is not None and first.name in dequantized:
            continue
        before = types.get(first.name) if first is not None else None
        outputs = [layer.get_output(j) for j in range(layer.num_outputs)]
        for output in outputs:
            if output.name not in types and before is not None:
                types[output.name] = before
        if only is not None and not (outputs and outputs[0].name in only):
            continue
        kind = types.get(outputs[0].name) if outputs else None
        integral = any(output.dtype in (module.int32, module.bool) for output in outputs)
        if kind not in wanted or integral or _FREE.search(layer.name):
            continue
        layer.precision = wanted[kind]
        for j in range(layer.num_outputs):
            layer.set_output_type(j, wanted[kind])
        counts[kind] += 1
    return counts[int(TensorProto.FLOAT16)], counts[int(TensorProto.FLOAT)]


def _named(model: onnx.ModelProto) -> Collection[str] | None:
    """The tensors that have to be FP32, where the file says which."""
    texts = (entry.value for entry in model.metadata_props if entry.key == SINGLE_KEY)
    text = next(texts, None)
    return None if text is None else frozenset(text.split())
