"""A GPU and a TensorRT of paper, as strict as the manuals allow the real ones to be.

``FakeGpu`` stands in for cuda-python's module, ``FakeBackend`` for engines.backend.Backend. Memory
is the host's. **Work is done as late as the API allows**: a stream runs only when something waits
for it, so that a missing wait or synchronization gives wrong numbers instead of passing by luck.
Memory is checked at every access, and what the manuals leave undefined (a graph of a context that
was changed since, a context used by two at once or out of order, an address that is not aligned,
work that outlives what it uses) is an error.
"""

# ruff: noqa: N802, N815  # the names are CUDA's

from __future__ import annotations

import ctypes
import enum
import functools
import itertools
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
from fake_tensorrt import make_tensorrt
from numpy.typing import NDArray

from engines.backend import Backend
from mat_export.contract import UserError

Shape = tuple[int, ...]
Work = Callable[[], None]


class Status(enum.IntEnum):
    """The part of cudaError_t that is used here."""

    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorNoDevice = 100
    cudaErrorInvalidResourceHandle = 400
    cudaErrorIllegalAddress = 700
    cudaErrorLaunchFailure = 719
    cudaErrorStreamCaptureUnsupported = 900
    cudaErrorStreamCaptureInvalidated = 901


class _CallError(Exception):
    def __init__(self, status: Status) -> None:
        super().__init__(status.name)
        self.status = status


