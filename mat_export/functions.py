"""The ONNX form of the custom operators: model-local functions of standard operators.

A runtime that does not know the operators runs these bodies; one that does (a TensorRT plugin)
takes the node instead. Each operator has one body for any window, shift and grid: the order of
tokens in their windows is index arithmetic over the grid. Where the graph has a fixed size the grid
is an attribute, so a runtime folds all of it when it loads the model and nothing remains at run
time (a test looks at what ONNX Runtime leaves).

Bodies use only operators that mean the same from opset 17 to 22, except where `opset` is asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from mat_export.contract import OPERATOR_DOMAIN
from mat_torch.config import DEMODULATION_EPS, LRELU_SLOPE, MASKED_LOGIT

__all__ = [
    "ATTENTION",
    "EPILOGUE",
    "EPILOGUE_PARTS",
    "FUSE_MLP",
    "LEAST_STYLE",
    "PROPAGATION",
    "QUERY_KEY_VALUE",
    "STYLE_SCALES",
    "UNMASKED_ATTENTION",
    "WINDOW_ORDER",
    "function_library",
]

ATTENTION = "MaskedWindowAttention"
UNMASKED_ATTENTION = "WindowAttention"
PROPAGATION = "MaskPropagation"
QUERY_KEY_VALUE = "QueryKeyValue"
FUSE_MLP = "FuseMlp"
STYLE_SCALES = "StyleScales"
EPILOGUE = "FusedEpilogue"

EPILOGUE_PARTS = ("scale", "noise", "bias", "ratio", "skip", "style")
"""What may follow the map of a FusedEpilogue, in order. That operator has no function, since its
inputs differ from call to call: ``epilogues.py`` makes it of standard operators, and back."""

LEAST_STYLE = 1e-12
"""A style's largest magnitude counts as no less than this."""
WINDOW_ORDER = "WindowOrder"


def function_library(opset: int, *, dynamic: bool) -> list[onnx.FunctionProto]:
    """Every function, callees first.

    Args:
        opset: Version of the standard operators, 17 or later.
        dynamic: The grid comes from the shapes of tensors; else from the nodes' attributes
            ``height`` and ``width``, so that all index arithmetic is over constants, and the
            nodes' ``shift`` is the effective one.
    """
    return [
        _window_order(opset, dynamic),
        _attention(opset, dynamic, masked=True),
        _attention(opset, dynamic, masked=False),
        _propagation(opset, dynamic),
        _query_key_value(opset),
        _fuse_mlp(opset),
        _style_scales(opset),
    ]


class _Body:
    """Nodes of one function, in order, with names that say what they hold."""

    def __init__(self, opset: int) -> None:
        self.opset = opset
        self.nodes: list[onnx.NodeProto] = []
        self._constants: dict[str, str] = {}

    def __call__(
        self, op: str, inputs: Sequence[str], output: str, *, domain: str = "", **attributes: Any
    ) -> str:
        """Append a node of one output and return the output's name."""
        self.nodes.append(
            helper.make_node(op, list(inputs), [output], name=output, domain=domain, **attributes)
        )
        return output

    def constant(self, name: str, value: NDArray[Any] | Sequence[int] | float) -> str:
        """A constant: an array as it is, a list of ints as int64, a number as a float32 scalar."""
        if name not in self._constants:
            array = (
                value
                if isinstance(value, np.ndarray)
                else np.asarray(value, np.float32 if isinstance(value, float) else np.int64)
            )
            self("Constant", [], name, value=numpy_helper.from_array(array))
            self._constants[name] = name
        return name

    def attribute(self, name: str) -> str:
        """The function's integer attribute `name` as an int64 scalar."""
        if name not in self._constants:
            node = helper.make_node("Constant", [], [name], name=name)
            node.attribute.append(_reference("value_int", name))
            self.nodes.append(node)
            self._constants[name] = name
        return name

    def vector(self, *parts: str, output: str) -> str:
        """One int64 vector out of scalars and vectors that `constant` and `attribute` made."""
        return self("Concat", parts, output, axis=0)

    def function(
        self,
        name: str,
        inputs: Sequence[str],
        outputs: Sequence[str],
        attributes: Sequence[str] = (),
        doc: str = "",
    ) -> onnx.FunctionProto:
        """The finished function."""
        domains = {node.domain for node in self.nodes} - {""}
        imports = [helper.make_opsetid("", self.opset)]
        imports += [helper.make_opsetid(domain, 1) for domain in sorted(domains)]
        function = helper.make_function(
            OPERATOR_DOMAIN, name, inputs, outputs, self.nodes, imports, attributes
        )
        function.doc_string = doc
        return function


