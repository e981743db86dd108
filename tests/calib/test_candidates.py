"""What may be quantized."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from calib.candidates import Candidates, find_candidates
from calib.placement import place
from mat_export.contract import GraphSpec, UserError
from mat_export.resampling import resample_densely


@pytest.fixture(scope="module")
def dense(tiny_onnx: Path) -> onnx.ModelProto:
    return resample_densely(onnx.load(tiny_onnx))[0]


def spec_of(model: onnx.ModelProto) -> GraphSpec:
    spec = GraphSpec.of_model(model)
    assert spec is not None
    return spec


@pytest.fixture(scope="module")
def found(dense: onnx.ModelProto) -> Candidates:
    return find_candidates(dense, spec_of(dense))


def test_nearly_all_work_may_be_int8(found: Candidates) -> None:
    assert found.share(frozenset(c.name for c in found.all)) > 0.98
    assert found.share(frozenset()) == 0.0
    assert all(c.kind == "conv" and c.gain > 0.0 for c in found.all)
    assert 0.1 < sum(c.gain for c in found.all) < 0.5


@pytest.mark.parametrize("excluded", ["mapping", ".styles.", "toRGB", ".pool.", ".to_style."])
def test_what_sums_up_or_decides_stays_as_it_is(found: Candidates, excluded: str) -> None:
    assert not any(excluded in c.name for c in found.all)


def test_every_convolution_is_a_candidate_or_left_out_by_a_rule(
    dense: onnx.ModelProto, found: Candidates
) -> None:
    convolutions = sum(node.op_type == "Conv" for node in dense.graph.node)
    assert len(found.all) + sum(found.left_out.values()) == convolutions
    assert set(found.left_out) == {"rgb", "style", "filter"}


def test_filters_and_skips_can_be_asked_for(dense: onnx.ModelProto, found: Candidates) -> None:
    more = find_candidates(dense, spec_of(dense), filters=True)
    kinds = {kind: [c for c in more.all if c.kind == kind] for kind in ("conv", "filter", "skip")}
    assert {c.name for c in kinds["conv"]} == {c.name for c in found.all}
    assert len(kinds["filter"]) == found.left_out["filter"]
    read = {c.tensor for c in (*kinds["conv"], *kinds["filter"])}
    assert kinds["skip"]
    assert all(c.tensor in read and not c.weight for c in kinds["skip"])
    order = [node.name for node in dense.graph.node]
    assert [c.name for c in more.all] == sorted((c.name for c in more.all), key=order.index)


def test_a_name_that_is_none_is_said(found: Candidates) -> None:
    assert found.named(found.all[3].name) == found.all[3]
    with pytest.raises(UserError, match="no layer 'nowhere/Conv'"):
        found.named("nowhere/Conv")


def test_a_quantized_graph_is_refused(dense: onnx.ModelProto, found: Candidates) -> None:
    quantized = place(dense, found.all[:1], {found.all[0].tensor: 0.5})
    with pytest.raises(UserError, match="quantized already"):
        find_candidates(quantized, spec_of(dense))
