"""Lower a model's opset: TensorRT 8.6, for one, parses nothing later than 17.

Only the standard operators of the main graph are lowered; functions are made for the opset they are
wanted in. Each revision of an operator in between has a rule here that takes it back, and one
without a rule stops the pass: nothing is ever lowered by merely changing the number.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from onnx import helper, numpy_helper

from mat_export.contract import UserError
from mat_export.graphs import attribute_of, prune, write_graph

__all__ = ["LOWEST_OPSET", "LoweringError", "lower_opset", "quantize_in_graph"]

LOWEST_OPSET = 17
"""The oldest opset with every operator the inference form needs."""

_IR_VERSIONS = {17: 8, 18: 8, 19: 9, 20: 9}
"""Newest IR version that came with each opset."""


class LoweringError(UserError):
    """A node that cannot be said in the older opset."""


class _Constants:
    """Values of initializers, by name."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._initializers = {tensor.name: tensor for tensor in graph.initializer}

    def known(self, node: onnx.NodeProto, position: int) -> bool:
        """Whether an input of the node is a constant."""
        return node.input[position] in self._initializers

    def ints(self, node: onnx.NodeProto, position: int) -> list[int]:
        """The integers in an input of the node."""
        name = node.input[position]
        if name not in self._initializers:
            raise LoweringError(f"{node.name}: input '{name}' is computed, not a constant")
        values: list[int] = numpy_helper.to_array(self._initializers[name]).tolist()
        return values


_Rule = Callable[[onnx.NodeProto, _Constants], None]


def _axes_to_attribute(node: onnx.NodeProto, constants: _Constants) -> None:
    """Reductions: axes became an input in opset 18."""
    axes = constants.ints(node, 1) if len(node.input) > 1 and node.input[1] else []
    if axes:  # no axes meant all of them, then as now
        node.attribute.append(onnx.helper.make_attribute("axes", axes))
    del node.input[1:]
    _drop(node, "noop_with_empty_axes", only=0)


def _equal_split(node: onnx.NodeProto, constants: _Constants) -> None:
    """Split: ``num_outputs`` came in opset 18; before, no sizes meant equal parts."""
    if len(node.input) < 2:
        _drop(node, "num_outputs", only=len(node.output))


def _plain_resize(node: onnx.NodeProto, constants: _Constants) -> None:
    """Resize: ``antialias``, ``axes`` and ``keep_aspect_ratio_policy`` came in opset 18."""
    _drop(node, "antialias", only=0)
    _drop(node, "keep_aspect_ratio_policy", only=b"stretch")
    _refuse(node, "axes")


def _known_coordinates(node: onnx.NodeProto, constants: _Constants) -> None:
    """Resize: one more way to map coordinates came in opset 19."""
    if attribute_of(node, "coordinate_transformation_mode") == b"half_pixel_symmetric":
        raise LoweringError(f"{node.name}: half_pixel_symmetric has no form in the older opset")


def _plain_pool(node: onnx.NodeProto, constants: _Constants) -> None:
    """AveragePool: ``dilations`` came in opset 19."""
    if any(d != 1 for d in attribute_of(node, "dilations") or ()):
        raise LoweringError(f"{node.name}: dilated average pooling needs opset 19")
    _drop(node, "dilations")


def _plain_cast(node: onnx.NodeProto, constants: _Constants) -> None:
    """Cast, CastLike and QuantizeLinear: ``saturate`` (8-bit floats only) came in opset 19."""
    _drop(node, "saturate", only=1)


def _plain_reshape(node: onnx.NodeProto, constants: _Constants) -> None:
    """Reshape: ``allowzero`` came in opset 14 and TensorRT 8.6 knows none.

    It says that a 0 in the shape is a size, not "keep"; no tensor of ours is empty, so a shape that
    is computed has no 0, and a constant one is looked at.
    """
    constant = constants.known(node, 1)
    if attribute_of(node, "allowzero") and constant and 0 in constants.ints(node, 1):
        raise LoweringError(f"{node.name}: an empty tensor has no form in the older opset")
    _drop(node, "allowzero")


def _unchanged(node: onnx.NodeProto, constants: _Constants) -> None:
    """Only element types were added."""