def _reference(attribute: str, of: str) -> onnx.AttributeProto:
    """An integer attribute whose value is the function's attribute `of`."""
    return onnx.AttributeProto(name=attribute, type=onnx.AttributeProto.INT, ref_attr_name=of)


def _window_order(opset: int, dynamic: bool) -> onnx.FunctionProto:
    """``WindowOrder(window, shift, height, width) → order, inverse, regions, line_shape``.

    All inputs are int64 scalars, not attributes: an attribute that refers to the caller's attribute
    is lost in TensorRT's parser, which inlines one level at a time.
    """
    b = _Body(opset)
    zero, one = b.constant("zero", np.int64(0)), b.constant("one", np.int64(1))
    column, flat = b.constant("column", [-1, 1]), b.constant("flat", [-1])
    window, shift, height, width = _GEOMETRY
    if dynamic:
        # A grid whose shorter side is at most the window is cut by that side, unshifted.
        shorter = b("Min", [height, width], "shorter")
        larger = b("Cast", [b("Greater", [shorter, window], "is_larger")], "is_larger_int", to=7)
        shift = b("Mul", [shift, larger], "effective_shift")
        window = b("Min", [window, shorter], "effective_window")
    row = b("Range", [zero, height, one], "row")
    col = b("Range", [zero, width, one], "column_index")
    # Which token stands where: the grid rolled by −shift and cut into windows.
    source_row = b("Mod", [b("Add", [row, shift], "row_ahead"), height], "source_row")
    source_row = b("Mul", [source_row, width], "source_row_start")
    source_col = b("Mod", [b("Add", [col, shift], "column_ahead"), width], "source_column")
    source = b("Add", [b("Reshape", [source_row, column], "source_rows"), source_col], "source")
    side = b("Reshape", [window, flat], "window_side")
    across = b("Reshape", [b("Div", [width, window], "windows_across"), flat], "across")
    cut = b("Reshape", [source, b.vector(flat, side, across, side, output="cut_shape")], "cut")
    cut = b("Transpose", [cut], "cut_by_window", perm=[0, 2, 1, 3])
    tokens = b("Mul", [side, side], "tokens_per_window")
    b("Reshape", [cut, b.vector(flat, tokens, output="order_shape")], "order")
    # Where each token went: the inverse permutation.
    places = b("Reshape", [cut, flat], "places")
    count = b("Range", [zero, b("Mul", [height, width], "token_count"), one], "token")
    inverse = b("ScatterElements", [places, places, count], "inverse_flat", axis=0)
    across = b("Reshape", [width, flat], "width_vector")
    b("Reshape", [inverse, b.vector(flat, across, output="grid_shape")], "inverse")
    # The shape of a grid as one line of tokens, [B, H·W, C].
    line = b("Shape", [places], "line_length")
    b.vector(b.constant("keep", [0]), line, flat, output="line_shape")
    # Tokens of one window are of one region if the roll wrapped both around or neither: 0 or −100.
    wrapped_row = b("Cast", [b("Less", [row, shift], "row_wraps")], "row_wrapped", to=7)
    wrapped_col = b("Cast", [b("Less", [col, shift], "column_wraps")], "column_wrapped", to=7)
    wrapped_row = b("Add", [wrapped_row, wrapped_row], "row_region")
    region = b("Reshape", [wrapped_row, column], "row_regions")
    region = b("Reshape", [b("Add", [region, wrapped_col], "region_grid"), flat], "region_flat")
    region = b("Gather", [region, "order"], "region")
    query = b("Unsqueeze", [region, b.constant("query_axes", [1, 3])], "query_region")
    key = b("Unsqueeze", [region, b.constant("key_axes", [1, 2])], "key_region")
    same = b("Equal", [query, key], "same_region")
    b("Where", [same, b.constant("open", 0.0), b.constant("shut", MASKED_LOGIT)], "regions")
    return b.function(
        WINDOW_ORDER,
        _GEOMETRY,
        _ORDER,
        (),
        "order: [windows, tokens] token at each place; inverse: [height, width] place of each "
        "token; regions: [windows, 1, tokens, tokens] added to logits, -100 where only the cyclic "
        "shift brought two tokens together; line_shape: what reshapes a grid to a line of tokens.",
    )


_GEOMETRY = ("window", "shift", "height", "width")
"""What WindowOrder takes."""

_ORDER = ("order", "inverse", "regions", "line_shape")
"""What WindowOrder returns."""


def _order_of(b: _Body, tensor: str, axis: int, dynamic: bool) -> None:
    """Call WindowOrder with the caller's own attributes; the grid is at `axis` of `tensor`."""
    for name in _attributes(dynamic):
        b.attribute(name)
    if dynamic:
        grid = b("Shape", [tensor], "grid", start=axis, end=axis + 2)
        for i, side in enumerate(("height", "width")):
            b("Gather", [grid, b.constant(f"{side}_axis", np.int64(i))], side)
    b.nodes.append(
        helper.make_node(
            WINDOW_ORDER, _GEOMETRY, _ORDER, name="window_order", domain=OPERATOR_DOMAIN
        )
    )


