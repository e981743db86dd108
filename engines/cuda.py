"""The little of CUDA that inference needs, over cuda-python, with types and plain errors.

Pointers and handles are ints, sizes are bytes. A stream is its handle: 0 is the default stream.
What holds something of the GPU is released by ``close()``, or else when Python collects it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import math
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mat_export.contract import RunError, UserError

__all__ = [
    "CudaError",
    "DeviceBuffer",
    "DeviceInfo",
    "Event",
    "Graph",
    "PinnedBuffer",
    "Stream",
    "capture",
    "copy_on_device",
    "copy_to_device",
    "copy_to_host",
    "cudart",
    "current_device",
    "device_info",
    "device_of",
    "free_memory",
    "on_device",
]

MIB = 1 << 20

SPARE_MEMORY = "close other programs or run a smaller batch"
"""What to do where memory ends."""

_OUT_OF_MEMORY = 2
"""cudaErrorMemoryAllocation."""

_UNUSABLE = {
    3: "check the NVIDIA driver with 'nvidia-smi'",
    35: "install the NVIDIA driver, or update it to one that knows cuda-python's CUDA version",
    46: "another program holds the GPU for itself, see 'nvidia-smi'",
    100: "no NVIDIA GPU is visible, check 'nvidia-smi' and CUDA_VISIBLE_DEVICES",
    803: "the NVIDIA driver was updated, restart the system",
    804: "this GPU needs a newer NVIDIA driver",
}
"""CUDA error codes that say there is no GPU to work with, and what to do about each."""


class CudaError(RunError):
    """A CUDA call failed, and not for a reason that the user can put right.

    Attributes:
        call: The function of the runtime API.
        code: CUDA's number of the error.
    """

    def __init__(self, call: str, code: int, text: str) -> None:
        super().__init__(f"{call} failed: {text}")
        self.call = call
        self.code = code


@functools.cache
def cudart() -> Any:
    """cuda-python's module of the CUDA runtime API, under the name it has in this version.

    Raises:
        UserError: If cuda-python is not installed.
    """
    reasons = []
    for name in ("cuda.bindings.runtime", "cuda.cudart"):  # from 12.6 on, and before
        try:
            return importlib.import_module(name)
        except ImportError as error:
            reasons.append(str(error))
    raise UserError(
        f"the GPU is driven through cuda-python, which cannot be imported ({reasons[0]}): "
        "pip install mat-export[trt]"
    )


def _call(name: str, *arguments: Any) -> Any:
    """Call the runtime API; what it gives besides its status, a tuple if several things.

    Raises:
        UserError: If there is no usable GPU or driver.
        CudaError: If the call failed otherwise.
    """
    module = cudart()
    try:
        status, *values = getattr(module, name)(*arguments)
    except RuntimeError as error:  # so cuda-python 12 says that there is no libcuda
        raise UserError(f"no NVIDIA GPU can be used here ({error}): {_UNUSABLE[35]}") from error
    if int(status) != 0:
        raise _failure(module, name, status)
    return values[0] if len(values) == 1 else tuple(values)


def _failure(module: Any, name: str, status: Any) -> UserError | CudaError:
    module.cudaGetLastError()  # CUDA keeps an error until it is read: TensorRT would meet it next
    _, text = module.cudaGetErrorString(status)
    _, label = module.cudaGetErrorName(status)
    reason = f"{text.decode()} ({label.decode()})"
    if int(status) in _UNUSABLE:
        return UserError(f"no NVIDIA GPU can be used here, {reason}: {_UNUSABLE[int(status)]}")
    return CudaError(name, int(status), reason)


# -- devices ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DeviceInfo:
    """One GPU.

    Attributes:
        index: Its number in this process.
        name: NVIDIA's name for it.
        compute_capability: Major and minor, (8, 9) for sm_89.
        driver: Newest CUDA version that the driver knows, (12, 4) for 12.4.
        total: Memory, in bytes.
        free: What was free of it when this was asked, in bytes.
    """

    index: int
    name: str
    compute_capability: tuple[int, int]
    driver: tuple[int, int]
    total: int
    free: int


def current_device() -> int:
    """Number of the GPU that this thread works on.

    Raises:
        UserError: If there is no usable GPU, driver or cuda-python.
    """
    _call("cudaGetDeviceCount")  # unlike cudaGetDevice, it looks for a driver in every version
    return int(_call("cudaGetDevice"))


def device_info(index: int | None = None) -> DeviceInfo:
    """What a GPU is, the current one if none is named. Raises UserError as current_device does."""
    index = current_device() if index is None else index
    with on_device(index):
        properties = _call("cudaGetDeviceProperties", index)
        version = int(_call("cudaDriverGetVersion"))
        free, total = _call("cudaMemGetInfo")
    name = properties.name
    return DeviceInfo(
        index=index,
        name=(name.decode() if isinstance(name, bytes) else str(name)).rstrip("\0").strip(),
        compute_capability=(int(properties.major), int(properties.minor)),
        driver=(version // 1000, version % 1000 // 10),
        total=int(total),
        free=int(free),
    )


def free_memory() -> int:
    """Bytes that are free on the current GPU."""
    return int(_call("cudaMemGetInfo")[0])


_thread = threading.local()


@contextlib.contextmanager
def on_device(index: int) -> Iterator[None]:
    """Work on a GPU within the block; CUDA keeps a current one for each thread.

    A CUDA context that the thread already has on that GPU is left in place.
    """
    previous = int(_call("cudaGetDevice"))
    if previous != index:
        _call("cudaSetDevice", index)
    elif not getattr(_thread, "ready", False):
        _call("cudaFree", 0)  # gives a new thread its context, or keeps the one it has
    _thread.ready = True
    try:
        yield
    finally:
        if previous != index:
            _call("cudaSetDevice", previous)


def device_of(pointer: int) -> int | None:
    """Number of the GPU that a pointer's memory lies on, None if it is the host's."""
    attributes = _call("cudaPointerGetAttributes", pointer)
    on_gpu = int(attributes.type) in (2, 3)  # cudaMemoryTypeDevice, cudaMemoryTypeManaged
    return int(attributes.device) if on_gpu else None


# -- what must be released -------------------------------------------------------------------------


class _Resource:
    """Something of CUDA's that is released exactly once.

    Attributes:
        handle: Its pointer or handle.
    """

    def __init__(self, handle: Any, release: str) -> None:
        self.handle = int(handle)
        self._finalizer = weakref.finalize(self, _release, release, self.handle)

    @property
    def closed(self) -> bool:
        """Whether it was released."""
        return not self._finalizer.alive

    def close(self) -> None:
        """Release it; nothing may be using it any more. Once more does nothing."""
        self._finalizer()


def _release(name: str, handle: int) -> None:
    # No status is read: at the end of the program the driver may be gone before us, and errors of
    # earlier work, which CUDA repeats here, were raised where that work was waited for.
    getattr(cudart(), name)(handle)


class DeviceBuffer(_Resource):
    """Memory of the current GPU, not initialised, at an address that is a multiple of 256.

    Args:
        nbytes: Its size.

    Raises:
        UserError: If the GPU has too little memory, with what was needed and what is free.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        try:
            pointer = _call("cudaMalloc", max(nbytes, 1))
        except CudaError as error:
            if error.code != _OUT_OF_MEMORY:
                raise
            raise UserError(
                f"the GPU has too little memory: {nbytes / MIB:.1f} MiB are needed and "
                f"{free_memory() / MIB:.1f} MiB are free; {SPARE_MEMORY}"
            ) from error
        super().__init__(pointer, "cudaFree")


