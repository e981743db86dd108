"""Inline the model-local functions: the same graph for runtimes that know no functions.

Unlike a general inliner this one keeps the modules' names (``first_stage.tran.0.blocks.1.attn/…``),
evaluates what is constant (where the grid is fixed, the order of tokens in their windows), shares
equal constants, and leaves out biases that are all zero (the regions of an unshifted window).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from mat_export.contract import OPERATOR_DOMAIN
from mat_export.graphs import prune

__all__ = ["inline_functions"]


def inline_functions(
    model: onnx.ModelProto, *, keep: Collection[str] = frozenset()
) -> onnx.ModelProto:
    """A copy of a model without functions.

    Args:
        model: Left as it is.
        keep: Functions, by name, whose calls stay: a plugin will stand for them. The functions
            themselves stay too, since they tell the types and shapes of what they give.

    Returns:
        The same graph of standard operators alone, and of calls of those that are kept.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    inliner = _Inliner(result, keep)
    nodes = [part for node in model.graph.node for part in inliner.expand(node)]
    nodes = inliner.without_zero_biases(nodes)
    del result.graph.node[:], result.graph.value_info[:]
    result.graph.node.extend(nodes)
    prune(result.graph)
    if not any(node.domain == OPERATOR_DOMAIN for node in nodes):
        del result.functions[:]
        kept = [o for o in result.opset_import if o.domain != OPERATOR_DOMAIN]
        del result.opset_import[:]
        result.opset_import.extend(kept)
    # Inner tensors lost their shapes with the functions; find them again.
    return onnx.shape_inference.infer_shapes(result)


class _Inliner:
    """The state of one pass: functions to expand, and constants made on the way."""

    def __init__(self, model: onnx.ModelProto, keep: Collection[str]) -> None:
        self._graph = model.graph
        self._functions = {(f.domain, f.name): f for f in model.functions if f.name not in keep}
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._values: dict[str, NDArray[Any]] = {}
        self._results: dict[tuple[str, ...], list[str]] = {}
        self._opsets = {o.domain: o.version for o in model.opset_import}

    def expand(self, node: onnx.NodeProto) -> Iterable[onnx.NodeProto]:
        """The nodes that stand for one node, which is itself unless it calls a function."""
        function = self._functions.get((node.domain, node.op_type))
        if function is None:
            yield node
            return
        attributes = {a.name: a for a in node.attribute}
        names = dict(zip(function.input, node.input, strict=False))
        names.update(zip(function.output, node.output, strict=False))
        for inner in function.node:
            copy = onnx.NodeProto()
            copy.CopyFrom(inner)
            copy.name = f"{node.name}/{inner.name}"
            _resolve(copy, attributes)
            for i, name in enumerate(copy.input):
                copy.input[i] = names.setdefault(name, f"{node.name}/{name}") if name else ""
            if all(name in self._values for name in copy.input):
                names.update(zip(inner.output, self._evaluated(copy), strict=True))
                continue
            for i, name in enumerate(copy.output):
                copy.output[i] = names.setdefault(name, f"{node.name}/{name}")
            yield from self.expand(copy)

    def _evaluated(self, node: onnx.NodeProto) -> list[str]:
        """Initializers with the results of a node whose inputs are constants."""
        if node.op_type == "Constant":
            return [self._constant(node)]
        key = (node.op_type, *node.input, *(str(a) for a in node.attribute))
        if key not in self._results:
            body = self._functions.get((node.domain, node.op_type), node)
            called = body is not node
            formal = body.input if called else node.input
            feeds = {name: self._values[own] for name, own in zip(formal, node.input, strict=True)}
            evaluator = ReferenceEvaluator(body, opsets=None if called else self._opsets)
            self._results[key] = [
                self._shared(f"{node.name}/{output}", np.asarray(result))
                for output, result in zip(
                    body.output, evaluator.run(None, feeds, attributes={}), strict=True
                )
            ]
        return self._results[key]

    def _constant(self, node: onnx.NodeProto) -> str:
        (attribute,) = node.attribute
        value = onnx.helper.get_attribute_value(attribute)
        array = numpy_helper.to_array(value) if attribute.name == "value" else np.asarray(value)
        return self._shared(node.name, array)

    def _shared(self, name: str, array: NDArray[Any]) -> str:
        """An initializer of this value: one that is there already, or a new one."""
        key = (str(array.dtype), array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = name
            self._values[name] = array
            self._graph.initializer.append(numpy_helper.from_array(array, name))
        return self._constants[key]

    def without_zero_biases(self, nodes: list[onnx.NodeProto]) -> list[onnx.NodeProto]:
        """Drop casts to the type a tensor has, and sums with an all-zero constant.

        In an FP32 graph every CastLike is such a cast.

        Only tensors of inlined functions are constants here, and each such sum's result is added
        to the logits next, so that a smaller shape broadcasts to the same sum.
        """
        renamed: dict[str, str] = {}
        kept = []
        for node in nodes:
            for i, name in enumerate(node.input):
                node.input[i] = renamed.get(name, name)
            if node.op_type == "CastLike":
                renamed[node.output[0]] = node.input[0]
                continue
            if node.op_type == "Add":
                zeros = [name for name in node.input if self._is_zero(name)]
                if zeros:
                    (other,) = [name for name in node.input if name != zeros[0]] or zeros
                    renamed[node.output[0]] = other
                    continue
            kept.append(node)
        return kept

    def _is_zero(self, name: str) -> bool:
        value = self._values.get(name)
        return value is not None and value.dtype == np.float32 and not value.any()


def _resolve(node: onnx.NodeProto, attributes: Mapping[str, onnx.AttributeProto]) -> None:
    """Replace references to a function's attributes by the caller's values."""
    resolved = []
    for attribute in node.attribute:
        if not attribute.ref_attr_name:
            resolved.append(attribute)
        elif attribute.ref_attr_name in attributes:
            value = onnx.AttributeProto()
            value.CopyFrom(attributes[attribute.ref_attr_name])
            value.name = attribute.name
            resolved.append(value)
    del node.attribute[:]
    node.attribute.extend(resolved)
