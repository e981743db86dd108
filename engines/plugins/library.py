"""The plugin library ``libmat_plugins.so``: built with CMake, described by itself, kept in a cache.

A library fits one generation of TensorRT and some GPUs. It says which, without a GPU or TensorRT,
so that a wrong one is refused with a sentence before anything loads it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from tempfile import TemporaryDirectory

from engines.options import capability_of, parse_target
from engines.plugins.kernels import SOURCES
from engines.plugins.toolchain import Toolchain, find_toolchain
from mat_export.contract import UserError
from mat_export.files import atomic_path, cache_folder, require_folder, require_writable

__all__ = [
    "LIBRARY_NAME",
    "LibraryDescription",
    "build_library",
    "cached_library",
    "check_library",
    "describe_library",
    "kept_libraries",
    "library_for",
    "sources_digest",
]

LIBRARY_NAME = "libmat_plugins.so"
"""What the library is called unless it is named otherwise."""

_PATH = str | os.PathLike[str]

BuildProgress = Callable[[str, int, int], None]
"""Called with what is being done, and how many percent of a hundred are done."""

Capability = tuple[int, int]

_DESCRIBE = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
try:
    describe = library.mat_plugins_describe
except AttributeError:
    sys.exit("it does not describe itself")
describe.restype = ctypes.c_char_p
print(describe().decode())
"""

_STEP = re.compile(r"\[\s*(\d+)%\] (?:Building \w+ object .*?([\w.]+)\.o$|(Linking).*)")
"""A line of a build by CMake: how far it is, and at which file."""


@dataclass(frozen=True)
class LibraryDescription:
    """What a library says of itself.

    Attributes:
        interface: ``V2`` (TensorRT 8.6) or ``V3`` (from 10 on).
        tensorrt: The version of the headers it was compiled with, such as ``10.14.1``.
        tensorrt_major: Its first number: the TensorRT that loads it.
        architectures: What it has code for: ``sm_NN``, and ``compute_NN`` for any later GPU; with
            ``a`` behind the number for that GPU alone, with ``f`` for its generation.
        compiler: nvcc's version, such as ``13.0.88``.
        sources: SHA-256 of the sources it was made of.
    """

    interface: str
    tensorrt: str
    tensorrt_major: int
    architectures: tuple[str, ...]
    compiler: str
    sources: str

    def runs_on(self, capability: Capability) -> bool:
        """Whether it has code for GPUs of this compute capability."""
        return any(_runs_on(architecture, capability) for architecture in self.architectures)


def _runs_on(architecture: str, capability: Capability) -> bool:
    """Whether GPUs of this compute capability run code for an architecture."""
    kind, _, number = architecture.partition("_")
    letter = number.lstrip("0123456789")
    own = capability_of(number.removesuffix(letter))
    if letter not in ("", "f"):  # 90a: what 9.0 alone has
        return own == capability
    # Machine code runs on its generation from its GPU on, PTX on everything later.
    later = kind == "compute" and not letter
    return own <= capability and (later or own[0] == capability[0])


# -- what a library is -----------------------------------------------------------------------------


