"""FP16 where it is hardest: numbers at the edge of half's range, every half tensor stored in half.

ONNX Runtime's processors compute half in FP32 and round only where a tensor leaves the graph, so a
check by it alone sees no overflow. Here, and in parity, each half tensor is held in half.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from mat_export.contract import GraphSpec
from mat_export.export import build_model
from mat_export.parity import ParityReport, check_parity, open_candidate
from mat_export.precision import apply_precision
from mat_export.runners import OrtRunner
from mat_export.suite import MASKS, Case, photograph
from mat_torch import Checkpoint

BAR = 45.0
"""The design's least PSNR in the hole, in dB."""


def with_weights(checkpoint: Checkpoint, factor: float) -> Checkpoint:
    """The weights of demodulated layers scaled; those of ToRGB would scale the image itself."""
    layers = [
        name.removesuffix("affine.weight")
        for name in checkpoint.tensors
        if name.endswith(".affine.weight") and "toRGB" not in name
    ]
    assert len(layers) > 10
    scaled = {f"{layer}weight": checkpoint.tensors[f"{layer}weight"] * factor for layer in layers}
    return Checkpoint(checkpoint.config, {**checkpoint.tensors, **scaled}, "scaled", "scaled")


def judged(single: onnx.ModelProto, folder: Path, *names: str) -> ParityReport:
    """The typed file against the FP32 graph that it was made of, over these masks."""
    paths = folder / "single.onnx", folder / "half.onnx"
    onnx.save(single, paths[0])
    onnx.save(apply_precision(single, "fp16").model, paths[1])
    suite = [
        Case(name, photograph("rocket", 256, 256), MASKS[name](256, 256), seed)
        for seed, name in enumerate(names)
    ]
    with open_candidate(paths[1]) as candidate, open_candidate(paths[0]) as reference:
        assert candidate.name.endswith("half tensors stored in half")
        assert not reference.name.endswith("half tensors stored in half")
        report = check_parity(candidate, reference, suite=suite)
    assert report.bar.psnr == BAR
    assert len(report.cases) == len(suite)
    return report


def assert_within_the_bar(report: ParityReport) -> None:
    assert report.passed, [(case.name, case.failures) for case in report.cases]
    for case in report.cases:
        assert case.finite
        assert case.hole.psnr is not None
        assert BAR <= case.hole.psnr < math.inf


@pytest.mark.parametrize("factor", [1e2, 1e4, 1e-4])
def test_weights_that_demodulation_divides_out_may_be_large(
    factor: float, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Styles likewise: `test_precision` scales those by 10⁴."""
    wild = with_weights(tiny_checkpoint, factor)
    model, _ = build_model(wild, GraphSpec(wild.config))
    assert_within_the_bar(judged(model, tmp_path, "all-hole", "random-large"))


@pytest.mark.parametrize("factor", [1e-3, 1e2])
def test_activations_of_another_size_stay_within_the_bar(
    factor: float, tiny_onnx: Path, tmp_path: Path
) -> None:
    model = onnx.load(tiny_onnx)
    # The first layer of stage two's encoder, whose features every later layer sees.
    name = "second_stage.enc.EncConv_Block_256x256.0.weight"
    tensor = next(t for t in model.graph.initializer if t.name == name)
    values = numpy_helper.to_array(tensor) * np.float32(factor)
    tensor.CopyFrom(numpy_helper.from_array(values, name))
    assert_within_the_bar(judged(model, tmp_path, "all-hole", "random-large"))


def test_an_overflow_between_two_half_operators_is_seen(tiny_onnx: Path, tmp_path: Path) -> None:
    """The same function in exact arithmetic, and in ONNX Runtime left to itself."""
    model = apply_precision(onnx.load(tiny_onnx), "fp16").model
    graph = model.graph
    node = next(
        n
        for n in graph.node
        if n.op_type == "LeakyRelu" and n.name.startswith("second_stage.dec.Dec_64x64.conv1/")
    )
    features = node.output[0]
    for other in graph.node:
        for i, name in enumerate(other.input):
            other.input[i] = "restored" if name == features else name
    graph.initializer.append(helper.make_tensor("up", TensorProto.FLOAT16, [], [60000.0]))
    graph.initializer.append(helper.make_tensor("down", TensorProto.FLOAT16, [], [1 / 60000.0]))
    graph.node.insert(
        list(graph.node).index(node) + 1,
        helper.make_node("Mul", [features, "up"], ["loud"], "loud"),
    )
    graph.node.insert(
        list(graph.node).index(node) + 2,
        helper.make_node("Mul", ["loud", "down"], ["restored"], "restored"),
    )
    path = tmp_path / "loud.onnx"
    onnx.save(model, path)
    mask = MASKS["random-large"](256, 256)
    suite = [Case("random-large", photograph("rocket", 256, 256), mask, 0)]
    with open_candidate(tiny_onnx) as reference:
        with open_candidate(path) as held:
            assert not check_parity(held, reference, suite=suite).cases[0].finite
        with OrtRunner(path) as alone:
            assert check_parity(alone, reference, suite=suite).cases[0].finite
