"""Computed biases: the same function, and no constant bias left behind a demodulation factor."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from mat_export.bench import example_inputs
from mat_export.fusing import compute_biases
from mat_export.inlining import inline_functions
from mat_export.runners import OrtRunner


@pytest.fixture(scope="module")
def plain(tiny_onnx: Path) -> onnx.ModelProto:
    return inline_functions(onnx.load(tiny_onnx))


@pytest.fixture(scope="module")
def computed(plain: onnx.ModelProto) -> tuple[onnx.ModelProto, int]:
    return compute_biases(plain)


def constant_biases(model: onnx.ModelProto) -> set[str]:
    """Sums with a constant of one value a channel, by module."""
    shapes = {t.name: list(t.dims) for t in model.graph.initializer}
    return {
        node.name.rpartition("/")[0]
        for node in model.graph.node
        if node.op_type == "Add"
        for name in node.input
        if len(shapes.get(name, [])) == 4 and shapes[name][2:] == [1, 1] and shapes[name][1] > 3
    }


def test_every_bias_behind_a_demodulation_factor_is_computed(
    plain: onnx.ModelProto, computed: tuple[onnx.ModelProto, int]
) -> None:
    model, count = computed
    demodulated = {name for name in constant_biases(plain) if name.rpartition(".")[2] in CONVS}
    assert count == len(demodulated) == 13
    # Of the rest of the graph only the groups' own sums are new.
    left = constant_biases(model) - constant_biases(plain)
    assert all(".styles." in name for name in left)
    assert constant_biases(plain) - constant_biases(model) == demodulated


CONVS = ("conv0", "conv1")
"""What the layers with styles are called."""


def test_the_picture_is_the_same(
    plain: onnx.ModelProto, computed: tuple[onnx.ModelProto, int]
) -> None:
    outputs = []
    for model in (plain, computed[0]):
        with OrtRunner(model.SerializeToString()) as runner:
            outputs.append(runner.run(example_inputs(runner.spec, 1))["output"])
    a, b = outputs
    assert np.abs(a - b).max() <= 1e-5 * np.abs(a).max()


def test_a_computed_bias_is_the_bias_exactly(
    plain: onnx.ModelProto, computed: tuple[onnx.ModelProto, int]
) -> None:
    weights = {t.name: numpy_helper.to_array(t) for t in plain.graph.initializer}
    own = {n.name: n.input[1] for n in plain.graph.node if n.op_type == "Add"}
    shifts = {
        n.input[1]: weights[own[n.name]]
        for n in computed[0].graph.node
        if n.op_type == "Add" and n.input[1].endswith("/shift") and n.name in own
    }
    assert len(shifts) == 13
    model = onnx.ModelProto()
    model.CopyFrom(computed[0])
    model.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in shifts
    )
    with OrtRunner(model.SerializeToString()) as runner:
        results = runner.run(example_inputs(runner.spec, 1))
    for name, bias in shifts.items():
        assert np.array_equal(results[name], bias)


def test_a_graph_without_styles_is_left_alone() -> None:
    bias = numpy_helper.from_array(np.ones((1, 4, 1, 1), np.float32), "bias")
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Add", ["x", "bias"], ["y"], "add")],
        "g",
        [value("x", 1, [1, 4, 2, 2])],
        [value("y", 1, [1, 4, 2, 2])],
        [bias],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)])
    rewritten, count = compute_biases(model)
    assert count == 0
    assert list(rewritten.graph.node) == list(graph.node)
