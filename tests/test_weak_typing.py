"""TensorRT 8.6 is told each layer's type as the file has it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
from onnx import TensorProto, helper

from engines.weak_typing import constrain, tensor_types
from mat_export.engine_graph import prepare_engine_graph

KINDS = (
    *("CONSTANT", "SHAPE", "CAST", "CONVOLUTION", "SHUFFLE", "ELEMENTWISE", "REDUCE"),
    *("QUANTIZE", "DEQUANTIZE", "PLUGIN_V2", "MATRIX_MULTIPLY"),
)
TRT = SimpleNamespace(
    float16="half",
    float32="float",
    int32="int32",
    bool="bool",
    LayerType=SimpleNamespace(**{kind: kind for kind in KINDS}),
)


@dataclass
class Tensor:
    name: str
    dtype: str = "float"


@dataclass
class Layer:
    """What the parser makes of a node, or puts between two."""

    name: str
    type: str
    inputs: list[str]
    outputs: list[str]
    dtype: str = "float"
    precision: str | None = None
    output_types: dict[int, str] = field(default_factory=dict)

    @property
    def num_inputs(self) -> int:
        return len(self.inputs)

    @property
    def num_outputs(self) -> int:
        return len(self.outputs)

    def get_input(self, i: int) -> Tensor:
        return Tensor(self.inputs[i])

    def get_output(self, i: int) -> Tensor:
        return Tensor(self.outputs[i], self.dtype)

    def set_output_type(self, i: int, dtype: str) -> None:
        self.output_types[i] = dtype


class Network:
    def __init__(self, layers: list[Layer]) -> None:
        self.layers = layers
        self.num_layers = len(layers)

    def get_layer(self, i: int) -> Layer:
        return self.layers[i]


def graph() -> onnx.ModelProto:
    """x → cast to half → y (half) → cast → z (float), and a condition."""
    nodes = [
        helper.make_node("Cast", ["x"], ["h"], "a/Cast", to=TensorProto.FLOAT16),
        helper.make_node("Relu", ["h"], ["y"], "b/Relu"),
        helper.make_node("Cast", ["y"], ["f"], "c/Cast", to=TensorProto.FLOAT),
        helper.make_node("Relu", ["f"], ["z"], "d/Relu"),
        helper.make_node("Greater", ["f", "f"], ["g"], "e/Greater"),
        helper.make_node("Cast", ["g"], ["m"], "e/MaskPropagation/Cast", to=TensorProto.FLOAT),
        helper.make_node("Relu", ["m"], ["n"], "e/MaskPropagation/Relu"),
    ]
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 4]) for n in "xzn"]
    made = helper.make_graph(nodes, "g", values[:1], values[1:])
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def run(layers: list[Layer]) -> tuple[int, int]:
    return constrain(TRT, Network(layers), graph())


def test_each_layer_gets_the_type_of_its_output_in_the_file() -> None:
    half = Layer("b/Relu", "CONVOLUTION", ["h"], ["y"])
    full = Layer("d/Relu", "CONVOLUTION", ["f"], ["z"])
    assert run([half, full]) == (1, 1)
    assert (half.precision, half.output_types) == ("half", {0: "half"})
    assert (full.precision, full.output_types) == ("float", {0: "float"})


def test_what_the_parser_adds_takes_the_type_of_what_it_reads() -> None:
    added = Layer("(Unnamed Layer* 1) [Shuffle]", "SHUFFLE", ["h"], ["(Unnamed Layer* 1)_output"])
    after = Layer("(Unnamed Layer* 2) [Shuffle]", "SHUFFLE", ["(Unnamed Layer* 1)_output"], ["?"])
    lost = Layer("(Unnamed Layer* 3) [Shuffle]", "SHUFFLE", ["nowhere"], ["??"])
    assert run([added, after, lost]) == (2, 0)
    assert added.precision == after.precision == "half"
    assert lost.precision is None


def test_constants_shapes_casts_and_whole_numbers_are_left_alone() -> None:
    layers = [
        Layer("k", "CONSTANT", [], ["y"]),
        Layer("s", "SHAPE", ["h"], ["y"]),
        Layer("a/Cast", "CAST", ["x"], ["h"]),
        Layer("e/Greater", "ELEMENTWISE", ["f", "f"], ["g"], dtype="bool"),
        Layer("i", "ELEMENTWISE", ["h"], ["y"], dtype="int32"),
    ]
    assert run(layers) == (0, 0)
    assert all(layer.precision is None and not layer.output_types for layer in layers)


def quantized_graph() -> onnx.ModelProto:
    """x → Q → DQ → r (float) → y (float)."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "o"], ["q"], "x/QuantizeLinear"),
        helper.make_node("DequantizeLinear", ["q", "s", "o"], ["r"], "x/DequantizeLinear"),
        helper.make_node("Relu", ["r"], ["y"], "a/Relu"),
        helper.make_node("Relu", ["y"], ["z"], "b/Relu"),
    ]
    weights = [
        helper.make_tensor("s", TensorProto.FLOAT, [], [0.5]),
        helper.make_tensor("o", TensorProto.INT8, [], [0]),
    ]
    x, z = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4]) for name in "xz")
    made = helper.make_graph(nodes, "g", [x], [z], weights)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_what_becomes_int8_is_told_no_type() -> None:
    quantize = Layer("x/QuantizeLinear", "QUANTIZE", ["x"], ["q"])
    dequantize = Layer("x/DequantizeLinear", "DEQUANTIZE", ["q"], ["r"])
    int8 = Layer("a/Relu", "CONVOLUTION", ["r"], ["y"])
    after = Layer("b/Relu", "CONVOLUTION", ["y"], ["z"])
    assert constrain(TRT, Network([quantize, dequantize, int8, after]), quantized_graph()) == (0, 1)
    for layer in (quantize, dequantize, int8):
        assert layer.precision is None
        assert not layer.output_types
    assert after.precision == "float"


