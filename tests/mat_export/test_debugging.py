"""A planted error is found at the layer where it was planted, and nothing is found without one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from mat_export.bench import example_inputs
from mat_export.contract import UserError, mask_state_names
from mat_export.debugging import (
    HEADINGS,
    Divergence,
    Suspect,
    checkpoints_of,
    find_divergence,
    run_onnxruntime,
)
from mat_export.inlining import inline_functions
from mat_export.precision import apply_precision
from mat_export.runners import OrtRunner, hold_half
from mat_torch import preset

Arrays = dict[str, NDArray[Any]]


def toy(kind: int = TensorProto.FLOAT, factor: float = 1.0, shift: float = 0.0) -> onnx.ModelProto:
    """x → one: ×2, ×f → (two: −x) and (three: +s, > 0, which four turns into a number) → a sum."""
    nodes = [
        helper.make_node("Mul", ["x", "double"], ["one/Mul"], "one/Mul"),
        helper.make_node("Mul", ["one/Mul", "factor"], ["one/Mul_2"], "one/Mul_2"),
        helper.make_node("Neg", ["one/Mul_2"], ["two/Neg"], "two/Neg"),
        helper.make_node("Add", ["one/Mul_2", "shift"], ["three/Add"], "three/Add"),
        helper.make_node("Greater", ["three/Add", "zero"], ["three/Greater"], "three/Greater"),
        helper.make_node("Cast", ["three/Greater"], ["four/Cast"], "four/Cast", to=kind),
        helper.make_node("Shape", ["two/Neg"], ["four/Shape"], "four/Shape"),
        helper.make_node("Expand", ["four/Cast", "four/Shape"], ["five/Expand"], "five/Expand"),
        helper.make_node("Add", ["two/Neg", "five/Expand"], ["y"], "Add"),
    ]
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    values = {"double": 2.0, "factor": factor, "shift": shift, "zero": 0.0}
    graph = helper.make_graph(
        nodes,
        "toy",
        [helper.make_tensor_value_info("x", kind, [4])],
        [helper.make_tensor_value_info("y", kind, [4])],
        [numpy_helper.from_array(np.asarray(v, dtype), k) for k, v in values.items()],
    )
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    onnx.checker.check_model(model, full_check=True)
    return model


X: Arrays = {"x": np.array([-2.0, -1.0, 1.0, 2.0], np.float32), "not used": np.zeros(1)}


def parted(one: onnx.ModelProto, other: onnx.ModelProto, **options: Any) -> Divergence:
    options = {"tolerance": 1e-6, "inputs": X, **options}
    inputs = options.pop("inputs")
    return find_divergence(
        one, run_onnxruntime, run_onnxruntime, inputs, reference=other, **options
    )


def initializer(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    found: onnx.TensorProto = next(t for t in model.graph.initializer if t.name == name)
    return found


def scaled(model: onnx.ModelProto, name: str, factor: float) -> onnx.ModelProto:
    """A copy with one weight multiplied."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    tensor = initializer(copy, name)
    values = numpy_helper.to_array(tensor) * np.float32(factor)
    tensor.CopyFrom(numpy_helper.from_array(values, name))
    return copy


@pytest.fixture(scope="module")
def tiny(tiny_onnx: Path) -> onnx.ModelProto:
    return inline_functions(onnx.load(tiny_onnx))


@pytest.fixture(scope="module")
def inputs(tiny_onnx: Path) -> Arrays:
    return example_inputs(OrtRunner(tiny_onnx).spec, 1)


# -- what is compared ---------------------------------------------------------------------------


def test_checkpoints_are_the_tensors_that_leave_a_module_in_order() -> None:
    assert checkpoints_of(toy()) == (
        *("one/Mul_2", "two/Neg", "three/Greater"),
        *("four/Cast", "four/Shape", "five/Expand", "y"),
    )


