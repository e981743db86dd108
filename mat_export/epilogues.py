"""Fused epilogues: what stands between two convolutions, as one operator for a plugin.

A layer's convolution is followed by a 3×3 filter where it resamples, by its demodulation, noise
and bias, the leaky ReLU, a partial convolution's ratio, the skip connection, and the next layer's
style. TensorRT makes one pass over the map of some of these, and one of each filter: on an H200 8.6
took 2.4 of 6.4 ms of mat-512 in FP16 for them, two to three times what the memory's bandwidth asks
for. So a chain of them becomes one call of

    mat::FusedEpilogue(x, scale?, noise?, bias?, ratio?, skip?, style?) → y
    y = (leaky_relu(filter(x)·scale + noise + bias)·ratio + skip)·style

whose attributes say which parts follow x (TensorRT's parser takes no empty inputs for plugins), the
filter ``[1, 2, 1] ⊗ [1, 2, 1]/16·gain`` with its padding, and the ReLU's slope. Inside it computes
in FP32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from mat_export.contract import OPERATOR_DOMAIN
from mat_export.functions import EPILOGUE, EPILOGUE_PARTS
from mat_export.graphs import attribute_of, prune, readers_of
from mat_export.resampling import FILTER

__all__ = ["LEAST_SIZE", "expand_epilogues", "fuse_epilogues"]

LEAST_SIZE = 1 << 20
"""Channels × height × width from which a chain is replaced. Below, less than 2 MB go in and out in
half precision: a GPU moves that in less time than it takes to start a kernel, whoever's. It also
leaves what stands among the tokens of mat-512 to TensorRT, which fuses it with their layers."""

_STEPS = ("filter", *EPILOGUE_PARTS[:3], "leaky_relu", *EPILOGUE_PARTS[3:])
"""What is done to a map, in order; each at most once."""

_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)


def fuse_epilogues(model: onnx.ModelProto) -> int:
    """Replace chains on large maps by calls of the operator.

    A chain ends where something else reads its tensor too. One operation by itself stays, unless it
    is a filter: nothing would be saved. So does what passes Q/DQ nodes, or comes from a convolution
    that reads a dequantized map: around INT8 kernels TensorRT fuses by itself, and keeps maps in
    formats that a plugin would have to be converted from and to. Maps whose size is not known stay.

    Args:
        model: Typed and without functions but those of plugins; it is rewritten. The type and shape
            of what each call gives are told in it, since nothing else does.

    Returns:
        How many calls there are.
    """
    pass_ = _Pass(model)
    calls = {chain.nodes[-1].output[0]: chain for chain in pass_.chains()}
    if not calls:
        return 0
    replaced = {id(node) for chain in calls.values() for node in chain.nodes}
    nodes = []
    for node in model.graph.node:
        if id(node) not in replaced:
            nodes.append(node)
        elif node.output[0] in calls:
            nodes.append(calls[node.output[0]].call())
    told = {value.name for value in model.graph.value_info}
    values = [pass_.values[name] for name in calls if name not in told]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.value_info.extend(values)
    prune(model.graph)  # weights of the filters that are attributes now
    if all(entry.domain != OPERATOR_DOMAIN for entry in model.opset_import):
        model.opset_import.append(helper.make_opsetid(OPERATOR_DOMAIN, 1))
    return len(calls)


@dataclass
class _Chain:
    """Nodes that one call stands for.

    Attributes:
        x: What the first of them reads.
        nodes: In order.
        parts: Names of the tensors beside x, by part.
        attributes: Of the call, where they are not what changes nothing.
    """

    x: str
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    parts: dict[str, str] = field(default_factory=dict)
    attributes: dict[str, int | float] = field(default_factory=dict)

    @property
    def filters(self) -> bool:
        return "filter" in self.attributes

    def call(self) -> onnx.NodeProto:
        """The node, with every attribute: a parser warns of those that are left out."""
        attributes: dict[str, Any] = {"filter": 0, "pad": 0, "gain": 1.0, "slope": 1.0}
        attributes |= self.attributes
        attributes |= {name: int(name in self.parts) for name in EPILOGUE_PARTS}
        return helper.make_node(
            EPILOGUE,
            [self.x, *(self.parts[name] for name in EPILOGUE_PARTS if name in self.parts)],
            [self.nodes[-1].output[0]],
            f"{self.nodes[-1].name}/{EPILOGUE}",
            domain=OPERATOR_DOMAIN,
            **attributes,
        )


class _Pass:
    """Who makes and who reads each tensor of a graph, of which type and shape it is."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._nodes = model.graph.node
        inferred = onnx.shape_inference.infer_shapes(model).graph
        self.values = {
            value.name: value for value in (*inferred.value_info, *inferred.input, *inferred.output)
        }
        self._weights = {tensor.name: tensor for tensor in model.graph.initializer}
        self._outputs = {output.name for output in model.graph.output}
        self._makers = {name: node for node in self._nodes for name in node.output}
        self._readers = readers_of(model.graph)

    def chains(self) -> Iterator[_Chain]:
        """Every chain that is worth a call; no node is in two."""
        taken: set[int] = set()
        for node in self._nodes:
            if id(node) in taken:
                continue
            chain = self._chain_from(node)
            if chain is None:
                continue
            taken.update(id(own) for own in chain.nodes)  # one that stays does so as a whole
            if self._is_worth_it(chain):
                yield chain

    def _chain_from(self, node: onnx.NodeProto) -> _Chain | None:
        """The longest chain that begins with a node."""
        if not node.input or not self._is_map(node.input[0]):
            return None
        chain = _Chain(node.input[0])
        name, done = chain.x, -1
        following: onnx.NodeProto | None = node
        while following is not None:
            step = self._step(following, name, done)
            if step is None:
                break
            done = _STEPS.index(step)
            self._add(chain, following, step, name)
            name = following.output[0]
            readers = self._readers[name]
            alone = len(readers) == 1 and name not in self._outputs
            following = readers[0] if alone else None
        return chain if chain.nodes else None

    def _step(self, node: onnx.NodeProto, x: str, done: int) -> str | None:
        """Which step behind those that are done a node is to the map x, if it is one."""
        if not self._is_map(node.output[0]):
            return None
        step: str | None = None
        if node.op_type == "Conv" and self._gain(node) is not None:
            step = "filter"
        elif node.op_type == "LeakyRelu":
            step = "leaky_relu"
        elif node.op_type in ("Add", "Mul") and self._shape(node.output[0]) == self._shape(x):
            kind = self._kind(_other(node, x), x)
            by_channel = "scale" if done < _STEPS.index("scale") else "style"
            step = {
                ("Mul", "channel"): by_channel,
                ("Mul", "pixel"): "ratio",
                ("Add", "channel"): "bias",
                ("Add", "pixel"): "noise",
                ("Add", "map"): "skip",
            }.get((node.op_type, kind or ""))
        return step if step is not None and _STEPS.index(step) > done else None

    def _add(self, chain: _Chain, node: onnx.NodeProto, step: str, x: str) -> None:
        chain.nodes.append(node)
        if step == "filter":
            gain = self._gain(node)
            assert gain is not None, "a filter has a gain"
            chain.attributes |= {"filter": 1, "pad": attribute_of(node, "pads")[0], "gain": gain}
        elif step == "leaky_relu":
            chain.attributes["slope"] = attribute_of(node, "alpha", 0.01)
        else:
            chain.parts[step] = _other(node, x)

    def _is_worth_it(self, chain: _Chain) -> bool:
        y = chain.nodes[-1].output[0]
        sides = self._shape(y)[1:]
        if math.prod(side if isinstance(side, int) else 0 for side in sides) < LEAST_SIZE:
            return False
        maps = [chain.x, *(chain.parts[name] for name in ("skip",) if name in chain.parts)]
        if any(self._is_dequantized(name) for name in maps) or self._is_quantized(y):
            return False
        return chain.filters or len(chain.nodes) > 1

    # -- what a tensor is

    def _is_map(self, name: str) -> bool:
        return self._type(name) in _FLOATS and len(self._shape(name)) == 4

    def _type(self, name: str) -> int:
        if name in self._weights:
            return int(self._weights[name].data_type)
        return int(self.values[name].type.tensor_type.elem_type) if name in self.values else 0

    def _shape(self, name: str) -> list[int | str]:
        """A number, or the name of an axis, for each axis; empty if it is not known.

        A first axis that is no number is the batch, as the contract has it, by whatever name ONNX
        calls it where a batch meets a batch.
        """
        if name in self._weights:
            return list(self._weights[name].dims)
        if name not in self.values:
            return []
        dims = self.values[name].type.tensor_type.shape.dim
        shape = [d.dim_value if d.HasField("dim_value") else d.dim_param for d in dims]
        return ["batch", *shape[1:]] if shape and isinstance(shape[0], str) else shape

    def _kind(self, name: str, x: str) -> str | None:
        """What a tensor is to a map that it is added to or multiplied with."""
        own, whole = self._shape(name), self._shape(x)
        if self._type(name) != self._type(x) or len(own) != 4 or own[0] not in (1, whole[0]):
            return None
        shapes = {
            "map": whole[1:],
            "channel": [whole[1], 1, 1],
            "pixel": [1, *whole[2:]],
        }
        return next((kind for kind, shape in shapes.items() if own[1:] == shape), None)

    def _gain(self, node: onnx.NodeProto) -> float | None:
        """The gain of a convolution that is the filter; None of any other."""
        if len(node.input) != 2 or node.input[1] not in self._weights:
            return None
        pads = attribute_of(node, "pads", [0] * 4)
        steps = (*attribute_of(node, "strides", [1, 1]), *attribute_of(node, "dilations", [1, 1]))
        shape = tuple(self._weights[node.input[1]].dims)
        if (
            shape[1:] != (1, 3, 3)
            or attribute_of(node, "group", 1) != shape[0]
            or set(steps) != {1}
            or len(set(pads)) != 1
            or pads[0] > 2
        ):
            return None
        weight = numpy_helper.to_array(self._weights[node.input[1]]).astype(np.float32)
        gain = float(weight[0].sum(dtype=np.float64))
        return gain if np.array_equal(weight, np.broadcast_to(FILTER * gain, shape)) else None

    def _is_dequantized(self, name: str) -> bool:
        """Whether a tensor comes from a DequantizeLinear, or a convolution that reads one's."""
        maker = self._makers.get(name)
        if maker is not None and maker.op_type in ("Cast", "Conv"):
            maker = self._makers.get(maker.input[0])
        if maker is not None and maker.op_type in ("Cast", "Conv"):
            maker = self._makers.get(maker.input[0])
        return maker is not None and maker.op_type == "DequantizeLinear"

    def _is_quantized(self, name: str) -> bool:
        """Whether a tensor goes to a QuantizeLinear, by way of a cast or at once."""
        readers = self._readers[name]
        casts = (node.output[0] for node in readers if node.op_type == "Cast")
        behind = (node for cast in casts for node in self._readers[cast])
        return any(node.op_type == "QuantizeLinear" for node in (*readers, *behind))


