"""Resampling for GPUs is the same function: whole graph, every map on the way, borders included."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from mat_export.bench import example_inputs
from mat_export.contract import GraphSpec
from mat_export.inlining import inline_functions
from mat_export.resampling import resample_densely
from mat_export.runners import OrtRunner


@pytest.fixture(scope="module")
def plain(tiny_onnx: Path) -> onnx.ModelProto:
    return inline_functions(onnx.load(tiny_onnx))


@pytest.fixture(scope="module")
def dense(plain: onnx.ModelProto) -> onnx.ModelProto:
    return resample_densely(plain)[0]


def filters(model: onnx.ModelProto, side: int) -> list[str]:
    """Modules with a depthwise filter of this side."""
    shapes = {t.name: list(t.dims) for t in model.graph.initializer}
    return [
        node.name
        for node in model.graph.node
        if node.op_type == "Conv" and shapes.get(node.input[1], [])[1:] == [1, side, side]
    ]


def outputs_of(model: onnx.ModelProto, names: list[str]) -> dict[str, NDArray[np.float32]]:
    """Tensors of a graph, on the example photograph."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    kept = {o.name for o in copy.graph.output}
    copy.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
        for name in names
        if name not in kept
    )
    with OrtRunner(copy.SerializeToString()) as runner:
        results: dict[str, NDArray[np.float32]] = runner.run(example_inputs(runner.spec, 1))
    return results


def test_every_filter_is_narrower_and_nothing_else_is_interleaved(
    plain: onnx.ModelProto, dense: onnx.ModelProto
) -> None:
    assert filters(plain, 4)
    assert filters(dense, 4) == []
    assert filters(dense, 3) == filters(plain, 4)
    left = [node.name for node in dense.graph.node if node.op_type == "DepthToSpace"]
    assert left
    assert all(".toRGB.upsample/" in name for name in left)
    assert all(node.op_type != "ConvTranspose" for node in dense.graph.node)


def test_counts_say_what_was_rewritten(plain: onnx.ModelProto) -> None:
    model, counts = resample_densely(plain)
    assert counts["down"] + counts["up"] == len(filters(plain, 4))
    assert counts["up"] == sum(node.op_type == "Resize" for node in model.graph.node)
    again, nothing = resample_densely(model)
    assert nothing == {"down": 0, "up": 0}
    assert [n.name for n in again.graph.node] == [n.name for n in model.graph.node]


def test_every_map_is_the_same_to_its_border(
    plain: onnx.ModelProto, dense: onnx.ModelProto
) -> None:
    consumers = {name: n for n in plain.graph.node for name in n.input}
    names = []
    for name in filters(plain, 4):
        up = ".subpixel" in name
        names.append(name if up else consumers[name].output[0])
    assert any(".subpixel" in name for name in names)
    expected, found = outputs_of(plain, names), outputs_of(dense, names)
    for name in (*names, "output"):
        r, y = expected[name], found[name]
        assert r.shape == y.shape
        scale = np.abs(r).max()
        assert scale > 0
        np.testing.assert_allclose(y / scale, r / scale, atol=2e-5, err_msg=name)


def test_the_model_is_valid_and_keeps_its_contract(
    plain: onnx.ModelProto, dense: onnx.ModelProto
) -> None:
    onnx.checker.check_model(dense, full_check=True)
    metadata = {entry.key: entry.value for entry in dense.metadata_props}
    own = {entry.key: entry.value for entry in plain.metadata_props}
    assert GraphSpec.from_metadata(metadata) == GraphSpec.from_metadata(own) is not None
    assert [i.name for i in dense.graph.input] == [i.name for i in plain.graph.input]


def test_a_changed_weight_changes_the_map(plain: onnx.ModelProto) -> None:
    """The comparison above can fail: one tap of one phase off by a tenth shows."""
    changed = onnx.ModelProto()
    changed.CopyFrom(plain)
    name = next(t.name for t in plain.graph.initializer if t.name.endswith("subpixel.odd_odd"))
    tensor = next(t for t in changed.graph.initializer if t.name == name)
    array = onnx.numpy_helper.to_array(tensor).copy()
    array[0] += 0.1 * np.abs(array).max()
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, name))
    target = name.replace(".odd_odd", ".blur/Conv")
    before = outputs_of(plain, [target])[target]
    after = outputs_of(resample_densely(changed)[0], [target])[target]
    assert np.abs(before - after).max() / np.abs(before).max() > 1e-3