class Handle:
    """What cuda-python gives for a stream, event or graph: an object that int() reads."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __int__(self) -> int:
        return self._number


class _Stream:
    def __init__(self) -> None:
        self.pending: list[Work] = []
        self.added = 0
        self.done = 0
        self.recording: list[Any] | None = None
        self.recorder = 0
        self.invalid = False


class _Event:
    def __init__(self, timing: bool) -> None:
        self.timing = timing
        self.place: tuple[_Stream, int] | None = None
        self.time = 0.0


class _Memory:
    def __init__(self, nbytes: int, kind: int, device: int) -> None:
        self.block = (ctypes.c_uint8 * (nbytes + 256))()
        self.start = -(-ctypes.addressof(self.block) // 256) * 256
        ctypes.memset(self.start, 0xCD, nbytes)
        self.nbytes = nbytes
        self.kind = kind
        self.device = device


def _function(function: Callable[..., Any]) -> Callable[..., tuple[Any, ...]]:
    """A function of the runtime API: gives its status first, and can be made to fail."""

    @functools.wraps(function)
    def call(self: FakeGpu, *arguments: Any) -> tuple[Any, ...]:
        name = function.__name__
        with self.lock:
            self.calls[name] += 1
            failure = next(self.failures.get(name, iter(())), None)
            if failure is not None:
                return self._refuse(failure)
            if self.without_driver is not None:
                return self._refuse(self.without_driver)
            try:
                value = function(self, *arguments)
            except _CallError as error:
                return self._refuse(error.status)
        values = value if isinstance(value, tuple) else () if value is None else (value,)
        return (Status.cudaSuccess, *values)

    return call


class FakeGpu:
    """cuda-python's module of the runtime API, over memory of the host.

    Args:
        memory: Bytes of memory of a GPU.
        devices: GPUs.
        without_driver: What every call then gives or raises, None if there is a driver.

    Attributes:
        calls: How often each function was called.
        failures: Put what the next calls of a function shall give, by its name; None for what
            they give anyway.
        errors: Everything undefined that was done.
        log: What streams did, in order: ``h2d``, ``d2h``, ``d2d``, ``run``, ``graph``.
    """

    cudaMemcpyKind = enum.Enum(
        "cudaMemcpyKind",
        {
            "cudaMemcpyHostToDevice": 1,
            "cudaMemcpyDeviceToHost": 2,
            "cudaMemcpyDeviceToDevice": 3,
        },
    )
    cudaStreamCaptureMode = enum.Enum(
        "cudaStreamCaptureMode", {"cudaStreamCaptureModeThreadLocal": 1}
    )

    def __init__(
        self,
        *,
        memory: int = 64 << 20,
        devices: int = 1,
        without_driver: Status | Exception | None = None,
    ) -> None:
        self.lock = threading.RLock()
        self.memory = memory
        self.devices = devices
        self.without_driver = without_driver
        self.calls: Counter[str] = Counter()
        self.failures: dict[str, Iterator[Status | Exception | None]] = {}
        self.errors: list[str] = []
        self.log: list[str] = []
        self.allocations: dict[int, _Memory] = {}
        self._streams: dict[int, _Stream] = {0: _Stream()}
        self._events: dict[int, _Event] = {}
        self._graphs: dict[int, list[Any]] = {}
        self._executables: dict[int, list[Any]] = {}
        self._numbers = itertools.count(16)
        self._current = threading.local()
        self._last = Status.cudaSuccess

    # -- for tests ---------------------------------------------------------------------------------

    @property
    def live(self) -> dict[str, int]:
        """What was made and not released yet."""
        counts = {
            "memory": len(self.allocations),
            "streams": len(self._streams) - 1,
            "events": len(self._events),
            "graphs": len(self._graphs) + len(self._executables),
        }
        return {name: count for name, count in counts.items() if count}

    @property
    def allocated(self) -> int:
        """How often memory was asked for, on the GPU or pinned."""
        return self.calls["cudaMalloc"] + self.calls["cudaHostAlloc"]

    def new_stream(self) -> int:
        """Handle of a stream of the caller's."""
        return int(self.cudaStreamCreateWithFlags(1)[1])

    def put(self, stream: int, work: Work) -> None:
        """Some work of the caller's."""
        with self.lock:
            self._add(self._stream(stream), work)

    def view(self, pointer: int, shape: Shape, dtype: Any, kind: int | None = None) -> NDArray[Any]:
        """Memory as an array, as it is now; an error if it is not all allocated."""
        nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        memory = self._find(pointer)
        if memory is None or pointer + nbytes > memory.start + memory.nbytes:
            self.wrong(f"access to {nbytes} bytes at {pointer:#x}, which are not allocated")
        elif kind is not None and memory.kind != kind:
            self.wrong(f"memory of kind {memory.kind} where kind {kind} is needed")
        block = (ctypes.c_uint8 * nbytes).from_address(pointer)
        view: NDArray[Any] = np.ctypeslib.as_array(block).view(dtype)
        return view.reshape(shape)

    def wrong(self, what: str) -> None:
        """Something undefined was done."""
        self.errors.append(what)
        raise _CallError(Status.cudaErrorIllegalAddress)

    # -- devices -----------------------------------------------------------------------------------

    @_function
    def cudaGetDeviceCount(self) -> int:
        return self.devices

    @_function
    def cudaGetDevice(self) -> int:
        return self._device

    @_function
    def cudaSetDevice(self, index: int) -> None:
        if not 0 <= index < self.devices:
            raise _CallError(Status.cudaErrorInvalidValue)
        self._current.device = index

    @_function
    def cudaGetDeviceProperties(self, index: int) -> Any:
        return SimpleNamespace(name=f"Paper GPU {index}".encode() + b"\0\0", major=8, minor=9)

    @_function
    def cudaDriverGetVersion(self) -> int:
        return 12040

    @_function
    def cudaMemGetInfo(self) -> tuple[int, int]:
        return self._free, self.memory

    def cudaGetLastError(self) -> tuple[Status]:
        status, self._last = self._last, Status.cudaSuccess
        return (status,)

    def cudaGetErrorString(self, status: Status) -> tuple[Status, bytes]:
        return Status.cudaSuccess, f"text of {status.value}".encode()

    def cudaGetErrorName(self, status: Status) -> tuple[Status, bytes]:
        return Status.cudaSuccess, status.name.encode()

    @property
    def last_error(self) -> Status:
        return self._last

    # -- memory ------------------------------------------------------------------------------------

    @_function
    def cudaMalloc(self, nbytes: int) -> int:
        self._not_while_recording()
        if nbytes > self._free:
            raise _CallError(Status.cudaErrorMemoryAllocation)
        return self._allocate(nbytes, 2)

    @_function
    def cudaHostAlloc(self, nbytes: int, flags: int) -> int:
        self._not_while_recording()
        assert flags == 0
        return self._allocate(nbytes, 1)

    @_function
    def cudaFree(self, pointer: int) -> None:
        self._not_while_recording()
        if pointer != 0:
            self._free_memory(pointer, 2)

    @_function
    def cudaFreeHost(self, pointer: int) -> None:
        self._not_while_recording()
        self._free_memory(pointer, 1)

    @_function
    def cudaPointerGetAttributes(self, pointer: int) -> Any:
        memory = self._find(pointer)
        if memory is None:
            return SimpleNamespace(type=0, device=-2)
        return SimpleNamespace(type=memory.kind, device=memory.device)

    @_function
    def cudaMemcpyAsync(
        self, target: int, source: int, nbytes: int, kind: Any, stream: int
    ) -> None:
        name, to, of = {1: ("h2d", 2, 1), 2: ("d2h", 1, 2), 3: ("d2d", 2, 2)}[kind.value]

        def copy() -> None:
            self.log.append(name)
            self.view(target, (nbytes,), np.uint8, to)[:] = self.view(
                source, (nbytes,), np.uint8, of
            )

        self._add(self._stream(stream), copy)

    # -- streams and events ------------------------------------------------------------------------

    @_function
    def cudaStreamCreateWithFlags(self, flags: int) -> Handle:
        assert flags == 1, "a stream that waits for the default stream"
        number = next(self._numbers)
        self._streams[number] = _Stream()
        return Handle(number)

    @_function
    def cudaStreamDestroy(self, stream: int) -> None:
        self._drain(self._stream(stream))
        del self._streams[int(stream)]

    @_function
    def cudaStreamSynchronize(self, stream: int) -> None:
        found = self._stream(stream)
        if found.recording is not None:
            found.invalid = True
            raise _CallError(Status.cudaErrorStreamCaptureUnsupported)
        self._drain(found)

    @_function
    def cudaStreamWaitEvent(self, stream: int, event: int, flags: int) -> None:
        assert flags == 0
        place = self._event(event).place
        if place is not None:
            self._add(self._stream(stream), lambda: self._drain(*place))

    @_function
    def cudaEventCreateWithFlags(self, flags: int) -> Handle:
        number = next(self._numbers)
        self._events[number] = _Event(timing=flags == 0)
        return Handle(number)

    @_function
    def cudaEventDestroy(self, event: int) -> None:
        del self._events[int(event)]

    @_function
    def cudaEventRecord(self, event: int, stream: int) -> None:
        found, target = self._event(event), self._stream(stream)

        def pass_by() -> None:
            found.time = time.perf_counter()

        self._add(target, pass_by)
        found.place = target, target.added

    @_function
    def cudaEventSynchronize(self, event: int) -> None:
        place = self._event(event).place
        if place is not None:
            self._drain(*place)

    @_function
    def cudaEventElapsedTime(self, start: int, end: int) -> float:
        first, last = self._event(start), self._event(end)
        if not (first.timing and last.timing):
            raise _CallError(Status.cudaErrorInvalidResourceHandle)
        return (last.time - first.time) * 1000

    # -- graphs ------------------------------------------------------------------------------------

    @_function
    def cudaStreamBeginCapture(self, stream: int, mode: Any) -> None:
        assert mode.value == 1
        found = self._stream(stream)
        if found is self._streams[0] or found.recording is not None:
            raise _CallError(Status.cudaErrorStreamCaptureUnsupported)
        found.recording, found.invalid = [], False
        found.recorder = threading.get_ident()

    @_function
    def cudaStreamEndCapture(self, stream: int) -> Handle:
        found = self._stream(stream)
        work, found.recording = found.recording, None
        if work is None or found.invalid:
            raise _CallError(Status.cudaErrorStreamCaptureInvalidated)
        number = next(self._numbers)
        self._graphs[number] = work
        return Handle(number)

    @_function
    def cudaGraphInstantiate(self, graph: Any, flags: int) -> Handle:
        assert flags == 0
        number = next(self._numbers)
        self._executables[number] = self._graphs[int(graph)]
        return Handle(number)

    @_function
    def cudaGraphDestroy(self, graph: Any) -> None:
        del self._graphs[int(graph)]

    @_function
    def cudaGraphUpload(self, executable: Any, stream: int) -> None:
        assert int(executable) in self._executables
        self._stream(stream)

    @_function
    def cudaGraphLaunch(self, executable: Any, stream: int) -> None:
        number = int(executable)
        if number not in self._executables:
            raise _CallError(Status.cudaErrorInvalidResourceHandle)
        work = [self._once(item) for item in self._executables[number]]

        def launch() -> None:
            if number not in self._executables:
                self.wrong("a graph was destroyed before it ran")
            self.log.append("graph")
            for item in work:
                item()

        self._add(self._stream(stream), launch)

    @_function
    def cudaGraphExecDestroy(self, executable: int) -> None:
        del self._executables[int(executable)]

    # -- inside ------------------------------------------------------------------------------------

    @property
    def _device(self) -> int:
        return getattr(self._current, "device", 0)

    @property
    def _free(self) -> int:
        used = sum(m.nbytes for m in self.allocations.values() if m.kind == 2)
        return self.memory - used

    def _refuse(self, status: Status | Exception) -> tuple[Any, ...]:
        if isinstance(status, Exception):
            raise status
        self._last = status
        return (status, None)

    def _allocate(self, nbytes: int, kind: int) -> int:
        memory = _Memory(nbytes, kind, self._device)
        self.allocations[memory.start] = memory
        return memory.start

    def _free_memory(self, pointer: int, kind: int) -> None:
        memory = self.allocations.pop(pointer, None)
        if memory is None or memory.kind != kind:
            self.wrong(f"{pointer:#x} was freed, and is not allocated as kind {kind}")

    def _find(self, pointer: int) -> _Memory | None:
        for memory in self.allocations.values():
            if memory.start <= pointer < memory.start + max(memory.nbytes, 1):
                return memory
        return None

    def _stream(self, stream: int) -> _Stream:
        found = self._streams.get(0 if int(stream) == 1 else int(stream))
        if found is None:
            raise _CallError(Status.cudaErrorInvalidResourceHandle)
        return found

    def _event(self, event: int) -> _Event:
        if int(event) not in self._events:
            raise _CallError(Status.cudaErrorInvalidResourceHandle)
        return self._events[int(event)]

    def _add(self, stream: _Stream, work: Any) -> None:
        if stream.recording is not None:
            stream.recording.append(work)
            return
        stream.pending.append(self._once(work))
        stream.added += 1

    @staticmethod
    def _once(work: Any) -> Work:
        """Some work, to be done once; an execution knows which of its context's it is."""
        return work.launched() if isinstance(work, _Launch) else work

    def _drain(self, stream: _Stream, upto: int | None = None) -> None:
        while stream.done < (stream.added if upto is None else upto):
            work = stream.pending.pop(0)
            stream.done += 1
            work()

    def _not_while_recording(self) -> None:
        for stream in self._streams.values():
            if stream.recording is not None and stream.recorder == threading.get_ident():
                stream.invalid = True
                raise _CallError(Status.cudaErrorStreamCaptureUnsupported)


