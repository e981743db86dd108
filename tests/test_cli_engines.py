"""`trt`, `refit`, `debug`, and everything else that takes an engine, from the command line."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
from test_cli import Run, one_sentence, run
from test_engine_build import Install, gpu, install
from test_engine_refit import opened

from engines.papers import OpenedPlan
from engines.plugins.library import LibraryDescription
from mat_export.contract import UserError
from mat_export.engine_graph import spec_of
from mat_export.parity import BARS, CaseResult, ParityReport, RegionError
from mat_torch import Checkpoint, random_checkpoint, save_checkpoint

__all__ = ["gpu", "install", "opened", "run"]  # the fixtures


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
    words = ("engine", "tensorrt-rtx", "sm_89", "fp16", "mat-tiny-256", "not checked")
    for word in (*words, "no plugin layers"):
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


# -- plugins --------------------------------------------------------------------------------------


@pytest.fixture
def plugin_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, install: Install, gpu: dict[str, Any]
) -> Path:
    """A machine with a GPU, TensorRT 10.13.3 and a library that fits; engines cannot run on it."""
    install("10.13.3")
    library = tmp_path / "libmat_plugins.so"
    library.write_bytes(b"code")
    fitting = LibraryDescription("V3", "10.13.3", 10, ("sm_86",), "13.0.88", "digest of sources")
    monkeypatch.setattr("engines.choice.describe_library", lambda path: fitting)
    monkeypatch.setattr("engines.choice.Engine", lambda backend, plan: contextlib.nullcontext())
    monkeypatch.setattr("engines.choice.time_engines", lambda engines, inputs: [[7.0], [5.0]])

    def check_quickly(plan: Path, model: Path, *_: Any, **asked: Any) -> ParityReport:
        assert (asked["batch"], asked["size"]) == (1, (256, 256))
        error = RegionError(9, 1e-3, 0.1, 52.7)
        case = CaseResult("one-window", error, error, True, True, 0, (), ())
        return ParityReport(plan.name, model.name, "fp16", BARS["fp16"], (case,))

    monkeypatch.setattr("mat_export.quick_parity.check_quickly", check_quickly)
    return library


def test_trt_keeps_the_faster_engine_and_builds_it_once(
    run: Run, tiny_onnx: Path, tmp_path: Path, plugin_machine: Path
) -> None:
    out = tmp_path / "mat.plan"
    code, _, error = run("trt", tiny_onnx, "--plugin-library", plugin_machine, "-o", out)
    assert code == 0, error
    assert "building twice" in error
    assert "kept the engine with plugins: 5.00 ms against 7.00 ms" in error
    assert "fp16, with plugins" in error
    manifest = json.loads(Path(f"{out}.json").read_text())
    sources = manifest["sources"]
    assert sources["plugin"]["path"] == str(plugin_machine)
    assert sources["passes"]["plugins"]["MaskedMapAttention"] > 0
    for name, plan, time in (("with_plugins", "with.plan", 5.0), ("without_plugins", "", 7.0)):
        figures = sources["plugin_choice"][name]
        assert figures["milliseconds"] == time
        assert figures["parity"]["passed"]
        assert plan in figures["parity"]["candidate"]
    assert manifest["command"][-2:] == ["--plugin-library", str(plugin_machine)]
    code, _, error = run(*manifest["command"][1:])
    assert code == 0, error
    assert "nothing to do" in error
    assert "building twice" not in error
    code, facts, _ = run("info", out)
    assert code == 0
    assert "5.00 ms against 7.00 ms" in facts
    plugin_machine.unlink()
    code, _, error = run("bench", out)
    one_sentence(code, error)
    assert "bring it, or build it again: mat-export trt" in error


def test_trt_with_plugins_on_builds_the_graph_that_calls_them(
    run: Run, tiny_onnx: Path, tmp_path: Path, plugin_machine: Path
) -> None:
    out = tmp_path / "mat.plan"
    arguments = ["trt", tiny_onnx, "--plugin-library", plugin_machine, "-o", out]
    code, _, error = run(*arguments, "--plugins", "on")
    assert code == 0, error
    assert "building twice" not in error
    manifest = json.loads(Path(f"{out}.json").read_text())
    assert "--plugins" in manifest["command"]
    assert manifest["sources"]["passes"]["plugins"]["MaskedMapAttention"] > 0
    code, _, error = run(*arguments, "--plugins", "off")
    one_sentence(code, error)
    assert "leave out one of the two" in error


def test_trt_without_a_library_says_why(
    run: Run, tiny_onnx: Path, tmp_path: Path, plugin_machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: Any, **__: Any) -> Path:
        raise UserError("CUDA's compiler nvcc is not on the PATH")

    monkeypatch.setattr("engines.choice.library_for", none)
    out = tmp_path / "mat.plan"
    code, _, error = run("trt", tiny_onnx, "-o", out)
    assert code == 0, error
    assert "building without plugins: CUDA's compiler nvcc is not on the PATH" in error
    manifest = json.loads(Path(f"{out}.json").read_text())
    assert manifest["sources"]["plugin"] is None
    assert "plugins" not in manifest["sources"]["passes"]
    code, facts, _ = run("info", out)
    assert code == 0
    assert "none (CUDA's compiler nvcc is not on the PATH)" in facts
    code, _, error = run("trt", tiny_onnx, "-o", out, "--plugins", "on")
    one_sentence(code, error)
    assert "cannot call plugins: CUDA's compiler" in error


def test_trt_takes_no_plugins_on_trust(
    run: Run, tiny_onnx: Path, tmp_path: Path, plugin_machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "onnxruntime" else find(name)
    )
    out = tmp_path / "mat.plan"
    code, _, error = run("trt", tiny_onnx, "--plugin-library", plugin_machine, "-o", out)
    assert code == 0, error
    assert "building without plugins: there is no onnxruntime" in error


def test_refit_keeps_the_calls_of_an_engine_with_plugins(
    run: Run, opened: OpenedPlan, tiny_onnx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Path(f"{opened.path}.json")
    manifest = json.loads(own.read_text())
    manifest["sources"]["passes"] = {"plugins": {"MaskedMapAttention": 11}}
    own.write_text(json.dumps(manifest))
    given: list[onnx.ModelProto] = []

    def refit_plan(plan: OpenedPlan, model: onnx.ModelProto, output: Path) -> SimpleNamespace:
        given.append(model)
        return SimpleNamespace(weights=7, seconds=1.0)

    monkeypatch.setattr("engines.refit.refit_plan", refit_plan)
    code, _, error = run("refit", opened.path, "--checkpoint", tiny_onnx, "--no-parity")
    assert code == 0, error
    (model,) = given
    assert any(node.op_type == "MaskedMapAttention" for node in model.graph.node)


@pytest.mark.parametrize("there", [True, False])
def test_doctor_tells_of_the_plugin_library(
    run: Run, plugin_machine: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    cached = plugin_machine if there else None
    monkeypatch.setattr("engines.checks.cached_library", lambda major, capability: cached)
    _, out, _ = run("doctor")
    (row,) = (line for line in out.splitlines() if "plugin library for tensorrt" in line)
    assert ("works" if there else "absent") in row


# -- refit, debug and the rest --------------------------------------------------------------------


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
    run: Run, small_onnx: Path, tmp_path: Path
) -> None:
    figures = tmp_path / "debug.json"
    code, out, error = run("debug", small_onnx, "--json", figures)
    assert code == 0, error
    assert "no divergence" in error
    assert "second_stage" in out
    assert len(json.loads(figures.read_text())["tensors"]) == 40


def test_debug_exits_with_1_and_names_the_layer(run: Run, tiny_onnx: Path) -> None:
    code, _, error = run("debug", tiny_onnx, "--tolerance", "1e-5")
    assert code == 1
    assert "they part at" in error


def test_a_recording_stands_for_the_reference(run: Run, small_onnx: Path, tmp_path: Path) -> None:
    recording = tmp_path / "reference.npz"
    assert run("parity", small_onnx, "--record", recording)[0] == 0
    code, out, error = run("parity", small_onnx, "--reference", recording)
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
    "two precisions": (["trt", "m.onnx", "--fp16", "--bf16"], "give one precision, got --fp16"),
    "no model": (["trt", "absent.onnx", "--target", "sm_89"], "there is no file 'absent.onnx'"),
    "garbage": (["trt", "garbage.onnx", "--target", "sm_89"], "is not a readable ONNX model"),
    "unknown target": (["trt", "m.onnx", "--target", "sm_70"], "sm_89"),
    "target in words": (["trt", "m.onnx", "--target", "ada"], "a target is a GPU generation"),
    "batch in words": (["trt", "m.onnx", "--batch", "many"], "min:opt:max"),
    "batch backwards": (["trt", "m.onnx", "--batch", "8:4:1"], "a batch range rises from 1 up"),
    "size in words": (["trt", "m.onnx", "--size", "large"], "; got 'large'"),
    "level": (["trt", "m.onnx", "--level", "9"], "0 to 5"),
    "no folder": (
        ["trt", "m.onnx", "--target", "sm_89", "-o", "nowhere/x.plan"],
        "'nowhere/x.plan' cannot be written: no such file or directory",
    ),
    "over the model": (["trt", "m.onnx", "--target", "sm_89", "-o", "m.onnx"], "is an input"),
    "plugins where there are none": (
        ["trt", "m.onnx", "--target", "sm_89", "--plugins", "on"],
        "no plugin layers",
    ),
    "a plugin library where there are none": (
        ["trt", "m.onnx", "--target", "sm_89", "--plugin-library", "garbage.npz"],
        "no plugin layers",
    ),
    "a plugin library and no plugins": (
        ["trt", "m.onnx", "--target", "sm_89", "--plugins", "off", "--plugin-library", "m.so"],
        "leave out one",
    ),
    "batch of a fixed graph": (
        ["trt", "m.onnx", "--target", "sm_89", "--batch", "1:2:4"],
        "--batch dynamic",
    ),
    "typed already": (["trt", "typed.onnx", "--target", "sm_89"], "fp16 already"),
    "missing engine": (["parity", "absent.plan"], "there is no file 'absent.plan'"),
    "engine without papers": (["parity", "bare.plan"], "no manifest"),
    "engine without papers to run": (
        ["inpaint", "m.onnx", "m.onnx", "-o", "o.png", "--model", "bare.plan"],
        "no manifest",
    ),
    "engine without papers to time": (["bench", "bare.plan"], "no manifest"),
    "engine without papers to look at": (["info", "bare.plan"], "no manifest"),
    "engine with broken papers": (["parity", "broken.plan"], "unreadable"),
    "refit of nothing": (
        ["refit", "absent.plan", "--checkpoint", "m.onnx"],
        "there is no file 'absent.plan'",
    ),
    "refit onto its weights": (
        ["refit", "bare.plan", "--checkpoint", "m.onnx", "-o", "m.onnx"],
        "is an input",
    ),
    "debug of nothing": (["debug", "absent.onnx"], "there is no file 'absent.onnx'"),
    "debug without TensorRT": (["debug", "m.onnx", "--backend", "tensorrt"], "mat-export[trt]"),
    "debug with a negative tolerance": (
        ["debug", "m.onnx", "--tolerance", "-1"],
        "a tolerance is a finite number from 0 up",
    ),
    "recording over the model": (["parity", "m.onnx", "--record", "m.onnx"], "is an input"),
    "recording of garbage": (
        ["parity", "m.onnx", "--reference", "garbage.npz"],
        "'garbage.npz' is no recording",
    ),
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
