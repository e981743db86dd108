"""The kernels as a shared library: compiled on first use, called with addresses.

``kernels.h`` says what each function takes. Whoever holds arrays (PyTorch, a test, the runtime)
passes where they lie, so that one binding serves all of them.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from mat_export.contract import UserError
from mat_export.files import cache_folder

__all__ = [
    "EPILOGUE_PARTS",
    "MASK_TYPES",
    "SOURCES",
    "TYPES",
    "KernelLibrary",
    "Tokens",
    "compile_kernels",
    "compile_once",
    "find_nvcc",
    "open_kernels",
]

SOURCES = Path(__file__).parent
"""Where the sources lie."""

TYPES = {"float32": 0, "float16": 1, "bfloat16": 2}
"""``MatType`` by the name of an element type."""

MASK_TYPES = {"bool": 0, "int32": 1}
"""``MatMaskType`` by the name of an element type."""

EPILOGUE_PARTS = ("scale", "noise", "bias", "ratio", "skip", "style")
"""``MatEpiloguePart``, in order."""

_FLAGS = ("-std=c++17", "-O3", "-shared", "-Xcompiler", "-fPIC")
_NOT_SUPPORTED = 801


class _Attention(ctypes.Structure):
    """``struct MatAttention``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "valid", "y", "propagated")),
        *((name, ctypes.c_int32) for name in ("batch", "height", "width", "heads", "head_size")),
        *((name, ctypes.c_int32) for name in ("window", "shift")),
        *((f"{name}_stride", ctypes.c_int32) for name in "qkvy"),
        *((name, ctypes.c_int32) for name in ("type", "mask_type", "y_padding")),
    )


class _TokenNorm(ctypes.Structure):
    """``struct MatTokenNorm``."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        *((name, ctypes.c_int32) for name in ("batch", "channels", "height", "width")),
        ("floor", ctypes.c_float),
        ("type", ctypes.c_int32),
    )


class _Epilogue(ctypes.Structure):
    """``struct MatEpilogue``."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("parts", ctypes.c_void_p * len(EPILOGUE_PARTS)),
        ("y", ctypes.c_void_p),
        ("batched", ctypes.c_int32 * len(EPILOGUE_PARTS)),
        *((name, ctypes.c_int32) for name in ("batch", "channels", "height", "width")),
        *((name, ctypes.c_int32) for name in ("filter", "pad")),
        *((name, ctypes.c_float) for name in ("gain", "slope")),
        *((name, ctypes.c_int32) for name in ("type", "layout")),
    )


@dataclass(frozen=True)
class Tokens:
    """Where the features of a grid of tokens lie: [B, H·W, C], a token's C side by side.

    Attributes:
        address: Of the first, on the GPU; a multiple of 4.
        stride: Elements from token to token, even.
    """

    address: int
    stride: int


