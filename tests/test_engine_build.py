"""Building engines: every generation's API, the process that builds, and real engines."""

from __future__ import annotations

import gc
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from fake_tensorrt import GPU, fake_device_info, make_tensorrt, write_module
from onnx import TensorProto, helper

from engines.backend import (
    Absent,
    Backend,
    BuildHooks,
    Gpu,
    find_backends,
    is_for_weak_types,
    open_backend,
)
from engines.backend.messages import logger_of
from engines.backend.tensorrt8 import _LogProgress
from engines.build import BuildReport, build_engine, timing_cache_path
from engines.options import BuildOptions
from engines.papers import read_engine_manifest, record_parity, save_engine
from engines.worker import CacheFile, CacheKeeper, Percentage
from mat_export.contract import METADATA_KEY, GraphSpec, UserError
from mat_export.files import file_digest
from mat_torch import Checkpoint, preset

TINY = GraphSpec(preset("mat-tiny-256"))
ADA = Gpu("Ada", (8, 9), "12.4", 8000, 4000)
ROOT = Path(__file__).parent.parent


def model_of(
    spec: GraphSpec | None = TINY, *, opset: int = 17, ir_version: int = 8, operator: str = "Unique"
) -> bytes:
    """A small graph, not that of the specification, with nodes named as ours are."""
    nodes = [
        helper.make_node("Relu", ["x"], ["y"], name="first_stage.conv_first/Relu"),
        helper.make_node(operator, ["y"], ["z"], name=f"first_stage.enc.0/{operator}_1"),
    ]
    tensors = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 4]) for n in "xz"]
    graph = helper.make_graph(nodes, "g", tensors[:1], tensors[1:])
    proto = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version
    )
    if spec is not None:
        helper.set_model_props(proto, {METADATA_KEY: spec.to_json()})
    data: bytes = proto.SerializeToString()
    return data