def test_every_module_of_the_network_has_a_checkpoint(tiny: onnx.ModelProto) -> None:
    names = set(checkpoints_of(tiny))
    makers = {output: node.name for node in tiny.graph.node for output in node.output}
    modules = {node.name.rpartition("/")[0] for node in tiny.graph.node}
    assert {makers[name].rpartition("/")[0] for name in names} == modules
    assert len(modules) > 150
    assert names >= {f"mask_state/{name}" for name in mask_state_names(preset("mat-tiny-256"))}


def test_equal_runs_do_not_part() -> None:
    found = parted(toy(), toy())
    assert found.first is None
    assert found.suspects == ()
    # An integer shape is not compared.
    assert [t.tensor for t in found.tensors] == [
        n for n in checkpoints_of(toy()) if "Shape" not in n
    ]
    assert all(t.relative == 0.0 and t.agrees for t in found.tensors)
    assert "no divergence in 6 tensors" in str(found)


# -- what is found ------------------------------------------------------------------------------


def test_the_first_tensor_beyond_the_tolerance_is_named_with_what_lies_before_it() -> None:
    found = parted(toy(factor=1.5), toy())
    assert found.first is not None
    assert found.first.tensor == "one/Mul_2"
    assert found.first.module == "one"
    assert found.first.relative == pytest.approx(0.5)
    assert found.first.largest == pytest.approx(2.0)
    assert found.suspects == (Suspect("one/Mul", "Mul"), Suspect("one/Mul_2", "Mul"))
    assert found.agreeing == ()
    assert "they part at one/Mul_2, in one: relative error 5.0e-01 is over 1e-06" in str(found)
    assert parted(toy(factor=1.5), toy(), tolerance=0.6).first is None


def test_a_boolean_has_to_be_equal_at_any_tolerance() -> None:
    found = parted(toy(shift=3.0), toy(), tolerance=10.0)
    assert found.first is not None
    assert found.first.tensor == "three/Greater"
    assert "1 of 4 values differ" in found.first.problem
    # Both nodes of its module are suspect, the branch beside it is not.
    assert [s.node for s in found.suspects] == ["three/Add", "three/Greater"]
    assert found.agreeing == ("one/Mul_2",)


def test_candidates_narrow_it_down_to_a_node() -> None:
    found = parted(toy(shift=3.0), toy(), candidates=["three/Greater", "three/Add", "one/Mul"])
    assert [t.tensor for t in found.tensors] == ["one/Mul", "three/Add", "three/Greater"]
    assert found.first is not None
    assert found.first.tensor == "three/Add"
    assert [s.node for s in found.suspects] == ["one/Mul_2", "three/Add"]
    assert found.agreeing == ("one/Mul",)


@pytest.mark.parametrize(("one", "said"), [(3e38, "of its 4"), (1.0, "of the reference's 4")])
def test_what_is_not_finite_is_never_in_agreement(one: float, said: str) -> None:
    other = 3e38 if one == 1.0 else 1.0
    found = parted(toy(factor=one), toy(factor=other), tolerance=1e30)
    assert found.first is not None
    assert found.first.relative is None
    assert f"{said} values are not finite" in found.first.problem
    json.loads(found.to_json())


