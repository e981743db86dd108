"""Precision lives in the file: an FP32 graph becomes a typed one, half where it is safe and pays.

Convolutions and matrix products over features compute in half precision; islands that need range
or would cancel stay in FP32, chosen by the rules below and counted in the result. Casts stand where
the two meet, weights are converted in place, and inputs and outputs keep their types, so the same
file serves every runtime that obeys types.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from mat_export.contract import GraphSpec, UserError
from mat_export.graphs import write_graph
from mat_export.inlining import inline_functions

__all__ = [
    "ISLANDS",
    "PRECISIONS",
    "Island",
    "TypedModel",
    "apply_precision",
    "require_source",
]

PRECISIONS = {
    "fp16": TensorProto.FLOAT16,
    "bf16": TensorProto.BFLOAT16,
    "int8": TensorProto.FLOAT16,
}
"""Half types by name; of an INT8 graph, that of what is not INT8."""

_FLOATS = (TensorProto.FLOAT, *PRECISIONS.values())

_LEAST_HALF = 2.0**-14
"""FP16's smallest normal number. Floors of divisors are raised to it, islands or not: where a
runtime takes such a constant into a half kernel, 1e-12 is 0 and 0/0 NaN. TensorRT 8.6 converts one
of them, whatever the file says, and an engine that was to be refitted gave NaN for holes without a
token. A norm below the floor is one of features that are subnormal in half already; a style's
cancels."""


@dataclass(frozen=True)
class Island:
    """A rule that keeps nodes in FP32.

    Attributes:
        name: What it is called in the manifest.
        why: The reason.
        pattern: Regular expression that a node's ``name`` (``module/Op``) contains.
    """

    name: str
    why: str
    pattern: str

    def holds(self, node: onnx.NodeProto) -> bool:
        """Whether the rule keeps this node in FP32."""
        return re.search(self.pattern, node.name) is not None


ISLANDS: tuple[Island, ...] = (
    Island("mapping", "eight layers deep, and a few thousand numbers", r"^mapping[./]"),
    Island("styles", "sums of squares over up to 512 channels, and their inverse", r"\.styles[./]"),
    Island("vectors", "one row an image: speed is not in it", r"/(Gemm|ReduceMean)(_\d+)?$"),
    Island("mask-ratio", "counts and quotients", r"/(AveragePool|MaxPool|Clip|Div)(_\d+)?$"),
    Island("mask-propagation", "masks are exact at any precision", r"/MaskPropagation/"),
    Island("token-norm", "a sum of squares over the channels", r"/(norm|least|safe_norm|unit)$"),
    Island("softmax", "sums of up to 256 beside logits of −200", r"/(biased_logits|weights)$"),
    Island("rgb", "three channels, summed over every level", r"\.toRGB/(?!(Mul|Conv)$)"),
    Island("rgb-upsampling", "likewise", r"\.toRGB\.upsample/"),
    Island("composite", "images at the graph's own type", r"^[A-Za-z]+(_\d+)?$"),
)
"""Every rule, in the order of the manifest. Of a ToRGB, the last one too, the scaled product is in
half and all that is added up in FP32. With the last one's product in FP32 as well mat-512
(untrained) is at 72.6 dB in the hole, without at 72.5; and its maps are among the largest."""

_TRANSPARENT = frozenset(
    (
        *("Concat", "DepthToSpace", "Expand", "Flatten", "Gather", "Identity", "Pad", "Reshape"),
        *("Resize", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze", "Where"),
        *("QuantizeLinear", "DequantizeLinear"),
    )
)
"""Operators that only move values: they take the type that comes in."""

_QUANTIZING = frozenset(["QuantizeLinear", "DequantizeLinear"])
"""Operators between a float type and INT8, in the float's type."""

_HALF_SCALES = 19
"""The first opset whose quantizing operators take half precision."""

_TYPE_ONLY = frozenset(["Cast", "CastLike", "Shape"])
"""Operators whose float inputs may have any type and stay as they are."""

_COMPARISONS = frozenset(["Greater", "GreaterOrEqual", "Equal", "Less"])
"""Operators that decide, in FP32."""