class PinnedBuffer(_Resource):
    """Memory of the host that is never swapped out, so that the GPU itself copies from and to it.

    Args:
        nbytes: Its size.

    Raises:
        UserError: If the system gives no more of it.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        try:
            pointer = _call("cudaHostAlloc", max(nbytes, 1), 0)  # cudaHostAllocDefault
        except CudaError as error:
            if error.code != _OUT_OF_MEMORY:
                raise
            raise UserError(
                f"the system pins no further {nbytes / MIB:.1f} MiB of memory for copies to the "
                f"GPU; {SPARE_MEMORY}"
            ) from error
        super().__init__(pointer, "cudaFreeHost")
        memory = (ctypes.c_uint8 * nbytes).from_address(self.handle)
        self._bytes: NDArray[np.uint8] = np.ctypeslib.as_array(memory)

    def view(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """The start of the buffer as an array, which must not be used once the buffer is closed."""
        count = dtype.itemsize * math.prod(shape)
        view: NDArray[Any] = self._bytes[:count].view(dtype)
        return view.reshape(shape)


class Stream(_Resource):
    """A queue of work, which does not wait for the default stream."""

    def __init__(self) -> None:
        super().__init__(_call("cudaStreamCreateWithFlags", 1), "cudaStreamDestroy")  # non-blocking

    def synchronize(self) -> None:
        """Wait until all work in it is done."""
        _call("cudaStreamSynchronize", self.handle)


class Event(_Resource):
    """A place in a stream; until it is first recorded it counts as passed.

    Args:
        timing: Keep the time too, for elapsed_ms.
    """

    def __init__(self, *, timing: bool = False) -> None:
        flags = 0 if timing else 2  # cudaEventDisableTiming
        super().__init__(_call("cudaEventCreateWithFlags", flags), "cudaEventDestroy")

    def record(self, stream: int) -> None:
        """Put it behind the work that the stream has now."""
        _call("cudaEventRecord", self.handle, stream)

    def block(self, stream: int) -> None:
        """Let what is put into the stream from now on wait for it; the host goes on."""
        _call("cudaStreamWaitEvent", stream, self.handle, 0)

    def synchronize(self) -> None:
        """Wait for it."""
        _call("cudaEventSynchronize", self.handle)

    def elapsed_ms(self, since: Event) -> float:
        """Milliseconds from another event to this one; both keep time and have passed."""
        return float(_call("cudaEventElapsedTime", since.handle, self.handle))


# -- copies ----------------------------------------------------------------------------------------


def copy_to_device(pointer: int, host: int, nbytes: int, stream: int) -> None:
    """Copy from pinned memory of the host to the GPU, when the stream comes to it."""
    kind = cudart().cudaMemcpyKind.cudaMemcpyHostToDevice
    _call("cudaMemcpyAsync", pointer, host, nbytes, kind, stream)


def copy_to_host(host: int, pointer: int, nbytes: int, stream: int) -> None:
    """Copy from the GPU to pinned memory of the host, when the stream comes to it."""
    kind = cudart().cudaMemcpyKind.cudaMemcpyDeviceToHost
    _call("cudaMemcpyAsync", host, pointer, nbytes, kind, stream)


def copy_on_device(target: int, source: int, nbytes: int, stream: int) -> None:
    """Copy within the GPU, when the stream comes to it."""
    kind = cudart().cudaMemcpyKind.cudaMemcpyDeviceToDevice
    _call("cudaMemcpyAsync", target, source, nbytes, kind, stream)


# -- graphs ----------------------------------------------------------------------------------------


class Graph(_Resource):
    """Work that was recorded once and is launched as a whole; made by capture."""

    def __init__(self, handle: Any) -> None:
        super().__init__(handle, "cudaGraphExecDestroy")

    def launch(self, stream: int) -> None:
        """Put all of it into a stream."""
        _call("cudaGraphLaunch", self.handle, stream)


def capture(stream: int, work: Callable[[], None]) -> Graph:
    """Record what a function puts into a stream, without running it.

    Only this thread is kept from calls that a capture forbids, such as allocating memory. The
    graph lies on the GPU when this returns, so that its first launch allocates nothing.

    Args:
        stream: Any but the default stream.
        work: Puts work into that stream and, through events, into others.

    Raises:
        CudaError: If CUDA cannot record that work; the stream is as it was before.
        Exception: What ``work`` raises; likewise.
    """
    mode = cudart().cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
    _call("cudaStreamBeginCapture", stream, mode)
    try:
        work()
    except BaseException:
        with contextlib.suppress(CudaError):  # what work raised says more
            _call("cudaGraphDestroy", _call("cudaStreamEndCapture", stream))
        raise
    recorded = _call("cudaStreamEndCapture", stream)
    try:
        graph = Graph(_call("cudaGraphInstantiate", recorded, 0))
    finally:
        _call("cudaGraphDestroy", recorded)
    _call("cudaGraphUpload", graph.handle, stream)
    return graph