def _attributes(dynamic: bool) -> list[str]:
    """Attributes that say how a grid is cut."""
    return ["window", "shift"] if dynamic else list(_GEOMETRY)


def _attention(opset: int, dynamic: bool, *, masked: bool) -> onnx.FunctionProto:
    """``softmax(q·kᵀ + regions + validity)·v`` within windows."""
    b = _Body(opset)
    _order_of(b, "q", 1, dynamic)
    infer = b.constant("infer", [-1])
    heads = b("Reshape", [b.attribute("heads"), infer], "head_count")
    keep = b.constant("keep", [0, 0, 0])
    heads_shape = b.vector(keep, heads, infer, output="heads_shape")

    def windows(x: str, perm: Sequence[int]) -> str:
        flat = b("Reshape", [x, "line_shape"], f"{x}_tokens")
        cut = b("Gather", [flat, "order"], f"{x}_windows", axis=1)
        cut = b("Reshape", [cut, heads_shape], f"{x}_by_head")
        return b("Transpose", [cut], f"{x}_heads", perm=perm)

    q, k = windows("q", [0, 1, 3, 2, 4]), windows("k", [0, 1, 3, 4, 2])
    logits = b("MatMul", [q, k], "logits")
    bias = "regions"
    if masked:
        shut, opened = b.constant("shut", MASKED_LOGIT), b.constant("open", 0.0)
        validity = b("Where", ["valid", opened, shut], "validity")
        validity = b("Reshape", [validity, b.constant("line", [0, -1])], "validity_tokens")
        validity = b("Gather", [validity, "order"], "validity_windows", axis=1)
        axes = b.constant("head_and_query", [2, 3])
        bias = b("Add", ["regions", b("Unsqueeze", [validity, axes], "validity_keys")], "bias")
    bias = b("CastLike", [bias, logits], "logit_bias")
    weights = b("Softmax", [b("Add", [logits, bias], "biased_logits")], "weights", axis=-1)
    y = b("MatMul", [weights, windows("v", [0, 1, 3, 2, 4])], "mixed")
    y = b("Transpose", [y], "mixed_by_token", perm=[0, 1, 3, 2, 4])
    y = b("Reshape", [y, "line_shape"], "mixed_tokens")
    b("Gather", [y, "inverse"], "y", axis=1)
    return b.function(
        ATTENTION if masked else UNMASKED_ATTENTION,
        ["q", "k", "v", *(["valid"] if masked else [])],
        ["y"],
        [*_attributes(dynamic), "heads"],
        "softmax(q·kᵀ + bias)·v within (shifted) windows. q, k, v, y: [B, H, W, C]; "
        "valid: bool [B, 1, H, W]. The caller normalises q and k and scales q.",
    )


def _propagation(opset: int, dynamic: bool) -> onnx.FunctionProto:
    """Every token of a window is valid if any token of it was."""
    b = _Body(opset)
    _order_of(b, "valid", 2, dynamic)
    flat = b("Cast", ["valid"], "valid_number", to=onnx.TensorProto.FLOAT)
    flat = b("Reshape", [flat, b.constant("line", [0, -1])], "valid_tokens")
    cut = b("Gather", [flat, "order"], "valid_windows", axis=1)
    last = b.constant("last", [2])
    count = b("ReduceSum", [cut, last], "valid_count", keepdims=0)
    # Window of each token: its place divided by the tokens of a window.
    window = b.attribute("window")
    if dynamic:
        window = b("Min", [window, "height", "width"], "effective_window")
    tokens = b("Mul", [window, window], "tokens_per_window")
    owner = b("Div", ["inverse", tokens], "window_of_token")
    spread = b("Gather", [count, owner], "count_of_token", axis=1)
    spread = b("Unsqueeze", [spread, b.constant("channel", [1])], "count_map")
    b("Greater", [spread, b.constant("half", 0.5)], "y")
    return b.function(
        PROPAGATION,
        ["valid"],
        ["y"],
        _attributes(dynamic),
        "valid, y: bool [B, 1, H, W]. True in every token of a (shifted) window that has one.",
    )


