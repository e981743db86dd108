"""Swapping weights: a new plan with papers of its own, or a sentence on what does not fit."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from fake_tensorrt import fake_device_info, make_tensorrt
from onnx import TensorProto, helper, numpy_helper

from engines.backend import open_backend
from engines.index import recall_engine, remember_engine
from engines.papers import OpenedPlan, open_plan, rebuild_command, save_engine
from engines.refit import refit_plan
from mat_export.contract import METADATA_KEY, GraphSpec, UserError
from mat_torch import preset

SPEC = GraphSpec(preset("mat-tiny-256"), precision="fp16", checkpoint="a" * 64)
NEW = SPEC.with_changes(checkpoint="b" * 64, source="fine-tuned")


AGAIN = ["mat-export", "trt", "new.onnx"]
SOURCES = {"onnx": {"path": "new.onnx"}}


def model_of(spec: GraphSpec | None, names: str = "wb") -> onnx.ModelProto:
    """A graph with the weights of the fake engine."""
    tensors = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [3]) for n in "xy"]
    nodes = [helper.make_node("Sum", ["x", *names], ["y"])]
    weights = [numpy_helper.from_array(np.ones(3, np.float32), name) for name in names]
    proto = helper.make_model(
        helper.make_graph(nodes, "g", tensors[:1], tensors[1:], weights),
        opset_imports=[helper.make_opsetid("", 17)],
    )
    if spec is not None:
        helper.set_model_props(proto, {METADATA_KEY: spec.to_json()})
    return proto


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> OpenedPlan:
    """A refittable engine of the fake TensorRT 8.6."""
    monkeypatch.setitem(sys.modules, "tensorrt", make_tensorrt("8.6.0"))
    monkeypatch.setattr("engines.cuda.device_info", fake_device_info)
    path = tmp_path / "mat.plan"
    backend = open_backend("tensorrt")
    request: dict[str, Any] = {
        "backend": "tensorrt",
        "version": "8.6.0",
        "model": "m" * 64,
        "plugin": None,
        "profiles": {},
        "gpu": {"name": "Fake GPU", "capability": [8, 6], "driver": "12"},
        "options": {"version_compatible": False, "hardware_compatible": False, "target": None},
    }
    import json

    save_engine(
        b'{"flags": ["REFIT"]}',
        path,
        {
            "key": "k" * 64,
            "request": request,
            "graph": json.loads(SPEC.to_json()),
            "sources": {
                "checkpoint": SPEC.checkpoint,
                "onnx": {"path": "mat.onnx", "sha256": "0" * 64},
                "passes": {"typed": 3},
                "plugin_choice": {"why": "1 ms less"},
            },
            "command": ["mat-export", "trt", "mat.onnx"],
            "parity": {"passed": True},
        },
    )
    assert backend.version == "8.6.0"
    return open_plan(path)


def test_the_new_engine_has_papers_of_its_own(opened: OpenedPlan, tmp_path: Path) -> None:
    target = tmp_path / "new.plan"
    report = refit_plan(opened, model_of(NEW), target, command=AGAIN, sources=SOURCES)
    assert report.weights == 2
    again = open_plan(target)
    assert again.spec.checkpoint == NEW.checkpoint
    # Nothing of the old weights' files is left in them.
    assert again.manifest["sources"] == {
        "passes": {"typed": 3},
        "onnx": {"path": "new.onnx"},
        "checkpoint": NEW.checkpoint,
    }
    assert rebuild_command(again.manifest) == "mat-export trt new.onnx"
    assert again.manifest["refitted_from"] == opened.manifest["sha256"]
    assert again.manifest["parity"] is None
    assert again.manifest["key"] != opened.manifest["key"]
    assert open_plan(opened.path).spec.checkpoint == SPEC.checkpoint


def test_it_may_replace_the_engine(
    opened: OpenedPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    remember_engine(opened.path, opened.manifest, ["request"])
    assert recall_engine("request") is not None
    refit_plan(opened, model_of(NEW), opened.path, command=AGAIN)
    assert open_plan(opened.path).spec.checkpoint == NEW.checkpoint
    assert recall_engine("request") is None


def test_indices_go_in_as_the_type_that_the_parser_made_of_them(
    opened: OpenedPlan, tmp_path: Path
) -> None:
    model = model_of(NEW)
    model.graph.initializer[1].CopyFrom(numpy_helper.from_array(np.arange(3), "b"))
    assert refit_plan(opened, model, tmp_path / "new.plan", command=AGAIN).weights == 2


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (model_of(None), "not ours"),
        (model_of(NEW.with_changes(precision="fp32")), "precision 'fp16' and 'fp32'"),
        (model_of(NEW.with_changes(batch=4)), "batch 1 and 4"),
        (model_of(NEW.with_changes(config=preset("mat-256"))), "mat-tiny-256 and mat-256"),
        (model_of(NEW, "w"), "not given"),
        (model_of(NEW, "c"), "another model"),
    ],
)
def test_what_does_not_fit_is_said_and_nothing_written(
    opened: OpenedPlan, tmp_path: Path, model: onnx.ModelProto, words: str
) -> None:
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(UserError, match=words):
        refit_plan(opened, model, tmp_path / "new.plan", command=AGAIN)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_an_engine_with_fixed_weights_is_refused(opened: OpenedPlan, tmp_path: Path) -> None:
    fixed = OpenedPlan(opened.path, b'{"flags": []}', opened.spec, opened.backend, opened.manifest)
    with pytest.raises(UserError, match="--refittable"):
        refit_plan(fixed, model_of(NEW), tmp_path / "new.plan", command=AGAIN)