_RULES: dict[tuple[str, int], _Rule] = {
    **{
        (op, 18): _axes_to_attribute
        for op in ("ReduceMean", "ReduceMax", "ReduceMin", "ReduceL2", "ReduceProd")
    },
    ("Split", 18): _equal_split,
    ("Resize", 18): _plain_resize,
    ("Resize", 19): _known_coordinates,
    ("AveragePool", 19): _plain_pool,
    ("Cast", 19): _plain_cast,
    ("CastLike", 19): _plain_cast,
    ("QuantizeLinear", 19): _plain_cast,
    ("Reshape", 19): _plain_reshape,
    **{
        (op, 19): _unchanged
        for op in (
            *("Shape", "Equal", "Identity", "Constant", "ConstantOfShape", "Size"),
            "DequantizeLinear",
        )
    },
    **{(op, 20): _unchanged for op in ("ReduceMax", "ReduceMin", "ConstantOfShape")},
}
"""What takes an operator back before the revision that came with an opset."""


def lower_opset(model: onnx.ModelProto, opset: int) -> bool:
    """Rewrite the main graph of a model, in place, for an older opset.

    Args:
        model: The model; its functions are left alone.
        opset: 17 or later.

    Returns:
        Whether anything was to do.

    Raises:
        LoweringError: If a node has no equal in that opset.
    """
    current = next(o for o in model.opset_import if o.domain == "")
    if current.version <= opset:
        return False
    constants = _Constants(model.graph)
    for node in model.graph.node:
        for revision in _revisions(node, opset, current.version):
            rule = _RULES.get((node.op_type, revision))
            if rule is None:
                raise LoweringError(
                    f"{node.name}: {node.op_type} of opset {revision} has no known form in "
                    f"opset {opset}; export without --opset"
                )
            rule(node, constants)
    prune(model.graph)  # what became attributes
    current.version = opset
    model.ir_version = min(model.ir_version, _IR_VERSIONS[opset])
    return True


def quantize_in_graph(graph: onnx.GraphProto) -> int:
    """Give weights in INT8 as the FP32 numbers that they stand for, and a node that rounds them.

    TensorRT 8.6 has no constants in INT8 (its ``IConstantLayer``), but folds the two into one. The
    integers are the same again: a product and a quotient are off by 2⁻²³ of at most 127.

    Returns:
        How many weights there were.
    """
    weights = {tensor.name: tensor for tensor in graph.initializer}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in weights:
            name, scale, *zero = node.input
            integers, steps = (numpy_helper.to_array(weights[n]) for n in (name, scale))
            axis = attribute_of(node, "axis", 1)
            shape = [-1 if i == axis else 1 for i in range(integers.ndim)]
            values = integers * steps.reshape(shape if steps.ndim else ())
            floats, rounded = f"{name}/floats", f"{name}/rounded"
            weights[floats] = numpy_helper.from_array(values.astype(np.float32), floats)
            pair = helper.make_node(
                "QuantizeLinear", [floats, scale, *zero], [rounded], rounded, axis=axis
            )
            node.input[0] = rounded
            nodes.append(pair)
        nodes.append(node)
    added = len(nodes) - len(graph.node)
    write_graph(graph, nodes, weights.values())
    return added


def _revisions(node: onnx.NodeProto, old: int, new: int) -> list[int]:
    """Opsets after `old` and up to `new` that revised the node's operator, newest first."""
    if node.domain:
        return []
    if any(attribute.type == onnx.AttributeProto.GRAPH for attribute in node.attribute):
        raise LoweringError(f"{node.name}: {node.op_type} has a graph of its own, left as it is")
    schema = onnx.defs.get_schema(node.op_type, new)
    found = []
    while schema.since_version > old:
        found.append(schema.since_version)
        if not onnx.defs.has(node.op_type, schema.since_version - 1):
            break
        schema = onnx.defs.get_schema(node.op_type, schema.since_version - 1)
    return found


def _drop(node: onnx.NodeProto, name: str, only: object = None) -> None:
    """Remove an attribute, which must have the value that the older opset implies."""
    value = attribute_of(node, name)
    if value is None:
        return
    if only is not None and value != only:
        raise LoweringError(f"{node.name}: {name}={value!r} has no form in the older opset")
    kept = [a for a in node.attribute if a.name != name]
    del node.attribute[:]
    node.attribute.extend(kept)


def _refuse(node: onnx.NodeProto, name: str) -> None:
    if attribute_of(node, name) is not None:
        raise LoweringError(f"{node.name}: {name} has no form in the older opset")
