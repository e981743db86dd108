"""The last selection said as sums of products gives the same numbers, bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from mat_export.blending import blend_outputs
from mat_export.engine_graph import prepare_engine_graph
from mat_export.precision import ISLANDS


def selecting(*, more: bool = False) -> onnx.ModelProto:
    """y = x where m > ½, else f; and a selection inside the graph."""
    floats = {name: ([1, 3, 1, 8] if name != "m" else [1, 1, 1, 8]) for name in ("m", "x", "f")}
    nodes = [
        helper.make_node("Greater", ["m", "half"], ["c"], "Greater"),
        helper.make_node("Where", ["c", "x", "f"], ["inner"], "Where"),
        helper.make_node("Neg", ["inner"], ["n"], "Neg"),
        helper.make_node("Where", ["c", "x", "n"], ["y"], "Where_1"),
    ]
    outputs = ["y"]
    if more:
        nodes.append(helper.make_node("Where", ["c", "x", "f"], ["coarse"], "Where_2"))
        outputs.append("coarse")
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in floats.items()],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 3, 1, 8]) for n in outputs],
        [numpy_helper.from_array(np.float32(0.5), "half")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def inputs() -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(0)
    half = np.float32(0.5)
    masks = [0, 1, half, np.nextafter(half, np.float32(1)), np.nextafter(half, np.float32(0))]
    mask = np.array([*masks, 0.7, -3, 1e30], np.float32).reshape(1, 1, 1, 8)
    x, f = (rng.standard_normal((1, 3, 1, 8)).astype(np.float32) for _ in range(2))
    return {"m": mask, "x": x, "f": f * np.float32(1e30)}


@pytest.mark.parametrize("more", [False, True])
def test_the_same_numbers_at_every_mask_next_to_a_half(more: bool) -> None:
    before, after = selecting(more=more), selecting(more=more)
    assert blend_outputs(after) == 1 + more
    onnx.checker.check_model(after, full_check=True)
    expected = ReferenceEvaluator(before).run(None, inputs())
    found = ReferenceEvaluator(after).run(None, inputs())
    for one, other in zip(expected, found, strict=True):
        np.testing.assert_array_equal(one, other)


def test_selections_inside_stay() -> None:
    model = selecting()
    blend_outputs(model)
    assert [node.name for node in model.graph.node if node.op_type == "Where"] == ["Where"]


def test_a_graph_for_tensorrt_8_ends_in_single_precision_sums(tiny_onnx: Path) -> None:
    for precision, opset, blended in (("fp16", 17, 1), ("fp16", 18, None), ("fp32", 17, None)):
        made = prepare_engine_graph(tiny_onnx, precision, opset=opset, weakly_typed=opset == 17)
        assert made.passes.get("blended_outputs") == blended
    graph = prepare_engine_graph(tiny_onnx, "fp16", opset=17, weakly_typed=True).model.graph
    makers = {name: node for node in graph.node for name in node.output}
    composite = next(rule for rule in ISLANDS if rule.name == "composite")
    last = makers["output"]
    assert last.op_type == "Add"
    assert composite.holds(last)
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.output)}
    assert last.name.startswith("Blend")
    assert types["output"] == TensorProto.FLOAT
    kept = makers[last.input[0]]
    assert kept.input[0] == "image", "at the graph's own type, without a cast"