def test_of_a_quantized_network_what_it_names_is_bound_and_nothing_else(
    small_calibration: tuple[Path, object],
) -> None:
    """8.6 refused to bind more of it, on a GPU."""
    model = prepare_engine_graph(small_calibration[0], "int8", opset=17, weakly_typed=True).model
    layers = {
        node.name: Layer(node.name, "CONVOLUTION", [*node.input[:1]], [node.output[0]])
        for node in model.graph.node
        if node.op_type not in ("Cast", "Shape", "QuantizeLinear", "DequantizeLinear")
    }
    halves, singles = constrain(TRT, Network([*layers.values()]), model)
    told = {name: layer.precision for name, layer in layers.items()}
    assert halves == 0
    assert 0 < singles == sum(precision == "float" for precision in told.values())
    assert {told[name] for name in told if name.startswith("mapping")} == {"float"}
    assert {told[name] for name in told if name.endswith("blur/Conv")} == {None}
    dequantized = {
        name
        for node in model.graph.node
        if node.op_type == "DequantizeLinear"
        for name in node.output
    }
    int8 = [
        node.name
        for node in model.graph.node
        if node.op_type == "Conv" and node.input[0] in dequantized
    ]
    assert int8
    assert {told[name] for name in int8} == {None}


def test_mask_propagation_stays_free() -> None:
    """Bound, it left 8.6 without an implementation for the block around it."""
    layer = Layer("first.blocks.0/MaskPropagation/valid_count", "REDUCE", ["m"], ["n"])
    assert run([layer]) == (0, 0)


def test_plugins_are_told_no_type_and_what_follows_them_is() -> None:
    """Bound, 8.6 found no format for them."""
    plugin = Layer("b/MaskedWindowAttention", "PLUGIN_V2", ["h"], ["y"])
    after = Layer("d/Relu", "CONVOLUTION", ["f"], ["z"])
    assert run([plugin, after]) == (0, 1)
    assert plugin.precision is None
    assert not plugin.output_types
    assert after.precision == "float"


def test_every_tensor_of_the_network_has_a_type(tiny_onnx: Path) -> None:
    model = prepare_engine_graph(tiny_onnx, "fp16", opset=17, weakly_typed=True).model
    types = tensor_types(model)
    weights = {t.name for t in model.graph.initializer}
    made = {name for node in model.graph.node for name in node.output if name}
    assert made <= types.keys() | weights
    kinds: dict[int, Any] = {}
    for name in made:
        kinds[types[name]] = kinds.get(types[name], 0) + 1
    assert kinds[TensorProto.FLOAT16] > 300
    assert kinds[TensorProto.FLOAT] > 100
