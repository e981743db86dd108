"""Graphs whose types the builder chooses."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper
from rtx_plan import convolution_work, read_int8_plan

from engines.backend import BuildHooks, open_backend
from engines.options import BuildOptions
from mat_export.bench import example_inputs
from mat_export.contract import SINGLE_KEY
from mat_export.engine_graph import prepare_engine_graph, spec_of
from mat_export.free_types import free_types
from mat_export.parity import compare
from mat_export.runners import OrtRunner


def model_of(nodes: list[onnx.NodeProto], outputs: str) -> onnx.ModelProto:
    """A model that reads x."""
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 4]) for n in "x" + outputs]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def types_of(model: onnx.ModelProto) -> set[int]:
    """Element types of all tensors."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    values = (*graph.input, *graph.value_info, *graph.output)
    return {v.type.tensor_type.elem_type for v in values} | {t.data_type for t in graph.initializer}


def test_every_float_is_single_under_its_own_name() -> None:
    nodes = [
        helper.make_node("Cast", ["x"], ["h"], "a/Cast", to=TensorProto.FLOAT16),
        helper.make_node("Relu", ["h"], ["y"], "mapping/Relu"),
        helper.make_node("Cast", ["y"], ["f"], "c/Cast", to=TensorProto.FLOAT),
        helper.make_node("Relu", ["f"], ["z"], "d/Relu"),
        helper.make_node("Greater", ["f", "f"], ["g"], "e/Greater"),
        helper.make_node("Cast", ["g"], ["m"], "e/Cast", to=TensorProto.FLOAT16),
        helper.make_node("Cast", ["m"], ["n"], "e/Cast_1", to=TensorProto.FLOAT),
    ]
    free = free_types(model_of(nodes, "zn"))
    onnx.checker.check_model(free, full_check=True)
    kept = [(node.name, node.input[0]) for node in free.graph.node]
    assert kept == [
        *[("mapping/Relu", "x"), ("d/Relu", "y"), ("e/Greater", "y"), ("e/Cast", "g")],
        ("e/Cast_1", "m"),  # it makes an output
    ]
    assert types_of(free) == {TensorProto.FLOAT, TensorProto.BOOL}
    assert {p.key: p.value for p in free.metadata_props} == {SINGLE_KEY: "y"}


def test_a_quantized_network_is_as_good(
    small_calibration: tuple[Path, object], small_fp32: Path
) -> None:
    """As the typed one that later versions get."""
    typed = prepare_engine_graph(small_calibration[0], "int8", opset=22).model
    free = prepare_engine_graph(small_calibration[0], "int8", opset=17, weakly_typed=True).model
    onnx.checker.check_model(free, full_check=True)
    assert TensorProto.FLOAT16 in types_of(typed)
    assert TensorProto.FLOAT16 not in types_of(free)
    inputs = example_inputs(spec_of(typed), 1)
    hole = inputs["mask"][0, 0] < 0.5
    with OrtRunner(small_fp32) as exact:
        expected = exact.run(inputs)["output"]
    found = []
    for model in (typed, free):
        with OrtRunner(model.SerializeToString()) as runner:
            psnr = compare(expected, runner.run(inputs)["output"], hole).psnr
        assert psnr is not None
        found.append(psnr)
    assert min(found) > 35.0
    assert abs(found[0] - found[1]) < 1.0


def test_a_builder_makes_the_same_layers_int8_with_fewer_kernels(
    small_calibration: tuple[Path, object],
) -> None:
    """TensorRT-RTX stands in for 8.6, which needs a GPU: the rounding of weights is folded."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    backend, options = open_backend("tensorrt-rtx"), BuildOptions(target="sm_89")
    found = []
    for opset in (22, 17):
        graph = prepare_engine_graph(
            small_calibration[0], "int8", opset=opset, weakly_typed=opset == 17
        ).model
        data = graph.SerializeToString()
        plan = read_int8_plan(partial(backend.build, data, options, {}, BuildHooks()))
        int8 = plan.int8
        assert int8 <= convolution_work(graph).keys()
        found.append((int8, len(plan.kernels)))
    (typed, kernels), (free, fewer) = found
    assert typed == free
    assert typed
    assert fewer < kernels
