"""`trt`, `refit`, `debug`, and everything else that takes an engine, from the command line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
from test_cli import Run, one_sentence, run
from test_engine_refit import opened

from engines.papers import OpenedPlan
from mat_export.engine_graph import spec_of
from mat_torch import Checkpoint, random_checkpoint, save_checkpoint

__all__ = ["opened", "run"]  # the fixtures


@pytest.fixture(autouse=True)
def no_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def plan(tiny_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine for Ada, built here; never write to it."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX builds engines without a GPU")
    import cli

    path = tmp_path_factory.mktemp("plan") / "tiny.plan"
    cli.trt(model=tiny_onnx, output=path, target="sm_89")
    return path


def test_trt_writes_an_engine_with_its_papers(run: Run, tiny_onnx: Path, plan: Path) -> None:
    manifest = json.loads(Path(f"{plan}.json").read_text())
    assert manifest["kind"] == "engine"
    assert manifest["graph"]["precision"] == "fp16"
    assert manifest["request"]["options"]["target"] == "sm_89"
    source = json.loads(Path(f"{tiny_onnx}.json").read_text())
    assert manifest["sources"]["onnx"]["sha256"] == source["sha256"]
    assert manifest["sources"]["checkpoint"] == source["graph"]["checkpoint"]
    passes = manifest["sources"]["passes"]
    assert passes["resampled"]["up"] > 0
    assert "softmax" in passes["fp32_islands"]
    assert manifest["parity"] is None
    code, out, error = run("info", plan)
    assert code == 0, error
    for word in ("engine", "tensorrt-rtx", "sm_89", "fp16", "mat-tiny-256", "not checked"):
        assert word in out


def test_the_command_in_the_papers_builds_the_same_request(run: Run, plan: Path) -> None:
    manifest = json.loads(Path(f"{plan}.json").read_text())
    assert manifest["command"][:2] == ["mat-export", "trt"]
    before = plan.stat().st_mtime_ns
    code, _, error = run(*manifest["command"][1:])
    assert code == 0, error
    assert "nothing to do" in error
    assert plan.stat().st_mtime_ns == before


@pytest.mark.parametrize("options", [["--bf16"], ["--fp32"], ["--tf32", "--mask-states"]])
def test_trt_builds_every_precision(
    run: Run, tiny_onnx: Path, tmp_path: Path, options: list[str]
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX builds engines without a GPU")
    out = tmp_path / "mat.plan"
    code, _, error = run("trt", tiny_onnx, *options, "--target", "sm_89", "-o", out)
    assert code == 0, error
    manifest = json.loads(Path(f"{out}.json").read_text())
    assert f"--{manifest['graph']['precision']}" == options[0]
    assert manifest["request"]["options"]["tf32"] is (options[0] == "--tf32")
    assert ("mask_states" in manifest["sources"]["passes"]) is ("--mask-states" in options)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mat.plan", "mat.plan.json"]


@pytest.mark.parametrize("form", ["checkpoint", "ONNX"])
def test_refit_prepares_the_new_weights_as_the_engine_was(
    run: Run,
    opened: OpenedPlan,
    tiny_checkpoint: Checkpoint,
    tiny_onnx: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    form: str,
) -> None:
    given: list[Any] = []

    def refit_plan(*arguments: Any) -> SimpleNamespace:
        given.append(arguments)
        return SimpleNamespace(weights=7, seconds=1.0)

    monkeypatch.setattr("engines.refit.refit_plan", refit_plan)
    weights, expected = tiny_onnx, tiny_checkpoint.digest
    if form == "checkpoint":
        other = random_checkpoint(tiny_checkpoint.config, 5)
        weights, expected = tmp_path / "tuned.safetensors", other.digest
        save_checkpoint(other, weights)
    target = tmp_path / "new.plan"
    code, _, error = run("refit", opened.path, "--checkpoint", weights, "-o", target, "--no-parity")
    assert code == 0, error
    assert "7 weights swapped" in error
    ((plan, model, output),) = given
    assert plan.path == opened.path
    assert output == target
    assert spec_of(model).precision == "fp16"
    assert spec_of(model).checkpoint == expected
    assert model.opset_import[0].version == 17  # what TensorRT 8.6 parses
    assert not model.functions
    assert any(t.data_type == onnx.TensorProto.FLOAT16 for t in model.graph.initializer)


def test_debug_names_no_layer_where_backends_agree(
    run: Run, tiny_onnx: Path, tmp_path: Path
) -> None:
    figures = tmp_path / "debug.json"
    code, out, error = run("debug", tiny_onnx, "--json", figures)
    assert code == 0, error
    assert "no divergence" in error
    assert "second_stage" in out
    assert len(json.loads(figures.read_text())["tensors"]) > 50


def test_debug_exits_with_1_and_names_the_layer(run: Run, tiny_onnx: Path) -> None:
    code, _, error = run("debug", tiny_onnx, "--tolerance", "1e-5")
    assert code == 1
    assert "they part at" in error


def test_a_recording_stands_for_the_reference(run: Run, tiny_onnx: Path, tmp_path: Path) -> None:
    recording = tmp_path / "reference.npz"
    assert run("parity", tiny_onnx, "--record", recording)[0] == 0
    code, out, error = run("parity", tiny_onnx, "--reference", recording)
    assert code == 0, error
    assert "recording" in out


def test_doctor_tells_of_every_backend(run: Run) -> None:
    code, out, _ = run("doctor")
    assert code == 0
    assert "GPU for engines" in out
    assert "tensorrt-rtx" in out
    assert "mat-export[trt]" in "".join(out.split()) or "works" in out


# -- bad input ------------------------------------------------------------------------------------

BAD = {
    "two precisions": (["trt", "m.onnx", "--fp16", "--bf16"], "--fp16 and --bf16"),
    "no model": (["trt", "absent.onnx", "--target", "sm_89"], "absent.onnx"),
    "garbage": (["trt", "garbage.onnx", "--target", "sm_89"], "garbage.onnx"),
    "unknown target": (["trt", "m.onnx", "--target", "sm_70"], "sm_89"),
    "target in words": (["trt", "m.onnx", "--target", "ada"], "sm_"),
    "batch in words": (["trt", "m.onnx", "--batch", "many"], "min:opt:max"),
    "batch backwards": (["trt", "m.onnx", "--batch", "8:4:1"], "8"),
    "size in words": (["trt", "m.onnx", "--size", "large"], "large"),
    "level": (["trt", "m.onnx", "--level", "9"], "0 to 5"),
    "no folder": (["trt", "m.onnx", "--target", "sm_89", "-o", "nowhere/x.plan"], "nowhere"),
    "over the model": (["trt", "m.onnx", "--target", "sm_89", "-o", "m.onnx"], "is an input"),
    "batch of a fixed graph": (
        ["trt", "m.onnx", "--target", "sm_89", "--batch", "1:2:4"],
        "--batch dynamic",
    ),
    "typed already": (["trt", "typed.onnx", "--target", "sm_89"], "fp16 already"),
    "missing engine": (["parity", "absent.plan"], "absent.plan"),
    "engine without papers": (["parity", "bare.plan"], "no manifest"),
    "engine without papers to run": (
        ["inpaint", "m.onnx", "m.onnx", "-o", "o.png", "--model", "bare.plan"],
        "no manifest",
    ),
    "engine without papers to time": (["bench", "bare.plan"], "no manifest"),
    "engine without papers to look at": (["info", "bare.plan"], "no manifest"),
    "engine with broken papers": (["parity", "broken.plan"], "unreadable"),
    "refit of nothing": (["refit", "absent.plan", "--checkpoint", "m.onnx"], "absent.plan"),
    "refit onto its weights": (
        ["refit", "bare.plan", "--checkpoint", "m.onnx", "-o", "m.onnx"],
        "is an input",
    ),
    "debug of nothing": (["debug", "absent.onnx"], "absent.onnx"),
    "debug without TensorRT": (["debug", "m.onnx", "--backend", "tensorrt"], "mat-export[trt]"),
    "debug with a negative tolerance": (["debug", "m.onnx", "--tolerance", "-1"], "tolerance"),
    "recording over the model": (["parity", "m.onnx", "--record", "m.onnx"], "is an input"),
    "recording of garbage": (["parity", "m.onnx", "--reference", "garbage.npz"], "garbage.npz"),
}


@pytest.mark.parametrize(("arguments", "word"), BAD.values(), ids=BAD)
def test_bad_input_is_one_sentence_and_leaves_nothing(
    arguments: list[str],
    word: str,
    run: Run,
    tiny_onnx: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if "--target" in arguments:
        pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is what knows targets")
    monkeypatch.chdir(tmp_path)
    os.symlink(tiny_onnx, "m.onnx")
    if "typed.onnx" in arguments:
        import onnx

        from mat_export.precision import apply_precision

        onnx.save(apply_precision(onnx.load(tiny_onnx), "fp16").model, "typed.onnx")
    for name in ("garbage.onnx", "garbage.npz", "bare.plan", "broken.plan"):
        Path(name).write_bytes(b"\x80\x04 this is nothing")
    Path("broken.plan.json").write_text("{")
    before = sorted(os.listdir(tmp_path))
    code, _, error = run(*arguments)
    one_sentence(code, error)
    assert word in error
    assert sorted(os.listdir(tmp_path)) == before


def test_an_engine_for_another_gpu_says_so(run: Run, plan: Path) -> None:
    code, _, error = run("parity", plan)
    one_sentence(code, error)


def test_a_cut_engine_says_how_to_build_it_again(run: Run, plan: Path, tmp_path: Path) -> None:
    data = plan.read_bytes()
    (tmp_path / "cut.plan").write_bytes(data[: len(data) // 2])
    (tmp_path / "cut.plan.json").write_bytes(Path(f"{plan}.json").read_bytes())
    code, _, error = run("bench", tmp_path / "cut.plan")
    one_sentence(code, error)
    assert "mat-export trt" in error
    assert f"{len(data) // 2} bytes of {len(data)}" in error


# -- the full network -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def full_onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """mat-512, exported with untrained weights."""
    from mat_export.export import export_onnx
    from mat_torch import preset, random_checkpoint

    path = tmp_path_factory.mktemp("full") / "mat-512.onnx"
    export_onnx(random_checkpoint(preset("mat-512"), 0), path)
    return path


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_trt_builds_the_full_network(
    run: Run, full_onnx: Path, tmp_path: Path, precision: str
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX builds engines without a GPU")
    out = tmp_path / "mat.plan"
    code, _, error = run("trt", full_onnx, f"--{precision}", "--target", "sm_89", "-o", out)
    assert code == 0, error
    manifest = json.loads(Path(f"{out}.json").read_text())
    assert manifest["bytes"] == out.stat().st_size > 100e6
    assert manifest["graph"]["config"]["name"] == "mat-512"
    out.unlink()  # some hundred megabytes