def test_zero_and_other_shapes_are_never_in_agreement() -> None:
    found = parted(toy(), toy(factor=0.0))
    assert found.first is not None
    assert found.first.problem == "the reference is all zero"

    def cut(model: onnx.ModelProto, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        return {k: v[:3] for k, v in run_onnxruntime(model, inputs).items()}

    shorter = find_divergence(toy(), cut, run_onnxruntime, X, tolerance=1.0)
    assert shorter.first is not None
    assert shorter.first.problem == "its shape is [3] and the reference's [4]"


def test_runs_of_a_few_tensors_close_in_on_the_divergence() -> None:
    seen: list[tuple[str, int, int]] = []
    options: dict[str, Any] = {"at_once": 2, "progress": lambda *step: seen.append(step)}
    found = parted(toy(shift=3.0), toy(), **options)
    assert found.first is not None
    assert found.first.tensor == "three/Greater"
    assert len(found.tensors) == 4
    assert [step[:2] for step in seen] == [
        *(("on trial", 0), ("reference", 1), ("on trial", 2), ("reference", 3), ("done", 4)),
    ]
    assert found == replace(parted(toy(shift=3.0), toy()), tensors=found.tensors)


def test_where_the_ends_of_a_graph_agree_one_run_is_all() -> None:
    found = parted(toy(), toy(), at_once=4)
    assert len(found.tensors) == 4
    assert found.tensors[-1].tensor == checkpoints_of(toy())[-1]
    assert "in 4 evenly spread ones of 6 tensors" in str(found)
    assert "in 6 tensors:" in str(parted(toy(), toy()))


@pytest.mark.parametrize("at_once", range(1, 8))
def test_however_many_at_once_the_same_tensor_is_found(at_once: int) -> None:
    for shift in (0.0, 3.0):
        one, few = (parted(toy(shift=shift), toy(), at_once=n) for n in (None, at_once))
        assert one.first == few.first
        assert one.suspects == few.suspects


def test_the_table_and_the_json_say_the_same() -> None:
    found = parted(toy(shift=3.0), toy())
    rows = found.rows()
    assert len(rows) == len(found.tensors)
    assert all(len(row) == len(HEADINGS) for row in rows)
    assert rows[0] == ["one/Mul_2", "0.0e+00", "0.0e+00", "agrees"]
    assert "values differ" in rows[2][3]
    figures = json.loads(found.to_json())
    assert figures["first"] == "three/Greater"
    assert figures["suspects"][0] == {"node": "three/Add", "operator": "Add"}
    assert figures["tensors"][0]["relative"] == 0.0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tolerance": -1.0}, "from 0 up"),
        ({"tolerance": float("nan")}, "from 0 up"),
        ({"tolerance": float("inf")}, "from 0 up"),
        ({"candidates": ["absent"]}, "'absent'"),
        ({"candidates": ["x"]}, "'x'"),
        ({"candidates": []}, "nothing to compare"),
        ({"at_once": 0}, "at least one"),
        ({"inputs": {}}, "ONNX Runtime cannot run"),
    ],
    ids=str,
)
def test_what_cannot_be_compared_is_a_user_error(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        parted(toy(), toy(), **options)


def test_a_backend_that_gives_no_tensor_or_graphs_that_share_none_are_user_errors() -> None:
    with pytest.raises(UserError, match="gave no output 'one/Mul_2'"):
        find_divergence(toy(), lambda model, inputs: {}, run_onnxruntime, X, tolerance=0.0)
    other = toy()
    for node in other.graph.node:
        node.output[0] += "'"
        for i, name in enumerate(node.input):
            node.input[i] = (
                name if name in ("x", "double", "factor", "shift", "zero") else name + "'"
            )
    other.graph.output[0].name = "y'"
    with pytest.raises(UserError, match="no tensor in common"):
        parted(toy(), other)


# -- the network --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weight", "module", "operator"),
    [
        ("mapping.fc.1.weight", "mapping.fc.1", "Gemm"),
        ("first_stage.enc_conv.1.conv.weight", "first_stage.enc_conv.1.conv", "Conv"),
        (
            "first_stage.tran.2.blocks.3.attn.value_weight",
            "first_stage.tran.2.blocks.3.attn",
            "MatMul",
        ),
        ("second_stage.conv0.weight", "second_stage.conv0", "Conv"),
    ],
)
def test_a_perturbed_weight_is_found_in_its_module(
    weight: str, module: str, operator: str, tiny: onnx.ModelProto, inputs: Arrays
) -> None:
    found = parted(scaled(tiny, weight, 1.01), tiny, tolerance=1e-4, inputs=inputs, at_once=100)
    assert found.first is not None
    assert found.first.module == module
    readers = [node.name for node in tiny.graph.node if weight in node.input]
    assert [s for s in found.suspects if s.node in readers and s.operator == operator]
    assert len(found.suspects) < 15


