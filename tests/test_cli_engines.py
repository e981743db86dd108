"""`trt`, `refit`, `debug`, and everything else that takes an engine, from the command line."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
from fake_gpu import FakeGpu, Status
from fake_tensorrt import GPU, fake_device_info
from test_cli import Run, one_sentence, run
from test_engine_build import Install, gpu, install, model_of
from test_engine_refit import opened

import cli
from engines.cuda import CudaError
from engines.papers import OpenedPlan, save_engine
from engines.plugins.library import LibraryDescription
from engines.runtime import EngineError
from mat_export.contract import UserError
from mat_export.engine_graph import prepare_engine_graph, spec_of
from mat_export.files import file_digest
from mat_export.manifest import manifest_path
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
    with pytest.MonkeyPatch.context() as patched:  # before no_cache, whose scope is narrower
        patched.setenv("XDG_CACHE_HOME", str(path.parent / "cache"))
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


def test_rtx_says_that_it_has_no_use_for_a_timing_cache(
    run: Run, plan: Path, tmp_path: Path
) -> None:
    command = json.loads(Path(f"{plan}.json").read_text())["command"]
    code, _, error = run(*command[1:], "--timing-cache", tmp_path / "new.cache")
    assert code == 0, error
    assert "times no kernels: --timing-cache is not used" in error
    assert list(tmp_path.iterdir()) == []


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
    monkeypatch.setattr("engines.timing.Engine", lambda backend, plan: contextlib.nullcontext())
    monkeypatch.setattr("engines.timing.time_engines", lambda engines, inputs: [[7.0], [5.0]])

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


@pytest.mark.parametrize(("version", "blended"), [("8.6.0", 1), ("10.13.3", None)])
def test_trt_prepares_the_graph_for_the_types_of_the_backend(
    run: Run,
    tiny_onnx: Path,
    tmp_path: Path,
    install: Install,
    gpu: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    version: str,
    blended: int | None,
) -> None:
    install(version)
    monkeypatch.setattr("engines.build.run_worker", lambda *_: ({}, b"a plan"))
    out = tmp_path / "mat.plan"
    code, _, error = run("trt", tiny_onnx, "--plugins", "off", "-o", out)
    assert code == 0, error
    passes = json.loads(Path(f"{out}.json").read_text())["sources"]["passes"]
    assert passes.get("blended_outputs") == blended


def test_trt_exits_with_1_where_no_engine_passes_parity(
    run: Run, tiny_onnx: Path, tmp_path: Path, plugin_machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check_quickly(plan: Path, model: Path, *_: Any, **__: Any) -> ParityReport:
        error = RegionError(9, 1.0, 2.0, 3.1)
        failures = ("PSNR in the hole 3.1 dB, below 40",)
        case = CaseResult("one-window", error, error, True, True, 0, (), failures)
        return ParityReport(plan.name, model.name, "fp16", BARS["fp16"], (case,))

    monkeypatch.setattr("mat_export.quick_parity.check_quickly", check_quickly)
    out = tmp_path / "mat.plan"
    for words in ("wrote", "nothing to do"):
        code, _, error = run("trt", tiny_onnx, "--plugin-library", plugin_machine, "-o", out)
        assert code == 1, error
        assert words in error
        assert error.splitlines()[-1].startswith("parity FAILED, one-window: PSNR in the hole 3.1")
    assert "prove it" not in error
    assert not json.loads(Path(f"{out}.json").read_text())["parity"]["passed"]
    code, facts, _ = run("info", out)
    assert code == 0
    assert "FAILED" in facts


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


@pytest.fixture
def two_engines(plugin_machine: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[float]]:
    """What two engines take when they are timed side by side."""
    times = [[4.0], [5.0]]
    monkeypatch.setattr("engines.timing.time_engines", lambda engines, inputs: times)
    return times


@pytest.mark.parametrize(
    ("took", "said"),
    [
        (4.0, "fp32 takes 4.00 ms and fp16 5.00 at batch 1: 0.80 of its time, {new} is the faster"),
        (5.5, "1.10 of its time, fp32 does not win here: {old} is the one to use"),
    ],
)
def test_trt_says_which_of_two_engines_is_faster(
    run: Run,
    tiny_onnx: Path,
    tmp_path: Path,
    two_engines: list[list[float]],
    took: float,
    said: str,
) -> None:
    two_engines[0] = [took]
    old, new = tmp_path / "old.plan", tmp_path / "new.plan"
    assert run("trt", tiny_onnx, "--plugins", "off", "-o", old)[0] == 0
    arguments = ["trt", tiny_onnx, "--fp32", "--plugins", "off", "-o", new, "--compare", old]
    for _ in range(2):  # built, and then found
        code, _, error = run(*arguments)
        assert code == 0, error
        assert said.format(old=old, new=new) in error.replace("\n", " ")


def test_trt_int8_says_how_to_learn_whether_it_wins(
    run: Run, small_calibration: tuple[Path, Any], plugin_machine: Path, tmp_path: Path
) -> None:
    arguments = ["trt", small_calibration[0], "--int8", "--plugins", "off"]
    code, _, error = run(*arguments, "-o", tmp_path / "int8.plan")
    assert code == 0, error
    assert "name that engine with --compare" in error.replace("\n", " ")


def test_trt_compares_no_engines_of_other_networks_inputs_or_batches(
    run: Run,
    tiny_onnx: Path,
    tmp_path: Path,
    two_engines: list[list[float]],
) -> None:
    old, new = tmp_path / "old.plan", tmp_path / "new.plan"
    assert run("trt", tiny_onnx, "--plugins", "off", "-o", old)[0] == 0
    papers = manifest_path(old)
    entries = json.loads(papers.read_text())
    graph = dict(entries["graph"])
    wrong: dict[str, tuple[dict[str, Any], str]] = {
        "network": ({"config": {**graph["config"], "name": "other"}}, "is of other and the model"),
        "inputs": ({"io": "uint8"}, "takes io uint8 and noise"),
        "batch": ({"batch": 4}, "was not built for 1 x 256x256"),
    }
    for name, (change, message) in wrong.items():
        papers.write_text(json.dumps({**entries, "graph": {**graph, **change}}))
        code, _, error = run("trt", tiny_onnx, "--plugins", "off", "-o", new, "--compare", old)
        assert code == 2, name
        assert message in error.replace("\n", " "), name
        assert not new.exists()
    code, _, error = run("trt", tiny_onnx, "-o", new, "--compare", tmp_path / "absent.plan")
    assert code == 2
    assert "absent.plan" in error
    code, _, error = run("trt", tiny_onnx, "--plugins", "off", "-o", old, "--compare", old)
    assert code == 2
    assert "is an input" in error


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

    def refit_plan(
        plan: OpenedPlan, model: onnx.ModelProto, output: Path, **papers: Any
    ) -> SimpleNamespace:
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


# -- the graph that engines are built of -----------------------------------------------------------


@pytest.mark.parametrize(("precision", "opset"), [("fp16", 20), ("fp16", 17), ("fp32", 17)])
def test_lower_writes_the_graph_that_engines_are_built_of(
    run: Run, tiny_onnx: Path, tmp_path: Path, precision: str, opset: int
) -> None:
    path = tmp_path / "lowered.onnx"
    code, _, error = run(
        *("lower", tiny_onnx, "-o", path, "--precision", precision, "--opset", opset)
    )
    assert code == 0, error
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    expected = prepare_engine_graph(tiny_onnx, precision, opset=opset, weakly_typed=opset == 17)
    assert model == expected.model
    assert not model.functions
    assert {o.version for o in model.opset_import if o.domain == ""} == {opset}
    assert json.loads(Path(f"{path}.json").read_text())["graph"]["precision"] == precision
    assert precision in run("info", path)[1]


def test_lower_names_its_file_and_does_not_write_over_its_model(
    run: Run, tiny_onnx: Path, tmp_path: Path
) -> None:
    model = tmp_path / "mat.onnx"
    model.write_bytes(tiny_onnx.read_bytes())
    code, _, error = run("lower", model, "-o", model)
    assert code == 2
    assert "is an input" in error
    assert model.read_bytes() == tiny_onnx.read_bytes()
    code, _, error = run("lower", model, "--precision", "bf16")
    assert code == 0, error
    assert (tmp_path / "mat-bf16.onnx").is_file()


# -- damaged papers -------------------------------------------------------------------------------


def damage(plan: Path, entry: str, value: Any) -> None:
    """Give an entry of a plan's manifest, named with dots, another value."""
    own = Path(f"{plan}.json")
    manifest = json.loads(own.read_text())
    *parents, last = entry.split(".")
    part = manifest
    for name in parents:
        part = part.setdefault(name, {})
    part[last] = value
    own.write_text(json.dumps(manifest))


