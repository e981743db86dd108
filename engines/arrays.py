"""Arrays of other libraries, taken as they lie: on the GPU by pointer, on the host as NumPy.

Two protocols say where an array on the GPU lies: DLPack (torch, CuPy, JAX) and the CUDA array
interface (torch, CuPy, Numba, PyCUDA). DLPack is asked first: it names the GPU, and its exporter
makes our stream wait for the array.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from engines import cuda
from mat_export.contract import UserError

__all__ = ["DeviceArray", "as_device_array", "as_host_array", "bfloat16"]

LEGACY_STREAM = 1
"""What both protocols call CUDA's default stream, which elsewhere is 0."""

Shape = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class DeviceArray:
    """A C-contiguous array on a GPU, as a view: it allocates and copies nothing.

    Libraries read it without a copy through ``__cuda_array_interface__``:
    ``torch.as_tensor(array, device="cuda")``, ``cupy.asarray(array)``. There is no ``__dlpack__``;
    everything that reads DLPack on a GPU reads this interface too, or wraps one that does.

    Attributes:
        pointer: Address of its first element.
        shape: Its lengths.
        dtype: Type of its elements.
        device: Number of the GPU.
        stream: The array is ready when the work that this stream has now is done. None: it is
            ready, or the caller orders the work on it.
        owner: What keeps the memory alive.
        read_only: It must not be written to.
    """

    pointer: int
    shape: Shape
    dtype: np.dtype[Any]
    device: int
    stream: int | None = None
    owner: Any = field(default=None, repr=False)
    read_only: bool = False

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return self.dtype.itemsize * math.prod(self.shape)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """Version 3 of the interface.

        Raises:
            RuntimeError: If the memory was released.
        """
        if isinstance(self.owner, cuda.DeviceBuffer) and self.owner.closed:
            raise RuntimeError(
                "this array lay in a buffer of an engine that has since replaced or released it: "
                "use the results of enqueue before the next call, or give it your own outputs"
            )
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.pointer, self.read_only),
            "version": 3,
            "strides": None,
            "stream": LEGACY_STREAM if self.stream == 0 else self.stream,
        }


def as_device_array(value: Any, *, name: str, device: int, stream: int) -> DeviceArray | None:
    """An array on the GPU as a view, or None if the value lies on the host.

    Args:
        value: Anything; on the GPU if it has ``__dlpack__`` or ``__cuda_array_interface__`` and
            says so.
        name: What to call it in messages, such as ``input 'image'``.
        device: The GPU it has to be on.
        stream: Where it will be used. An array that comes by DLPack is ready there; one that comes
            by the CUDA array interface brings the stream to wait for, if it names one.

    Raises:
        UserError: If it lies on another device, is not C-contiguous, or its library refuses.
    """
    if isinstance(value, DeviceArray):  # spares the detour of its own interface
        value.__cuda_array_interface__  # noqa: B018  # raises if its memory is gone
        array: DeviceArray | None = value
    elif isinstance(value, np.ndarray | np.generic):
        return None
    else:
        array = _from_dlpack(value, name, stream) or _from_interface(value, name)
    if array is not None and array.device != device:
        raise UserError(
            f"{name} lies on GPU {array.device} and the engine runs on GPU {device}: "
            "copy it there first"
        )
    return array


def as_host_array(value: Any, *, name: str) -> NDArray[Any]:
    """An array on the host as NumPy, without a copy.

    Args:
        value: A NumPy array, or one of another library that has ``__dlpack__`` (torch on the CPU).
        name: What to call it in messages.

    Raises:
        UserError: If it is none, lies on a GPU, or its library refuses.
    """
    if isinstance(value, np.ndarray):
        return value
    if hasattr(value, "__dlpack_device__"):
        if _kind(value.__dlpack_device__()) in _HOST:
            try:
                return np.from_dlpack(value)
            except (BufferError, RuntimeError, TypeError, ValueError) as error:
                _refused(name, error)
        raise UserError(f"{name} lies on a GPU: copy it to the host, or use enqueue")
    if getattr(value, "__cuda_array_interface__", None) is not None:
        raise UserError(f"{name} lies on a GPU: copy it to the host, or use enqueue")
    raise UserError(
        f"{name} is a {type(value).__name__}: give a NumPy array or another library's array that "
        "has __dlpack__ or __cuda_array_interface__"
    )


def bfloat16() -> np.dtype[Any]:
    """NumPy's bfloat16, which ml_dtypes brings.

    Raises:
        UserError: If ml_dtypes is not installed.
    """
    try:
        import ml_dtypes
    except ImportError as error:
        raise UserError("bfloat16 arrays need ml_dtypes: pip install ml_dtypes") from error
    dtype: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return dtype


def _refused(name: str, error: Exception) -> NoReturn:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    raise UserError(f"{name} is not handed out by its library: {reason}") from error


def _check_layout(name: str, shape: Shape, strides: Shape | None, unit: int) -> None:
    """Raise UserError unless strides, the innermost of them ``unit``, are those of a C-order array.

    What stands for an axis of length 1 has no meaning, and None means C order.
    """
    if strides is None or 0 in shape:
        return
    step = unit
    for length, stride in zip(shape[::-1], strides[::-1], strict=True):
        if length != 1 and stride != step:
            raise UserError(
                f"{name} of shape {list(shape)} is not contiguous in memory: make it so first, "
                "with .contiguous() in torch, ascontiguousarray in CuPy"
            )
        step *= length


