"""Each rule of the lowering keeps what a model computes, and what has no rule stops it.

That nothing newer than opset 17 is left in a real export is held in `test_export`, which has one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from mat_export.contract import UserError
from mat_export.lowering import LOWEST_OPSET, LoweringError, lower_opset

Array = NDArray[Any]
F32, I64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL

X = np.random.default_rng(0).standard_normal((2, 6, 4, 4)).astype(np.float32)


@dataclass(frozen=True)
class Small:
    """A model of one node over an input ``x``, a constant for each other input.

    Attributes:
        op: Its operator.
        attributes: The node's.
        constants: Inputs after x, by name, in order; the name "" leaves one out.
        outputs: Element type of each output.
        x: What to run it on.
    """

    op: str
    attributes: dict[str, Any] = field(default_factory=dict)
    constants: dict[str, Array] = field(default_factory=dict)
    outputs: Sequence[int] = (F32,)
    x: Array = field(default_factory=lambda: X)

    def model(self, opset: int = 20) -> onnx.ModelProto:
        outputs = [f"y{i}" for i in range(len(self.outputs))]
        node = helper.make_node(
            self.op, ["x", *self.constants], outputs, name="node", **self.attributes
        )
        return model(
            [node],
            {name: array for name, array in self.constants.items() if name},
            list(zip(outputs, self.outputs, strict=True)),
            opset,
            self.x,
        )


def model(
    nodes: list[onnx.NodeProto],
    constants: dict[str, Array],
    outputs: list[tuple[str, int]],
    opset: int = 20,
    x: Array = X,
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)],
        [helper.make_empty_tensor_value_info(name) for name, _ in outputs],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    for info, (_, kind) in zip(graph.output, outputs, strict=True):
        info.type.tensor_type.elem_type = kind
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    return onnx.shape_inference.infer_shapes(made, strict_mode=True, data_prop=True)


def run(made: onnx.ModelProto, x: Array) -> list[Array]:
    onnx.checker.check_model(made, full_check=True)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(
        made.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    results: list[Array] = session.run(None, {"x": x})
    return results


def ints(*values: int) -> Array:
    return np.asarray(values, np.int64)


NO_ROI = {"": np.empty(0, np.float32)}
RESIZE = {"mode": "linear", "antialias": 0, "keep_aspect_ratio_policy": "stretch"}

RULES = {
    "mean_over_axes": Small("ReduceMean", {"keepdims": 0}, {"axes": ints(2, 3)}),
    "mean_over_negative_axes": Small("ReduceMean", {"keepdims": 1}, {"axes": ints(-1)}),
    "mean_over_all": Small("ReduceMean", {"keepdims": 0, "noop_with_empty_axes": 0}),
    "mean_over_all_by_empty_axes": Small("ReduceMean", {"keepdims": 1}, {"axes": ints()}),
    "max_over_axes": Small("ReduceMax", {"keepdims": 0}, {"axes": ints(1)}),
    "min_over_axes": Small("ReduceMin", {"keepdims": 1}, {"axes": ints(1)}),
    "norm_over_axes": Small("ReduceL2", {"keepdims": 1}, {"axes": ints(1)}),
    "product_over_axes": Small("ReduceProd", {"keepdims": 0}, {"axes": ints(3)}),
    "split_in_equal_parts": Small("Split", {"axis": 1, "num_outputs": 3}, {}, (F32, F32, F32)),
    "split_by_sizes": Small("Split", {"axis": 1}, {"sizes": ints(1, 5)}, (F32, F32)),
    "resize_to_sizes": Small(
        "Resize", RESIZE, {**NO_ROI, "scales": np.empty(0, np.float32), "to": ints(2, 6, 8, 12)}
    ),
    "resize_by_scales": Small(
        "Resize",
        {**RESIZE, "coordinate_transformation_mode": "asymmetric"},
        {**NO_ROI, "scales": np.asarray([1, 1, 2, 2], np.float32)},
    ),
    "average_pool": Small(
        "AveragePool",
        {
            "kernel_shape": [3, 3],
            "pads": [1, 1, 1, 1],
            "strides": [2, 2],
            "count_include_pad": 1,
            "dilations": [1, 1],
        },
    ),
    "cast": Small("Cast", {"to": I64, "saturate": 1}, {}, (I64,)),
    "cast_like": Small("CastLike", {"saturate": 1}, {"like": ints(0)}, (I64,)),
    "reshape_by_zero_that_keeps": Small("Reshape", {"allowzero": 0}, {"shape": ints(0, 6, -1)}),
    "reshape_allowing_zero": Small("Reshape", {"allowzero": 1}, {"shape": ints(2, 96)}),
    "shape": Small("Shape", {"start": 1, "end": 3}, {}, (I64,)),
    "equal": Small("Equal", {}, {"other": X[:1]}, (BOOL,)),
    "identity": Small("Identity"),
    "size": Small("Size", {}, {}, (I64,)),
    "constant_of_shape": Small(
        "ConstantOfShape", {"value": helper.make_tensor("value", F32, [1], [2.5])}, x=ints(2, 3)
    ),
    "unrevised": Small("LeakyRelu", {"alpha": 0.2}),
}


@pytest.mark.parametrize("opset", [17, 18, 19])
@pytest.mark.parametrize("name", RULES)
def test_a_lowered_node_computes_the_same(name: str, opset: int) -> None:
    case = RULES[name]
    lowered = case.model()
    expected = run(lowered, case.x)
    assert lower_opset(lowered, opset)
    assert [o.version for o in lowered.opset_import] == [opset]
    assert lowered.ir_version <= {17: 8, 18: 8, 19: 9}[opset]
    for result, reference in zip(run(lowered, case.x), expected, strict=True):
        assert result.dtype == reference.dtype
        # ONNX Runtime has another kernel for the newer AveragePool.
        np.testing.assert_allclose(result, reference, rtol=1e-6, atol=1e-6)


NEWER = {
    "ReduceMean": {"noop_with_empty_axes"},
    "Split": {"num_outputs"},
    "Resize": {"antialias", "axes", "keep_aspect_ratio_policy"},
    "AveragePool": {"dilations"},
    "Cast": {"saturate"},
    "CastLike": {"saturate"},
    "Reshape": {"allowzero"},
}


@pytest.mark.parametrize("name", RULES)
def test_no_newer_attribute_and_no_axes_as_input_is_left(name: str) -> None:
    case = RULES[name]
    lowered = case.model()
    lower_opset(lowered, 17)
    (node,) = lowered.graph.node
    assert not {a.name for a in node.attribute} & NEWER.get(case.op, set())
    assert len(node.input) == 1 or not case.op.startswith("Reduce")


REFUSED = {
    "noop_with_empty_axes": Small("ReduceMean", {"noop_with_empty_axes": 1}),
    "antialias": Small(
        "Resize",
        {**RESIZE, "antialias": 1},
        {**NO_ROI, "scales": np.asarray([1, 1, 0.5, 0.5], np.float32)},
    ),
    "keep_aspect_ratio_policy": Small(
        "Resize",
        {"mode": "linear", "keep_aspect_ratio_policy": "not_larger"},
        {**NO_ROI, "scales": np.empty(0, np.float32), "to": ints(2, 6, 8, 12)},
    ),
    "axes": Small(
        "Resize",
        {"mode": "linear", "axes": [2, 3]},
        {**NO_ROI, "scales": np.asarray([2, 2], np.float32)},
    ),
    "half_pixel_symmetric": Small(
        "Resize",
        {"mode": "linear", "coordinate_transformation_mode": "half_pixel_symmetric"},
        {**NO_ROI, "scales": np.asarray([1, 1, 2, 2], np.float32)},
    ),
    "dilated": Small("AveragePool", {"kernel_shape": [2, 2], "dilations": [2, 2]}),
    "saturate": Small("Cast", {"to": TensorProto.FLOAT8E4M3FN, "saturate": 0}, {}, (17,)),
    "empty": Small("Reshape", {"allowzero": 1}, {"shape": ints(0, 3)}, x=X[:0]),
    "Pad": Small("Pad", {}, {"pads": ints(0, 0, 1, 1, 0, 0, 1, 1)}),
    "Gelu": Small("Gelu"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_older_opset_cannot_say_is_refused_by_node_and_name(name: str) -> None:
    case = REFUSED[name]
    refused = case.model()
    onnx.checker.check_model(refused, full_check=True)  # so that only the lowering can object
    with pytest.raises(LoweringError, match=rf"^node: .*{name}"):
        lower_opset(refused, 17)


def test_computed_axes_are_refused_by_name() -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["axes"], name="axes", start=0, end=1),
        helper.make_node("ReduceMean", ["x", "axes"], ["y"], name="mean", keepdims=0),
    ]
    with pytest.raises(LoweringError, match="mean: input 'axes' is computed"):
        lower_opset(model(nodes, {}, [("y", F32)]), 17)


def test_a_computed_shape_may_be_reshaped_to() -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["whole"], name="whole"),
        helper.make_node("Reshape", ["x", "whole"], ["y"], name="reshape", allowzero=1),
    ]
    lowered = model(nodes, {}, [("y", F32)])
    lower_opset(lowered, 17)
    np.testing.assert_array_equal(run(lowered, X)[0], X)


def test_a_node_with_a_graph_of_its_own_is_refused() -> None:
    branch = helper.make_graph(
        [helper.make_node("ReduceMax", ["x", "axes"], ["z"], name="inner", keepdims=0)],
        "branch",
        [],
        [helper.make_tensor_value_info("z", F32, None)],
    )
    nodes = [
        helper.make_node(
            "If", ["yes"], ["y"], name="choice", then_branch=branch, else_branch=branch
        )
    ]
    constants = {"axes": ints(1), "yes": np.asarray(True)}
    with pytest.raises(LoweringError, match=r"choice: If has a graph of its own"):
        lower_opset(model(nodes, constants, [("y", F32)]), 19)


def test_a_refusal_is_the_users_error() -> None:
    assert issubclass(LoweringError, UserError)


def test_axes_that_nothing_reads_any_more_leave_the_file_and_others_stay() -> None:
    nodes = [
        helper.make_node("ReduceMean", ["x", "axes"], ["mean"], name="mean", keepdims=1),
        helper.make_node("ReduceMax", ["mean", "axes"], ["max"], name="max", keepdims=1),
        helper.make_node("Unsqueeze", ["max", "shared"], ["deep"], name="deep"),
        helper.make_node("ReduceMin", ["deep", "shared"], ["y"], name="min", keepdims=0),
    ]
    constants = {"axes": ints(3), "shared": ints(1)}
    lowered = model(nodes, constants, [("y", F32)])
    expected = run(lowered, X)
    lower_opset(lowered, 17)
    assert [tensor.name for tensor in lowered.graph.initializer] == ["shared"]
    np.testing.assert_array_equal(run(lowered, X)[0], expected[0])


@pytest.mark.parametrize("opset", [20, 21])
def test_a_model_that_is_old_enough_stays_as_it_is(opset: int) -> None:
    made = RULES["mean_over_axes"].model()
    before = made.SerializeToString(deterministic=True)
    assert not lower_opset(made, opset)
    assert made.SerializeToString(deterministic=True) == before


def test_other_domains_are_left_alone() -> None:
    nodes = [
        helper.make_node("Split", ["x"], ["y"], name="ours", domain="mat", num_outputs=1),
        helper.make_node("Identity", ["y"], ["z"], name="standard"),
    ]
    made = helper.make_model(
        helper.make_graph(
            nodes,
            "mixed",
            [helper.make_tensor_value_info("x", F32, X.shape)],
            [helper.make_tensor_value_info("z", F32, X.shape)],
        ),
        opset_imports=[helper.make_opsetid("mat", 1), helper.make_opsetid("", 20)],
    )
    assert lower_opset(made, LOWEST_OPSET)
    assert [(o.domain, o.version) for o in made.opset_import] == [("mat", 1), ("", 17)]
    assert [a.name for a in made.graph.node[0].attribute] == ["num_outputs"]