@dataclass(frozen=True)
class TypedModel:
    """A typed graph.

    Attributes:
        model: The graph, functions inlined.
        half_nodes: Nodes that compute in half precision.
        islands: FP32 nodes by rule.
        casts: Casts between the two.
        floors: Nodes whose floor was raised to the smallest normal number of FP16.
    """

    model: onnx.ModelProto
    half_nodes: int
    islands: dict[str, int]
    casts: int
    floors: int


def apply_precision(
    model: onnx.ModelProto, precision: str, *, keep: Collection[str] = frozenset()
) -> TypedModel:
    """Type an FP32 graph, or what is FP32 in a quantized one.

    Args:
        model: A file of ``mat-export onnx``, in FP32; for ``int8`` one of ``mat-export calibrate``.
        precision: ``fp16``, ``bf16``, or ``int8``: FP16 but for the quantized layers.
        keep: Functions whose calls stay, see ``inline_functions``.

    Raises:
        UserError: For another precision, or a model that is not ours or not in FP32.
    """
    if precision not in PRECISIONS:
        raise UserError(f"precision is one of {', '.join(PRECISIONS)}, got '{precision}'")
    spec = GraphSpec.of_model(model)
    if spec is None:
        raise UserError("not a model of mat-export: export one with 'mat-export onnx'")
    require_source(spec, precision, "the model")
    typed = inline_functions(model, keep=keep)
    if precision == "bf16":
        _raise_opset(typed)
    spec.with_changes(precision=precision).write_to(typed)
    return _Typing(typed, PRECISIONS[precision]).run()


def require_source(spec: GraphSpec, precision: str, label: str) -> None:
    """Raise UserError unless a file is what graphs of a precision are made of."""
    if precision == "int8" and spec.precision == "fp32":
        raise UserError(f"{label} is in fp32: quantize it first, with 'mat-export calibrate'")
    if precision != "int8" and spec.precision == "int8":
        raise UserError(f"{label} is in int8: build it with --int8, or start from the FP32 file")
    if spec.precision not in ("fp32", "int8"):
        raise UserError(f"{label} is in {spec.precision} already: start from the FP32 file")


_BF16_OPSET = 22
"""The first opset whose convolutions and pools take bfloat16."""


def _raise_opset(model: onnx.ModelProto) -> None:
    """Declare the opset that bfloat16 needs; from 20 on, what we use only gained types.

    Raises:
        UserError: If the model was lowered below 20.
    """
    standard = next(o for o in model.opset_import if o.domain == "")
    if standard.version < 20:
        raise UserError(f"bf16 needs a model of opset 20, got {standard.version}: export it again")
    standard.version = _BF16_OPSET
    model.ir_version = max(model.ir_version, 10)


