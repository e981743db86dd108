"""The last choice between image and filling, for a builder that chooses types itself.

The exported graph ends in ``Where(mask > ½, image, filling)``: kept pixels are the image's, bit for
bit. TensorRT 8.6 hands selections to its fusing compiler, and binds no type of what that reads: at
``--level 0`` on an H200 kept pixels of mat-tiny-256 with plugins were off, by half precision's
rounding as far as errors tell. Sums and products obey the types they are told, and so made the same
engine exact:

    k = clip((mask − ½)·2²⁵, 0, 1)                1 for every mask above ½, else 0
    y = image·k + filling·(1 − k)

which is the same number for any finite filling.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

__all__ = ["STEEPNESS", "blend_outputs"]

STEEPNESS = float(1 << 25)
"""Slope of k: floats just above ½ are 2⁻²⁴ apart, so the next one is past 1 already."""


def blend_outputs(model: onnx.ModelProto) -> int:
    """Say the selections that give float outputs as sums of products.

    Args:
        model: What ``inline_functions`` gives of an exported model, in FP32; it is rewritten.

    Returns:
        How many there were.
    """
    graph = model.graph
    makers = {name: node for node in graph.node for name in node.output}
    outputs = {o.name for o in graph.output if o.type.tensor_type.elem_type == TensorProto.FLOAT}
    nodes: list[onnx.NodeProto] = []
    keeping: dict[str, tuple[str, str]] = {}
    count = 0
    for node in graph.node:
        choice = makers.get(node.input[0]) if node.op_type == "Where" else None
        if choice is None or choice.op_type != "Greater" or node.output[0] not in outputs:
            nodes.append(node)
            continue
        if choice.name not in keeping:
            keeping[choice.name] = _weights(graph, nodes, choice, f"Keep_{len(keeping)}")
        keep, rest = keeping[choice.name]
        kept, filled = (f"Blend{part}_{count}" for part in ("Kept", "Filled"))
        nodes += [
            helper.make_node("Mul", [node.input[1], keep], [kept], kept),
            helper.make_node("Mul", [node.input[2], rest], [filled], filled),
            helper.make_node("Add", [kept, filled], node.output, f"Blend_{count}"),
        ]
        count += 1
    del graph.node[:]
    graph.node.extend(nodes)
    return count


def _weights(
    graph: onnx.GraphProto, nodes: list[onnx.NodeProto], choice: onnx.NodeProto, name: str
) -> tuple[str, str]:
    """Append k and 1 − k of a comparison, and give their names; named as images' nodes are."""
    above, steep, keep, rest = (part + name for part in ("Above", "Steep", "", "Not"))
    constants = {}
    for value in (0.0, 1.0, STEEPNESS):
        constants[value] = f"blending/{value:g}"
        if all(tensor.name != constants[value] for tensor in graph.initializer):
            tensor = numpy_helper.from_array(np.float32(value), constants[value])
            graph.initializer.append(tensor)
    zero, one, slope = constants.values()
    nodes += [
        helper.make_node("Sub", choice.input, [above], above),
        helper.make_node("Mul", [above, slope], [steep], steep),
        helper.make_node("Clip", [steep, zero, one], [keep], keep),
        helper.make_node("Sub", [one, keep], [rest], rest),
    ]
    return keep, rest
