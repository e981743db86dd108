"""Inlining gives the same graph without functions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from mat_export.bench import example_inputs
from mat_export.contract import mask_state_names
from mat_export.inlining import inline_functions
from mat_export.runners import OrtRunner

ARITHMETIC = {"Range", "Mod", "ScatterElements", "Equal", "Less"}
"""What only the order of tokens in their windows needs."""


@pytest.fixture(scope="module")
def inlined(tiny_onnx: Path) -> onnx.ModelProto:
    return inline_functions(onnx.load(tiny_onnx))


def test_the_result_has_standard_operators_alone(inlined: onnx.ModelProto) -> None:
    onnx.checker.check_model(inlined, full_check=True)
    assert not inlined.functions
    assert {node.domain for node in inlined.graph.node} == {""}
    assert [o.domain for o in inlined.opset_import] == [""]


def test_the_result_is_the_same_function_to_the_last_bit(
    tiny_onnx: Path, inlined: onnx.ModelProto
) -> None:
    with OrtRunner(tiny_onnx) as before, OrtRunner(inlined.SerializeToString()) as after:
        inputs = example_inputs(before.spec, 1)
        assert np.array_equal(before.run(inputs)["output"], after.run(inputs)["output"])


def test_where_the_grid_is_fixed_no_index_arithmetic_is_left(inlined: onnx.ModelProto) -> None:
    assert not ARITHMETIC & {node.op_type for node in inlined.graph.node}
    assert not any(node.op_type == "Constant" for node in inlined.graph.node)


def test_an_unshifted_window_adds_no_regions(inlined: onnx.ModelProto) -> None:
    biased = [n.name for n in inlined.graph.node if n.name.endswith("/biased_logits")]
    # Shifted: one block in each stage but the middle one. With a mask: five blocks.
    assert len(biased) == 7
    assert "first_stage.tran.2.blocks.0.attn/WindowAttention/biased_logits" not in biased


def test_nodes_keep_the_names_of_their_modules(inlined: onnx.ModelProto) -> None:
    names = [node.name for node in inlined.graph.node]
    assert len(set(names)) == len(names)
    assert "first_stage.tran.0.blocks.1.attn/MaskedWindowAttention/logits" in names


def test_mask_states_keep_their_names(tiny_onnx: Path, inlined: onnx.ModelProto) -> None:
    made = {output for node in inlined.graph.node for output in node.output}
    config = OrtRunner(tiny_onnx).spec.config
    assert {f"mask_state/{name}" for name in mask_state_names(config)} <= made


def test_the_original_is_left_as_it_is(tiny_onnx: Path) -> None:
    model = onnx.load(tiny_onnx)
    before = model.SerializeToString()
    inline_functions(model)
    assert model.SerializeToString() == before
