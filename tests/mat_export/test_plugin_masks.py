"""Masks cross the border of plugins as integers, by as few casts as that takes."""

from __future__ import annotations

from collections.abc import Sequence

import onnx
import pytest
from onnx import TensorProto, helper

from mat_export.contract import OPERATOR_DOMAIN
from mat_export.plugin_masks import PLUGIN_OPERATORS, masks_as_integers

GRID = [1, 8, 8, 4]
MASK = [1, 1, 8, 8]


def call(name: str, inputs: Sequence[str], output: str) -> onnx.NodeProto:
    return helper.make_node(name, inputs, [output], output, domain=OPERATOR_DOMAIN)


def attention(mask: str, output: str) -> onnx.NodeProto:
    return call("MaskedWindowAttention", ["x", "x", "x", mask], output)


def propagation(mask: str, output: str) -> onnx.NodeProto:
    return call("MaskPropagation", [mask], output)


def graph_of(
    nodes: Sequence[onnx.NodeProto], outputs: dict[str, int], told: Sequence[str] = ()
) -> onnx.GraphProto:
    """A graph of features `x` and a mask `m`; the masks that are told have their types in it."""
    shapes = {int(TensorProto.FLOAT): GRID, int(TensorProto.BOOL): MASK}
    values = helper.make_tensor_value_info
    return helper.make_graph(
        nodes,
        "g",
        [values("x", TensorProto.FLOAT, GRID), values("m", TensorProto.BOOL, MASK)],
        [values(name, kind, shapes[kind]) for name, kind in outputs.items()],
        value_info=[values(name, TensorProto.BOOL, MASK) for name in told],
    )


def check(graph: onnx.GraphProto) -> None:
    imports = [helper.make_opsetid("", 17), helper.make_opsetid(OPERATOR_DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=8)
    onnx.checker.check_model(model, full_check=True)


def kinds(graph: onnx.GraphProto) -> list[str]:
    """Each node's operator, and of a cast what it makes."""
    return [
        f"Cast to {TensorProto.DataType.Name(node.attribute[0].i)}"
        if node.op_type == "Cast"
        else node.op_type
        for node in graph.node
    ]


def test_consecutive_calls_share_integers_and_what_else_reads_a_mask_gets_bools() -> None:
    graph = graph_of(
        [
            attention("m", "y"),
            propagation("m", "n"),
            attention("n", "z"),
            propagation("n", "o"),
            helper.make_node("Not", ["o"], ["p"]),
        ],
        {"y": TensorProto.FLOAT, "z": TensorProto.FLOAT, "p": TensorProto.BOOL},
        told=["n", "o"],
    )
    assert masks_as_integers(graph) == 2
    check(graph)
    assert kinds(graph) == [
        "Cast to INT32",
        "MaskedWindowAttention",
        "MaskPropagation",
        "MaskedWindowAttention",
        "MaskPropagation",
        "Cast to BOOL",
        "Not",
    ]
    masks = [node.input[-1] for node in graph.node if node.domain == OPERATOR_DOMAIN]
    assert masks == ["m/as_int32", "m/as_int32", "n/as_int32", "n/as_int32"]
    assert graph.node[-2].output[0] == graph.node[-1].input[0] == "o"
    # What tells of masks tells of the integers too, and no more of what is gone.
    types = {v.name: v.type.tensor_type for v in graph.value_info}
    assert {name: value.elem_type for name, value in types.items()} == {
        "o": TensorProto.BOOL,
        "n/as_int32": TensorProto.INT32,
        "o/as_int32": TensorProto.INT32,
    }
    assert [d.dim_value for d in types["n/as_int32"].shape.dim] == MASK


def test_a_mask_that_is_an_output_stays_one_of_bools() -> None:
    graph = graph_of(
        [propagation("m", "n"), propagation("n", "o")],
        {"n": TensorProto.BOOL, "o": TensorProto.BOOL},
    )
    assert masks_as_integers(graph) == 3
    check(graph)
    assert kinds(graph) == [
        "Cast to INT32",
        "MaskPropagation",
        "Cast to BOOL",
        "MaskPropagation",
        "Cast to BOOL",
    ]
    assert graph.node[3].input[0] == graph.node[1].output[0]


@pytest.mark.parametrize("other", ["WindowAttention", "Not"])
def test_what_takes_no_mask_of_a_plugin_is_left_as_it_is(other: str) -> None:
    node = (
        call("WindowAttention", ["x", "x", "x"], "y")
        if other in PLUGIN_OPERATORS
        else helper.make_node("Not", ["m"], ["y"])
    )
    kind = TensorProto.FLOAT if other in PLUGIN_OPERATORS else TensorProto.BOOL
    graph = graph_of([node], {"y": kind})
    before = graph.SerializeToString()
    assert masks_as_integers(graph) == 0
    assert graph.SerializeToString() == before