@pytest.mark.parametrize("value", ["passed", 3, [1], True])
@pytest.mark.parametrize(
    "entry",
    [
        *("request", "request.options", "gpu", "layers", "layers.by_precision", "parity"),
        *("sources", "sources.plugin", "sources.plugin_choice", "graph", "command", "versions"),
    ],
)
def test_info_of_a_damaged_manifest_is_a_sentence(
    run: Run, opened: OpenedPlan, entry: str, value: Any
) -> None:
    damage(opened.path, entry, value)
    for file in (opened.path, Path(f"{opened.path}.json")):
        code, facts, error = run("info", file)
        if entry == "command" and isinstance(value, list):
            assert code == 0, error
            assert "command" in facts
        else:
            one_sentence(code, error)


def test_refit_of_an_engine_with_damaged_papers_is_a_sentence(
    run: Run, opened: OpenedPlan, small_onnx: Path
) -> None:
    before = opened.path.read_bytes()
    damage(opened.path, "sources.passes", None)
    code, _, error = run("refit", opened.path, "--checkpoint", small_onnx)
    one_sentence(code, error)
    assert "is damaged (sources.passes)" in error
    assert opened.path.read_bytes() == before


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
    papers: dict[str, Any] = {}

    def refit_plan(*arguments: Any, **named: Any) -> SimpleNamespace:
        given.append(arguments)
        papers.update(named)
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
    # What it says of itself leads to the new weights.
    again = shlex.join(papers["command"])
    assert str(weights) in again
    if form == "ONNX":
        assert again == f"mat-export trt {weights}"
        assert papers["sources"]["onnx"]["sha256"] == file_digest(weights)
    else:
        exported = target.with_suffix(".onnx")
        assert f"mat-export onnx --checkpoint {weights} --key G_ema --batch 1" in again
        assert f"-o {exported} && mat-export trt {exported}" in again


