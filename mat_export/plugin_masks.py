"""Masks at the border of plugins: 32-bit integers, since TensorRT's plugins have no bools.

The headers of TensorRT say so of every generation of plugins (``PluginTensorDesc::type``), and 8.6
finds no format for a node that takes a bool. So each mask that a plugin reads is cast to INT32,
once, and one that a plugin gives is cast back to bool, if anything else reads it.
"""

from __future__ import annotations

import onnx
from onnx import TensorProto, helper

from mat_export.contract import OPERATOR_DOMAIN
from mat_export.functions import ATTENTION, EPILOGUE, PROPAGATION, UNMASKED_ATTENTION
from mat_export.token_maps import MAP_ATTENTION, TOKEN_NORM, UNMASKED_MAP_ATTENTION

__all__ = ["PLUGIN_OPERATORS", "masks_as_integers"]

PLUGIN_OPERATORS = frozenset(
    (
        *(ATTENTION, UNMASKED_ATTENTION, PROPAGATION),
        *(EPILOGUE, MAP_ATTENTION, UNMASKED_MAP_ATTENTION, TOKEN_NORM),
    )
)
"""The operators that a plugin library has kernels for: those of an exported file, and those that a
graph for plugins is rewritten in."""

_MASK_INPUT = {ATTENTION: 3, MAP_ATTENTION: 2, PROPAGATION: 0}
"""Which input of an operator is a mask."""


def masks_as_integers(graph: onnx.GraphProto) -> int:
    """Let the calls of PLUGIN_OPERATORS take and give masks as INT32, 0 or 1.

    Args:
        graph: Its calls take and give masks as bools; it is rewritten. Every other node and the
            graph's outputs keep the names and types of what they read.

    Returns:
        How many casts were added.
    """
    calls = [node for node in graph.node if _takes_mask(node)]
    read = {name for node in graph.node if not _takes_mask(node) for name in node.input}
    read |= {output.name for output in graph.output}
    given = {node.output[0] for node in calls if node.op_type == PROPAGATION}
    cast: set[str] = set()
    nodes = []
    for node in graph.node:
        if not _takes_mask(node):
            nodes.append(node)
            continue
        place = _MASK_INPUT[node.op_type]
        mask = node.input[place]
        if mask not in given | cast:
            nodes.append(_cast(mask, _integers(mask), TensorProto.INT32))
            cast.add(mask)
        node.input[place] = _integers(mask)
        nodes.append(node)
        if node.op_type == PROPAGATION:
            mask = node.output[0]
            node.output[0] = _integers(mask)
            if mask in read:
                nodes.append(_cast(_integers(mask), mask, TensorProto.BOOL))
    added = len(nodes) - len(graph.node)
    del graph.node[:]
    graph.node.extend(nodes)
    _tell_types(graph, given | cast)
    return added


def _tell_types(graph: onnx.GraphProto, masks: set[str]) -> None:
    """Say the types of the integers too, where those of masks are told; forget what is gone."""
    made = {name for node in graph.node for name in node.output}
    kept = [value for value in graph.value_info if value.name in made]
    for value in graph.value_info:
        if value.name in masks:
            integers = onnx.ValueInfoProto()
            integers.CopyFrom(value)
            integers.name = _integers(value.name)
            integers.type.tensor_type.elem_type = TensorProto.INT32
            kept.append(integers)
    del graph.value_info[:]
    graph.value_info.extend(kept)


def _takes_mask(node: onnx.NodeProto) -> bool:
    return node.domain == OPERATOR_DOMAIN and node.op_type in _MASK_INPUT


def _integers(mask: str) -> str:
    return f"{mask}/as_int32"


def _cast(name: str, result: str, wanted: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [name], [result], f"{result}/Cast", to=wanted)