# -- TensorRT --------------------------------------------------------------------------------------


class FakeTensor(SimpleNamespace):
    """One input or output: name, mode ``INPUT`` or ``OUTPUT``, TensorRT's type, shape."""

    name: str
    mode: str
    dtype: str
    shape: Shape


TENSORS = (
    FakeTensor(name="image", mode="INPUT", dtype="FLOAT", shape=(-1, 3, -1, -1)),
    FakeTensor(name="z", mode="INPUT", dtype="FLOAT", shape=(-1, 4)),
    FakeTensor(name="truncation", mode="INPUT", dtype="FLOAT", shape=(1,)),
    FakeTensor(name="output", mode="OUTPUT", dtype="FLOAT", shape=(-1, 3, -1, -1)),
    FakeTensor(name="coarse", mode="OUTPUT", dtype="UINT8", shape=(-1, -1, -1)),
)

SMALL = {"image": ((1, 3, 4, 4), (1, 3, 8, 8), (2, 3, 16, 16)), "z": ((1, 4), (1, 4), (2, 4))}
LARGE = {"image": ((1, 3, 8, 8), (4, 3, 32, 32), (8, 3, 64, 64)), "z": ((1, 4), (4, 4), (8, 4))}
"""Smallest, best and largest shapes of two optimization profiles, which overlap."""