@pytest.mark.parametrize("verdict", ["passed", "failed", "could not be reached"])
def test_refit_keeps_the_engine_that_is_there_until_the_new_one_is_proved(
    run: Run,
    opened: OpenedPlan,
    tiny_onnx: Path,
    monkeypatch: pytest.MonkeyPatch,
    verdict: str,
) -> None:
    seen: list[Path] = []

    def refit_plan(
        plan: OpenedPlan, model: onnx.ModelProto, output: Path, **papers: Any
    ) -> SimpleNamespace:
        facts = {**plan.manifest, **papers, "refitted_from": plan.manifest["sha256"]}
        save_engine(b"refitted", output, facts)
        return SimpleNamespace(weights=7, seconds=1.0)

    def judge(candidate: Path, *_: Any, **__: Any) -> SimpleNamespace:
        seen.append(candidate)
        assert candidate.read_bytes() == b"refitted"
        assert opened.path.read_bytes() == opened.plan
        if verdict == "could not be reached":
            raise UserError("no reference")
        passed = verdict == "passed"
        return SimpleNamespace(passed=passed, to_json=lambda: json.dumps({"passed": passed}))

    monkeypatch.setattr("engines.refit.refit_plan", refit_plan)
    monkeypatch.setattr(cli, "_judge", judge)
    papers = Path(f"{opened.path}.json").read_bytes()
    code, _, error = run("refit", opened.path, "--checkpoint", tiny_onnx)
    assert code == {"passed": 0, "failed": 1, "could not be reached": 2}[verdict], error
    if verdict == "passed":
        assert opened.path.read_bytes() == b"refitted"
        manifest = json.loads(Path(f"{opened.path}.json").read_text())
        assert manifest["parity"] == {"passed": True}
        assert manifest["refitted_from"] == opened.manifest["sha256"]
    else:
        assert opened.path.read_bytes() == opened.plan
        assert Path(f"{opened.path}.json").read_bytes() == papers
    assert not seen[0].parent.exists()
    assert seen[0].parent.parent == opened.path.parent