def _other(node: onnx.NodeProto, x: str) -> str:
    """What x is added to or multiplied with."""
    return next((name for name in node.input if name != x), x)


# -- the way back ----------------------------------------------------------------------------------


def expand_epilogues(model: onnx.ModelProto) -> None:
    """Say every call in standard operators again, as the kernels compute it: a reference.

    Args:
        model: What ``fuse_epilogues`` made; it is rewritten.
    """
    values = {value.name: value.type.tensor_type for value in model.graph.value_info}
    nodes = []
    for node in model.graph.node:
        if node.op_type == EPILOGUE and node.domain == OPERATOR_DOMAIN:
            nodes += _expanded(node, values[node.output[0]])
        else:
            nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _expanded(call: onnx.NodeProto, y: onnx.TypeProto.Tensor) -> list[onnx.NodeProto]:
    """One call in standard operators, in FP32 between casts."""
    nodes: list[onnx.NodeProto] = []

    def add(op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        result = f"{call.name}/{output}"
        nodes.append(helper.make_node(op, inputs, [result], result, **attributes))
        return result

    def single(name: str, label: str) -> str:
        return add("Cast", [name], label, to=TensorProto.FLOAT)

    given = iter(call.input[1:])
    parts = {name: single(next(given), name) for name in EPILOGUE_PARTS if attribute_of(call, name)}
    t = single(call.input[0], "x")
    if attribute_of(call, "filter"):
        channels = y.shape.dim[1].dim_value
        weight = np.broadcast_to(FILTER * attribute_of(call, "gain"), (channels, 1, 3, 3))
        tensor = numpy_helper.from_array(weight.astype(np.float32))
        taps = add("Constant", [], "taps", value=tensor)
        pads = [attribute_of(call, "pad")] * 4
        t = add("Conv", [t, taps], "filtered", kernel_shape=[3, 3], pads=pads, group=channels)
    for step in _STEPS[1:]:
        if step == "leaky_relu":
            t = add("LeakyRelu", [t], step, alpha=attribute_of(call, "slope"))
        elif step in parts:
            op = "Add" if step in ("noise", "bias", "skip") else "Mul"
            t = add(op, [t, parts[step]], f"with_{step}")
    nodes.append(helper.make_node("Cast", [t], call.output, call.name, to=y.elem_type))
    return nodes
