"""The roofline of an engine's layers, of graphs with plugins and without."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import onnx
import pytest

from mat_export.engine_graph import prepare_model
from mat_export.functions import EPILOGUE

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"

Rows = dict[str, Any]


@pytest.fixture(scope="module")
def rows(tiny_onnx: Path) -> dict[bool, Rows]:
    """Rows by layer, with plugins and without; each node a layer that took a millisecond."""
    model = onnx.load(tiny_onnx)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        roofline = importlib.import_module("roofline")
    found = {}
    for plugins in (False, True):
        graph = prepare_model(
            model, "fp16", opset=17, weakly_typed=True, plugins=plugins, label="a model"
        ).model
        profile = {node.name: 1.0 for node in graph.graph.node}
        entries = roofline.table(graph, profile, tflops=100.0, tbs=1.0)
        found[plugins] = {row.layer: row for row in entries}
    return found


@pytest.mark.parametrize("plugins", [False, True])
def test_operations_are_those_of_convolutions_and_products(
    rows: dict[bool, Rows], plugins: bool
) -> None:
    first = rows[plugins]["first_stage.conv_first.conv/Conv"]
    assert first.kind == "convolution"
    assert first.gflop > 0.0
    assert first.least_ms >= first.gflop / 100.0
    products = [row for name, row in rows[plugins].items() if name.endswith("/Gemm")]
    assert products
    assert all(row.gflop > 0.0 for row in products)


@pytest.mark.parametrize("plugins", [False, True])
def test_tokens_and_fused_epilogues_are_kinds_of_their_own(
    rows: dict[bool, Rows], plugins: bool
) -> None:
    own = rows[plugins]
    calls = [row for name, row in own.items() if name.endswith(EPILOGUE)]
    assert bool(calls) is plugins
    assert all(row.kind == "fused epilogue" for row in calls)
    assert all(row.mb > 0.0 and row.gflop == 0.0 for row in calls)
    blocks = [row for name, row in own.items() if ".blocks." in name]
    assert blocks
    assert {row.kind for row in blocks} == {"attention and tokens"}
