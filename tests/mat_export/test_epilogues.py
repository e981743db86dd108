"""Chains between convolutions become one operator where it is worth it, and mean what they did."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from engines.plugins import kernels
from mat_export.bench import example_inputs
from mat_export.contract import OPERATOR_DOMAIN
from mat_export.engine_graph import prepare_engine_graph
from mat_export.epilogues import LEAST_SIZE, expand_epilogues, fuse_epilogues
from mat_export.functions import EPILOGUE_PARTS
from mat_export.parity import compare
from mat_export.runners import OrtRunner

SIZE = (16, 256, 256)
"""Channels, height and width of the maps below, as large as it takes."""


def chain(
    *steps: str, shape: Sequence[int | str] = (1, *SIZE), gain: float = 1.0
) -> onnx.ModelProto:
    """A graph x → … → y of steps: "filter", "relu", or an operator and the kind of its side."""
    batch, channels, height, width = shape
    shapes = {
        "channel": [1, channels, 1, 1],
        "pixel": [1, 1, height, width],
        "map": [batch, channels, height, width],
    }
    taps = np.outer([1, 2, 1], [1, 2, 1]) * np.float32(gain / 16.0)
    weight = np.broadcast_to(taps, (SIZE[0], 1, 3, 3)).astype(np.float32)
    values = helper.make_tensor_value_info
    inputs = [values("x", TensorProto.FLOAT, shapes["map"])]
    nodes, name = [], "x"
    for i, step in enumerate(steps):
        result = "y" if i == len(steps) - 1 else f"t{i}"
        if step == "filter":
            node = helper.make_node(
                "Conv",
                [name, "weight"],
                [result],
                group=channels,
                pads=[1] * 4,
                kernel_shape=[3, 3],
            )
        elif step == "relu":
            node = helper.make_node("LeakyRelu", [name], [result], alpha=0.2)
        else:
            op, kind = step.split()
            inputs.append(values(f"side{i}", TensorProto.FLOAT, shapes[kind]))
            node = helper.make_node(op, [name, f"side{i}"], [result])
        node.name = result
        nodes.append(node)
        name = result
    y = values("y", TensorProto.FLOAT, shapes["map"])
    graph = helper.make_graph(nodes, "g", inputs, [y], [numpy_helper.from_array(weight, "weight")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return model


def calls(model: onnx.ModelProto) -> list[dict[str, int | float]]:
    """The attributes of every call."""
    return [
        {a.name: helper.get_attribute_value(a) for a in node.attribute}
        for node in model.graph.node
        if node.domain == OPERATOR_DOMAIN
    ]


def kinds(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


EVERYTHING = (
    *("filter", "Mul channel", "Add pixel", "Add channel", "relu"),
    *("Mul pixel", "Add map", "Mul channel"),
)


def run(model: onnx.ModelProto, inputs: dict[str, NDArray[np.float32]]) -> NDArray[np.float32]:
    import onnxruntime

    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (y,) = session.run(None, inputs)
    return np.asarray(y)


def test_every_part_in_order_is_one_call_that_computes_the_same() -> None:
    plain, fused = (chain(*EVERYTHING, gain=4.0) for _ in range(2))
    assert fuse_epilogues(fused) == 1
    assert kinds(fused) == ["FusedEpilogue"]
    assert list(fused.graph.node[0].input) == ["x", *(f"side{i}" for i in (1, 2, 3, 5, 6, 7))]
    (attributes,) = calls(fused)
    assert attributes == {
        **dict.fromkeys(EPILOGUE_PARTS, 1),
        "filter": 1,
        "pad": 1,
        "gain": 4.0,
        "slope": pytest.approx(0.2),
    }
    assert not fused.graph.initializer
    onnx.checker.check_model(fused)
    expand_epilogues(fused)
    onnx.checker.check_model(fused, full_check=True)
    rng = np.random.default_rng(0)
    inputs = {
        value.name: rng.standard_normal(
            [d.dim_value for d in value.type.tensor_type.shape.dim], np.float32
        )
        for value in plain.graph.input
    }
    np.testing.assert_allclose(run(fused, inputs), run(plain, inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("steps", "left"),
    [
        (("filter",), ["FusedEpilogue"]),
        (("relu",), ["LeakyRelu"]),
        (("Mul channel",), ["Mul"]),
        (("relu", "Mul pixel"), ["FusedEpilogue"]),
        (("Mul channel", "Mul channel"), ["FusedEpilogue"]),
        (("Mul channel", "filter"), ["Mul", "FusedEpilogue"]),
        (("relu", "Add channel"), ["LeakyRelu", "Add"]),
        (("filter", "filter"), ["FusedEpilogue"] * 2),
    ],
)
def test_a_chain_is_what_comes_in_order_and_saves_a_pass(steps: list[str], left: list[str]) -> None:
    model = chain(*steps)
    assert fuse_epilogues(model) == left.count("FusedEpilogue")
    assert kinds(model) == left


@pytest.mark.parametrize(
    "shape",
    [(1, 16, 255, 256), (1, 16, 8, 8), ("batch", 16, "height", 256)],
    ids=["a little smaller", "small", "of a size that is not known"],
)
def test_maps_that_are_not_large_stay(shape: tuple[int | str, ...]) -> None:
    assert np.prod(SIZE) == LEAST_SIZE
    model = chain("relu", "Mul pixel", shape=shape)
    assert fuse_epilogues(model) == 0
    assert kinds(model) == ["LeakyRelu", "Mul"]


def test_a_batch_that_is_not_known_is_no_hindrance() -> None:
    model = chain("filter", "Mul channel", "Add map", "Mul channel", shape=("batch", *SIZE))
    for i, value in enumerate(model.graph.input):
        value.type.tensor_type.shape.dim[0].dim_param = f"unk__{i}"  # as inference names them
    assert fuse_epilogues(model) == 1
    assert kinds(model) == ["FusedEpilogue"]


def test_a_tensor_with_other_readers_ends_the_chain() -> None:
    model = chain("Mul channel", "relu", "Add map", "Mul channel")
    model.graph.output.append(helper.make_tensor_value_info("t1", TensorProto.FLOAT, [1, *SIZE]))
    assert fuse_epilogues(model) == 2
    assert [list(node.output) for node in model.graph.node] == [["t1"], ["y"]]


def test_other_convolutions_stay() -> None:
    model = chain("filter", "relu")
    weight = numpy_helper.to_array(model.graph.initializer[0]).copy()
    weight[3, 0, 1, 1] += 1e-3
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, "weight"))
    assert fuse_epilogues(model) == 0


def quantize(model: onnx.ModelProto, name: str) -> None:
    """Put Q and DQ between a tensor and its readers."""
    for node in model.graph.node:
        node.input[:] = [f"{name}/dq" if own == name else own for own in node.input]
    for output in model.graph.output:
        output.name = f"{name}/dq" if output.name == name else output.name
    weights = [
        numpy_helper.from_array(np.float32(0.1), "s"),
        numpy_helper.from_array(np.int8(0), "o"),
    ]
    model.graph.initializer.extend(weights)
    nodes = [
        helper.make_node("QuantizeLinear", [name, "s", "o"], [f"{name}/q"]),
        helper.make_node("DequantizeLinear", [f"{name}/q", "s", "o"], [f"{name}/dq"]),
    ]
    place = 1 + max(
        (i for i, node in enumerate(model.graph.node) if name in node.output), default=-1
    )
    for i, node in enumerate(nodes):
        model.graph.node.insert(place + i, node)
    onnx.checker.check_model(model, full_check=True)


@pytest.mark.parametrize("name", ["x", "side2", "y"])
def test_what_passes_quantization_stays(name: str) -> None:
    model = chain("Mul channel", "relu", "Add map")
    quantize(model, name)
    before = kinds(model)
    assert fuse_epilogues(model) == 0
    assert kinds(model) == before


def test_what_a_quantized_convolution_gives_stays() -> None:
    model = chain("filter", "Mul channel", "relu")
    quantize(model, "x")
    model.graph.initializer[0].CopyFrom(
        numpy_helper.from_array(np.ones((16, 1, 3, 3), np.float32), "weight")
    )
    assert fuse_epilogues(model) == 0


def test_the_operator_has_the_parts_of_the_kernels() -> None:
    assert EPILOGUE_PARTS == kernels.EPILOGUE_PARTS


# -- the network -----------------------------------------------------------------------------------


def test_the_network_is_the_same_picture_and_fourteen_calls(tiny_onnx: Path) -> None:
    for precision, bar in (("fp32", 100.0), ("fp16", 55.0)):
        plain = prepare_engine_graph(tiny_onnx, precision, opset=17, weakly_typed=True)
        fused = prepare_engine_graph(tiny_onnx, precision, opset=17, weakly_typed=True)
        assert fuse_epilogues(fused.model) == 14
        expand_epilogues(fused.model)
        inputs = example_inputs(plain.spec, 1)
        hole = inputs["mask"][0, 0] < 0.5
        pictures = []
        for graph in (plain, fused):
            with OrtRunner(graph.model.SerializeToString()) as runner:
                pictures.append(runner.run(inputs)["output"])
        psnr = compare(pictures[0], pictures[1], hole).psnr
        assert psnr is not None
        assert psnr >= bar, precision


def test_plugins_get_the_calls_unless_they_are_quick_ones(tiny_onnx: Path) -> None:
    graph = prepare_engine_graph(tiny_onnx, "fp16", opset=17, weakly_typed=True, plugins=True)
    plugins = graph.passes["plugins"]
    assert isinstance(plugins, dict)
    assert plugins["FusedEpilogue"] == 14
    quick = prepare_engine_graph(
        tiny_onnx, "fp16", opset=17, weakly_typed=True, plugins=True, quick=True
    )
    assert quick.passes["plugins"] == {
        **dict.fromkeys(plugins, 0),
        "MaskPropagation": 5,
        "MaskedWindowAttention": 5,
        "WindowAttention": 9,
    }