def _query_key_value(opset: int) -> onnx.FunctionProto:
    """``[q, k] = (x/max(‖x‖₂, 1e-12))·W + b``, ``v = x·W_v``."""
    b = _Body(opset)
    if opset >= 18:
        norm = b("ReduceL2", ["x", b.constant("last", [-1])], "norm", keepdims=1)
    else:
        norm = b("ReduceL2", ["x"], "norm", keepdims=1, axes=[-1])
    least = b("CastLike", [b.constant("least_norm", 1e-12), "x"], "least")
    unit = b("Div", ["x", b("Max", [norm, least], "safe_norm")], "unit")
    both = b("MatMul", [unit, "query_key_weight"], "query_key_product")
    both = b("Add", [both, "query_key_bias"], "query_key")
    split = helper.make_node("Split", [both], ["q", "k"], name="split_query_key", axis=-1)
    if opset >= 18:
        split.attribute.append(helper.make_attribute("num_outputs", 2))
    b.nodes.append(split)
    b("MatMul", ["x", "value_weight"], "v")
    return b.function(
        QUERY_KEY_VALUE,
        ["x", "query_key_weight", "query_key_bias", "value_weight"],
        ["q", "k", "v"],
        doc="[q, k] = unit(x)·W + b and v = x·W_v, per token. x: [B, H, W, C].",
    )


def _fuse_mlp(opset: int) -> onnx.FunctionProto:
    """Three Linears over [x, y], leaky ReLU after the first two."""
    b = _Body(opset)
    h = b("Concat", ["x", "y"], "both", axis=-1)
    for name in ("fuse", "fc1", "fc2"):
        h = b("MatMul", [h, f"{name}_weight"], f"{name}_product")
        last = name == "fc2"
        h = b("Add", [h, f"{name}_bias"], "z" if last else f"{name}_sum")
        if not last:
            h = b("LeakyRelu", [h], name, alpha=LRELU_SLOPE)
    inputs = ["x", "y"]
    inputs += [f"{name}_{part}" for name in ("fuse", "fc1", "fc2") for part in ("weight", "bias")]
    return b.function(
        FUSE_MLP,
        inputs,
        ["z"],
        doc="fc2(lrelu(fc1(lrelu(fuse([x, y])))), per token. x, y, z: [B, H, W, C].",
    )


def _style_scales(opset: int) -> onnx.FunctionProto:
    """``s/max|s|`` of each layer and ``rsqrt((s/m)²·energy + ε/(m·n)²)`` of those demodulated."""
    b = _Body(opset)
    infer, one = b.constant("infer", [-1]), b.constant("one", [1])
    keep, last = b.constant("keep", [0]), b.constant("last", [-1])
    width = b("Reshape", [b.attribute("width"), infer], "width_vector")
    count = b("Reshape", [b.attribute("demodulated"), infer], "count_vector")
    rows = b("Gemm", ["style", "weight", "bias"], "styles")
    rows = b("Reshape", [rows, b.vector(keep, infer, width, output="rows_shape")], "rows")
    magnitudes = b("Abs", [rows], "magnitudes")
    if opset >= 18:
        m = b("ReduceMax", [magnitudes, last], "largest", keepdims=1)
    else:
        m = b("ReduceMax", [magnitudes], "largest", keepdims=1, axes=[-1])
    m = b("Max", [m, b.constant("least", LEAST_STYLE)], "bounded")
    s = b("Div", [rows, m], "scale_rows")
    # Demodulation of the first layers.
    axis = b.constant("layer_axis", [1])
    first = b("Slice", [s, keep, count, axis], "demodulated_rows")
    square = b("Mul", [first, first], "square")
    square = b("Unsqueeze", [square, b.constant("row_axis", [2])], "square_rows")
    sums = b("Squeeze", [b("MatMul", [square, "energy"], "sum_rows"), "row_axis"], "sums")
    own = b("Slice", [m, keep, count, axis], "demodulated_bounded")
    own = b("Mul", [own, "norm"], "whole_bounded")
    eps = b("Div", [b.constant("epsilon", DEMODULATION_EPS / 2.0), own], "epsilon_over_whole")
    eps = b("Div", [eps, own], "epsilon_over_square")
    root = b("Sqrt", [b("Add", [sums, eps], "energy_sum")], "root")
    factor = b("Reciprocal", [root], "factor_rows")
    shape = b.vector(keep, infer, one, one, output="map_shape")
    b("Reshape", [s, shape], "scale")
    b("Reshape", [factor, shape], "factor")
    b("Reshape", [m, shape], "magnitude")
    return b.function(
        STYLE_SCALES,
        ["style", "weight", "bias", "energy", "norm"],
        ["scale", "factor", "magnitude"],
        ["width", "demodulated"],
        doc="Styles of several layers of one width. style: [B, D]; energy: [demodulated, width, "
        "out]; norm: [demodulated, 1]; scale: [B, layers·width, 1, 1]; factor: [B, "
        "demodulated·out, 1, 1]; magnitude: [B, layers, 1, 1].",
    )