def test_a_verdict_that_cannot_be_noted_in_the_papers_is_still_written(
    run: Run, tiny_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def judge(*_: Any, **__: Any) -> SimpleNamespace:
        return SimpleNamespace(passed=True, to_json=lambda: json.dumps({"passed": True}))

    def record(*_: Any) -> None:
        raise UserError("the folder is read-only")

    monkeypatch.setattr(cli, "_judge", judge)
    monkeypatch.setattr(cli, "_record_parity", record)
    verdict = tmp_path / "verdict.json"
    code, _, error = run("parity", tiny_onnx, "--json", verdict)
    assert code == 2
    assert "read-only" in error
    assert json.loads(verdict.read_text()) == {"passed": True}


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


def test_doctor_tells_of_every_backend(
    run: Run, install: Install, gpu: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def row(name: str) -> str:
        """What is said of one thing, in a line."""
        code, out, _ = run("doctor")
        assert code == 0, out
        lines = out.splitlines()
        cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if "│" in line]
        (start,) = (i for i, line in enumerate(cells) if line[0] == name)
        more = next((i for i in range(start + 1, len(cells)) if cells[i][0]), len(cells))
        return " ".join(" ".join(line[1:]).strip() for line in cells[start:more])

    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    install("10.13.3")
    assert row("GPU for engines").startswith("works Fake GPU, compute capability 8.6")
    said = row("tensorrt")
    assert said.startswith("works 10.13.3: bf16, fp16, fp32, int8, tf32, ONNX opset 22")
    assert "runs on this GPU" in said
    assert row("tensorrt-rtx") == "absent not installed: pip install 'mat-export[rtx]'"
    monkeypatch.setitem(GPU, "capability", (12, 0))
    install("8.6.0")
    assert row("tensorrt").startswith("absent 8.6.0: ")
    assert "does not run on this machine" in row("tensorrt")
    install(None)
    assert row("tensorrt") == "absent not installed: pip install 'mat-export[trt]'"


# -- bad input ------------------------------------------------------------------------------------

BAD = {
    "two precisions": (["trt", "m.onnx", "--fp16", "--bf16"], "give one precision, got --fp16"),
    "no model": (["trt", "absent.onnx", "--target", "sm_89"], "there is no file 'absent.onnx'"),
    "garbage": (["trt", "garbage.onnx", "--target", "sm_89"], "is not a readable ONNX model"),
    "another network": (
        ["trt", "foreign.onnx", "--target", "sm_89"],
        "'foreign.onnx' is an ONNX model, but not one that mat-export wrote",
    ),
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
    "a name of no engine": (["trt", "m.onnx", "-o", "mat.trt"], "ends in .plan or .engine"),
    "no ending": (["trt", "m.onnx", "-o", "mat"], "ends in .plan or .engine"),
    "a model for a timing cache": (
        ["trt", "m.onnx", "--timing-cache", "m.onnx"],
        "'m.onnx' is no timing cache",
    ),
    "garbage for a timing cache": (
        ["trt", "m.onnx", "--timing-cache", "garbage.npz"],
        "'garbage.npz' is no timing cache",
    ),
    "the engine for a timing cache": (
        ["trt", "m.onnx", "-o", "new.plan", "--timing-cache", "./new.plan"],
        "is to be the engine's",
    ),
    "a folder for a timing cache": (["trt", "m.onnx", "--timing-cache", "."], "unreadable"),
    "a target of no use": (["trt", "m.onnx", "--target", "sm_75"], "got sm_75"),
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
    "refit to a name of no engine": (
        ["refit", "bare.plan", "--checkpoint", "m.onnx", "-o", "new.trt"],
        "ends in .plan or .engine",
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
        from mat_export.precision import apply_precision

        onnx.save(apply_precision(onnx.load(tiny_onnx), "fp16").model, "typed.onnx")
    if "foreign.onnx" in arguments:
        onnx.save(model_of(None), "foreign.onnx")
    for name in ("garbage.onnx", "garbage.npz", "bare.plan", "broken.plan"):
        Path(name).write_bytes(b"\x80\x04 this is nothing")
    Path("broken.plan.json").write_text("{")
    before = sorted(os.listdir(tmp_path))
    code, _, error = run(*arguments)
    one_sentence(code, error)
    assert word in error
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize(
    "arguments",
    [
        ["trt", "--bf16", "-o", "mat.plan"],
        ["debug", "--backend", "tensorrt", "--precision", "bf16"],
    ],
)
def test_a_precision_that_tensorrt_lacks_is_told_before_the_model_is_prepared(
    run: Run,
    small_onnx: Path,
    tmp_path: Path,
    install: Install,
    gpu: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
) -> None:
    install("8.6.0")
    monkeypatch.chdir(tmp_path)
    before = sorted(os.listdir(tmp_path))
    code, _, error = run(arguments[0], small_onnx, *arguments[1:])
    one_sentence(code, error)
    assert "error: TensorRT 8.6.0 has no bf16; the file may be in fp16, fp32, int8, tf32" in error
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize(
    "error",
    [
        EngineError("TensorRT refused to run the engine: MaskPropagation: no kernel for sm_89"),
        CudaError("cudaStreamSynchronize", 700, "an illegal memory access was encountered"),
    ],
)
def test_a_run_that_fails_is_a_sentence(
    run: Run, small_onnx: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr("mat_export.runners.OrtRunner.run", fail)
    code, _, said = run("parity", small_onnx)
    one_sentence(code, said)
    assert f"error: {error}" in said


def test_an_engine_for_another_gpu_says_so(run: Run, plan: Path, gpu: dict[str, Any]) -> None:
    code, _, error = run("parity", plan)
    one_sentence(code, error)
    assert "was built for compute capability 8.9 (sm_89), and Fake GPU has 8.6" in error
    assert "mat-export trt" in error


def test_a_cut_engine_says_how_to_build_it_again(run: Run, plan: Path, tmp_path: Path) -> None:
    data = plan.read_bytes()
    (tmp_path / "cut.plan").write_bytes(data[: len(data) // 2])
    (tmp_path / "cut.plan.json").write_bytes(Path(f"{plan}.json").read_bytes())
    code, _, error = run("bench", tmp_path / "cut.plan")
    one_sentence(code, error)
    assert "mat-export trt" in error
    assert f"{len(data) // 2} bytes of {len(data)}" in error


def test_another_engine_under_the_papers_is_no_engine_of_theirs(
    run: Run, plan: Path, tmp_path: Path, gpu: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(GPU, "capability", (8, 9))
    data = bytearray(plan.read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "other.plan").write_bytes(data)
    (tmp_path / "other.plan.json").write_bytes(Path(f"{plan}.json").read_bytes())
    code, _, error = run("parity", tmp_path / "other.plan")
    one_sentence(code, error)
    assert "mat-export trt" in error


@pytest.mark.parametrize(
    ("version", "behaviour", "words"),
    [
        (None, "", ("not installed", "mat-export[trt]", "mat-export[rtx]")),
        ("10.13.3", "builds", ("no NVIDIA GPU", "--target")),
        ("10.13.3", "memory", ("little free memory", "MiB", "--workspace")),
    ],
    ids=["no TensorRT", "no GPU", "too little GPU memory"],
)
def test_trt_says_what_the_machine_lacks(
    run: Run,
    small_onnx: Path,
    tmp_path: Path,
    install: Install,
    monkeypatch: pytest.MonkeyPatch,
    version: str | None,
    behaviour: str,
    words: tuple[str, ...],
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    install(version, behaviour)
    if behaviour != "builds":
        monkeypatch.setattr("engines.cuda.device_info", fake_device_info)
    else:
        monkeypatch.setattr(
            "engines.cuda.cudart", lambda: FakeGpu(without_driver=Status.cudaErrorNoDevice)
        )
    target = tmp_path / "mat.plan"
    code, _, error = run("trt", small_onnx, "--fp16", "--plugins", "off", "-o", target)
    one_sentence(code, error)
    (said,) = (line for line in error.splitlines() if line.startswith("error: "))
    assert all(word in said for word in words), said
    assert not list(tmp_path.glob("mat.plan*"))


def test_an_engine_without_a_gpu_is_a_sentence(run: Run, plan: Path) -> None:
    code, _, error = run("parity", plan)
    one_sentence(code, error)
    assert "GPU" in error


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
    assert manifest["build_seconds"] <= 30  # some 8 on two cores
    assert manifest["bytes"] == out.stat().st_size > 100e6
    assert manifest["graph"]["config"]["name"] == "mat-512"
    out.unlink()  # some hundred megabytes