class KernelLibrary:
    """The functions of a compiled library.

    Args:
        path: What ``compile_kernels`` gives.

    Raises:
        UserError: If it does not load.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        try:
            self._library = ctypes.CDLL(os.fspath(path))
        except OSError as error:
            raise UserError(f"the kernels in '{path}' do not load: {error}") from error
        self._library.mat_attention_problem.restype = ctypes.c_char_p
        self._library.mat_epilogue_problem.restype = ctypes.c_char_p
        self._library.mat_token_norm_problem.restype = ctypes.c_char_p
        self._library.mat_propagate.argtypes = (
            *[ctypes.c_void_p] * 2,
            *[ctypes.c_int32] * 6,
            ctypes.c_void_p,
        )

    def attention(
        self,
        q: Tokens,
        k: Tokens,
        v: Tokens,
        y: Tokens,
        *,
        shape: tuple[int, int, int],
        heads: int,
        head_size: int,
        window: int,
        shift: int,
        dtype: str,
        valid: int | None = None,
        propagated: int | None = None,
        mask_dtype: str = "bool",
        stream: int = 0,
    ) -> None:
        """Masked window attention, and the mask behind it.

        Args:
            q: Queries, scaled by 1/√head_size already.
            k: Keys.
            v: Values.
            y: Where the result goes.
            shape: B, H and W; both sides are multiples of the window.
            heads: Heads side by side in a token.
            head_size: Features of a head, even and at most 32.
            window: 8 or 16.
            shift: Tokens the grid is rolled by, from 0 below the window.
            dtype: One of TYPES, of q, k, v and y.
            valid: Address of a mask [B, H·W], not 0 where valid; None where every token is.
            propagated: Address for the mask behind the block, 0 or 1; None if not wanted.
            mask_dtype: One of MASK_TYPES, of both masks.
            stream: A cudaStream_t.

        Raises:
            UserError: For a size or type that the kernels do not have.
            RuntimeError: If the launch fails.
        """
        call = _Attention(
            *(tokens.address for tokens in (q, k, v)),
            valid,
            y.address,
            propagated,
            *shape,
            heads,
            head_size,
            window,
            shift,
            *(tokens.stride for tokens in (q, k, v, y)),
            _type(dtype),
            _mask_type(mask_dtype),
        )
        problem = self._library.mat_attention_problem(ctypes.byref(call))
        if problem is not None:
            raise UserError(f"masked window attention: {problem.decode()}")
        status = self._library.mat_attention(ctypes.byref(call), ctypes.c_void_p(stream))
        if status == _NOT_SUPPORTED:
            raise UserError("bfloat16 needs a GPU of compute capability 8.0 or later")
        _check(status)

    def propagate(
        self,
        mask: int,
        out: int,
        *,
        shape: tuple[int, int, int],
        window: int,
        shift: int,
        mask_dtype: str = "bool",
        stream: int = 0,
    ) -> None:
        """Mask propagation alone: every token of a window with a valid token is valid.

        Args:
            mask: Address of a mask [B, H·W], not 0 where valid.
            out: Address for the result, another one.
            shape: B, H and W; both sides are multiples of the window.
            window: 8 or 16.
            shift: Tokens the grid is rolled by, from 0 below the window.
            mask_dtype: One of MASK_TYPES, of both masks.
            stream: A cudaStream_t.

        Raises:
            UserError: For another type of masks.
            RuntimeError: If the launch fails, or the sizes are none of these.
        """
        kind = _mask_type(mask_dtype)
        _check(self._library.mat_propagate(mask, out, *shape, window, shift, kind, stream))

    def token_norm(
        self,
        x: int,
        y: int,
        *,
        shape: tuple[int, int, int, int],
        dtype: str,
        floor: float,
        stream: int = 0,
    ) -> None:
        """``x/max(‖x‖₂, floor)`` over the channels of each pixel, the norm in FP32.

        Args:
            x: Address of a map [B, H, W, C], C padded to a multiple of 8.
            y: Address for the result, likewise.
            shape: B, C, H and W.
            dtype: ``float16`` or ``bfloat16``.
            floor: Of the norm, above 0.
            stream: A cudaStream_t.

        Raises:
            UserError: For a size or type that the kernels do not have.
            RuntimeError: If the launch fails.
        """
        call = _TokenNorm(x, y, *shape, floor, _type(dtype))
        problem = self._library.mat_token_norm_problem(ctypes.byref(call))
        if problem is not None:
            raise UserError(f"token norm: {problem.decode()}")
        _check(self._library.mat_token_norm(ctypes.byref(call), ctypes.c_void_p(stream)))

    def epilogue(
        self,
        x: int,
        y: int,
        parts: Mapping[str, tuple[int, bool]],
        *,
        shape: tuple[int, int, int, int],
        dtype: str,
        channels_last: bool = False,
        pad: int | None = None,
        gain: float = 1.0,
        slope: float = 1.0,
        stream: int = 0,
    ) -> None:
        """What stands between two convolutions; ``epilogue.cuh`` has the formula.

        Args:
            x: Address of a map.
            y: Address for the result.
            parts: By a name of EPILOGUE_PARTS, where it lies and whether it has an entry for each
                image rather than one for all.
            shape: B, C, H and W of x.
            dtype: One of TYPES, of everything.
            channels_last: x, skip and y lie as [B, H, W, C], C padded to a multiple of 8 and
                addresses to 16 bytes; else as [B, C, H, W].
            pad: Zeros around x for the filter, 0 to 2; None does not filter.
            gain: Of the filter.
            slope: Of negative numbers in the leaky ReLU.
            stream: A cudaStream_t.

        Raises:
            UserError: For a size, type or layout that the kernels do not have.
            RuntimeError: If the launch fails.
        """
        call = _Epilogue(
            x=x,
            y=y,
            batch=shape[0],
            channels=shape[1],
            height=shape[2],
            width=shape[3],
            filter=pad is not None,
            pad=pad or 0,
            gain=gain,
            slope=slope,
            type=_type(dtype),
            layout=channels_last,
        )
        for name, (address, batched) in parts.items():
            call.parts[EPILOGUE_PARTS.index(name)] = address
            call.batched[EPILOGUE_PARTS.index(name)] = batched
        problem = self._library.mat_epilogue_problem(ctypes.byref(call))
        if problem is not None:
            raise UserError(f"fused epilogue: {problem.decode()}")
        _check(self._library.mat_epilogue(ctypes.byref(call), ctypes.c_void_p(stream)))


def open_kernels(capability: tuple[int, int]) -> KernelLibrary:
    """The kernels for a GPU, compiled if they are not in the user's cache folder yet.

    Raises:
        UserError: Without a compiler, or if it fails.
    """
    return KernelLibrary(compile_kernels(f"sm_{capability[0]}{capability[1]}"))


def compile_kernels(architecture: str, *, folder: Path | None = None) -> Path:
    """Compile the kernels, once for each state of their sources, architecture and compiler.

    Args:
        architecture: Such as ``sm_90``, from ``sm_75`` on.
        folder: Where libraries are kept; by default the user's cache folder.

    Returns:
        The library.

    Raises:
        UserError: Without a compiler, or if it fails.
    """
    arguments = (*_FLAGS, f"-arch={architecture}")
    return compile_once("kernels.cu", arguments, f"libmat_kernels-{architecture}", ".so", folder)


def compile_once(
    source: str, arguments: Sequence[str], stem: str, suffix: str, folder: Path | None = None
) -> Path:
    """Compile a source with nvcc, once for each state of the sources, arguments and compiler.

    Args:
        source: Its file name, in SOURCES.
        arguments: nvcc's, which say what is made.
        stem: How the made file's name begins.
        suffix: How it ends.
        folder: Where what is made is kept; by default the user's cache folder.

    Returns:
        The made file.

    Raises:
        UserError: Without a compiler, or if it fails.
    """
    nvcc = find_nvcc()
    digest = _digest([nvcc, "--version"], arguments)
    folder = cache_folder() / "kernels" if folder is None else folder
    target = folder / f"{stem}-{digest[:16]}{suffix}"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder) as temporary:
        made = Path(temporary) / target.name
        command = [nvcc, *arguments, str(SOURCES / source), "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise UserError(
                f"nvcc did not compile {source} ({' '.join(arguments)}): "
                f"{(done.stderr or done.stdout).strip()[-800:]}"
            )
        os.replace(made, target)
    return target


def find_nvcc() -> str:
    """CUDA's compiler: on the PATH, or under CUDA_HOME.

    Raises:
        UserError: If there is none.
    """
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [] if home is None else [os.path.join(home, "bin")]
    found = shutil.which("nvcc", path=os.pathsep.join([*places, os.environ.get("PATH", "")]))
    if found is None:
        raise UserError(
            "CUDA's compiler nvcc is not on the PATH nor under CUDA_HOME: install the CUDA toolkit "
            "to compile the kernels"
        )
    return found


def _digest(version: Sequence[str], arguments: Sequence[str]) -> str:
    """Of everything a library is made of."""
    state = hashlib.sha256()
    state.update(subprocess.run(version, capture_output=True, check=False).stdout)
    state.update("\0".join(arguments).encode())
    for path in sorted(SOURCES.iterdir()):
        if path.suffix in (".cu", ".cuh", ".h"):
            state.update(path.read_bytes())
    return state.hexdigest()


def _type(name: str) -> int:
    if name not in TYPES:
        raise UserError(f"the kernels compute in {', '.join(TYPES)}, got '{name}'")
    return TYPES[name]


def _mask_type(name: str) -> int:
    if name not in MASK_TYPES:
        raise UserError(f"the kernels take masks of {', '.join(MASK_TYPES)}, got '{name}'")
    return MASK_TYPES[name]


def _check(status: int) -> None:
    if status:
        raise RuntimeError(f"a kernel was not launched: CUDA error {status}")
