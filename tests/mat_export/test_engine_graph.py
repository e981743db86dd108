"""The graph that engines are built of gives the picture of the exported one."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from small import SMALL

from engines.plugins.kernels import KernelLibrary, Tokens
from mat_export.bench import example_inputs
from mat_export.contract import (
    OPERATOR_DOMAIN,
    GraphSpec,
    UserError,
    mask_state_names,
    plugin_problem,
)
from mat_export.engine_graph import (
    PLUGIN_OPERATORS,
    prepare_engine_graph,
    prepare_model,
    spec_of,
)
from mat_export.epilogues import expand_epilogues
from mat_export.export import export_onnx
from mat_export.functions import function_library
from mat_export.parity import compare
from mat_export.runners import OrtRunner
from mat_export.token_maps import expand_token_maps
from mat_torch import random_checkpoint


def opset_of(model: onnx.ModelProto) -> int:
    return int(next(o.version for o in model.opset_import if o.domain == ""))


@pytest.mark.parametrize(("precision", "opset"), [("fp32", 17), ("fp32", 22), ("tf32", 20)])
def test_fp32_is_the_same_picture(tiny_onnx: Path, precision: str, opset: int) -> None:
    graph = prepare_engine_graph(tiny_onnx, precision, opset=opset, weakly_typed=opset == 17)
    onnx.checker.check_model(graph.model, full_check=True)
    assert opset_of(graph.model) == min(opset, 20) == graph.passes["opset"]
    assert not graph.model.functions
    assert graph.spec.precision == precision
    assert spec_of(graph.model) == graph.spec
    inputs = example_inputs(graph.spec, 1)
    with OrtRunner(tiny_onnx) as plain, OrtRunner(graph.model.SerializeToString()) as own:
        expected, found = plain.run(inputs)["output"], own.run(inputs)["output"]
    error = np.linalg.norm(expected - found) / np.linalg.norm(expected)
    assert 0 < error < 1e-5


@pytest.mark.parametrize("opset", [17, 20])
def test_fp16_holds_its_bar(tiny_onnx: Path, opset: int) -> None:
    graph = prepare_engine_graph(tiny_onnx, "fp16", opset=opset, weakly_typed=opset == 17)
    inputs = example_inputs(graph.spec, 1)
    hole = inputs["mask"][:, 0] < 0.5
    with OrtRunner(tiny_onnx) as plain, OrtRunner(graph.model.SerializeToString()) as own:
        expected, found = plain.run(inputs)["output"], own.run(inputs)["output"]
    psnr = compare(expected, found, hole[0]).psnr
    assert psnr is not None
    assert psnr >= 45.0
    assert graph.passes["half_nodes"]


def test_mask_states_become_outputs(tiny_onnx: Path) -> None:
    graph = prepare_engine_graph(tiny_onnx, "fp16", opset=17, weakly_typed=True, mask_states=True)
    names = [f"mask_state/{name}" for name in mask_state_names(graph.spec.config)]
    assert {o.name for o in graph.model.graph.output} == {"output", *names}
    assert graph.passes["mask_states"] == len(names)
    onnx.checker.check_model(graph.model, full_check=True)  # shapes of all outputs among the rest
    inputs = example_inputs(graph.spec, 1)
    with OrtRunner(graph.model.SerializeToString()) as runner:
        results = runner.run(inputs)
    for name in names:
        assert results[name].dtype == np.float32
        assert set(np.unique(results[name])) <= {0.0, 1.0}
    assert results["mask_state/conv_first"].mean() < 1.0


def test_bf16_needs_a_new_opset(tiny_onnx: Path) -> None:
    graph = prepare_engine_graph(tiny_onnx, "bf16", opset=22)
    assert opset_of(graph.model) == 22
    with pytest.raises(UserError, match="opset"):
        prepare_engine_graph(tiny_onnx, "bf16", opset=17)


def test_what_is_not_ours_is_refused(tiny_onnx: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="precision is one of"):
        prepare_engine_graph(tiny_onnx, "fp8", opset=20)
    with pytest.raises(UserError, match="there is no file"):
        prepare_engine_graph(tmp_path / "none.onnx", "fp16", opset=20)
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    values = [onnx.helper.make_tensor_value_info(n, 1, [1]) for n in "xy"]
    other = onnx.helper.make_model(onnx.helper.make_graph([node], "g", values[:1], values[1:]))
    onnx.save(other, tmp_path / "other.onnx")
    with pytest.raises(UserError, match="not one that mat-export wrote"):
        prepare_engine_graph(tmp_path / "other.onnx", "fp16", opset=20)
    typed = prepare_engine_graph(tiny_onnx, "fp16", opset=20)
    onnx.save(typed.model, tmp_path / "typed.onnx")
    with pytest.raises(UserError, match="in fp16 already"):
        prepare_engine_graph(tmp_path / "typed.onnx", "fp16", opset=20)


def test_the_source_is_left_as_it_is(tiny_onnx: Path) -> None:
    before = tiny_onnx.read_bytes()
    prepare_engine_graph(tiny_onnx, "fp16", opset=17)
    assert tiny_onnx.read_bytes() == before
    metadata = {e.key: e.value for e in onnx.load(tiny_onnx).metadata_props}
    spec = GraphSpec.from_metadata(metadata)
    assert spec is not None
    assert spec.precision == "fp32"


NO_KERNELS = {
    "a window of 4": ({"windows": (8, 4, 16, 16, 8)}, "has windows of 4"),
    "a window of 32": ({"windows": (8, 32, 16, 16, 2)}, "has windows of 2 and 32"),
    "an odd head size": ({"token_dim": 6}, "those of 'test-128' have 3"),
    "a head size above 32": ({"token_dim": 68}, "those of 'test-128' have 34"),
}


@pytest.mark.parametrize(("changes", "words"), NO_KERNELS.values(), ids=NO_KERNELS)
def test_a_network_that_plugins_have_no_kernel_for_is_refused_with_what_to_do(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    path = tmp_path / "model.onnx"
    export_onnx(random_checkpoint(replace(SMALL, **changes), 0), path)
    for quick in (False, True):
        with pytest.raises(UserError, match=rf"{words}: build with --plugins off$"):
            prepare_engine_graph(path, "fp16", opset=17, plugins=True, quick=quick)
    assert "plugins" not in prepare_engine_graph(path, "fp16", opset=17).passes


def test_a_precision_that_there_is_not_is_refused_of_a_loaded_model_too(small_onnx: Path) -> None:
    for plugins in (False, True):
        with pytest.raises(UserError, match=r"precision is one of fp32, tf32, .*, got 'fp8'"):
            prepare_model(onnx.load(small_onnx), "fp8", opset=20, plugins=plugins)


@pytest.mark.parametrize("head_size", [2, 3, 30, 32, 33, 34])
@pytest.mark.parametrize("window", [2, 4, 8, 16, 32])
def test_the_networks_that_are_refused_are_those_that_the_kernels_refuse(
    paper_kernels: KernelLibrary, window: int, head_size: int
) -> None:
    config = replace(SMALL, token_dim=2 * head_size, windows=(window, 16, 16, 16, window))
    q, y = np.zeros((2, window**2, 2 * 34), np.float32)
    tokens, out = (Tokens(x.ctypes.data, 2 * 34) for x in (q, y))
    call: dict[str, Any] = {"shape": (1, window, window), "heads": 2, "head_size": head_size}
    call |= {"window": window, "shift": 0, "dtype": "float32"}
    try:
        paper_kernels.attention(tokens, tokens, tokens, out, **call)
        refused = False
    except UserError:
        refused = True
    assert bool(plugin_problem(config)) == refused


def plugin_functions() -> list[onnx.FunctionProto]:
    """The operators' functions between masks of integers, as plugins take and give them."""
    functions = function_library(17, dynamic=False)
    for function in functions:
        if function.name not in PLUGIN_OPERATORS or "valid" not in function.input:
            continue
        for node in function.node:
            node.input[:] = ["valid_bool" if name == "valid" else name for name in node.input]
        to_bool = onnx.helper.make_node("Cast", ["valid"], ["valid_bool"], to=TensorProto.BOOL)
        function.node.insert(0, to_bool)
        if function.name == "MaskPropagation":
            function.node[-1].output[0] = "y_bool"
            to_integers = onnx.helper.make_node("Cast", ["y_bool"], ["y"], to=TensorProto.INT32)
            function.node.append(to_integers)
    return functions


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_with_plugins_the_operators_are_calls_of_what_their_functions_say(
    tiny_onnx: Path, precision: str
) -> None:
    plain = prepare_engine_graph(tiny_onnx, precision, opset=17, weakly_typed=True)
    graph = prepare_engine_graph(tiny_onnx, precision, opset=17, weakly_typed=True, plugins=True)
    # Two stacks of blocks with masks: into the first block's calls, and out of the last one's.
    assert graph.passes["plugin_mask_casts"] == 4
    called = Counter(n.op_type for n in graph.model.graph.node if n.domain == OPERATOR_DOMAIN)
    assert set(called) <= PLUGIN_OPERATORS
    assert graph.passes["plugins"] == {name: called[name] for name in PLUGIN_OPERATORS}
    assert called["MaskPropagation"] == 5
    on = "Window" if precision == "fp32" else "Map"
    assert (called[f"Masked{on}Attention"], called[f"{on}Attention"]) == (5, 9)
    assert called["TokenNorm"] == (0 if precision == "fp32" else 14)
    assert "plugin_mask_casts" not in plain.passes
    assert not graph.model.functions
    onnx.checker.check_model(graph.model, full_check=True)
    assert len(graph.model.graph.node) < 0.75 * len(plain.model.graph.node)
    # With the functions back it is a graph that anyone runs, and the picture is the same.
    expand_epilogues(graph.model)
    expand_token_maps(graph.model)
    graph.model.functions.extend(plugin_functions())
    inputs = example_inputs(graph.spec, 1)
    hole = inputs["mask"][:, 0] < 0.5
    with OrtRunner(plain.model.SerializeToString()) as a:
        expected = a.run(inputs)["output"]
    with OrtRunner(graph.model.SerializeToString()) as b:
        found = b.run(inputs)["output"]
    psnr = compare(expected, found, hole[0]).psnr
    assert psnr is not None
    assert psnr >= (100.0 if precision == "fp32" else 55.0)


def test_mask_states_are_the_same_behind_plugins(tiny_onnx: Path) -> None:
    plain = prepare_engine_graph(tiny_onnx, "fp32", opset=17, mask_states=True)
    graph = prepare_engine_graph(tiny_onnx, "fp32", opset=17, mask_states=True, plugins=True)
    onnx.checker.check_model(graph.model, full_check=True)
    expand_epilogues(graph.model)
    graph.model.functions.extend(plugin_functions())
    inputs = example_inputs(graph.spec, 1)
    with OrtRunner(plain.model.SerializeToString()) as a:
        expected = a.run(inputs)
    with OrtRunner(graph.model.SerializeToString()) as b:
        found = b.run(inputs)
    assert found.keys() == expected.keys()
    for name in expected.keys() - {"output"}:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
