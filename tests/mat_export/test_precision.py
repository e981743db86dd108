"""A typed graph computes in half where it is safe, and stays close to FP32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from mat_export.contract import UserError
from mat_export.engine_graph import prepare_engine_graph
from mat_export.export import build_model
from mat_export.parity import check_parity, open_candidate
from mat_export.precision import ISLANDS, TypedModel, apply_precision
from mat_export.runners import OrtRunner
from mat_export.suite import MASKS, Case, photograph
from mat_torch import Checkpoint


def suite(*names: str) -> list[Case]:
    return [
        Case(name, photograph("rocket", 256, 256), MASKS[name](256, 256), seed)
        for seed, name in enumerate(names)
    ]


@pytest.fixture(scope="module")
def half(tiny_onnx: Path) -> TypedModel:
    return apply_precision(onnx.load(tiny_onnx), "fp16")


def typed_values(model: onnx.ModelProto) -> dict[str, int]:
    """Element type of every tensor that shape inference reaches."""
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    return {
        info.name: info.type.tensor_type.elem_type
        for info in (*inferred.graph.value_info, *inferred.graph.output)
    }


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_the_file_is_valid_and_keeps_its_inputs_and_outputs(
    tiny_onnx: Path, precision: str
) -> None:
    before = onnx.load(tiny_onnx)
    after = apply_precision(before, precision).model
    onnx.checker.check_model(after, full_check=True)
    assert after.graph.input == before.graph.input
    assert after.graph.output == before.graph.output


def test_fp16_is_within_its_bar_over_every_hard_mask(
    tiny_onnx: Path, half: TypedModel, tmp_path: Path
) -> None:
    path = tmp_path / "half.onnx"
    onnx.save(half.model, path)
    with open_candidate(path) as candidate, open_candidate(tiny_onnx) as reference:
        assert candidate.spec.precision == "fp16"
        report = check_parity(candidate, reference)
    assert report.passed, [case.failures for case in report.cases]
    assert report.bar.psnr == 45.0
    worst = min(case.hole.psnr for case in report.cases if case.hole.psnr is not None)
    assert 45.0 <= worst < 100.0  # equality would mean that nothing was in half


def test_bf16_is_within_its_bar(tiny_onnx: Path, tmp_path: Path) -> None:
    path = tmp_path / "bf16.onnx"
    onnx.save(prepare_engine_graph(tiny_onnx, "bf16", opset=22).model, path)
    with open_candidate(path) as candidate, open_candidate(tiny_onnx) as reference:
        assert "stored in half" in candidate.name
        report = check_parity(candidate, reference, suite=suite("one-window", "random-large"))
    assert report.passed, [case.failures for case in report.cases]
    assert report.bar.psnr == 30.0
    assert max(case.hole.psnr or 0.0 for case in report.cases) < 60.0  # it was really rounded


def test_styles_far_beyond_the_trained_range_stay_within_the_bar(
    tiny_checkpoint: Checkpoint, tiny_onnx: Path, tmp_path: Path
) -> None:
    spec = OrtRunner(tiny_onnx).spec
    tensors = {
        # Those of ToRGB scale the image itself, which no format would hold.
        name: tensor * 1e4 if ".affine." in name and "toRGB" not in name else tensor
        for name, tensor in tiny_checkpoint.tensors.items()
    }
    wild = Checkpoint(spec.config, tensors, "wild", "wild")
    model, _ = build_model(wild, spec)
    single, double = tmp_path / "single.onnx", tmp_path / "half.onnx"
    onnx.save(model, single)
    onnx.save(apply_precision(model, "fp16").model, double)
    with open_candidate(double) as candidate, open_candidate(single) as reference:
        report = check_parity(candidate, reference, suite=suite("all-hole", "random-large"))
    assert report.passed, [case.failures for case in report.cases]


def test_convolutions_and_products_of_features_are_half(half: TypedModel) -> None:
    types = typed_values(half.model)
    single = [
        node.name
        for node in half.model.graph.node
        if node.op_type in ("Conv", "MatMul") and types[node.output[0]] == TensorProto.FLOAT
    ]
    # Styles, and the three-channel upsampling of each ToRGB.
    assert all(".styles." in name or ".toRGB.upsample" in name for name in single)
    assert half.half_nodes > 300


def test_islands_are_fp32_and_each_rule_holds_some_node(half: TypedModel) -> None:
    assert set(half.islands) == {island.name for island in ISLANDS}
    types = typed_values(half.model)
    for node in half.model.graph.node:
        own = node.op_type == "Softmax" or node.name.startswith("mapping")
        if own and node.op_type != "Cast":
            assert types[node.output[0]] == TensorProto.FLOAT, node.name


def test_what_every_level_adds_to_the_image_is_added_in_fp32(half: TypedModel) -> None:
    types = typed_values(half.model)
    sums = [
        node.output[0]
        for node in half.model.graph.node
        if node.op_type == "Add" and ".toRGB/" in node.name
    ]
    assert len(sums) >= 5
    assert all(types[name] == TensorProto.FLOAT for name in sums)


def test_no_floor_of_a_divisor_is_less_than_half_can_hold(half: TypedModel) -> None:
    values = {t.name: numpy_helper.to_array(t) for t in half.model.graph.initializer}
    floors = [
        values[name].item()
        for node in half.model.graph.node
        if node.op_type == "Max"
        for name in node.input
        if name in values
    ]
    assert len(floors) == half.floors > 14  # every attention block and every group of styles
    assert all(floor >= 2.0**-14 for floor in floors)


def test_bf16_has_the_range_and_keeps_its_floors(tiny_onnx: Path) -> None:
    assert apply_precision(onnx.load(tiny_onnx), "bf16").floors == 0


def test_each_cast_is_made_once(half: TypedModel) -> None:
    casts = [n for n in half.model.graph.node if n.op_type == "Cast" and "/as_" in n.output[0]]
    assert len(casts) == half.casts
    assert len({(cast.input[0], cast.attribute[0].i) for cast in casts}) == half.casts


def test_weights_of_convolutions_are_stored_in_half_alone(half: TypedModel) -> None:
    stored = {tensor.name: tensor.data_type for tensor in half.model.graph.initializer}
    weights = [node.input[1] for node in half.model.graph.node if node.op_type == "Conv"]
    halves = [name for name in weights if stored[name] == TensorProto.FLOAT16]
    assert len(halves) > 0.9 * len(weights)
    assert not [name for name in halves if name.removesuffix("/as_float16") in stored]


def test_a_weight_that_half_cannot_hold_is_named(tiny_onnx: Path) -> None:
    model = onnx.load(tiny_onnx)
    name = "second_stage.conv0.weight"
    tensor = next(t for t in model.graph.initializer if t.name == name)
    values = numpy_helper.to_array(tensor).copy()
    values.flat[0] = 1e6
    tensor.CopyFrom(numpy_helper.from_array(values, name))
    with pytest.raises(UserError, match=r"second_stage\.conv0\.weight.*bf16"):
        apply_precision(model, "fp16")


def test_what_cannot_be_typed_is_refused(tiny_onnx: Path, half: TypedModel) -> None:
    with pytest.raises(UserError, match="fp16, bf16"):
        apply_precision(onnx.load(tiny_onnx), "fp8")
    with pytest.raises(UserError, match="fp16 already"):
        apply_precision(half.model, "bf16")
    foreign = onnx.helper.make_model(onnx.helper.make_graph([], "g", [], []))
    with pytest.raises(UserError, match="not a model of mat-export"):
        apply_precision(foreign, "fp16")


def test_the_graph_stays_finite_where_the_image_is_white_and_all_is_hole(half: TypedModel) -> None:
    case = Case("white", np.full((256, 256, 3), 255, np.uint8), MASKS["all-hole"](256, 256), 3)
    from mat_export.bench import example_inputs
    from mat_export.pixels import to_unit

    with OrtRunner(half.model.SerializeToString()) as runner:
        inputs = example_inputs(runner.spec, 1)
        keep = case.keep[None].astype(np.uint8) * np.uint8(255)
        inputs["image"], inputs["mask"] = to_unit(case.image[None], keep)
        assert np.isfinite(runner.run(inputs)["output"]).all()
