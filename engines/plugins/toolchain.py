"""What the plugin library is built with: CUDA's compiler, CMake and TensorRT's headers."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from engines.plugins.kernels import find_nvcc
from mat_export.contract import UserError

__all__ = ["Headers", "Toolchain", "find_headers", "find_toolchain"]

_PATH = str | os.PathLike[str]

_FOLDERS = (
    "/usr/include/x86_64-linux-gnu",
    "/usr/include/aarch64-linux-gnu",
    "/usr/local/tensorrt/include",
    "/usr/local/TensorRT/include",
    "/opt/tensorrt/include",
    "/usr/local/include",
    "/usr/include",
)
"""Where packages and archives of TensorRT put its headers."""

_DEFINITION = re.compile(r"#define\s+(\w+)\s+(\w+)")


@dataclass(frozen=True)
class Headers:
    """TensorRT's headers.

    Attributes:
        folder: Where ``NvInferRuntime.h`` lies.
        version: Such as ``10.14.1``.
    """

    folder: Path
    version: str

    @property
    def major(self) -> int:
        """The first number of the version."""
        return int(self.version.split(".")[0])


@dataclass(frozen=True)
class Toolchain:
    """Everything that a build needs.

    Attributes:
        nvcc: CUDA's compiler.
        cmake: CMake.
        headers: TensorRT's headers.
    """

    nvcc: str
    cmake: str
    headers: Headers

    @functools.cached_property
    def compiler(self) -> str:
        """The version of nvcc, such as ``13.0.88``."""
        found = re.search(r"V(\d+(\.\d+)+)", _output(self.nvcc, "--version"))
        return found[1] if found is not None else "unknown"

    @functools.cached_property
    def architectures(self) -> tuple[str, ...]:
        """The GPUs that nvcc compiles for, ``sm_NN``, oldest first."""
        numbers = re.findall(r"^sm_(\d+)$", _output(self.nvcc, "--list-gpu-code"), re.MULTILINE)
        return tuple(f"sm_{number}" for number in sorted(map(int, numbers)))


def find_toolchain(
    tensorrt_include: _PATH | None = None, tensorrt_major: int | None = None
) -> Toolchain:
    """What a build needs, found on this machine.

    Args:
        tensorrt_include: Folder of TensorRT's headers; None looks for them.
        tensorrt_major: The TensorRT that they must be of; None takes any.

    Raises:
        UserError: If something is missing: what, and how to get it.
    """
    nvcc = find_nvcc()
    here = os.path.dirname(sys.executable)  # pip puts it there, on the PATH or not
    cmake = shutil.which("cmake", path=os.pathsep.join([os.environ.get("PATH", ""), here]))
    if cmake is None:
        raise UserError("CMake, which builds the plugin library, is missing: pip install cmake")
    return Toolchain(nvcc, cmake, find_headers(tensorrt_include, tensorrt_major))


def find_headers(include: _PATH | None = None, major: int | None = None) -> Headers:
    """TensorRT's headers: in the folder given, in TENSORRT_INCLUDE or TENSORRT_ROOT, or usual ones.

    The last place to look is an installed ``kernel_lens``, which holds those of 10.14.

    Raises:
        UserError: If there are none of that version.
    """
    others = []
    for folder, named in _places(include):
        headers = _headers_in(folder)
        if headers is None:
            if named is not None:
                raise UserError(f"{named} is '{folder}', which holds no NvInferVersion.h")
        elif headers.major == 8 or headers.major >= 10:
            if major is None or headers.major == major:
                return headers
            others.append(f"{headers.version} in '{folder}'")
        else:
            others.append(f"{headers.version} in '{folder}', which has no plugins of ours")
        if named is not None and headers is not None:
            break  # what is named is meant
    wanted = "TensorRT" if major is None else f"TensorRT {major}"
    found = f" (there is {', '.join(others)})" if others else ""
    raise UserError(
        f"the headers of {wanted} were not found{found}: give their folder with --tensorrt-include "
        "or TENSORRT_INCLUDE; Debian's libnvinfer-headers-dev has them, and "
        "'pip install --no-deps kernel-lens==2.0.1' those of 10.14"
    )


def _places(include: _PATH | None) -> Iterator[tuple[Path, str | None]]:
    """Folders to look in, and what named them if the user did."""
    if include is not None:
        yield Path(include), "--tensorrt-include"
        return
    if folder := os.environ.get("TENSORRT_INCLUDE"):
        yield Path(folder), "TENSORRT_INCLUDE"
    if root := os.environ.get("TENSORRT_ROOT"):
        yield Path(root, "include"), "TENSORRT_ROOT's include"
    for name in _FOLDERS:
        yield Path(name), None
    package = importlib.util.find_spec("kernel_lens")  # looks, and imports nothing
    for place in (package and package.submodule_search_locations) or ():
        yield Path(place, "include", "tensorrt"), None


def _headers_in(folder: Path) -> Headers | None:
    try:
        text = (folder / "NvInferVersion.h").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    values: dict[str, str] = dict(_DEFINITION.findall(text))
    numbers = []
    for part in ("MAJOR", "MINOR", "PATCH"):
        value = values.get(f"NV_TENSORRT_{part}", "")
        value = values.get(value, value)  # a number, or the name of one
        if not value.isdecimal():
            return None
        numbers.append(value)
    return Headers(folder.absolute(), ".".join(numbers))


def _output(*command: str) -> str:
    """What a command prints; nothing if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else ""
