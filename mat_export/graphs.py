"""What every pass over an ONNX graph asks of it, and how it writes one back."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable
from typing import Any

import onnx

__all__ = ["attribute_of", "prune", "readers_of", "write_graph"]


def write_graph(
    graph: onnx.GraphProto, nodes: Collection[onnx.NodeProto], weights: Iterable[onnx.TensorProto]
) -> None:
    """Give a graph other nodes, and of these weights the ones that they read.

    Shapes of inner tensors are dropped: infer them again.
    """
    read = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in weights if tensor.name in read]
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend(nodes)
    graph.initializer.extend(kept)


def prune(graph: onnx.GraphProto) -> None:
    """Drop initializers that nothing reads."""
    read = {name for node in graph.node for name in node.input} | {o.name for o in graph.output}
    kept = [tensor for tensor in graph.initializer if tensor.name in read]
    if len(kept) < len(graph.initializer):
        del graph.initializer[:]
        graph.initializer.extend(kept)


def readers_of(graph: onnx.GraphProto) -> defaultdict[str, list[onnx.NodeProto]]:
    """The nodes that read each tensor, in order, one once for each time that it does."""
    readers: defaultdict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in graph.node:
        for name in node.input:
            readers[name].append(node)
    return readers


def attribute_of(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    """An attribute's value, or `default` where the node has none."""
    found = (onnx.helper.get_attribute_value(a) for a in node.attribute if a.name == name)
    return next(found, default)
