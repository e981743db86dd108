"""Parts of a graph, equalized channels and Q/DQ nodes compute what they should."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from calib.candidates import Candidate, Candidates, find_candidates
from calib.equalizing import equalize, measure_powers
from calib.placement import place
from calib.samples import Sample, draw_samples, open_pictures
from calib.sensitivity import noise
from calib.stages import StagedModel, Values, open_session
from calib.trials import LayerTrials
from mat_export.contract import GraphSpec
from mat_export.resampling import resample_densely

SCALE = 2.0**-4


def silent(name: str, done: int, total: int) -> None:
    pass


@pytest.fixture(scope="module")
def dense(small_fp32: Path) -> onnx.ModelProto:
    return resample_densely(onnx.load(small_fp32))[0]


@pytest.fixture(scope="module")
def spec(dense: onnx.ModelProto) -> GraphSpec:
    found = GraphSpec.of_model(dense)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def candidates(dense: onnx.ModelProto, spec: GraphSpec) -> Candidates:
    return find_candidates(dense, spec, filters=True)


@pytest.fixture(scope="module")
def samples(spec: GraphSpec) -> list[Sample]:
    return draw_samples(spec, open_pictures(None, 128), 3, seed=0)


@pytest.fixture(scope="module")
def staged(dense: onnx.ModelProto, candidates: Candidates) -> StagedModel:
    return StagedModel(dense, candidates.all, threads=1)


def output(model: onnx.ModelProto, sample: Sample) -> NDArray[np.float32]:
    result: NDArray[np.float32] = open_session(model, 1).run(["output"], dict(sample.feeds))[0]
    return result


def test_a_graph_in_parts_is_the_graph(
    dense: onnx.ModelProto, staged: StagedModel, samples: list[Sample]
) -> None:
    assert (staged.run(samples[0].feeds) == output(dense, samples[0])).all()


def test_every_candidate_is_visited_once_with_what_it_reads(
    staged: StagedModel, candidates: Candidates, samples: list[Sample]
) -> None:
    seen: dict[str, tuple[int, ...]] = {}
    staged.run(samples[0].feeds, lambda c, x, _: seen.__setitem__(c.name, x.shape))
    assert list(seen) == [c.name for c in candidates.all]
    assert all(len(shape) == 4 for shape in seen.values())


def test_an_error_of_a_layer_is_what_quantizing_it_alone_gives(
    dense: onnx.ModelProto, staged: StagedModel, candidates: Candidates, samples: list[Sample]
) -> None:
    """The shortcut of the sensitivity pass, for layers of each kind and all over the graph."""
    trials = LayerTrials(dense, threads=1)
    chosen = {c.name for c in candidates.all[::7]}
    assert {c.kind for c in candidates.all if c.name in chosen} == {"conv", "filter", "skip"}
    sample = samples[1]
    erring: dict[Candidate, NDArray[np.float32]] = {}

    def visit(candidate: Candidate, x: NDArray[np.float32], values: Values) -> None:
        if candidate.name in chosen:
            error = trials.quantized(candidate, x, SCALE) - trials.exact(candidate, x)
            erring[candidate] = staged.with_error(values, candidate, error)

    exact = staged.run(sample.feeds, visit)
    for candidate, actual in erring.items():
        alone = output(place(dense, [candidate], {candidate.tensor: SCALE}), sample)
        shift = noise(exact, alone, sample.hole)
        assert noise(alone, actual, sample.hole) < 1e-3 * shift + 1e-12, candidate.name


def test_equalizing_changes_no_bit(
    dense: onnx.ModelProto, staged: StagedModel, candidates: Candidates, samples: list[Sample]
) -> None:
    powers = measure_powers(staged, samples, silent)
    assert set(powers) == {c.name for c in candidates.all}
    equal, count = equalize(dense, candidates.all, powers)
    assert count > len(candidates.all) // 4
    for sample in samples[:2]:
        assert (output(equal, sample) == output(dense, sample)).all()
    again = measure_powers(StagedModel(equal, candidates.all, 1), samples, silent)
    before, after = (float(np.mean([np.mean(p) for p in m.values()])) for m in (powers, again))
    assert after < 0.9 * before, "channels lie nearer to the largest"


@pytest.fixture(scope="module")
def placed(dense: onnx.ModelProto, candidates: Candidates) -> onnx.ModelProto:
    return place(dense, candidates.all, {c.tensor: SCALE for c in candidates.all})


def test_nodes_are_placed_by_tensorrts_rules(
    placed: onnx.ModelProto, candidates: Candidates
) -> None:
    onnx.checker.check_model(placed, full_check=True)
    weights = {t.name: t for t in placed.graph.initializer}
    makers = {name: node for node in placed.graph.node for name in node.output}
    quantizing = [n for n in placed.graph.node if n.op_type.endswith("izeLinear")]
    assert quantizing
    for node in quantizing:
        scale, zero = (weights[name] for name in node.input[1:])
        assert scale.data_type == TensorProto.FLOAT
        assert zero.data_type == TensorProto.INT8
        assert not numpy_helper.to_array(zero).any()
        value = numpy_helper.to_array(scale)
        assert (value > 0).all()
        assert (value.astype(np.float16) == value).all()
        assert value.ndim == (1 if node.input[0] in weights else 0)
        if value.ndim:
            assert [a.i for a in node.attribute if a.name == "axis"] == [0]
    for candidate in candidates.all:
        node = next(n for n in placed.graph.node if n.name == candidate.name)
        assert makers[node.input[list(node.input).index(f"{candidate.tensor}/dequantized")]]
        if candidate.weight:
            assert makers[node.input[1]].op_type == "DequantizeLinear"


def test_a_tensor_has_one_pair_and_others_read_it_exact(
    dense: onnx.ModelProto, placed: onnx.ModelProto, candidates: Candidates
) -> None:
    pairs = [n.input[0] for n in placed.graph.node if n.op_type == "QuantizeLinear"]
    assert len(pairs) == len(set(pairs))
    enlarged = {n.input[0] for n in dense.graph.node if n.op_type == "Resize"} & set(pairs)
    assert enlarged, "what is enlarged is rounded before"
    assert set(pairs) - enlarged == {c.tensor for c in candidates.all}
    chosen = {c.name for c in candidates.all}
    before = {n.name: list(n.input) for n in dense.graph.node}
    for node in placed.graph.node:
        if node.name in before and node.name not in chosen and node.op_type != "Resize":
            assert list(node.input) == before[node.name], node.name


def test_folded_weights_are_what_their_integers_stand_for(
    dense: onnx.ModelProto, candidates: Candidates, samples: list[Sample]
) -> None:
    """Of one layer, since a value that is rounded the other way is noise to all that follow."""
    exact, hole = output(dense, samples[0]), samples[0].hole
    layer = next(c for c in candidates.all if c.name.startswith("second_stage.dec"))
    one, other = (
        output(place(dense, [layer], {layer.tensor: SCALE}, fold=fold), samples[0])
        for fold in (False, True)
    )
    assert noise(one, other, hole) < 1e-4 * noise(exact, one, hole)
