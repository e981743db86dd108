"""Lower a model's opset: TensorRT 8.6, for one, parses nothing later than 17.

Only the standard operators of the main graph are lowered; functions are made for the opset they are
wanted in. Each operator whose meaning changed in between has a rule here, and one without a rule
stops the pass: nothing is ever lowered by merely changing the number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx
from onnx import numpy_helper

from mat_export.contract import UserError

__all__ = ["LOWEST_OPSET", "LoweringError", "lower_opset"]

LOWEST_OPSET = 17
"""The oldest opset with every operator the inference form needs."""

_IR_VERSIONS = {17: 8, 18: 8, 19: 9, 20: 9}
"""Newest IR version that came with each opset."""


class LoweringError(UserError):
    """A node that cannot be said in the older opset."""


class _Constants:
    """Values of small initializers and constants, by name."""

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
    if len(node.input) > 1 and node.input[1]:
        node.attribute.append(onnx.helper.make_attribute("axes", constants.ints(node, 1)))
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


def _plain_pool(node: onnx.NodeProto, constants: _Constants) -> None:
    """AveragePool: ``dilations`` came in opset 19."""
    if any(d != 1 for d in _attribute(node, "dilations") or ()):
        raise LoweringError(f"{node.name}: dilated average pooling needs opset 19")
    _drop(node, "dilations")


def _plain_cast(node: onnx.NodeProto, constants: _Constants) -> None:
    """Cast and CastLike: ``saturate`` (8-bit floats only) came in opset 19."""
    _drop(node, "saturate", only=1)


def _plain_reshape(node: onnx.NodeProto, constants: _Constants) -> None:
    """Reshape: ``allowzero`` came in opset 14 and TensorRT 8.6 knows none.

    It says that a 0 in the shape is a size, not "keep"; no tensor of ours is empty, so a shape that
    is computed has no 0, and a constant one is looked at.
    """
    constant = constants.known(node, 1)
    if _attribute(node, "allowzero") and constant and 0 in constants.ints(node, 1):
        raise LoweringError(f"{node.name}: an empty tensor has no form in the older opset")
    _drop(node, "allowzero")


def _unchanged(node: onnx.NodeProto, constants: _Constants) -> None:
    """Only element types were added."""


_RULES: dict[str, _Rule] = {
    **dict.fromkeys(
        ("ReduceMean", "ReduceMax", "ReduceMin", "ReduceL2", "ReduceProd"), _axes_to_attribute
    ),
    "Split": _equal_split,
    "Resize": _plain_resize,
    "AveragePool": _plain_pool,
    "Cast": _plain_cast,
    "Reshape": _plain_reshape,
    **dict.fromkeys(
        ("Shape", "Equal", "Identity", "Constant", "ConstantOfShape", "Size"),
        _unchanged,
    ),
}


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
        if node.domain == "" and _changed(node.op_type, opset, current.version):
            rule = _RULES.get(node.op_type)
            if rule is None:
                raise LoweringError(
                    f"{node.name}: {node.op_type} of opset {current.version} has no known form in "
                    f"opset {opset}; export without --opset"
                )
            rule(node, constants)
    current.version = opset
    model.ir_version = min(model.ir_version, _IR_VERSIONS[opset])
    return True


def _changed(op: str, old: int, new: int) -> bool:
    """Whether an operator was revised between two opsets."""
    since: int = onnx.defs.get_schema(op, new).since_version
    return since > old


def _attribute(node: onnx.NodeProto, name: str) -> Any:
    found = [a for a in node.attribute if a.name == name]
    return onnx.helper.get_attribute_value(found[0]) if found else None


def _drop(node: onnx.NodeProto, name: str, only: object = None) -> None:
    """Remove an attribute, which must have the value that the older opset implies."""
    value = _attribute(node, name)
    if value is None:
        return
    if only is not None and value != only:
        raise LoweringError(f"{node.name}: {name}={value!r} has no form in the older opset")
    kept = [a for a in node.attribute if a.name != name]
    del node.attribute[:]
    node.attribute.extend(kept)


def _refuse(node: onnx.NodeProto, name: str) -> None:
    if _attribute(node, name) is not None:
        raise LoweringError(f"{node.name}: {name} has no form in the older opset")
