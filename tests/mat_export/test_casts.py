"""Casts behind the parts of a tensor become one before it, and every number stays what it was."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from mat_export.bench import example_inputs
from mat_export.casts import hoist_casts
from mat_export.contract import GraphSpec
from mat_export.inlining import inline_functions
from mat_export.parity import load_onnx
from mat_export.precision import apply_precision
from mat_export.runners import hold_half


def run(model: onnx.ModelProto, inputs: dict[str, Any]) -> list[Any]:
    """What a graph gives with every half tensor really rounded."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(hold_half(model).SerializeToString(), options)
    found: list[Any] = session.run(None, inputs)
    return found


def casts(model: onnx.ModelProto) -> int:
    return Counter(node.op_type for node in model.graph.node)["Cast"]


def test_the_network_gives_the_same_bits_with_fewer_casts(tiny_onnx: Path) -> None:
    exported = load_onnx(tiny_onnx)
    spec = GraphSpec.of_model(exported)
    assert spec is not None
    plain = apply_precision(inline_functions(exported), "fp16").model
    moved = onnx.ModelProto()
    moved.CopyFrom(plain)
    assert hoist_casts(moved.graph) == 23 == casts(plain) - casts(moved)
    onnx.checker.check_model(moved, full_check=True)
    inputs = example_inputs(spec, 1)
    (expected,), (found,) = run(plain, inputs), run(moved, inputs)
    np.testing.assert_array_equal(found, expected)


# -- small graphs ----------------------------------------------------------------------------------

Change = Callable[[list[onnx.NodeProto]], None]


HALF, FLOAT, DOUBLE = TensorProto.FLOAT16, TensorProto.FLOAT, TensorProto.DOUBLE


def graph(change: Change | None, outputs: dict[str, int]) -> onnx.ModelProto:
    """x → doubled, split into a, b and the first half of c; each cast to half, y = a·b, z = −c."""
    nodes = [
        helper.make_node("Add", ["x", "x"], ["whole"], "whole"),
        helper.make_node("Split", ["whole", "sizes"], ["a", "b", "c"], "split", axis=0),
        helper.make_node("Cast", ["a"], ["a_half"], "a_half", to=HALF),
        helper.make_node("Cast", ["b"], ["b_half"], "b_half", to=HALF),
        helper.make_node("Slice", ["c", "zero", "one"], ["cut"], "cut"),
        helper.make_node("Cast", ["cut"], ["cut_half"], "cut_half", to=HALF),
        helper.make_node("Mul", ["a_half", "b_half"], ["y"], "y"),
        helper.make_node("Neg", ["cut_half"], ["z"], "z"),
    ]
    if change is not None:
        change(nodes)
    constants = {"sizes": [2, 2, 2], "zero": [0], "one": [1]}
    weights = [numpy_helper.from_array(np.array(v, np.int64), n) for n, v in constants.items()]
    made = helper.make_graph(
        nodes,
        "parts",
        [helper.make_tensor_value_info("x", FLOAT, [6])],
        [helper.make_tensor_value_info(name, to, None) for name, to in outputs.items()],
        weights,
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return onnx.shape_inference.infer_shapes(model)


X = {"x": np.array([0.1, 0.2, 0.3, 70.0, 1e-7, 3.0], np.float32)}


def _reuse(nodes: list[onnx.NodeProto]) -> None:
    """The whole is cast too, at the end."""
    nodes.append(helper.make_node("Cast", ["whole"], ["also"], "also", to=HALF))


@pytest.mark.parametrize(
    ("change", "outputs", "left"),
    [(None, {}, 1), (_reuse, {"also": HALF}, 1)],
    ids=["a cast of its own", "a cast there is"],
)
def test_parts_and_parts_of_parts_share_one_cast(
    change: Change | None, outputs: dict[str, int], left: int
) -> None:
    model = graph(change, {"y": HALF, "z": HALF, **outputs})
    expected, before = run(model, X), casts(model)
    assert hoist_casts(model.graph) == before - left
    assert casts(model) == left
    onnx.checker.check_model(model, full_check=True)
    for a, b in zip(run(model, X), expected, strict=True):
        np.testing.assert_array_equal(a, b)


def _read_uncast(nodes: list[onnx.NodeProto]) -> None:
    nodes.append(helper.make_node("Neg", ["a"], ["more"], "more"))


def _other_type(nodes: list[onnx.NodeProto]) -> None:
    nodes[2].attribute[0].i = DOUBLE
    nodes[6] = helper.make_node("Neg", ["b_half"], ["y"], "y")
    nodes.append(helper.make_node("Neg", ["a_half"], ["more"], "more"))


@pytest.mark.parametrize(
    ("change", "outputs"),
    [
        (_read_uncast, {"more": FLOAT}),
        (_other_type, {"more": DOUBLE}),
        (None, {"a": FLOAT}),
    ],
    ids=["read without a cast", "cast to another type", "given as it is"],
)
def test_what_is_read_as_it_is_leaves_the_casts_of_its_kin(
    change: Change | None, outputs: dict[str, int]
) -> None:
    model = graph(change, {"y": HALF, "z": HALF, **outputs})
    expected = run(model, X)
    # Only the slice's moves before it, to the part that it is cut from.
    assert hoist_casts(model.graph) == 0
    assert casts(model) == 3
    for a, b in zip(run(model, X), expected, strict=True):
        np.testing.assert_array_equal(a, b)