def expected(inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """What the fake engine computes: something of every input and of the shape."""
    image, z, truncation = inputs["image"], inputs["z"], inputs["truncation"]
    bias = z.sum(axis=1, dtype=np.float32)[:, None, None, None] + np.float32(
        10 * image.shape[2] + image.shape[3]
    )
    output = (image * truncation + bias).astype(np.float32)
    coarse = (np.abs(image[:, 0]) * np.float32(100)).astype(np.uint8)
    return {"output": output, "coarse": coarse}


class FakeEngine:
    """ICudaEngine.

    Args:
        gpu: What it runs on.
        tensors: Its inputs and outputs.
        profiles: Ranges of its optimization profiles.
        sharing: Contexts may share a profile; not so in TensorRT 8.6 without a preview feature.
        modern: Contexts have what newer versions added.
        compute: The outputs for inputs, by name.
    """

    def __init__(
        self,
        gpu: FakeGpu,
        tensors: Iterable[FakeTensor] = TENSORS,
        profiles: tuple[Mapping[str, Any], ...] = (SMALL, LARGE),
        *,
        sharing: bool = True,
        modern: bool = True,
        compute: Callable[[Mapping[str, NDArray[Any]]], Mapping[str, NDArray[Any]]] = expected,
    ) -> None:
        self.gpu = gpu
        self.compute = compute
        self.tensors = {tensor.name: tensor for tensor in tensors}
        self.profiles = profiles
        self.sharing = sharing
        self.modern = modern
        self.contexts: weakref.WeakSet[FakeContext] = weakref.WeakSet()
        self.runs_before_capturable = 0
        self.refuse_capture = False
        self.refuse_runs = False

    @property
    def num_io_tensors(self) -> int:
        return len(self.tensors)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self.profiles)

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> Any:
        return SimpleNamespace(name=self.tensors[name].mode)

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name=self.tensors[name].dtype)

    def get_tensor_shape(self, name: str) -> list[int]:
        return list(self.tensors[name].shape)

    def get_tensor_profile_shape(self, name: str, profile: int) -> Any:
        return tuple(list(shape) for shape in self.profiles[profile][name])

    @property
    def inputs(self) -> list[FakeTensor]:
        return [tensor for tensor in self.tensors.values() if tensor.mode == "INPUT"]

    @property
    def dynamic(self) -> bool:
        return any(-1 in tensor.shape for tensor in self.inputs)


