"""Tokens as maps: the same sums in the convolutions' layout, and nothing half rewritten."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from mat_export.bench import example_inputs
from mat_export.contract import OPERATOR_DOMAIN
from mat_export.functions import function_library
from mat_export.inlining import inline_functions
from mat_export.parity import compare, load_onnx
from mat_export.precision import apply_precision
from mat_export.runners import OrtRunner
from mat_export.token_maps import expand_token_maps, tokens_as_maps

KEPT = frozenset(("MaskedWindowAttention", "WindowAttention", "MaskPropagation"))


def network(path: Path, precision: str) -> onnx.ModelProto:
    """The exported network as plugins would get it, with its functions."""
    model = inline_functions(load_onnx(path), keep=KEPT)
    return model if precision == "fp32" else apply_precision(model, precision, keep=KEPT).model


def kinds(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


@pytest.mark.parametrize(("precision", "bar"), [("fp32", 100.0), ("fp16", 55.0)])
def test_the_network_is_the_same_picture(tiny_onnx: Path, precision: str, bar: float) -> None:
    plain, rewritten = network(tiny_onnx, precision), network(tiny_onnx, precision)
    before = kinds(plain)
    calls = tokens_as_maps(rewritten)
    # Five stacks of 14 blocks; masks are needed in the first two.
    assert calls == {"MaskedMapAttention": 5, "MapAttention": 9, "TokenNorm": 14}
    after = kinds(rewritten)
    # Five products a block are convolutions, biases within them; no map changes its layout.
    assert before["MatMul"] - after["MatMul"] == 5 * 14 == after["Conv"] - before["Conv"]
    assert before["Add"] - after["Add"] == 4 * 14
    assert before["Transpose"] - after["Transpose"] == 10
    assert after["ReduceL2"] == 0
    # The new maps' shapes are told, also behind the first stack.
    told = {value.name: value.type.tensor_type.shape.dim for value in rewritten.graph.value_info}
    norms = [n.output[0] for n in rewritten.graph.node if n.op_type == "TokenNorm"]
    sides = [64] * 2 + [32] * 3 + [16] * 4 + [32] * 3 + [64] * 2
    assert [[d.dim_value for d in told[name]] for name in norms] == [[1, 90, n, n] for n in sides]
    onnx.checker.check_model(rewritten)

    expand_token_maps(rewritten)
    runners = [OrtRunner(model.SerializeToString()) for model in (plain, rewritten)]
    inputs = example_inputs(runners[0].spec, 1)
    expected, found = (runner.run(inputs)["output"] for runner in runners)
    psnr = compare(expected, found, inputs["mask"][0, 0] < 0.5).psnr
    assert psnr is not None
    assert psnr >= bar


# -- one block by itself ---------------------------------------------------------------------------


def block(change: Callable[[list[onnx.NodeProto]], None] | None = None) -> onnx.ModelProto:
    """x → tokens → a norm, products, attention → a map; opset 18, whose axes are inputs."""
    draw = np.random.default_rng(0).standard_normal
    weights = {
        "w_qk": draw((6, 12)),
        "b_qk": draw(12),
        "w_v": draw((6, 6)),
        "floor": np.array(1e-5),
        "least": np.array(0.5),
    }
    attributes: dict[str, Any] = {"window": 8, "shift": 4, "heads": 2, "height": 16, "width": 8}
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], "enter", perm=[0, 2, 3, 1]),
        helper.make_node("ReduceL2", ["t", "axes"], ["norm"], "norm", keepdims=1),
        helper.make_node("Max", ["norm", "floor"], ["safe"], "safe"),
        helper.make_node("Div", ["t", "safe"], ["unit"], "unit"),
        helper.make_node("MatMul", ["unit", "w_qk"], ["qk_product"], "qk_product"),
        helper.make_node("Add", ["qk_product", "b_qk"], ["qk"], "qk"),
        helper.make_node("Split", ["qk"], ["q", "k"], "split", axis=-1, num_outputs=2),
        helper.make_node("MatMul", ["t", "w_v"], ["v"], "v"),
        helper.make_node("Greater", ["mask", "least"], ["valid"], "valid"),
        helper.make_node(
            "MaskedWindowAttention",
            ["q", "k", "v", "valid"],
            ["a"],
            "attention",
            domain=OPERATOR_DOMAIN,
            **attributes,
        ),
        helper.make_node("Concat", ["t", "a"], ["both"], "both", axis=-1),
        helper.make_node("Transpose", ["both"], ["y"], "leave", perm=[0, 3, 1, 2]),
    ]
    if change is not None:
        change(nodes)
    made = [
        numpy_helper.from_array(np.asarray(value, np.float32), name)
        for name, value in weights.items()
    ]
    made.append(numpy_helper.from_array(np.array([-1], np.int64), "axes"))
    graph = helper.make_graph(
        nodes,
        "block",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 6, 16, 8]),
            helper.make_tensor_value_info("mask", TensorProto.FLOAT, [1, 1, 16, 8]),
        ],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)],
        made,
    )
    graph.node.append(helper.make_node("Neg", ["y"], ["out"], "out"))
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(OPERATOR_DOMAIN, 1)]
    functions = function_library(18, dynamic=False)
    return helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=8)


def run(model: onnx.ModelProto) -> Any:
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString())
    rng = np.random.default_rng(1)
    x = rng.standard_normal((1, 6, 16, 8), dtype=np.float32)
    x[..., 3, 3] = 0.0  # a token without length
    mask = (rng.random((1, 1, 16, 8)) < 0.5).astype(np.float32)
    return session.run(None, {"x": x, "mask": mask})[0]


def test_a_block_of_opset_18_is_the_same() -> None:
    model = block()
    expected = run(model)
    assert tokens_as_maps(model) == {"MaskedMapAttention": 1, "TokenNorm": 1}
    assert kinds(model)["Transpose"] == 0
    expand_token_maps(model)
    np.testing.assert_allclose(run(model), expected, rtol=1e-5, atol=1e-6)


def _softmax(nodes: list[onnx.NodeProto]) -> None:
    nodes[-1].input[0] = "soft"
    nodes.insert(-1, helper.make_node("Softmax", ["both"], ["soft"], "soft", axis=-1))


def _read_queries(nodes: list[onnx.NodeProto]) -> None:
    nodes[-2].input[0] = "q"


def _norm_over_rows(nodes: list[onnx.NodeProto]) -> None:
    nodes[1].input[1] = "rows"
    nodes.insert(0, helper.make_node("Constant", [], ["rows"], "rows", value_ints=[1]))


def _swap(nodes: list[onnx.NodeProto]) -> None:
    nodes[6].output[:] = ["k", "q"]


@pytest.mark.parametrize("change", [_softmax, _read_queries, _norm_over_rows, _swap])
def test_what_is_not_known_between_tokens_leaves_all_as_it_is(
    change: Callable[[list[onnx.NodeProto]], None],
) -> None:
    model = block(change)
    before = model.SerializeToString(deterministic=True)
    assert tokens_as_maps(model) == {}
    assert model.SerializeToString(deterministic=True) == before