@pytest.fixture(autouse=True)
def caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache folder and a folder for temporary files of each test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setattr("tempfile.tempdir", None)
    return tmp_path / "cache"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A GPU in this process."""
    monkeypatch.setattr("engines.cuda.device_info", fake_device_info)
    return GPU


Install = Callable[..., ModuleType]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Install:
    """Make a TensorRT importable here and in processes started from here."""

    def write(version: str | None, behaviour: str = "builds") -> ModuleType | None:
        module = None if version is None else make_tensorrt(version, behaviour)
        monkeypatch.setitem(sys.modules, "tensorrt", module)
        if version is not None:
            folder = tmp_path / "site"
            folder.mkdir(exist_ok=True)
            write_module(folder, version, behaviour)
            monkeypatch.syspath_prepend(str(folder))
        return module

    return write  # type: ignore[return-value]


@pytest.fixture
def no_rtx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)


def with_capability(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setitem(GPU, "capability", capability)


# -- finding a backend -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "opset", "precisions"),
    [
        ("8.6.0", 17, {"fp32", "tf32", "fp16", "int8"}),
        ("10.13.3.9", 22, {"fp32", "tf32", "fp16", "bf16", "int8"}),
        ("11.0.0", 22, {"fp32", "tf32", "fp16", "bf16", "int8"}),
    ],
)
def test_a_backend_says_what_it_parses(
    install: Install, version: str, opset: int, precisions: set[str]
) -> None:
    install(version)
    backend = open_backend("tensorrt")
    assert (backend.name, backend.version, backend.opset) == ("tensorrt", version, opset)
    assert backend.precisions == precisions
    assert backend.weakly_typed == is_for_weak_types(opset) == (opset == 17)
    assert backend.targets == ()
    assert not backend.builds_without_gpu


@pytest.mark.parametrize("version", ["8.5.3", "9.2.0", "10.12.0.36", "10.0.1"])
def test_versions_between_the_known_ones_are_refused(install: Install, version: str) -> None:
    install(version)
    with pytest.raises(UserError, match=rf"version {version}, we know 8.6 and from 10.13"):
        open_backend("tensorrt")


@pytest.mark.parametrize(
    ("built", "installed", "runs"),
    [
        ("8.6.0", "8.6.1", True),
        ("8.6.1", "8.6.0", False),
        ("8.6.1", "10.13.3", True),
        ("8.6.1", "11.0.0", False),
        ("10.13.3", "11.2.0", True),
        ("10.13.3", "12.0.0", False),
        ("11.0.0", "12.0.0", True),
        ("11.0.0", "10.14.0", False),
        ("", "10.13.3", False),
    ],
)
def test_a_backend_knows_whose_engines_it_runs(
    install: Install, built: str, installed: str, runs: bool
) -> None:
    install(installed)
    backend = open_backend("tensorrt")
    assert backend.runs_engines_of(built, version_compatible=True) is runs
    assert not backend.runs_engines_of(built, version_compatible=False)
    assert backend.runs_engines_of(installed, version_compatible=False)


@pytest.mark.usefixtures("no_rtx")
def test_a_backend_that_is_not_installed_says_what_to_install(install: Install) -> None:
    install(None)
    with pytest.raises(UserError, match=r"not installed: pip install 'mat-export\[trt\]'"):
        open_backend("tensorrt")
    with pytest.raises(UserError, match=r"not installed: pip install 'mat-export\[rtx\]'"):
        open_backend("tensorrt-rtx")
    found = find_backends()
    assert [type(one) for one in found] == [Absent, Absent]
    assert [one.name for one in found] == ["tensorrt", "tensorrt-rtx"]


def test_a_broken_install_is_named_as_such(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "tensorrt.py").write_text("raise OSError('libnvinfer.so.10: cannot open\\nxx')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    with pytest.raises(UserError, match=r"does not import \(libnvinfer.so.10: cannot open\)"):
        open_backend("tensorrt")


def test_an_unknown_backend_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match="auto, tensorrt, tensorrt-rtx"):
        open_backend("trt")


@pytest.mark.usefixtures("gpu")
def test_auto_prefers_tensorrt_where_it_runs_on_the_gpu(install: Install) -> None:
    install("10.13.3")
    assert open_backend().name == "tensorrt"


@pytest.mark.usefixtures("gpu")
def test_auto_takes_rtx_for_a_gpu_that_the_installed_tensorrt_does_not_know(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    install("8.6.0")
    with_capability(monkeypatch, (12, 0))
    assert open_backend().name == "tensorrt-rtx"


@pytest.mark.usefixtures("gpu")
def test_auto_never_takes_rtx_for_a_data_centre_gpu(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    install(None)
    for capability in ((9, 0), (10, 0)):
        with_capability(monkeypatch, capability)
        with pytest.raises(UserError, match=r"mat-export\[trt\].*TensorRT-RTX .* does not run"):
            open_backend()


def test_auto_without_a_gpu_asks_for_a_target(install: Install) -> None:
    install("10.13.3")
    with pytest.raises(UserError, match="--target sm_NN"):
        open_backend()


def test_a_target_takes_rtx(install: Install) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    install("10.13.3")
    assert open_backend(target="sm_89").name == "tensorrt-rtx"
    with pytest.raises(UserError, match="leave out --target sm_89"):
        open_backend("tensorrt", target="sm_89")


def test_an_unknown_target_is_refused_with_the_known_ones() -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    with pytest.raises(UserError, match=r"does not know the target sm_90; it knows sm_80, .*sm_89"):
        open_backend(target="sm_90")


def test_rtx_is_not_for_gpus_before_ampere(
    monkeypatch: pytest.MonkeyPatch, install: Install, gpu: dict[str, Any]
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    assert "sm_75" not in open_backend("tensorrt-rtx").targets
    for choice in ("auto", "tensorrt-rtx"):
        with pytest.raises(UserError, match=r"sm_80, .*, got sm_75, or use --backend tensorrt"):
            open_backend(choice, target="sm_75")
    with_capability(monkeypatch, (7, 5))
    install(None)
    with pytest.raises(UserError, match=r"mat-export\[trt\].*TensorRT-RTX .* does not run on it"):
        open_backend()
    install("10.13.3")
    assert open_backend().name == "tensorrt"


# -- what is refused before the work ---------------------------------------------------------------


def check(backend: Backend, options: BuildOptions | None = None, **changes: Any) -> None:
    facts: dict[str, Any] = {"precision": "fp16", "opset": 17, "ir_version": 8, "gpu": ADA}
    backend.check_request(options or BuildOptions(), **{**facts, **changes})


def test_8_6_takes_opset_17_in_fp32_and_fp16(install: Install) -> None:
    install("8.6.0")
    backend = open_backend("tensorrt")
    check(backend)
    with pytest.raises(UserError, match=r"opset 17 and IR version 8, .* opset 20"):
        check(backend, opset=20)
    with pytest.raises(UserError, match="export it with --opset 17"):
        check(backend, ir_version=9)
    with pytest.raises(UserError, match=r"8\.6\.0 has no bf16"):
        check(backend, precision="bf16")


def test_gpus_before_ampere_take_no_bfloat16_and_no_hardware_compatibility(
    install: Install,
) -> None:
    install("10.13.3")
    backend = open_backend("tensorrt")
    turing = replace(ADA, capability=(7, 5))
    check(backend, precision="bf16")
    with pytest.raises(UserError, match=r"capability 7\.5 have no bfloat16"):
        check(backend, precision="bf16", gpu=turing)
    with pytest.raises(UserError, match="Ampere"):
        check(backend, BuildOptions(hardware_compatible=True), gpu=turing)


@pytest.mark.parametrize("version", ["8.6.0", "10.13.3", "11.0.0"])
def test_every_tensorrt_has_compatible_and_refittable_engines(
    install: Install, version: str
) -> None:
    install(version)
    options = BuildOptions(version_compatible=True, hardware_compatible=True, refittable=True)
    check(open_backend("tensorrt"), options)


def test_what_a_version_lacks_is_named(install: Install) -> None:
    module = install("10.13.3")
    del module.HardwareCompatibilityLevel
    with pytest.raises(UserError, match=r"TensorRT 10\.13\.3 has no hardware-compatible engines"):
        check(open_backend("tensorrt"), BuildOptions(hardware_compatible=True))


def test_unknown_tactic_sources_are_refused_with_the_known_ones(install: Install) -> None:
    install("10.13.3")
    with pytest.raises(UserError, match=r"'CUDNN'; it has EDGE_MASK_CONVOLUTIONS, JIT_CONV"):
        check(open_backend("tensorrt"), BuildOptions(tactic_sources=("CUDNN",)))


def test_what_rtx_lacks_is_refused() -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    backend = open_backend("tensorrt-rtx")
    check(backend, BuildOptions(target="sm_89"), gpu=None)
    check(backend, BuildOptions(hardware_compatible=True), gpu=None)
    with pytest.raises(UserError, match="no version-compatible"):
        check(backend, BuildOptions(version_compatible=True))
    with pytest.raises(UserError, match="leave out --refittable"):
        check(backend, BuildOptions(refittable=True), gpu=None)
    for precision in ("fp32", "fp16", "bf16"):
        with pytest.raises(UserError, match=r"before sm_80, .*, got sm_75"):
            check(backend, BuildOptions(target="sm_75"), precision=precision)
    turing = replace(ADA, capability=(7, 5))
    check(backend, BuildOptions(hardware_compatible=True), precision="bf16", gpu=turing)


def test_rtx_builds_for_the_gpu_or_for_all() -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    backend = open_backend("tensorrt-rtx")
    assert backend.resolve_target(BuildOptions(), ADA) == "sm_89"
    assert backend.resolve_target(BuildOptions(target="sm_120"), ADA) == "sm_120"
    assert backend.resolve_target(BuildOptions(hardware_compatible=True), None) is None
    with pytest.raises(UserError, match=r"--target \(sm_80, "):
        backend.resolve_target(BuildOptions(), None)
    for capability in ((7, 5), (9, 0)):
        with pytest.raises(UserError, match="does not run on Ada"):
            backend.resolve_target(BuildOptions(), replace(ADA, capability=capability))


# -- how each generation is told -------------------------------------------------------------------


def configured(
    backend: Backend, options: BuildOptions | None = None, precision: str = "fp16", **hooks: Any
) -> Any:
    """What the fake built: its configuration."""
    profiles = {"x": ((1, 4), (2, 4), (8, 4))}
    plan = backend.build(
        model_of(replace(TINY, precision=precision)),
        options or BuildOptions(),
        profiles,
        BuildHooks(**hooks),
    )
    return json.loads(plan)


def test_8_6_is_made_to_obey_the_types(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    module = install("8.6.0")
    backend = open_backend("tensorrt")
    seen: list[Any] = []

    def constrain(given: Any, network: Any, proto: Any) -> None:
        seen.append((given, proto.graph.node[0].op_type))
        network.constrained = True

    monkeypatch.setattr("engines.weak_typing.constrain", constrain)
    built = configured(backend)
    assert seen == [(module, "Relu")]
    assert built["constrained"]
    assert built["flags"] == ["FP16", "OBEY_PRECISION_CONSTRAINTS"]
    assert built["network"] == 1
    assert built["verbosity"] == "DETAILED"
    built = configured(backend, precision="int8")
    assert built["constrained"]
    assert sorted(built["flags"]) == ["FP16", "INT8", "OBEY_PRECISION_CONSTRAINTS"]
    built = json.loads(backend.build(model_of(), BuildOptions(), {}, BuildHooks()))
    assert not built["constrained"]
    assert built["flags"] == []
    assert built["profiles"] == []


@pytest.mark.parametrize(("version", "flags"), [("10.13.3", 2), ("11.0.0", 0)])
def test_later_networks_are_strongly_typed(install: Install, version: str, flags: int) -> None:
    install(version)
    built = configured(open_backend("tensorrt"))
    assert built["network"] == flags
    assert built["flags"] == []
    assert built["profiles"] == [{"x": [[1, 4], [2, 4], [8, 4]]}]
    assert not built["constrained"]
    assert built["builder_optimization_level"] is None
    assert built["sources"] is None


def test_every_option_reaches_tensorrt(install: Install) -> None:
    install("10.13.3")
    options = BuildOptions(
        level=5,
        workspace_mib=3,
        tf32=True,
        version_compatible=True,
        hardware_compatible=True,
        refittable=True,
        tactic_sources=("JIT_CONVOLUTIONS",),
        timing_iterations=7,
    )
    built = configured(open_backend("tensorrt"), options)
    assert built["flags"] == ["REFIT", "TF32", "VERSION_COMPATIBLE"]
    assert built["builder_optimization_level"] == 5
    assert built["pools"] == {"WORKSPACE": 3 << 20}
    assert built["sources"] == 2
    assert built["avg_timing_iterations"] == 7
    assert built["hardware_compatibility_level"] == 1


def test_11_3_warns_of_its_refittable_engines(install: Install) -> None:
    for version, warned in (("11.3.0", 1), ("11.4.0", 0)):
        install(version)
        lines: list[str] = []
        configured(
            open_backend("tensorrt"),
            BuildOptions(refittable=True),
            log=lambda severity, text, to=lines: to.append(severity),
        )
        assert lines.count("warning") == warned


@pytest.mark.parametrize("version", ["8.6.0", "10.13.3"])
def test_progress_comes_from_the_monitor_or_the_log(
    install: Install, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setattr("engines.weak_typing.constrain", lambda *_: None)
    install(version)
    told: list[tuple[str, int, int]] = []
    severities: list[str] = []
    configured(
        open_backend("tensorrt"),
        progress=Percentage(lambda *event: told.append(event)),
        log=lambda severity, text: severities.append(severity),
    )
    percents = [done for _, done, _ in told]
    assert percents == sorted(set(percents))
    assert percents[-1] > 70
    if version == "8.6.0":
        assert [what for what, *_ in told][1:] == [f"layer {i}" for i in range(4)]
    assert set(severities) == {"info"}


def test_choosing_layouts_is_told_though_no_layer_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("engines.worker.time", SimpleNamespace(monotonic=lambda: now[0]))
    told: list[tuple[str, int]] = []
    lines = _LogProgress(Percentage(lambda what, done, _: told.append((what, done))))
    lines.read("After concat removal: 2 layers")
    for i in range(2):
        lines.read("=============== Computing costs for ")
        lines.read(f"--------------- Timing Runner: layer {i} (CaskConvolution[0x80000009])")
    for _ in range(25):
        now[0] += 1.0
        lines.read("--------------- Timing Runner: Optimizer Reformat(x -> <out>) (Reformat)")
    assert [percent for _, percent in told] == [0, 50, 99, 99, 99]
    assert told[-1][0] == "choosing layouts, 20 conversions timed"


@pytest.mark.parametrize("version", ["8.6.0", "10.13.3"])
def test_a_refused_node_is_named_with_its_module(install: Install, version: str) -> None:
    install(version, "refuses")
    backend = open_backend("tensorrt")
    with pytest.raises(UserError) as caught:
        backend.build(model_of(), BuildOptions(), {}, BuildHooks())
    text = str(caught.value)
    assert "node 'first_stage.enc.0/Unique_1' (Unique) of the module 'first_stage.enc.0'" in text
    assert "no importer (UNSUPPORTED_NODE, and 1 more)" in text
    assert "\n" not in text


def test_a_failed_build_tells_tensorrts_errors(install: Install) -> None:
    install("10.13.3", "fails")
    with pytest.raises(UserError, match="Error Code 10: no implementation for first_stage/Conv"):
        configured(open_backend("tensorrt"))


def test_what_a_build_goes_on_after_is_no_reason_of_its_failure(install: Install) -> None:
    """As 8.6 said it on an H200, of the cache that it had written itself."""
    module = install("8.6.0")
    logger, heard = logger_of(module), []
    logger.sink = lambda severity, text: heard.append(severity)
    for text in (
        "1: [myelinCache.h::deserializeFromBuffer::52] Error Code 1: Myelin (Myelin error from x)",
        "4: The timing cache will not be used!",
        "10: could not find any implementation for node y",
    ):
        logger.log(module.ILogger.Severity.ERROR, text)
    assert heard == ["warning", "warning", "error"]
    assert list(logger.errors) == ["10: could not find any implementation for node y"]


@pytest.mark.usefixtures("gpu")
def test_too_little_gpu_memory_says_how_much_is_free(install: Install) -> None:
    install("10.13.3", "memory")
    with pytest.raises(UserError, match=r"memory \(1024 of 8192 MiB\): .*--workspace, --batch"):
        configured(open_backend("tensorrt"))


def test_a_builder_that_does_not_start_is_no_crash(install: Install) -> None:
    install("8.6.0", "no GPU")
    message = "does not start on this machine: CUDA .* the NVIDIA driver is missing or too old"
    with pytest.raises(UserError, match=message):
        configured(open_backend("tensorrt"))


@pytest.mark.usefixtures("gpu")
def test_a_build_loads_the_plugins_it_was_given(install: Install, tmp_path: Path) -> None:
    install("8.6.0")
    library = tmp_path / "libmat.so"
    library.write_bytes(b"code")
    plugin = {"path": str(library), "sha256": file_digest(library)}
    given = {"plugin": plugin}
    report = build_engine(model_of(), tmp_path / "a.plan", BuildOptions(), sources=given)
    assert report.manifest["request"]["plugin"] == plugin["sha256"]
    library.write_bytes(b"something else")
    with pytest.raises(UserError, match=r"is no plugin library for TensorRT 8\.6\.0"):
        build_engine(model_of(), tmp_path / "b.plan", BuildOptions(), sources=given, force=True)
    library.unlink()
    with pytest.raises(UserError, match="there is no plugin library"):
        build_engine(model_of(), tmp_path / "b.plan", BuildOptions(), sources=given, force=True)
    assert not (tmp_path / "b.plan").exists()


def test_rtx_takes_no_plugins(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    backend = open_backend("tensorrt-rtx", target="sm_89")
    with pytest.raises(UserError, match="no plugin layers"):
        backend.load_plugins(tmp_path / "libmat.so")
    with pytest.raises(UserError, match="no plugin layers"):
        backend.check_plugins("fp16", BuildOptions(target="sm_89"))


def test_what_a_tensorrt_builds_no_engine_with_plugins_of_is_refused(install: Install) -> None:
    install("8.6.0")
    backend = open_backend("tensorrt")
    for precision in ("fp32", "tf32", "fp16"):
        backend.check_plugins(precision, BuildOptions())
    with pytest.raises(UserError, match=r"8\.6\.0 has no bf16"):
        backend.check_plugins("bf16", BuildOptions())
    with pytest.raises(UserError, match="cannot be version-compatible"):
        backend.check_plugins("fp16", BuildOptions(version_compatible=True))
    install("10.13.3")
    open_backend("tensorrt").check_plugins("bf16", BuildOptions(hardware_compatible=True))


@pytest.mark.parametrize(("version", "major"), [("8.6.0", 8), ("10.13.3.9", 10), ("11.0.0", 11)])
def test_a_backend_knows_which_library_it_loads(install: Install, version: str, major: int) -> None:
    install(version)
    assert open_backend("tensorrt").major == major


def test_a_build_can_be_cancelled_where_there_is_a_monitor(install: Install) -> None:
    install("10.13.3", "hangs")
    with pytest.raises(UserError, match="cancelled"):
        configured(open_backend("tensorrt"), cancelled=lambda: True, timing_cache=KeptNowhere)


class KeptNowhere:
    """A timing cache for one build."""

    def __init__(self, config: Any) -> None:
        self._config = config

    def __enter__(self) -> None:
        self._config.set_timing_cache(self._config.create_timing_cache(b""), False)

    def __exit__(self, *_: object) -> None:
        pass


# -- engines in use --------------------------------------------------------------------------------


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(("version", "memory"), [("8.6.0", 1 << 20), ("11.0.0", 2 << 20)])
def test_an_engine_tells_its_memory_and_layers(install: Install, version: str, memory: int) -> None:
    install(version)
    backend = open_backend("tensorrt")
    engine = backend.deserialize(b'{"flags": []}')
    assert backend.context_memory(engine) == memory
    layers = backend.layer_information(engine)["Layers"]
    assert [layer["LayerType"] for layer in layers] == ["CaskConvolution", "Reformat"]
    with pytest.raises(UserError, match=f"takes {memory >> 20} MiB"):
        backend.create_context(engine)


@pytest.mark.usefixtures("gpu")
def test_a_plan_that_does_not_load_is_a_sentence(install: Install) -> None:
    install("10.13.3")
    with pytest.raises(UserError, match="does not load the plan: Serialization assertion failed"):
        open_backend("tensorrt").deserialize(b"x")


def test_nothing_is_loaded_without_a_gpu(install: Install) -> None:
    install("8.6.0")
    with pytest.raises(UserError, match="GPU"):
        open_backend("tensorrt").deserialize(b'{"flags": []}')


@pytest.mark.usefixtures("gpu")
def test_host_code_is_loaded_on_request_alone(install: Install) -> None:
    install("10.13.3")
    backend = open_backend("tensorrt")
    plan = b'{"flags": ["VERSION_COMPATIBLE"]}'
    with pytest.raises(UserError, match="host code"):
        backend.deserialize(plan)
    backend.allow_host_code = True
    assert backend.deserialize(plan) is not None


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("version", "plan"), [("10.13.3", b"plain"), ("10.14.1", b"INCLUDE_REFIT")]
)
def test_refitting_takes_weights_by_name(install: Install, version: str, plan: bytes) -> None:
    install(version)
    backend = open_backend("tensorrt")
    engine = backend.deserialize(b'{"flags": ["REFIT"]}')
    three = np.ones(3, np.float32)
    assert backend.refittable_weights(engine) == {"w", "b"}
    assert backend.refit(engine, {"w": three, "b": three, "folded": three}) == plan
    with pytest.raises(UserError, match="not given: 'b'"):
        backend.refit(engine, {"w": three})
    with pytest.raises(UserError, match="'w' does not fit the engine"):
        backend.refit(engine, {"w": np.ones(4, np.float32), "b": three})
    with pytest.raises(UserError, match="of another model"):
        backend.refit(engine, {"other": three})
    with pytest.raises(UserError, match="--refittable"):
        backend.refit(backend.deserialize(b'{"flags": []}'), {"w": three})


# -- the process that builds -----------------------------------------------------------------------


def leftovers(folder: Path) -> list[Path]:
    """Files of a test that no build should leave."""
    plans = [p for p in folder.iterdir() if ".plan" in p.name]  # also parts and manifests
    return [*(folder / "temporary").iterdir(), *plans]


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    return tmp_path / "mat.plan"


@pytest.mark.usefixtures("gpu")
def test_a_build_writes_plan_and_papers(install: Install, plan: Path, caches: Path) -> None:
    install("10.13.3.9")
    told: list[tuple[str, int, int]] = []
    report = build_engine(
        model_of(),
        plan,
        BuildOptions(level=1),
        sources={"onnx": {"path": "a.onnx"}, "command": ["mat-export", "trt", "a b.onnx"]},
        progress=lambda *event: told.append(event),
    )
    assert not report.cached
    assert json.loads(plan.read_bytes())["builder_optimization_level"] == 1
    manifest = json.loads((plan.parent / "mat.plan.json").read_text())
    assert manifest == json.loads(json.dumps(report.manifest))
    assert manifest["request"]["gpu"] == {"name": "Fake GPU", "capability": [8, 6], "driver": "12"}
    assert manifest["request"]["backend"] == "tensorrt"
    assert manifest["command"] == ["mat-export", "trt", "a b.onnx"]
    assert manifest["sources"]["onnx"] == {"path": "a.onnx"}
    assert manifest["layers"]["reformats"] == 1
    assert manifest["context_bytes"] == report.context_bytes == 2 << 20
    assert told[-1] == ("built", 100, 100)
    assert report.backend == "tensorrt 10.13.3.9"
    cache = caches / "mat-export" / "timing" / "tensorrt-10.13.3.9-fake-gpu.cache"
    assert CacheFile(cache).load() == b"new timed"
    assert not list((plan.parent / "temporary").iterdir())


@pytest.mark.usefixtures("gpu")
def test_a_version_compatible_engine_is_loaded_once_built(install: Install, plan: Path) -> None:
    install("10.13.3")
    report = build_engine(model_of(), plan, BuildOptions(version_compatible=True))
    assert report.layers is not None


@pytest.mark.usefixtures("gpu")
def test_the_same_request_builds_nothing(
    install: Install, plan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("10.13.3")
    first = build_engine(model_of(), plan, BuildOptions(level=1))

    with monkeypatch.context() as patched:
        patched.setattr("subprocess.Popen", no_process)
        second = build_engine(model_of(), plan, BuildOptions(level=1))
        assert second.cached
        assert second.manifest["sha256"] == first.manifest["sha256"]
        with pytest.raises(AssertionError, match="process"):
            build_engine(model_of(), plan, BuildOptions(level=1), force=True)


def again(plan: Path, notes: list[str] | None = None, **more: Any) -> BuildReport:
    """Ask for the engine of the tests below."""
    said = [] if notes is None else notes
    return build_engine(model_of(), plan, BuildOptions(level=1), note=said.append, **more)


@pytest.fixture
def elsewhere(install: Install, gpu: dict[str, Any], plan: Path) -> Path:
    """Where to ask for the engine that is built at `plan`."""
    install("10.13.3")
    sources = {"onnx": {"path": "a.onnx"}, "command": ["mat-export", "trt", "a.onnx"]}
    assert not again(plan, sources=sources).cached
    (plan.parent / "elsewhere").mkdir()
    return plan.parent / "elsewhere" / "other.plan"


def test_the_same_request_builds_nothing_whatever_its_output_is_called(
    plan: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record_parity(plan, {"passed": True})
    built = read_engine_manifest(plan)
    elsewhere.write_bytes(b"what was there")
    monkeypatch.setattr("subprocess.Popen", no_process)
    notes: list[str] = []
    command = ["mat-export", "trt", "b.onnx"]
    report = again(elsewhere, notes, sources={"onnx": {"path": "b.onnx"}, "command": command})
    assert report.cached
    assert notes == [f"the same request built '{plan}' before: copied"]
    assert elsewhere.read_bytes() == plan.read_bytes()
    assert elsewhere.stat().st_ino != plan.stat().st_ino
    sources = {**built["sources"], "onnx": {"path": "b.onnx"}}
    copied = {**built, "command": command, "sources": sources}
    assert read_engine_manifest(elsewhere) == json.loads(json.dumps(report.manifest)) == copied
    record_parity(elsewhere, {"passed": False})
    assert read_engine_manifest(plan) == built
    assert len(list(elsewhere.parent.iterdir())) == 2
    with pytest.raises(AssertionError, match="process"):
        again(elsewhere.with_name("third.plan"), force=True)


def test_an_engine_that_was_moved_is_known_once_it_is_asked_for_there(
    plan: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan.rename(elsewhere)
    Path(f"{plan}.json").rename(f"{elsewhere}.json")
    monkeypatch.setattr("subprocess.Popen", no_process)
    assert again(elsewhere).cached
    assert again(plan).cached


def removed(plan: Path, entry: Path) -> None:
    plan.unlink()


def without_papers(plan: Path, entry: Path) -> None:
    Path(f"{plan}.json").unlink()


def cut(plan: Path, entry: Path) -> None:
    plan.write_bytes(plan.read_bytes()[:-1])


def refitted(plan: Path, entry: Path) -> None:
    """Its manifest as `engines.refit` leaves it, the weights being the same."""
    manifest = read_engine_manifest(plan)
    facts = {"key": f"refit of {manifest['key']} with {manifest['request']['model']}"}
    save_engine(plan.read_bytes(), plan, {**manifest, **facts})


def replaced(plan: Path, entry: Path) -> None:
    save_engine(b"another plan", plan, read_engine_manifest(plan))


def no_entry(plan: Path, entry: Path) -> None:
    entry.unlink()


def no_json(plan: Path, entry: Path) -> None:
    entry.write_bytes(b"\xff{")


def nested(plan: Path, entry: Path) -> None:
    entry.write_text("[" * 100_000)


def a_list(plan: Path, entry: Path) -> None:
    entry.write_text("[]")


def no_path(plan: Path, entry: Path) -> None:
    entry.write_text('{"path": 3, "sha256": ""}')


def a_null(plan: Path, entry: Path) -> None:
    entry.write_text('{"path": "a\\u0000b", "sha256": ""}')


def a_folder(plan: Path, entry: Path) -> None:
    entry.unlink()
    entry.mkdir()


@pytest.mark.parametrize(
    "change",
    [
        *(removed, without_papers, cut, refitted, replaced),
        *(no_entry, no_json, nested, a_list, no_path, a_null, a_folder),
    ],
)
def test_what_is_not_as_it_was_built_is_built_anew_in_silence(
    plan: Path, elsewhere: Path, caches: Path, change: Callable[[Path, Path], None]
) -> None:
    (entry,) = (caches / "mat-export" / "engines").iterdir()
    change(plan, entry)
    notes: list[str] = []
    assert not again(elsewhere, notes).cached
    assert notes == []
    if change is not a_folder:
        assert json.loads(entry.read_text())["path"] == str(elsewhere)
    assert again(elsewhere).cached


def test_a_refitted_engine_is_built_anew_at_its_own_place(plan: Path, elsewhere: Path) -> None:
    refitted(plan, plan)
    notes: list[str] = []
    assert not again(plan, notes).cached
    assert notes == [
        f"building '{plan}' anew, since it was built otherwise: its weights were swapped"
    ]


def test_without_a_home_folder_engines_are_built_and_found_at_their_place(
    plan: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nowhere() -> None:
        raise UserError("there is no home folder to keep a cache in")

    monkeypatch.setattr("engines.build.cache_folder", nowhere)
    monkeypatch.setattr("engines.index.cache_folder", nowhere)
    assert not again(elsewhere).cached
    assert again(elsewhere).cached
    assert again(plan).cached


def test_a_cache_folder_that_cannot_be_written_is_no_hindrance(
    plan: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (plan.parent / "file").touch()
    monkeypatch.setattr("engines.index.cache_folder", lambda: plan.parent / "file")
    assert not again(elsewhere).cached
    assert again(elsewhere).cached


def test_a_copy_is_written_whole_or_not_at_all(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.replace", full)
        with pytest.raises(UserError, match="no space left"):
            again(elsewhere)
    assert not list(elsewhere.parent.iterdir())


@pytest.mark.usefixtures("gpu")
def test_any_other_request_builds_anew_and_says_why(
    install: Install, plan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("10.13.3")
    build_engine(model_of(), plan, BuildOptions())
    starts: list[str] = []

    def started(*_: Any, **__: Any) -> None:
        starts.append("")
        raise RuntimeError("enough")

    monkeypatch.setattr("engines.build.run_worker", started)

    def why(model: bytes | None = None, options: BuildOptions | None = None, **sources: Any) -> str:
        notes: list[str] = []
        with pytest.raises(RuntimeError, match="enough"):
            build_engine(
                model or model_of(),
                plan,
                options or BuildOptions(),
                note=notes.append,
                sources=sources,
            )
        return notes[0]

    assert "options.tf32: False, now True" in why(options=BuildOptions(tf32=True))
    assert "model: " in why(model_of(operator="Neg"))
    assert "plugin: none, now abc" in why(plugin={"path": "x.so", "sha256": "abc"})
    monkeypatch.setitem(GPU, "name", "Other GPU")
    assert "gpu.name: Fake GPU, now Other GPU" in why()
    monkeypatch.setitem(GPU, "name", "Fake GPU")
    install("10.14.0")
    assert "version: 10.13.3, now 10.14.0" in why()
    install("10.13.3")
    plan.write_bytes(plan.read_bytes()[:-1])
    assert "is not the file its manifest describes" in why()
    assert len(starts) == 6


@pytest.mark.usefixtures("gpu")
def test_a_parser_error_crosses_the_process(install: Install, tmp_path: Path, plan: Path) -> None:
    install("8.6.0", "refuses")
    with pytest.raises(UserError, match=r"'first_stage.enc.0/Unique_1' \(Unique\) of the module"):
        build_engine(model_of(), plan, BuildOptions())
    assert not leftovers(tmp_path)


@pytest.mark.usefixtures("gpu")
def test_warnings_are_shown_once_each_kind(install: Install, plan: Path) -> None:
    install("10.13.3", "fails")
    notes: list[str] = []
    with pytest.raises(UserError, match="could not build the engine"):
        build_engine(model_of(), plan, BuildOptions(), note=notes.append)
    assert notes[0] == "TensorRT warning: block.0/Add: slow 1"
    assert len([text for text in notes if "slow" in text]) == 1


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        ("crashes", r"died while building \(SIGSEGV, at '.+'\).*--level or --backend"),
        ("killed", r"was killed \(SIGKILL.*want of memory"),
    ],
)
def test_a_build_that_dies_is_a_sentence(
    install: Install, tmp_path: Path, plan: Path, behaviour: str, message: str
) -> None:
    install("10.13.3", behaviour)
    plan.write_bytes(b"an older engine")
    with pytest.raises(UserError, match=message):
        build_engine(model_of(), plan, BuildOptions())
    assert plan.read_bytes() == b"an older engine"
    assert leftovers(tmp_path) == [plan]


@pytest.mark.usefixtures("gpu")
def test_a_fault_of_ours_is_no_users_mistake(install: Install, tmp_path: Path, plan: Path) -> None:
    install("10.13.3", "raises")
    with pytest.raises(RuntimeError, match="no such method"):
        build_engine(model_of(), plan, BuildOptions())
    assert not leftovers(tmp_path)


@pytest.mark.usefixtures("gpu")
def test_a_process_that_hangs_when_done_is_ended(
    install: Install, plan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engines.process._PATIENCE_SECONDS", 0.3)
    install("10.13.3", "hangs at exit")
    started = time.monotonic()
    assert build_engine(model_of(), plan, BuildOptions()).bytes > 0
    assert time.monotonic() - started < 20


# -- the timing cache ------------------------------------------------------------------------------


def test_a_timing_cache_comes_back(tmp_path: Path) -> None:
    file = CacheFile(tmp_path / "a" / "b.cache")
    assert file.load() is None
    file.save(b"timings")
    assert file.load() == b"timings"


@pytest.mark.parametrize("damage", [lambda d: d[:-1], lambda d: b"", lambda d: b"x" + d])
def test_a_damaged_timing_cache_is_not_given_to_tensorrt(
    tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    file = CacheFile(tmp_path / "b.cache")
    file.save(b"timings")
    file.path.write_bytes(damage(file.path.read_bytes()))
    with pytest.raises(UserError, match="damaged"):
        file.load()


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize(
    ("content", "why"), [(b"garbage", "damaged"), (None, "of another TensorRT or GPU")]
)
def test_a_timing_cache_of_no_use_is_left_aside_with_a_note(
    install: Install, plan: Path, tmp_path: Path, content: bytes | None, why: str, named: bool
) -> None:
    """And replaced where nobody named it; what a user named is whatever it is."""
    install("10.13.3")
    default = timing_cache_path(open_backend("tensorrt"), replace(ADA, name="Fake GPU"))
    assert default is not None
    cache = CacheFile(tmp_path / "own.cache" if named else default)
    if content is None:
        cache.save(b"another GPU's")
    else:
        cache.path.parent.mkdir(parents=True, exist_ok=True)
        cache.path.write_bytes(content)
    before = cache.path.read_bytes()
    notes: list[str] = []
    given = cache.path if named else None
    build_engine(model_of(), plan, BuildOptions(), note=notes.append, timing_cache=given)
    (said,) = (text for text in notes if "left aside" in text)
    assert why in said
    assert ("nothing is saved" in said) is named
    if named:
        assert cache.path.read_bytes() == before
    else:
        assert (cache.load() or b"").startswith(b"new timed")


@pytest.mark.usefixtures("gpu")
def test_an_empty_timing_cache_is_as_good_as_none(
    install: Install, plan: Path, tmp_path: Path
) -> None:
    install("10.13.3")
    cache = CacheFile(tmp_path / "own.cache")
    cache.path.touch()
    notes: list[str] = []
    build_engine(model_of(), plan, BuildOptions(), note=notes.append, timing_cache=cache.path)
    assert not notes
    assert cache.load() == b"new timed"


@pytest.mark.usefixtures("gpu")
def test_the_next_build_goes_on_with_the_timing_cache(
    install: Install, plan: Path, tmp_path: Path
) -> None:
    install("10.13.3")
    cache = CacheFile(tmp_path / "own.cache")
    for _ in range(2):
        build_engine(model_of(), plan, BuildOptions(), timing_cache=cache.path, force=True)
    assert cache.load() == b"new timed timed"


def test_timings_of_two_builds_at_once_are_merged(tmp_path: Path) -> None:
    config = make_tensorrt("10.13.3").Builder(None).create_builder_config()
    file = CacheFile(tmp_path / "own.cache")
    file.save(b"old")
    saved = threading.Event()
    with CacheKeeper(config, file, lambda *_: None, threading.Event(), saved):
        assert not saved.is_set()
        config.get_timing_cache().data += b" ours"
        file.save(b"old theirs")
    assert saved.is_set()
    assert file.load() == b"old theirsold ours"


def test_a_build_that_is_cancelled_keeps_its_timings_beside_those_of_another(
    tmp_path: Path,
) -> None:
    config = make_tensorrt("8.6.0").Builder(None).create_builder_config()
    file = CacheFile(tmp_path / "own.cache")
    file.save(b"old")
    cancelled, saved = threading.Event(), threading.Event()
    keeper = CacheKeeper(config, file, lambda *_: None, cancelled, saved)
    with keeper:
        config.get_timing_cache().data += b" ours"
        file.save(b"old theirs")
        cancelled.set()
        assert wait_until(saved.is_set)
        assert file.load() == b"old theirsold ours"
        assert config.get_timing_cache().data == b"old ours", "the running build has its own"


def test_the_timing_cache_is_set_once_and_held(tmp_path: Path) -> None:
    config = make_tensorrt("8.6.0").Builder(None).create_builder_config()
    given: list[weakref.ref[Any]] = []
    plain = config.set_timing_cache

    def set_timing_cache(cache: Any, ignore_mismatch: bool) -> bool:
        given.append(weakref.ref(cache))
        return bool(plain(type(cache)(cache.data), ignore_mismatch))  # it holds no reference

    config.set_timing_cache = set_timing_cache
    file = CacheFile(tmp_path / "own.cache")
    file.save(b"old")
    with CacheKeeper(config, file, lambda *_: None, threading.Event(), threading.Event()):
        gc.collect()
        (one,) = given
        assert one() is not None


@pytest.mark.parametrize("meanwhile", [b"a picture", None])
def test_what_another_program_has_written_meanwhile_is_left(
    tmp_path: Path, meanwhile: bytes | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engines.worker._SAVE_SECONDS", 0.2)
    config = make_tensorrt("10.13.3").Builder(None).create_builder_config()
    file = CacheFile(tmp_path / "own.cache")
    lines: list[str] = []
    stopped = threading.Event()
    with CacheKeeper(config, file, lambda *line: lines.append(line[1]), stopped, threading.Event()):
        if meanwhile is None:
            file.save(b"another GPU's")
        else:
            file.path.write_bytes(meanwhile)
        before = file.path.read_bytes()
        config.get_timing_cache().data += b" ours"
        time.sleep(0.6)  # some saves are due
    assert file.path.read_bytes() == before
    assert len(lines) == 1
    assert "left aside, and nothing is saved" in lines[0]


def test_a_growing_timing_cache_is_saved_while_the_build_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engines.worker._SAVE_SECONDS", 0.2)
    config = make_tensorrt("10.13.3").Builder(None).create_builder_config()
    file = CacheFile(tmp_path / "own.cache")
    with CacheKeeper(config, file, lambda *_: None, threading.Event(), threading.Event()):
        for growth in (b" a", b" b"):
            config.get_timing_cache().data += growth
            assert wait_until(lambda: file.load() == config.get_timing_cache().data)


def test_each_tensorrt_and_gpu_has_its_timing_cache(
    install: Install, caches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("10.13.3")
    one = timing_cache_path(open_backend("tensorrt"), ADA)
    two = timing_cache_path(open_backend("tensorrt"), replace(ADA, name="NVIDIA RTX 4090/x"))
    install("10.14.0")
    three = timing_cache_path(open_backend("tensorrt"), ADA)
    assert len({one, two, three}) == 3
    assert two == caches / "mat-export" / "timing" / "tensorrt-10.13.3-nvidia-rtx-4090-x.cache"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/somewhere")
    elsewhere = timing_cache_path(open_backend("tensorrt"), ADA)
    assert elsewhere is not None
    assert elsewhere.is_relative_to("/somewhere/.cache/mat-export")


# -- Ctrl-C ----------------------------------------------------------------------------------------

_SCRIPT = """
import signal
import sys
import engines.process
from pathlib import Path
from engines.build import build_engine
from engines.options import BuildOptions
engines.process._PATIENCE_SECONDS = 1.0
signal.signal(signal.SIGINT, signal.default_int_handler)  # also where tests run in the background
folder = Path(sys.argv[1])
options = BuildOptions.from_json(sys.argv[2])
try:
    build_engine((folder / "model.onnx").read_bytes(), folder / "mat.plan", options,
                 progress=lambda *event: print(*event, flush=True))
