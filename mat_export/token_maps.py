"""Tokens as maps: the transformer's blocks in the layout of the convolutions around them.

The exported graph turns a map [B, C, H, W] into tokens [B, H, W, C] before a stack of blocks and
back behind it, and multiplies tokens by matrices. A GPU's convolutions in half precision keep the
channels of a pixel side by side, which is the tokens' own order in memory; but TensorRT does not
see that, and converts before and after every product: with attention left to plugins, 252 of the
1,110 layers that 8.6 made of mat-512 were reformats. So, for plugins, a block becomes

    u  = TokenNorm(x)                                # x/max(‖x‖₂, floor), per token
    qk = Conv1×1(u),  v = Conv1×1(x)
    y  = MaskedMapAttention(qk, v, mask)             # MaskedWindowAttention on maps
    z  = Conv1×1(lrelu(Conv1×1(lrelu(Conv1×1([x, y])))))

and nothing between two convolutions of the network changes its layout. Exact: the same sums, in
another order.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from mat_export.contract import OPERATOR_DOMAIN
from mat_export.functions import ATTENTION, UNMASKED_ATTENTION
from mat_export.graphs import attribute_of, readers_of, write_graph

__all__ = [
    "MAP_ATTENTION",
    "TOKEN_NORM",
    "UNMASKED_MAP_ATTENTION",
    "expand_token_maps",
    "tokens_as_maps",
]

MAP_ATTENTION = "MaskedMapAttention"
"""``(query_key [B, 2C, H, W], value [B, C, H, W], mask [B, 1, H, W]) → [B, C, H, W]``."""

UNMASKED_MAP_ATTENTION = "MapAttention"
"""Likewise without a mask."""

TOKEN_NORM = "TokenNorm"
"""``x [B, C, H, W] → x/max(‖x‖₂, floor)``, the norm over C and in FP32."""

_TO_TOKENS, _TO_MAPS = [0, 2, 3, 1], [0, 3, 1, 2]

_ON_MAPS = {ATTENTION: MAP_ATTENTION, UNMASKED_ATTENTION: UNMASKED_MAP_ATTENTION}

_ELEMENTWISE = frozenset(("LeakyRelu",))
"""What does not look at the layout."""


class _UnknownError(Exception):
    """The graph has something between tokens that this pass does not know."""


def tokens_as_maps(model: onnx.ModelProto) -> dict[str, int]:
    """Rewrite every stack of blocks; a graph with anything unknown between tokens stays as it is.

    Args:
        model: Typed, with calls of ATTENTION and UNMASKED_ATTENTION and their functions; it is
            rewritten. The types and shapes of the new maps are told in it, since nothing says what
            its new calls give; those of other inner tensors are dropped.

    Returns:
        How many calls of each operator on maps there are now.
    """
    values = onnx.shape_inference.infer_shapes(model).graph.value_info  # the pass changes nodes
    pass_ = _Pass(model.graph)
    try:
        nodes = pass_.run()
    except _UnknownError:
        return {}
    write_graph(model.graph, nodes, pass_.weights.values())
    model.graph.value_info.extend(_on_maps(value) for value in values if value.name in pass_.new)
    kinds = (MAP_ATTENTION, UNMASKED_MAP_ATTENTION, TOKEN_NORM)
    calls = Counter(node.op_type for node in nodes if node.domain == OPERATOR_DOMAIN)
    return {kind: calls[kind] for kind in kinds if calls[kind]}


class _Pass:
    """Goes through the nodes in order, and says each one that meets tokens anew.

    Attributes:
        weights: By name, with those that were made.
        new: Maps that have the names of the tokens that they stand for.
    """

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.weights = {t.name: t for t in graph.initializer}
        self._graph = graph
        self._makers = {o: node for node in graph.node for o in node.output}
        self._readers = readers_of(graph)
        self._outputs = {output.name for output in graph.output}
        self._maps: dict[str, str] = {}  # a tensor of tokens → the map in its place
        self._back: dict[str, str] = {}  # tokens turned back into a map → that map
        self.new: set[str] = set()
        self._done: set[str] = set()  # first outputs of nodes that went into another

    def run(self) -> list[onnx.NodeProto]:
        """The nodes of the rewritten graph, in order."""
        nodes: list[onnx.NodeProto] = []
        for node in self._graph.node:
            if node.output[0] in self._done:
                continue
            if node.op_type == "Transpose" and attribute_of(node, "perm") == _TO_TOKENS:
                self._maps[node.output[0]] = node.input[0]
            elif any(name in self._maps for name in node.input):
                nodes += self._rewritten(node)
            else:
                nodes.append(node)
        if (self._maps.keys() | self._back.keys()) & self._outputs:
            raise _UnknownError
        self.new = {name for name, on_maps in self._maps.items() if name == on_maps}
        # What read the tokens turned back into a map reads the map.
        for node in nodes:
            for i, name in enumerate(node.input):
                node.input[i] = self._back.get(name, name)
        return nodes

    def _rewritten(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        kind = node.op_type
        if kind == "Transpose" and attribute_of(node, "perm") == _TO_MAPS:
            self._back[node.output[0]] = self._maps[node.input[0]]
            return []
        if kind == "MatMul":
            return [self._product(node)]
        if kind == "Concat" and attribute_of(node, "axis") in (-1, 3):
            return [self._same(node, axis=1)]
        if kind in _ELEMENTWISE:
            return [self._same(node)]
        if kind in ("Cast", "ReduceL2"):
            return [self._norm(node)]
        if kind == "Split":
            return []  # attention takes queries and keys together
        if node.domain == OPERATOR_DOMAIN and kind in _ON_MAPS:
            return [self._attention(node)]
        raise _UnknownError

    def _same(self, node: onnx.NodeProto, **changed: int) -> onnx.NodeProto:
        """The node on maps, with other attributes."""
        if not all(name in self._maps for name in node.input):
            raise _UnknownError
        result = onnx.NodeProto()
        result.CopyFrom(node)
        result.input[:] = [self._maps[name] for name in node.input]
        for attribute in result.attribute:
            if attribute.name in changed:
                attribute.i = changed[attribute.name]
        self._maps[node.output[0]] = node.output[0]
        return result

    def _product(self, node: onnx.NodeProto) -> onnx.NodeProto:
        """``x·W + b`` → a 1×1 convolution."""
        x, weight = node.input
        if x not in self._maps or weight not in self.weights:
            raise _UnknownError
        matrix = self._array(weight)
        if matrix.ndim != 2:
            raise _UnknownError
        kernel = np.ascontiguousarray(matrix.T)[:, :, None, None]
        inputs, output = [self._maps[x], self._constant(f"{weight}/kernel", kernel)], node.output[0]
        bias = self._only_reader(output)
        if bias is not None and bias.op_type == "Add":
            (name,) = set(bias.input) - {output}
            if name not in self.weights or list(self.weights[name].dims) != [matrix.shape[1]]:
                raise _UnknownError
            self._done.add(bias.output[0])
            inputs.append(name)
            output = bias.output[0]
        self._maps[output] = output
        return helper.make_node(
            "Conv", inputs, [output], node.name, kernel_shape=[1, 1], strides=[1, 1], pads=[0] * 4
        )

    def _norm(self, node: onnx.NodeProto) -> onnx.NodeProto:
        """``x/max(‖x‖₂, floor)``, between casts or not, → TokenNorm."""
        x, tokens = node.input[0], node.output[0]
        cast = node if node.op_type == "Cast" else None
        if cast is None:
            tokens = x
        readers = [n for n in self._readers[tokens] if n.op_type in ("ReduceL2", "Div")]
        if {n.op_type for n in readers} != {"ReduceL2", "Div"} or len(readers) != 2:
            raise _UnknownError
        if cast is not None and len(self._readers[tokens]) != 2:
            raise _UnknownError
        norm, quotient = sorted(readers, key=lambda n: n.op_type, reverse=True)
        least = self._only_reader(norm.output[0])
        if least is None or least.op_type != "Max" or quotient.input[1] != least.output[0]:
            raise _UnknownError
        if not self._is_over_channels(norm):
            raise _UnknownError
        (floor,) = set(least.input) - {norm.output[0]}
        unit = quotient.output[0]
        back = self._only_reader(unit)
        used = [norm, least, quotient]
        if cast is not None:
            if back is None or back.op_type != "Cast":
                raise _UnknownError
            used.append(back)
            unit = back.output[0]
        self._done.update(n.output[0] for n in used)
        self._maps[unit] = unit
        return helper.make_node(
            TOKEN_NORM,
            [self._maps[x]],
            [unit],
            quotient.name,
            domain=OPERATOR_DOMAIN,
            floor=float(self._array(floor)),
        )

    def _is_over_channels(self, norm: onnx.NodeProto) -> bool:
        axes = attribute_of(norm, "axes")
        if axes is None and len(norm.input) > 1:
            axes = self._array(norm.input[1]).tolist()
        return axes in ([-1], [3])

    def _attention(self, node: onnx.NodeProto) -> onnx.NodeProto:
        """q and k are halves of one map."""
        q, k, v, *mask = node.input
        split = self._makers.get(q)
        if (
            split is None
            or split.op_type != "Split"
            or [*split.output] != [q, k]
            or v not in self._maps
            or any(len(self._readers[name]) != 1 for name in (q, k))
        ):
            raise _UnknownError
        result = onnx.NodeProto()
        result.CopyFrom(node)
        result.op_type = _ON_MAPS[node.op_type]
        result.input[:] = [self._maps[split.input[0]], self._maps[v], *mask]
        self._maps[node.output[0]] = node.output[0]
        return result

    def _only_reader(self, name: str) -> onnx.NodeProto | None:
        readers = self._readers[name]
        return readers[0] if len(readers) == 1 and name not in self._outputs else None

    def _array(self, name: str) -> NDArray[Any]:
        if name not in self.weights:
            raise _UnknownError
        return numpy_helper.to_array(self.weights[name])

    def _constant(self, name: str, value: NDArray[Any]) -> str:
        self.weights[name] = numpy_helper.from_array(value, name)
        return name


def _on_maps(tokens: onnx.ValueInfoProto) -> onnx.ValueInfoProto:
    """[B, H, W, C] → [B, C, H, W]."""
    result = onnx.ValueInfoProto()
    result.CopyFrom(tokens)
    sides = [*tokens.type.tensor_type.shape.dim]
    if len(sides) == len(_TO_MAPS):
        del result.type.tensor_type.shape.dim[:]
        result.type.tensor_type.shape.dim.extend(sides[i] for i in _TO_MAPS)
    return result


def expand_token_maps(model: onnx.ModelProto) -> None:
    """Say the operators on maps in standard ones and those on tokens, for runtimes without plugins.

    Args:
        model: What `tokens_as_maps` rewrote, with the functions of the operators on tokens; it is
            changed.
    """
    opset = next(o.version for o in model.opset_import if o.domain == "")
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        nodes += _expanded(node, opset) if node.domain == OPERATOR_DOMAIN else [node]
    write_graph(model.graph, nodes, [*model.graph.initializer])


def _expanded(node: onnx.NodeProto, opset: int) -> list[onnx.NodeProto]:
    y = node.output[0]
    if node.op_type == TOKEN_NORM:
        (x,), floor = node.input, np.array(attribute_of(node, "floor"), np.float32)
        parts = ("wide", "floor", "axis", "square", "sum", "norm", "safe", "unit")
        wide, least, axis, square, total, norm, safe, unit = (f"{y}/{part}" for part in parts)
        return [
            helper.make_node("Cast", [x], [wide], to=onnx.TensorProto.FLOAT),
            helper.make_node("Constant", [], [least], value=numpy_helper.from_array(floor)),
            helper.make_node("Constant", [], [axis], value_ints=[1]),
            helper.make_node("Mul", [wide, wide], [square]),
            helper.make_node("ReduceSum", [square, axis], [total], keepdims=1),
            helper.make_node("Sqrt", [total], [norm]),
            helper.make_node("Max", [norm, least], [safe]),
            helper.make_node("Div", [wide, safe], [unit]),
            helper.make_node("CastLike", [unit, x], [y]),
        ]
    on_tokens = {on_maps: kind for kind, on_maps in _ON_MAPS.items()}
    if node.op_type not in on_tokens:
        return [node]
    query_key, value, *mask = node.input
    halves, tokens = [f"{y}/q", f"{y}/k"], [f"{y}/{name}/tokens" for name in "qkvy"]
    call = onnx.NodeProto()
    call.CopyFrom(node)
    call.op_type = on_tokens[node.op_type]
    call.input[:] = [*tokens[:3], *mask]
    call.output[:] = tokens[3:]
    number: dict[str, Any] = {"num_outputs": 2} if opset >= 18 else {}
    return [
        helper.make_node("Split", [query_key], halves, axis=1, **number),
        *(
            helper.make_node("Transpose", [name], [to], perm=_TO_TOKENS)
            for name, to in zip((*halves, value), tokens[:3], strict=True)
        ),
        call,
        helper.make_node("Transpose", tokens[3:], [y], perm=_TO_MAPS),
    ]