class _Launch:
    """One execution as a context was at that time; of a graph, each launch is one."""

    def __init__(self, context: FakeContext) -> None:
        self._context = context
        self._of_graph = context.recording
        self._generation = context.generation
        self._shapes = context.all_shapes()
        self._pointers = dict(context.addresses)

    def launched(self) -> Work:
        context = self._context
        self._check()
        context.launched += 1
        number = context.launched

        def run() -> None:
            gpu = context.engine.gpu
            self._check()
            context.ran += 1
            if context.ran != number:
                gpu.wrong("two executions of one context were not ordered on the GPU")
            if not context.switched:
                gpu.wrong("an execution did not wait for the switch of the profile")
            gpu.log.append("run")
            arrays = {
                name: gpu.view(self._pointers[name], shape, _NUMPY[tensor.dtype], 2)
                for name, shape in self._shapes.items()
                for tensor in (context.engine.tensors[name],)
            }
            inputs = {tensor.name: arrays[tensor.name] for tensor in context.engine.inputs}
            for name, value in context.engine.compute(inputs).items():
                if name in arrays:
                    arrays[name][...] = value

        return run

    def _check(self) -> None:
        if self._of_graph and self._context.generation != self._generation:
            self._context.engine.gpu.wrong("a graph was launched after its context was changed")


_NUMPY = {"FLOAT": np.float32, "UINT8": np.uint8, "HALF": np.float16, "BOOL": np.bool_}