def describe_library(path: _PATH) -> LibraryDescription:
    """What a library says of itself; needs no GPU and no TensorRT.

    It is opened in a process of its own, since opening it registers its plugins.

    Raises:
        UserError: If there is no such file, it does not load, or it is no library of ours.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"there is no plugin library '{path}': 'mat-export plugins build' makes one"
        )
    command = [sys.executable, "-I", "-c", _DESCRIBE, str(path.absolute())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or ["it ended the process that opened it"]
        raise UserError(
            f"'{path}' is no plugin library of this toolkit ({reason[0]}): "
            "'mat-export plugins build' makes one"
        )
    said = json.loads(done.stdout)
    said["architectures"] = tuple(said["architectures"].split(","))
    return LibraryDescription(
        **{field.name: said[field.name] for field in fields(LibraryDescription)}
    )


def check_library(
    description: LibraryDescription, tensorrt_major: int, capability: Capability
) -> None:
    """Refuse a library that does not fit.

    Args:
        description: The library's.
        tensorrt_major: Of the TensorRT that is to load it, such as 10.
        capability: Compute capability of the GPU, such as (9, 0).

    Raises:
        UserError: With the difference and the command that builds one which fits.
    """
    if description.tensorrt_major != tensorrt_major:
        raise UserError(
            f"the plugin library is for TensorRT {description.tensorrt_major}, and this is "
            f"TensorRT {tensorrt_major}: build one with its headers, 'mat-export plugins build "
            "--tensorrt-include DIR'"
        )
    if not description.runs_on(capability):
        raise UserError(
            f"the plugin library has code for {', '.join(description.architectures)}, which no GPU "
            f"of compute capability {capability[0]}.{capability[1]} runs: build one with "
            f"'mat-export plugins build --arch {_target(capability)}'"
        )


def sources_digest() -> str:
    """SHA-256 of the sources that a library is made of, as CMakeLists.txt computes it."""
    suffixes = (".cpp", ".cu", ".cuh", ".h")
    names = sorted(
        path.name
        for path in SOURCES.iterdir()
        if path.suffix in suffixes or path.name == "CMakeLists.txt"
    )
    lines = (
        f"{name} {hashlib.sha256((SOURCES / name).read_bytes()).hexdigest()}\n" for name in names
    )
    return hashlib.sha256("".join(lines).encode()).hexdigest()


# -- making one ------------------------------------------------------------------------------------


def build_library(
    output: _PATH,
    *,
    tensorrt_include: _PATH | None = None,
    tensorrt_major: int | None = None,
    architectures: Sequence[str] | None = None,
    progress: BuildProgress | None = None,
) -> Path:
    """Compile the library; `output` is written whole or not at all.

    Args:
        output: The ``.so`` to write.
        tensorrt_include: Folder of ``NvInferRuntime.h``; by default it is looked for.
        tensorrt_major: The major version that the headers must be of; None takes any.
        architectures: ``sm_NN`` each; None is every one we know that the compiler knows too.
        progress: Hears how far it is.

    Returns:
        `output`.

    Raises:
        UserError: If nvcc, CMake or the headers are missing, the compiler does not know a GPU, or
            it fails.
    """
    require_writable(output)
    tools = find_toolchain(tensorrt_include, tensorrt_major)
    targets = None if architectures is None else [parse_target(name) for name in architectures]
    return _build(tools, Path(output), targets, progress)


def kept_libraries(version: str = "") -> list[Path]:
    """All libraries in the user's cache folder, of TensorRTs whose versions begin like this.

    Raises:
        UserError: If the user has no home folder.
    """
    return sorted((cache_folder() / "plugins").glob(f"libmat_plugins-trt{version}*.so"))


def cached_library(tensorrt_major: int, capability: Capability) -> Path | None:
    """A library of today's sources in the user's cache folder that fits; None if there is none.

    Needs no compiler and builds nothing.
    """
    sources, target = sources_digest(), _target(capability)
    fitting: dict[Path, bool] = {}
    for path in kept_libraries(f"{tensorrt_major}."):
        with contextlib.suppress(UserError):
            description = describe_library(path)
            check_library(description, tensorrt_major, capability)
            if description.sources == sources:
                fitting[path] = target in description.architectures
    return max(fitting, key=fitting.__getitem__, default=None)


def library_for(
    tensorrt_major: int,
    capability: Capability,
    *,
    tensorrt_include: _PATH | None = None,
    progress: BuildProgress | None = None,
) -> Path:
    """A library that fits, built into the user's cache folder if none is there yet.

    Kept by a digest of the sources, the headers' version, the architecture and the compiler; on a
    machine without a compiler, any that fits will do.

    Raises:
        UserError: As `build_library`, if there is none.
    """
    try:
        tools = find_toolchain(tensorrt_include, tensorrt_major)
    except UserError:
        kept = cached_library(tensorrt_major, capability)
        if kept is None:
            raise
        return kept
    target = _nearest(tools, capability)
    parts = (sources_digest(), tools.headers.version, target, tools.compiler)
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    folder = cache_folder() / "plugins"
    path = folder / f"libmat_plugins-trt{tools.headers.version}-{target}-{digest}.so"
    if path.exists():
        return path
    require_folder(folder)
    return _build(tools, path, [target], progress)


def _build(
    tools: Toolchain, output: Path, targets: list[str] | None, progress: BuildProgress | None
) -> Path:
    tell = progress or (lambda what, done, total: None)
    with TemporaryDirectory(prefix="mat-export-") as folder:
        tell("configuring", 0, 100)
        configure = [tools.cmake, "-S", str(SOURCES), "-B", folder]
        configure += [f"-DTENSORRT_INCLUDE={tools.headers.folder}"]
        configure += [f"-DCMAKE_CUDA_COMPILER={tools.nvcc}"]
        if targets is not None:
            configure += [f"-DCMAKE_CUDA_ARCHITECTURES={_for_cmake(tools, targets)}"]
        _run(configure, "CMake did not configure the plugin library", lambda line: None)
        compiling = [tools.cmake, "--build", folder]
        _run(compiling, "the plugin library did not compile", lambda line: _tell(line, tell))
        with atomic_path(output) as temporary:
            shutil.copy(Path(folder, LIBRARY_NAME), temporary)
    tell("done", 100, 100)
    return output


def _for_cmake(tools: Toolchain, targets: list[str]) -> str:
    """CMake's list of architectures: code for each, and PTX of the newest for later GPUs."""
    unknown = [target for target in targets if target not in tools.architectures]
    if unknown:
        raise UserError(
            f"nvcc {tools.compiler} does not compile for {', '.join(unknown)}; it knows "
            f"{', '.join(tools.architectures)}"
        )
    numbers = sorted({int(target.removeprefix("sm_")) for target in targets})
    return ";".join([*(f"{number}-real" for number in numbers), f"{numbers[-1]}-virtual"])


def _nearest(tools: Toolchain, capability: Capability) -> str:
    """The newest architecture that nvcc knows and the GPU runs, by way of PTX if it is newer."""
    known = [name for name in tools.architectures if capability_of(name) <= capability]
    return known[-1] if known else _target(capability)


def _target(capability: Capability) -> str:
    return f"sm_{capability[0]}{capability[1]}"


def _run(command: list[str], failure: str, line_done: Callable[[str], None]) -> None:
    """Run a command and pass on its lines; a failure says its last ones."""
    lines: list[str] = []
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, "LC_ALL": "C"},
    ) as running:
        assert running.stdout is not None
        for line in running.stdout:
            lines.append(line)
            line_done(line.rstrip())
    if running.returncode:
        raise UserError(f"{failure}: {''.join(lines).strip()[-1500:]}")


def _tell(line: str, tell: BuildProgress) -> None:
    step = _STEP.match(line)
    if step is not None:
        tell(f"compiling {step[2]}" if step[2] else "linking", min(int(step[1]), 99), 100)
