"""`benchmarks/attention_tensorrt.py` gives TensorRT the operator in half precision, all of it.

Its engines and times need a GPU; the graphs are judged here.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    return importlib.import_module("attention_tensorrt")


@pytest.mark.parametrize("cut", [(16, 8, 0, 2), (16, 8, 4, 2), (16, 16, 0, 1)], ids=str)
def test_the_graph_is_the_operator_in_half(script: Any, cut: tuple[int, int, int, int]) -> None:
    block = script.Block(*cut)
    model = script.typed_model(block, 17)
    onnx.checker.check_model(model, full_check=True)
    x = script.draw(block, 3)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (y,) = session.run(None, x)
    truth = script.expected(block, x).astype(np.float64)
    assert y.dtype == np.float16
    assert np.linalg.norm(y - truth) / np.linalg.norm(truth) < 1e-3
    types = {v.name: v.type.tensor_type.elem_type for v in model.graph.value_info}
    singles = {n.op_type for n in model.graph.node if types.get(n.output[0]) == TensorProto.FLOAT}
    assert singles == {"Cast", "Add", "Softmax"}, "the softmax and its logits alone"


def test_draws_are_the_same_every_time(script: Any) -> None:
    block = script.Block(16, 8, 0, 1)
    first, again, other = (script.draw(block, seed) for seed in (0, 0, 1))
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["q"], other["q"])