def test_a_model_with_functions_is_inlined_first(tiny_onnx: Path, inputs: Arrays) -> None:
    model = onnx.load(tiny_onnx)
    assert model.functions
    found = find_divergence(
        model,
        run_onnxruntime,
        lambda model, inputs: run_onnxruntime(model, inputs, threads=1),
        inputs,
        tolerance=1e-4,
    )
    assert found.first is None
    assert len(found.tensors) > 250


def test_half_agrees_with_single_within_its_tolerance_and_no_less(
    tiny: onnx.ModelProto, inputs: Arrays
) -> None:
    half = apply_precision(tiny, "fp16").model
    found = parted(half, tiny, tolerance=1e-2, inputs=inputs)
    assert found.first is None, str(found)
    assert {t.tensor for t in found.tensors} >= {"output", "mask_state/conv_first"}
    worst = max(t.relative or 0.0 for t in found.tensors)
    assert worst > 1e-3  # half really computes in half
    strict = parted(half, tiny, tolerance=1e-5, inputs=inputs, at_once=20)
    assert strict.first is not None
    assert strict.first.module == "first_stage.conv_first.conv"


def test_an_overflow_in_half_is_named_as_not_finite(tiny: onnx.ModelProto, inputs: Arrays) -> None:
    weight = "second_stage.enc.EncConv_Block_64x64.0.weight"
    loud = scaled(tiny, weight, 1e5)
    assert np.abs(numpy_helper.to_array(initializer(loud, weight))).max() < 65504  # it fits itself
    half = apply_precision(loud, "fp16").model
    found = parted(half, loud, tolerance=1e-2, inputs=inputs)
    assert found.first is not None
    assert found.first.module == "second_stage.enc.EncConv_Block_64x64.0"
    assert "values are not finite" in found.first.problem
    assert "Conv" in {s.operator for s in found.suspects}


# -- half as it is stored -----------------------------------------------------------------------


def test_a_half_tensor_is_held_in_half_where_the_runtime_alone_would_not() -> None:
    half = toy(TensorProto.FLOAT16, factor=30000.0)
    for name in ("a", "b"):  # back into the range, so that only what is between can overflow
        half.graph.node.append(
            helper.make_node("Mul", ["y" if name == "a" else "a", "small"], [name], f"six/{name}")
        )
    half.graph.initializer.append(numpy_helper.from_array(np.float16(1e-3), "small"))
    half.graph.output[0].name = "b"
    x = {"x": np.array([-4.0, -1.0, 1.0, 4.0], np.float16)}
    held = run_onnxruntime(half, x)["b"]
    assert held.dtype == np.float16
    assert np.isinf(held[[0, 3]]).all()
    assert np.isfinite(held[[1, 2]]).all()


def test_bfloat16_is_rounded_between_operators_of_single(tiny: onnx.ModelProto) -> None:
    typed = apply_precision(tiny, "bf16").model
    before = typed.SerializeToString()
    held = hold_half(typed)
    assert typed.SerializeToString() == before
    onnx.checker.check_model(held, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(held, strict_mode=True).graph
    narrow = {
        info.name
        for info in inferred.value_info
        if info.type.tensor_type.elem_type == onnx.TensorProto.BFLOAT16
    }
    assert len(narrow) > 400
    readers = [node for node in held.graph.node if narrow & {*node.input}]
    assert {node.op_type for node in readers} == {"Cast"}
    assert len(readers) == len(narrow)


def test_holding_adds_nothing_to_a_graph_without_half(tiny: onnx.ModelProto) -> None:
    assert hold_half(tiny) is tiny
    half = apply_precision(tiny, "fp16").model
    before = half.SerializeToString()
    held = hold_half(half)
    assert half.SerializeToString() == before
    added = [n for n in held.graph.node if n.name.endswith("/held")]
    assert len(held.graph.node) == len(half.graph.node) + len(added)
    assert len(added) > 2 * 400
    onnx.checker.check_model(held, full_check=True)