# -- the CUDA array interface ----------------------------------------------------------------------


def _from_interface(value: Any, name: str) -> DeviceArray | None:
    """Read ``__cuda_array_interface__``, version 2 or 3; None if there is none."""
    try:
        interface = getattr(value, "__cuda_array_interface__", None)
    except (RuntimeError, TypeError, ValueError) as error:  # so torch refuses what needs a gradient
        _refused(name, error)
    if interface is None:
        return None
    pointer, read_only = interface["data"]
    shape = tuple(int(length) for length in interface["shape"])
    dtype = np.dtype(interface["typestr"])
    strides = interface.get("strides")
    if interface.get("mask") is not None:
        raise UserError(f"{name} is a masked array: fill it first")
    if strides is not None:
        strides = tuple(strides)
    _check_layout(name, shape, strides, dtype.itemsize)
    device = cuda.device_of(int(pointer))
    if device is None:
        raise UserError(f"{name} has a CUDA array interface, but its memory is not on a GPU")
    stream = interface.get("stream")
    return DeviceArray(
        int(pointer),
        shape,
        dtype,
        device,
        stream=None if stream is None else int(stream),
        owner=value,
        read_only=bool(read_only),
    )


# -- DLPack ----------------------------------------------------------------------------------------

_CUDA, _CUDA_MANAGED = 2, 13
_HOST = (1, 3)
"""kDLCPU, kDLCUDAHost."""


class _Device(ctypes.Structure):
    _fields_ = (("kind", ctypes.c_int32), ("index", ctypes.c_int32))


class _Type(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _Type),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    """DLManagedTensor."""

    _fields_ = (
        ("tensor", _Tensor),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


class _Versioned(ctypes.Structure):
    """DLManagedTensorVersioned."""

    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    )


_READ_ONLY = 1
"""Flag of DLManagedTensorVersioned."""

_is_valid = ctypes.pythonapi.PyCapsule_IsValid
_is_valid.argtypes = (ctypes.py_object, ctypes.c_char_p)
_is_valid.restype = ctypes.c_int
_get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_get_pointer.argtypes = (ctypes.py_object, ctypes.c_char_p)
_get_pointer.restype = ctypes.c_void_p


def _kind(device: Any) -> int:
    return int(device[0])


def _from_dlpack(value: Any, name: str, stream: int) -> DeviceArray | None:
    """Read an array on a GPU through DLPack; None if it has no DLPack or lies on the host."""
    if not hasattr(value, "__dlpack_device__") or not hasattr(value, "__dlpack__"):
        return None
    kind = _kind(value.__dlpack_device__())
    if kind in _HOST:
        return None
    if kind not in (_CUDA, _CUDA_MANAGED):
        raise UserError(f"{name} lies on a device that is not a CUDA GPU (DLPack type {kind})")
    ordered = stream or LEGACY_STREAM
    try:
        try:
            capsule = value.__dlpack__(stream=ordered, max_version=(1, 0))
        except TypeError:  # the exporter is older than version 1 of the protocol
            capsule = value.__dlpack__(stream=ordered)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        _refused(name, error)
    return replace(read_capsule(capsule, name), owner=(capsule, value))


def read_capsule(capsule: Any, name: str) -> DeviceArray:
    """What a DLPack capsule describes, on whatever device, as a view that the capsule owns.

    The capsule is read and not consumed: while it lives so does the memory, and with it goes, by
    the exporter's own hand, the exporter's claim.

    Raises:
        UserError: If the array is not C-contiguous or of a type that NumPy does not have.
    """
    read_only = False
    if _is_valid(capsule, b"dltensor_versioned"):
        versioned = _Versioned.from_address(_get_pointer(capsule, b"dltensor_versioned"))
        if versioned.major > 1:
            raise UserError(f"{name} comes by DLPack {versioned.major}, this program knows 1")
        tensor, read_only = versioned.tensor, bool(versioned.flags & _READ_ONLY)
    else:
        tensor = _Managed.from_address(_get_pointer(capsule, b"dltensor")).tensor
    shape = tuple(tensor.shape[: tensor.ndim])
    strides = tuple(tensor.strides[: tensor.ndim]) if tensor.strides else None
    _check_layout(name, shape, strides, 1)
    return DeviceArray(
        int(tensor.data or 0) + int(tensor.byte_offset),
        shape,
        _numpy_type(tensor.dtype, name),
        int(tensor.device.index),
        owner=capsule,
        read_only=read_only,
    )


def _numpy_type(dtype: _Type, name: str) -> np.dtype[Any]:
    code, bits = int(dtype.code), int(dtype.bits)
    kinds = {0: "int", 1: "uint", 2: "float"}
    if dtype.lanes == 1:
        if code in kinds and bits in (8, 16, 32, 64) and (code, bits) != (2, 8):
            return np.dtype(f"{kinds[code]}{bits}")
        if (code, bits) == (6, 8):
            return np.dtype(np.bool_)
        if (code, bits) == (4, 16):
            return bfloat16()
    raise UserError(
        f"{name} has elements that NumPy does not know (DLPack type {code}, {bits} bit)"
    )