class FakeContext:
    """IExecutionContext of TensorRT 8.6."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.profile = 0 if not engine.contexts else -1
        self.shapes: dict[str, Shape] = {
            tensor.name: tensor.shape for tensor in engine.inputs if -1 not in tensor.shape
        }
        self.addresses: dict[str, int] = {}
        self.generation = 0
        self.launched = 0
        self.ran = 0
        self.runs = 0
        self.recording = False
        self.switched = True
        self._fresh = True
        self._inside = threading.Lock()
        engine.contexts.add(self)

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        target = self._stream(stream)
        others = [context for context in self.engine.contexts if context is not self]
        if not self.engine.sharing and any(other.profile == profile for other in others):
            return False
        if self.launched != self.ran:
            self.engine.gpu.errors.append("the profile was switched while work was under way")
        self.profile = profile
        self.switched = False
        self.engine.gpu._add(target, self._switch)
        self.shapes = {
            n: s for n, s in self.shapes.items() if -1 not in self.engine.tensors[n].shape
        }
        self._change()
        return True

    def _switch(self) -> None:
        self.switched = True

    def set_input_shape(self, name: str, shape: Shape) -> bool:
        low, _, high = self.engine.profiles[self.profile][name]
        if self.profile < 0 or not all(
            a <= b <= c for a, b, c in zip(low, shape, high, strict=True)
        ):
            return False
        self.shapes[name] = tuple(shape)
        self._change()
        return True

    def set_tensor_address(self, name: str, pointer: int) -> bool:
        self.addresses[name] = pointer
        self.generation += 1
        return pointer % 256 == 0

    def get_tensor_shape(self, name: str) -> Any:
        shapes = self.all_shapes()
        return _NoDims() if not shapes else list(shapes[name])

    def execute_async_v3(self, stream: int) -> bool:
        gpu = self.engine.gpu
        if not self._inside.acquire(blocking=False):
            gpu.errors.append("two threads used one context at once")
            return False
        try:
            time.sleep(0)
            with gpu.lock:
                return self._execute(self._stream(stream))
        finally:
            self._inside.release()

    def all_shapes(self) -> dict[str, Shape]:
        """Of all tensors; empty if the inputs' do not go together."""
        image = self.shapes["image"]
        if "z" in self.shapes and self.shapes["z"][0] != image[0]:
            return {}
        outputs = {"output": image, "coarse": (image[0], *image[2:])}
        kept = {name: shape for name, shape in outputs.items() if name in self.engine.tensors}
        return {**self.shapes, **kept}

    def _execute(self, stream: _Stream) -> bool:
        gpu = self.engine.gpu
        self.recording = stream.recording is not None
        ready = (
            gpu.last_error == Status.cudaSuccess
            and (self.profile >= 0 or not self.engine.dynamic)
            and set(self.addresses) == set(self.engine.tensors)
            and all(pointer % 256 == 0 for pointer in self.addresses.values())
            and bool(self.all_shapes())
            and not self.engine.refuse_runs
        )
        if self.recording and (self._fresh or self.engine.refuse_capture):
            stream.invalid = True
            ready = False
        if ready:
            gpu._add(stream, _Launch(self))
            if not self.recording:
                self._fresh = False
                self.runs += 1
        return ready

    def _change(self) -> None:
        self.generation += 1
        self._fresh = True

    def _stream(self, stream: int) -> _Stream:
        assert type(stream) is int, "TensorRT takes the handle of a stream as a number"
        return self.engine.gpu._stream(stream)


class ModernContext(FakeContext):
    """IExecutionContext as in TensorRT-RTX."""

    def infer_shapes(self) -> list[str]:
        missing = [tensor.name for tensor in self.engine.inputs if tensor.name not in self.shapes]
        if not missing and not self.all_shapes():
            raise RuntimeError("shape inference failed")
        return missing

    def is_stream_capturable(self, stream: int) -> bool:
        return self.runs >= self.engine.runs_before_capturable


class _NoDims:
    """A Dims of -1 axes, by which TensorRT 8.6 says that shapes do not go together."""

    def __len__(self) -> int:
        return -1

    def __getitem__(self, index: int) -> int:
        raise IndexError


class FakeBackend(Backend):
    """TensorRT 8.6.0, of which there is no more than running an engine.

    Args:
        engine: What every plan but ``b"broken"`` holds.
        most: Contexts that can be made at once, None for any number.
        context_bytes: GPU memory that each takes.
    """

    def __init__(
        self, engine: FakeEngine, *, most: int | None = None, context_bytes: int = 1 << 20
    ) -> None:
        super().__init__(make_tensorrt("8.6.0"))
        self.engine = engine
        self.most = most
        self.context_bytes = context_bytes
        self.deserialized = 0

    def deserialize(self, plan: bytes) -> Any:
        if plan == b"broken":
            raise UserError("TensorRT does not load the plan")
        self.deserialized += 1
        return self.engine

    def create_context(self, engine: FakeEngine) -> Any:
        gpu = engine.gpu
        if self.most is not None and len(engine.contexts) >= self.most:
            raise UserError("TensorRT made no context for the engine")
        status, memory = gpu.cudaMalloc(self.context_bytes)
        if status != Status.cudaSuccess:
            gpu.cudaGetLastError()
            raise UserError("TensorRT made no context for the engine")
        context = (ModernContext if engine.modern else FakeContext)(engine)
        weakref.finalize(context, gpu.cudaFree, memory)
        return context

    def context_memory(self, engine: FakeEngine) -> int:
        return self.context_bytes


# -- arrays of other libraries ---------------------------------------------------------------------