class _Typing:
    """One pass over a graph in its order, remembering the type of each float tensor."""

    def __init__(self, model: onnx.ModelProto, half: int) -> None:
        self._model, self._half = model, half
        self._weights = {t.name: t for t in model.graph.initializer}
        self._types = {name: t.data_type for name, t in self._weights.items()}
        self._types.update({i.name: i.type.tensor_type.elem_type for i in model.graph.input})
        self._inferred = {
            v.name: v.type.tensor_type.elem_type
            for v in (*model.graph.value_info, *model.graph.output)
        }
        self._nodes: list[onnx.NodeProto] = []
        self._cast: dict[tuple[str, int], str] = {}
        self._islands: Counter[str] = Counter()
        self._casts = self._halves = self._floors = 0
        opset = next(o.version for o in model.opset_import if o.domain == "")
        self._half_scales = opset >= _HALF_SCALES
        self._dequantized: set[str] = set()  # in FP32

    def run(self) -> TypedModel:
        """Type every node, then write the graph anew."""
        graph = self._model.graph
        outputs = {o.name for o in graph.output}
        for node in graph.node:
            self._type_node(node)
        for name in outputs:
            assert self._types[name] == self._inferred[name], f"output {name} changed its type"
        write_graph(graph, self._nodes, self._weights.values())
        islands = dict(self._islands)
        return TypedModel(self._model, self._halves, islands, self._casts, self._floors)

    def _type_node(self, node: onnx.NodeProto) -> None:
        if node.op_type == "Max" and self._half == TensorProto.FLOAT16:
            self._raise_floor(node)
        floats = [n for n in node.input if n and self._types[n] in _FLOATS]
        chosen = self._choose(node, floats)
        if node.op_type not in _TYPE_ONLY:
            for i, name in enumerate(node.input):
                if name in floats and not (node.op_type == "Resize" and i > 0):  # its scales
                    node.input[i] = self._as(name, chosen)
        self._nodes.append(node)
        for output in node.output:
            inferred = self._inferred.get(output, TensorProto.FLOAT)
            self._types[output] = chosen if inferred in _FLOATS else inferred
        if node.op_type == "Cast" and self._types[node.output[0]] in _FLOATS:
            self._types[node.output[0]] = TensorProto.FLOAT
        if node.op_type == "CastLike":
            self._types[node.output[0]] = self._types[node.input[1]]

    def _raise_floor(self, node: onnx.NodeProto) -> None:
        """Keep a positive floor positive in FP16."""
        for i, name in enumerate(node.input):
            if name not in self._weights or self._types[name] != TensorProto.FLOAT:
                continue
            value = numpy_helper.to_array(self._weights[name])
            if ((value > 0.0) & (value < _LEAST_HALF)).any():
                raised = f"{name}/raised"
                least = np.where(value > 0.0, np.maximum(value, _LEAST_HALF), value)
                self._weights[raised] = numpy_helper.from_array(least.astype(np.float32), raised)
                self._types[raised] = TensorProto.FLOAT
                node.input[i] = raised
                self._floors += 1

    def _choose(self, node: onnx.NodeProto, floats: list[str]) -> int:
        """The type a node computes in."""
        if node.op_type in _TYPE_ONLY | _COMPARISONS or not floats:
            return int(TensorProto.FLOAT)
        if not self._half_scales:
            if node.op_type in _QUANTIZING:
                self._dequantized.update(node.output)
                return int(TensorProto.FLOAT)
            if node.op_type == "Conv" and node.input[0] in self._dequantized:
                return int(TensorProto.FLOAT)  # nothing between DQ and what becomes INT8
        rule = next((island.name for island in ISLANDS if island.holds(node)), None)
        if rule is not None:
            self._islands[rule] += 1
            return int(TensorProto.FLOAT)
        if node.op_type in _TRANSPARENT:
            made = [self._types[n] for n in floats if n not in self._weights] or [self._half]
            return self._half if self._half in made else int(TensorProto.FLOAT)
        self._halves += 1
        return self._half

    def _as(self, name: str, wanted: int) -> str:
        """The tensor in the wanted type: itself, a converted weight, or a cast."""
        if self._types[name] == wanted:
            return name
        key = (name, wanted)
        if key not in self._cast:
            self._cast[key] = f"{name}/as_{TensorProto.DataType.Name(wanted).lower()}"
            if name in self._weights:
                tensor = _converted(self._weights[name], wanted, self._cast[key])
                self._weights[tensor.name] = tensor
            else:
                self._nodes.append(
                    helper.make_node("Cast", [name], [self._cast[key]], self._cast[key], to=wanted)
                )
                self._casts += 1
            self._types[self._cast[key]] = wanted
        return self._cast[key]


def _converted(tensor: onnx.TensorProto, wanted: int, name: str) -> onnx.TensorProto:
    """A weight in another type.

    Raises:
        UserError: If it does not fit, since infinity would be found much later.
    """
    values = numpy_helper.to_array(tensor).astype(np.float32)
    dtype = helper.tensor_dtype_to_np_dtype(wanted)
    with np.errstate(over="ignore"):
        converted = values.astype(dtype)
    if not np.isfinite(converted.astype(np.float32)).all():
        largest = float(np.abs(values).max())
        raise UserError(
            f"weight '{tensor.name}' reaches {largest:g}, which half precision cannot hold: "
            "use bf16 or fp32"
        )
    return numpy_helper.from_array(converted, name)