except KeyboardInterrupt:
    sys.exit(130)
"""


def building(folder: Path, options: BuildOptions) -> subprocess.Popen[str]:
    """A process that builds ``model.onnx`` of a folder, once it says that it does."""
    process = subprocess.Popen(
        [sys.executable, "-c", _SCRIPT, str(folder), options.to_json()],
        stdout=subprocess.PIPE,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder / "site"), str(ROOT)])},
    )
    assert process.stdout is not None
    assert process.stdout.readline(), "the build did not start"
    return process


def workers(folder: Path) -> list[int]:
    """Running processes that build in this test's folder for temporary files."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = entry.read_bytes()
            state = (entry.parent / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if b"engines.worker" in line and str(folder).encode() in line and state != "Z":
            found.append(int(entry.parent.name))
    return found


def wait_until(condition: Callable[[], bool], seconds: float = 15.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at /proc")


@needs_proc
@pytest.mark.parametrize("version", ["8.6.0", "10.13.3"])
def test_ctrl_c_ends_the_build_and_leaves_the_timing_cache_alone(
    install: Install, tmp_path: Path, caches: Path, version: str
) -> None:
    install(version, "hangs")
    (tmp_path / "model.onnx").write_bytes(model_of())
    process = building(tmp_path, BuildOptions())
    assert wait_until(lambda: bool(workers(tmp_path)))
    (worker,) = workers(tmp_path)
    assert os.getsid(worker) == worker  # a terminal's Ctrl-C does not reach it
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    assert time.monotonic() - started < 5
    assert not workers(tmp_path)
    assert not leftovers(tmp_path)
    (cache,) = (caches / "mat-export" / "timing").iterdir()
    assert CacheFile(cache).load() == b"new timed so far"


@needs_proc
def test_ctrl_c_ends_a_build_that_does_not_listen(install: Install, tmp_path: Path) -> None:
    install("8.6.0", "stuck")
    (tmp_path / "model.onnx").write_bytes(model_of())
    process = building(tmp_path, BuildOptions())
    assert wait_until(lambda: bool(workers(tmp_path)))
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    assert not workers(tmp_path)
    assert not leftovers(tmp_path)


@needs_proc
def test_a_worker_does_not_outlive_its_parent(install: Install, tmp_path: Path) -> None:
    install("8.6.0", "hangs")
    (tmp_path / "model.onnx").write_bytes(model_of())
    process = building(tmp_path, BuildOptions())
    assert wait_until(lambda: bool(workers(tmp_path)))
    process.kill()
    process.wait()
    assert wait_until(lambda: not workers(tmp_path))
    assert not leftovers(tmp_path)


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (b"\xff\xff\xff", "not a readable ONNX model"),
        (b"", "not a model of mat-export"),
        (model_of(None), "not a model of mat-export: export one"),
    ],
)
def test_a_file_that_is_not_ours_is_refused(plan: Path, model: bytes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_engine(model, plan, BuildOptions(target="sm_89"))
    assert not plan.exists()


def test_an_output_that_cannot_be_written_is_the_first_thing_to_hear_of(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or directory"):
        build_engine(b"", tmp_path / "none" / "mat.plan", BuildOptions())
    (tmp_path / "mat.plan.json").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        build_engine(b"", tmp_path / "mat.plan", BuildOptions())


def test_a_range_of_a_static_graph_is_refused_before_the_build(
    plan: Path, install: Install, gpu: dict[str, Any]
) -> None:
    install("10.13.3")
    with pytest.raises(UserError, match="--batch dynamic"):
        build_engine(model_of(), plan, BuildOptions(batch=(1, 2, 4)))


@pytest.mark.usefixtures("gpu")
def test_a_temporary_folder_without_room_is_a_sentence(
    install: Install, plan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("10.13.3")
    monkeypatch.setattr("tempfile.tempdir", str(plan.parent / "none"))
    with pytest.raises(UserError, match="set TMPDIR"):
        build_engine(model_of(), plan, BuildOptions())


@pytest.mark.usefixtures("gpu")
def test_a_disk_that_is_full_once_the_engine_is_built_is_a_sentence(
    install: Install, tmp_path: Path, plan: Path
) -> None:
    install("10.13.3", "fills the disk")
    plan.write_bytes(b"an older engine")
    where = re.escape(str(tmp_path / "temporary"))
    with pytest.raises(UserError, match=f"cannot write temporary files to '{where}' .*set TMPDIR"):
        build_engine(model_of(), plan, BuildOptions())
    assert plan.read_bytes() == b"an older engine"
    assert leftovers(tmp_path) == [plan]


@pytest.mark.usefixtures("gpu")
def test_no_place_for_temporary_files_is_a_sentence(
    install: Install, plan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none() -> None:
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

    install("10.13.3")
    monkeypatch.setattr("tempfile._get_default_tempdir", none)
    with pytest.raises(UserError, match=r"No usable temporary directory.*set TMPDIR"):
        build_engine(model_of(), plan, BuildOptions())


# -- TensorRT-RTX builds engines here --------------------------------------------------------------


@pytest.fixture(scope="module")
def rtx() -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")


def typed(path: Path, precision: str) -> bytes:
    """An exported graph in a precision, as engines are built of."""
    from mat_export.inlining import inline_functions
    from mat_export.precision import apply_precision

    exported = onnx.load(path)
    in_fp32 = precision == "fp32"
    proto = inline_functions(exported) if in_fp32 else apply_precision(exported, precision).model
    data: bytes = proto.SerializeToString()
    return data


def no_process(*_: Any, **__: Any) -> None:
    raise AssertionError("a process was started")


@pytest.mark.usefixtures("rtx")
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_rtx_builds_an_engine_without_a_gpu(
    tiny_onnx: Path, plan: Path, precision: str, monkeypatch: pytest.MonkeyPatch, caches: Path
) -> None:
    model, options = typed(tiny_onnx, precision), BuildOptions(target="sm_89")
    notes: list[str] = []
    told: list[str] = []
    report = build_engine(
        model, plan, options, note=notes.append, progress=lambda phase, *_: told.append(phase)
    )
    assert not report.cached
    assert plan.stat().st_size == report.bytes > 10_000_000
    assert report.manifest["graph"]["precision"] == precision
    assert report.manifest["request"]["options"]["target"] == "sm_89"
    assert report.manifest["request"]["gpu"] is None
    assert report.layers is None
    assert report.manifest["warnings"] == notes == []
    assert "Building engine" in told
    assert not (caches / "mat-export" / "timing").exists()  # RTX times nothing
    monkeypatch.setattr("subprocess.Popen", no_process)
    assert build_engine(model, plan, options).cached


@pytest.fixture(scope="module")
def tiny_batches(tiny_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small preset for any number of pictures."""
    from mat_export.export import export_onnx

    path = tmp_path_factory.mktemp("batches") / "tiny.onnx"
    export_onnx(tiny_checkpoint, path, GraphSpec(tiny_checkpoint.config, batch=None))
    return path


@pytest.fixture(scope="module")
def tiny_sizes(tiny_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small preset for pictures of several sizes."""
    from mat_export.export import export_onnx

    path = tmp_path_factory.mktemp("sizes") / "tiny.onnx"
    spec = GraphSpec(tiny_checkpoint.config, dynamic_size=True, noise="input")
    export_onnx(tiny_checkpoint, path, spec)
    return path


@pytest.mark.usefixtures("rtx")
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_rtx_builds_a_dynamic_batch(tiny_batches: Path, plan: Path, precision: str) -> None:
    options = BuildOptions(target="sm_120", batch=(1, 2, 4), level=1)
    report = build_engine(typed(tiny_batches, precision), plan, options)
    assert report.manifest["graph"]["precision"] == precision
    profiles = report.manifest["request"]["profiles"]
    assert profiles["z"] == ((1, 128), (2, 128), (4, 128))
    assert report.bytes > 10_000_000


@pytest.mark.usefixtures("rtx")
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_rtx_builds_a_dynamic_size(tiny_sizes: Path, plan: Path, precision: str) -> None:
    options = BuildOptions(target="sm_89", size=((256, 256), (256, 256), (256, 512)), level=1)
    report = build_engine(typed(tiny_sizes, precision), plan, options)
    assert report.manifest["graph"]["precision"] == precision
    profiles = report.manifest["request"]["profiles"]
    assert profiles["image"] == ((1, 3, 256, 256), (1, 3, 256, 256), (1, 3, 256, 512))
    assert report.bytes > 10_000_000


@pytest.mark.usefixtures("rtx")
def test_rtx_names_the_node_that_it_refuses(plan: Path) -> None:
    with pytest.raises(UserError) as caught:
        build_engine(model_of(), plan, BuildOptions(target="sm_89"))
    text = str(caught.value)
    assert (
        "the node 'first_stage.enc.0/Unique_1' (Unique) of the module 'first_stage.enc.0'" in text
    )
    assert not plan.exists()


@pytest.mark.usefixtures("rtx")
def test_rtx_says_what_it_cannot_build(plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For Turing it compiles no FP32 matrix products; once it does, it need not be refused."""
    a = helper.make_tensor_value_info("a", TensorProto.FLOAT, [64, 64])
    b = helper.make_tensor_value_info("b", TensorProto.FLOAT, [64, 64])
    node = helper.make_node("MatMul", ["a", "a"], ["b"], name="mapping.fc.0/MatMul")
    graph = helper.make_graph([node], "g", [a], [b])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    helper.set_model_props(proto, {METADATA_KEY: TINY.to_json()})
    model, options = proto.SerializeToString(), BuildOptions(target="sm_75")
    with pytest.raises(UserError, match=r"could not build the engine: .*Turing") as caught:
        open_backend("tensorrt-rtx").build(model, options, {}, BuildHooks())
    assert "\n" not in str(caught.value)
    monkeypatch.setattr("subprocess.Popen", no_process)
    with pytest.raises(UserError, match=r"before sm_80, .*, got sm_75"):
        build_engine(model, plan, options)
    assert not plan.exists()


@needs_proc
@pytest.mark.usefixtures("rtx")
def test_ctrl_c_ends_a_real_build(tiny_onnx: Path, tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "model.onnx").write_bytes(typed(tiny_onnx, "fp32"))
    process = building(tmp_path, BuildOptions(target="sm_89"))
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    assert not workers(tmp_path)
    assert not leftovers(tmp_path)
