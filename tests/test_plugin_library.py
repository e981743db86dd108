"""The plugin library: its compiler and headers are found, it is built whole, and says what it is.

Real builds need nvcc and CMake; everything else runs without them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import cli
from engines.plugins import library as module
from engines.plugins.kernels import EPILOGUE_PARTS, SOURCES
from engines.plugins.library import (
    LibraryDescription,
    build_library,
    cached_library,
    check_library,
    describe_library,
    library_for,
    sources_digest,
)
from engines.plugins.toolchain import find_headers, find_toolchain
from mat_export.contract import UserError

TOOLS = shutil.which("nvcc") is not None and shutil.which("cmake") is not None
needs_nvcc = pytest.mark.skipif(not TOOLS, reason="needs CUDA's compiler nvcc, and CMake")


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine without a compiler, CMake and headers; a folder that is on its PATH."""
    for name in ("CUDA_HOME", "CUDA_PATH", "TENSORRT_INCLUDE", "TENSORRT_ROOT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("engines.plugins.toolchain._FOLDERS", ())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    monkeypatch.setenv("PATH", str(folder))
    return folder


def tool(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def write_headers(folder: Path, version: str = "10.14.1", named: bool = True) -> Path:
    """NvInferVersion.h of a version, as TensorRT writes it since 10.11, or as before."""
    folder.mkdir(parents=True)
    lines = []
    for part, number in zip(("MAJOR", "MINOR", "PATCH"), version.split("."), strict=True):
        if named:
            lines.append(f"#define TRT_{part}_ENTERPRISE {number}")
            lines.append(f"#define NV_TENSORRT_{part} TRT_{part}_ENTERPRISE //!< TensorRT {part}.")
        else:
            lines.append(f"#define NV_TENSORRT_{part} {number} //!< TensorRT {part}.")
    (folder / "NvInferVersion.h").write_text("\n".join(lines))
    return folder


# -- what a build needs ----------------------------------------------------------------------------


@pytest.mark.parametrize(("version", "named"), [("10.14.1", True), ("8.6.1", False)])
def test_headers_say_their_version_in_either_way(tmp_path: Path, version: str, named: bool) -> None:
    folder = write_headers(tmp_path / "include", version, named)
    headers = find_headers(folder)
    assert (headers.folder, headers.version) == (folder, version)
    assert headers.major == int(version.split(".")[0])


def test_headers_are_looked_for_where_the_user_says_then_in_usual_places(
    bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = [write_headers(tmp_path / name / "include") for name in ("usual", "root", "named")]
    usual, root, named = places
    given = write_headers(tmp_path / "given")
    monkeypatch.setattr("engines.plugins.toolchain._FOLDERS", (str(tmp_path), str(usual)))
    assert find_headers().folder == usual
    monkeypatch.setenv("TENSORRT_ROOT", str(root.parent))
    assert find_headers().folder == root
    monkeypatch.setenv("TENSORRT_INCLUDE", str(named))
    assert find_headers().folder == named
    assert find_headers(given).folder == given


def test_headers_of_another_tensorrt_are_passed_by(
    bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = write_headers(tmp_path / "old", "8.6.1", named=False)
    odd = write_headers(tmp_path / "odd", "9.3.0")
    new = write_headers(tmp_path / "new")
    monkeypatch.setattr("engines.plugins.toolchain._FOLDERS", tuple(map(str, (odd, old, new))))
    assert find_headers().folder == old
    assert find_headers(major=10).folder == new
    with pytest.raises(UserError, match=r"TensorRT 11 were not found .*9\.3\.0.*8\.6\.1.*10\.14"):
        find_headers(major=11)
    with pytest.raises(UserError, match=r"there is 8\.6\.1 in"):
        find_headers(old, major=10)
    with pytest.raises(UserError, match=r"9\.3\.0 in .* has no plugins of ours"):
        find_headers(odd)


def test_what_is_missing_is_named_with_the_way_to_get_it(
    bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out" / "lib.so"
    output.parent.mkdir()
    with pytest.raises(UserError, match=r"nvcc .* install the CUDA toolkit"):
        build_library(output)
    tool(bare / "nvcc", "exit 0")
    with pytest.raises(UserError, match=r"CMake.* pip install cmake"):
        build_library(output)
    tool(bare / "cmake", "exit 0")
    with pytest.raises(UserError, match="--tensorrt-include or TENSORRT_INCLUDE"):
        build_library(output)
    with pytest.raises(UserError, match=r"--tensorrt-include is .* holds no NvInferVersion\.h"):
        build_library(output, tensorrt_include=tmp_path)
    monkeypatch.setenv("TENSORRT_ROOT", str(tmp_path))
    with pytest.raises(UserError, match="TENSORRT_ROOT's include is"):
        build_library(output)
    assert list(output.parent.iterdir()) == []


def test_a_build_that_fails_says_why_and_leaves_nothing(bare: Path, tmp_path: Path) -> None:
    headers = write_headers(tmp_path / "include")
    output = tmp_path / "out" / "lib.so"
    output.parent.mkdir()
    tool(bare / "nvcc", 'if [ "$1" = --list-gpu-code ]; then echo sm_75; echo sm_90; fi')
    tool(bare / "cmake", "echo no host compiler; exit 1")
    with pytest.raises(UserError, match=r"CMake did not configure .*: no host compiler"):
        build_library(output, tensorrt_include=headers)
    tool(bare / "cmake", 'if [ "$1" = --build ]; then echo no such header >&2; exit 2; fi')
    with pytest.raises(UserError, match="did not compile: no such header"):
        build_library(output, tensorrt_include=headers)
    with pytest.raises(UserError, match="does not compile for sm_70; it knows sm_75, sm_90"):
        build_library(output, tensorrt_include=headers, architectures=["sm_90", "sm_70"])
    with pytest.raises(UserError, match="a target is"):
        build_library(output, tensorrt_include=headers, architectures=["hopper"])
    assert list(output.parent.iterdir()) == []


# -- what a library is -----------------------------------------------------------------------------

BOTH = LibraryDescription("V3", "10.14.1", 10, ("sm_75", "sm_86", "sm_90"), "13.0.88", "0")


@pytest.mark.parametrize(
    ("architectures", "runs", "fails"),
    [
        (("sm_75",), [(7, 5)], [(7, 0), (8, 0)]),
        (("sm_80",), [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0)]),
        (("sm_86", "sm_90"), [(8, 6), (8, 9), (9, 0)], [(8, 0), (10, 0)]),
        (("sm_90", "compute_90"), [(9, 0), (10, 0), (12, 0)], [(8, 9)]),
        (("sm_120",), [(12, 0), (12, 1)], [(10, 0)]),
        (("sm_90a", "compute_90a"), [(9, 0)], [(8, 9), (10, 0), (12, 0)]),
        (("sm_80", "sm_90a"), [(8, 0), (9, 0)], [(10, 0)]),
        (("sm_100f", "compute_100f"), [(10, 0), (10, 3)], [(9, 0), (12, 0)]),
    ],
)
def test_code_runs_on_its_generation_and_ptx_on_later_ones(
    architectures: tuple[str, ...], runs: list[tuple[int, int]], fails: list[tuple[int, int]]
) -> None:
    library = LibraryDescription("V3", "10.14.1", 10, architectures, "13.0.88", "0")
    assert [library.runs_on(capability) for capability in runs] == [True] * len(runs)
    assert [library.runs_on(capability) for capability in fails] == [False] * len(fails)


def test_a_library_for_another_tensorrt_or_gpu_is_refused_with_the_command_that_builds_one() -> (
    None
):
    check_library(BOTH, 10, (8, 9))
    with pytest.raises(
        UserError, match=r"for TensorRT 10, and this is TensorRT 11: .*plugins build"
    ):
        check_library(BOTH, 11, (8, 9))
    with pytest.raises(UserError, match=r"sm_75, sm_86, sm_90, which .* 12\.0 .*--arch sm_120"):
        check_library(BOTH, 10, (12, 0))


def test_a_file_that_is_no_plugin_library_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no plugin library"):
        describe_library(tmp_path / "none.so")
    text = tmp_path / "text.so"
    text.write_bytes(b"no library")
    with pytest.raises(UserError, match="no plugin library of this toolkit"):
        describe_library(text)
    if shutil.which("gcc") is not None:
        other = tmp_path / "other.so"
        command = ["gcc", "-shared", "-x", "c", "/dev/null", "-o", str(other)]
        subprocess.run(command, check=True)
        with pytest.raises(UserError, match="it does not describe itself"):
            describe_library(other)


# -- a real one ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def headers() -> Path:
    try:
        return find_headers(major=10).folder
    except UserError as error:
        pytest.skip(f"needs TensorRT 10's headers: {error}")


@pytest.fixture(scope="module")
def compiled(headers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library for TensorRT 10, with code for one GPU; what it told while it was built."""
    if not TOOLS:
        pytest.skip("needs CUDA's compiler nvcc, and CMake")
    path = tmp_path_factory.mktemp("library") / "libmat_plugins.so"
    heard: list[tuple[str, int, int]] = []
    build_library(
        path,
        tensorrt_include=headers,
        architectures=["9.0"],
        progress=lambda *state: heard.append(state),
    )
    (path.parent / "heard.json").write_text(json.dumps(heard))
    return path


def test_a_build_tells_how_far_it_is(compiled: Path) -> None:
    heard = json.loads((compiled.parent / "heard.json").read_text())
    assert [what for what, _, _ in heard][:2] == ["configuring", "compiling kernels.cu"]
    assert [what for what, _, _ in heard][-2:] == ["linking", "done"]
    done = [done for _, done, _ in heard]
    assert done == sorted(done)
    assert (done[0], done[-1]) == (0, 100)
    assert {total for _, _, total in heard} == {100}
    assert sorted(p.name for p in compiled.parent.iterdir()) == ["heard.json", compiled.name]


def test_a_library_says_what_it_is_without_a_gpu_or_tensorrt(compiled: Path, headers: Path) -> None:
    made = describe_library(compiled)
    assert (made.interface, made.tensorrt_major) == ("V3", 10)
    assert made.tensorrt == find_headers(headers).version
    assert made.architectures == ("sm_90", "compute_90")
    assert made.compiler == find_toolchain(headers).compiler
    assert made.sources == sources_digest()


def test_a_library_shows_its_entry_points_and_nothing_else(compiled: Path) -> None:
    if shutil.which("nm") is None:
        pytest.skip("needs binutils")
    listed = subprocess.run(
        ["nm", "-D", "--defined-only", str(compiled)], capture_output=True, text=True, check=True
    )
    names = {line.split()[-1] for line in listed.stdout.splitlines()}
    assert names == {"getCreators", "setLoggerFinder", "mat_plugins_describe"}


_CREATORS = """
import json, sys
import tensorrt_rtx
registry = tensorrt_rtx.get_plugin_registry()
before = {creator.name for creator in registry.all_creators}
registry.load_library(sys.argv[1])
print(json.dumps([
    [creator.name, creator.plugin_version, creator.plugin_namespace,
     [field.name for field in creator.field_names]]
    for creator in registry.all_creators if creator.name not in before
]))
"""


def test_a_registry_of_nvidias_lists_its_creators(compiled: Path) -> None:
    """That of TensorRT-RTX, where no network could use them."""
    pytest.importorskip("tensorrt_rtx", reason="needs TensorRT-RTX, whose registry is asked")
    done = subprocess.run(
        [sys.executable, "-c", _CREATORS, str(compiled)], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == [
        ["MaskedWindowAttention", "1", "", ["window", "shift", "heads"]],
        ["WindowAttention", "1", "", ["window", "shift", "heads"]],
        ["MaskPropagation", "1", "", ["window", "shift"]],
        ["FusedEpilogue", "1", "", ["filter", "pad", "gain", "slope", *EPILOGUE_PARTS]],
        ["MaskedMapAttention", "1", "", ["window", "shift", "heads"]],
        ["MapAttention", "1", "", ["window", "shift", "heads"]],
        ["TokenNorm", "1", "", ["floor"]],
    ]


@needs_nvcc
def test_cmake_refuses_a_tensorrt_between_8_and_10(tmp_path: Path) -> None:
    headers = write_headers(tmp_path / "include", "9.3.0")
    command = ["cmake", "-S", str(SOURCES), "-B", str(tmp_path / "build")]
    done = subprocess.run(
        [*command, f"-DTENSORRT_INCLUDE={headers}"], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "the headers are of TensorRT 9: give those of 8.6, or of 10 or" in done.stderr


@needs_nvcc
def test_by_default_there_is_code_for_each_generation_that_the_compiler_knows(
    tmp_path: Path,
) -> None:
    headers, build = write_headers(tmp_path / "include"), tmp_path / "build"
    command = ["cmake", "-S", str(SOURCES), "-B", str(build), f"-DTENSORRT_INCLUDE={headers}"]
    subprocess.run(command, check=True, capture_output=True)
    flags = (build / "CMakeFiles" / "mat_plugins.dir" / "flags.make").read_text()
    coded = re.findall(r"code=\[?sm_(\d+)", flags)
    known = {name.removeprefix("sm_") for name in find_toolchain(headers).architectures}
    ours = ("75", "80", "86", "89", "90", "100", "110", "120")
    assert coded == [number for number in ours if number in known]
    assert re.findall(r"code=\[?compute_(\d+)", flags) == coded[-1:]


def test_the_cache_holds_one_library_for_each_tensorrt_and_gpu(
    compiled: Path, headers: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    builds: list[list[str] | None] = []

    def build(tools: object, output: Path, targets: list[str] | None, progress: object) -> Path:
        builds.append(targets)
        return Path(shutil.copy(compiled, output))

    monkeypatch.setattr(module, "_build", build)
    assert cached_library(10, (9, 0)) is None
    path = library_for(10, (9, 0), tensorrt_include=headers)
    assert path.parent == tmp_path / "mat-export" / "plugins"
    assert library_for(10, (9, 0), tensorrt_include=headers) == path
    assert builds == [["sm_90"]]
    assert cached_library(10, (9, 0)) == path
    assert cached_library(10, (12, 0)) == path  # by way of its PTX
    assert cached_library(10, (8, 9)) is None
    assert cached_library(11, (9, 0)) is None
    (path.parent / "libmat_plugins-trt10.0.0-broken.so").write_bytes(b"no library")
    assert cached_library(10, (9, 0)) == path
    monkeypatch.setattr(module, "sources_digest", lambda: "of other sources")
    assert cached_library(10, (9, 0)) is None
    assert library_for(10, (9, 0), tensorrt_include=headers) != path
    assert len(builds) == 2


def test_without_a_compiler_the_cache_is_all_there_is(
    compiled: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", os.devnull)
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="nvcc"):
        library_for(10, (9, 0))
    folder = tmp_path / "mat-export" / "plugins"
    folder.mkdir(parents=True)
    kept = Path(shutil.copy(compiled, folder / "libmat_plugins-trt10.14.1-sm_90-0.so"))
    assert library_for(10, (9, 0)) == kept


def test_the_command_builds_a_library_and_says_how_to_use_it(
    compiled: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    asked = {}

    def build(output: Path, **options: object) -> Path:
        asked.update(options)
        return Path(shutil.copy(compiled, output))

    monkeypatch.setattr(module, "build_library", build)
    output = tmp_path / "libmat.so"
    command = ["mat-export", "plugins", "build", "--arch", "sm_89", "--arch", "9.0"]
    monkeypatch.setattr("sys.argv", [*command, "-o", str(output)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0
    assert asked["architectures"] == ["sm_89", "9.0"]
    shown = capfd.readouterr()
    assert "10, headers of 10." in shown.out
    assert "IPluginV3" in shown.out
    assert "sm_90, compute_90" in shown.out
    assert f"--plugins on --plugin-library {output}" in shown.err
    assert f"trtexec --dynamicPlugins={output}" in shown.err