class CudaArray:
    """An array on the fake GPU with the CUDA array interface; its values are set by work.

    Args:
        gpu: Where.
        values: What it holds when ``stream`` has come so far.
        stream: Which of the library's streams that is.
        offset: Bytes from an aligned address at which it starts.
        extra: Entries of the interface to set.
    """

    def __init__(
        self,
        gpu: FakeGpu,
        values: NDArray[Any],
        stream: int,
        *,
        offset: int = 0,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        self._gpu = gpu
        self.shape, self.dtype = values.shape, values.dtype
        self._base = int(gpu.cudaMalloc(values.nbytes + offset)[1])
        self.pointer = self._base + offset
        self._extra = dict(extra or {})
        self.fill(values, stream)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.pointer, False),
            "version": 3,
            "strides": None,
            **self._extra,
        }

    def fill(self, values: NDArray[Any], stream: int) -> None:
        """Let a stream write to it."""

        def write() -> None:
            self.view[...] = values

        self._gpu.put(stream, write)

    @property
    def view(self) -> NDArray[Any]:
        """What it holds now."""
        return self._gpu.view(self.pointer, self.shape, self.dtype, 2)

    def free(self) -> None:
        self._gpu.cudaFree(self._base)


class _Capsules:
    """The C side of DLPack."""

    destructor_type = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

    def __init__(self) -> None:
        self.new = ctypes.pythonapi.PyCapsule_New
        self.new.argtypes = (ctypes.c_void_p, ctypes.c_char_p, self.destructor_type)
        self.new.restype = ctypes.py_object


_CAPSULES = _Capsules()


class DlpackArray(CudaArray):
    """The same with DLPack alone.

    Args:
        versioned: Speak version 1 of the protocol, if the consumer asks for it.
        element: DLPack's code and bits of the element type; float32 by default.
        strides: In elements; None leaves them out.
        device: DLPack's type and number of the device.
        flags: Of version 1: 1 is read-only.

    Attributes:
        streams: What consumers asked it to be ready on.
        held: Claims of consumers that were not given up yet.
    """

    __cuda_array_interface__ = property()  # it has none

    def __init__(
        self,
        gpu: FakeGpu,
        values: NDArray[Any],
        stream: int,
        *,
        offset: int = 0,
        versioned: bool = True,
        element: tuple[int, int] = (2, 32),
        strides: Shape | None = None,
        device: tuple[int, int] = (2, 0),
        flags: int = 0,
    ) -> None:
        super().__init__(gpu, values, stream, offset=offset)
        self._own_stream = stream
        self._versioned = versioned
        self._element = element
        self._strides = strides
        self._device = device
        self._flags = flags
        self._kept: list[Any] = []
        self.streams: list[Any] = []
        self.held = 0

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._device

    def __dlpack__(self, *, stream: int | None = None, **options: Any) -> Any:
        if options and not self._versioned:
            raise TypeError("unexpected keyword argument 'max_version'")
        self.streams.append(stream)
        if stream is not None and stream > 0:
            event = int(self._gpu.cudaEventCreateWithFlags(2)[1])
            self._gpu.cudaEventRecord(event, self._own_stream)
            self._gpu.cudaStreamWaitEvent(stream, event, 0)
            self._gpu.cudaEventDestroy(event)
        return self._capsule()

    def _capsule(self) -> Any:
        from engines import arrays  # its structures are held against torch's capsules in a test

        shape = (ctypes.c_int64 * len(self.shape))(*self.shape)
        strides = (
            None if self._strides is None else (ctypes.c_int64 * len(self.shape))(*self._strides)
        )
        managed = arrays._Versioned() if self._versioned else arrays._Managed()
        if self._versioned:
            managed.major, managed.flags = 1, self._flags
        tensor = managed.tensor
        tensor.data, tensor.byte_offset = self._base, self.pointer - self._base
        tensor.device.kind, tensor.device.index = self._device
        tensor.ndim = len(self.shape)
        tensor.dtype.code, tensor.dtype.bits = self._element
        tensor.dtype.lanes = 1
        tensor.shape = ctypes.cast(shape, ctypes.POINTER(ctypes.c_int64))
        if strides is not None:
            tensor.strides = ctypes.cast(strides, ctypes.POINTER(ctypes.c_int64))

        def give_up(_: int) -> None:
            self.held -= 1

        name = b"dltensor_versioned" if self._versioned else b"dltensor"
        destructor = _CAPSULES.destructor_type(give_up)
        self._kept += [managed, shape, strides, destructor, name]
        self.held += 1
        return _CAPSULES.new(ctypes.addressof(managed), name, destructor)
