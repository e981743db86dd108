"""Execution contexts with all that belongs to them, and the pool that lends them."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from engines import cuda
from engines.arrays import DeviceArray
from engines.layout import EngineTensor, Layout, Request, Shape, Source
from mat_export.contract import RunError, UserError

if TYPE_CHECKING:
    from engines.backend import Backend

__all__ = ["Context", "EngineError", "Pool"]


_B = TypeVar("_B", cuda.DeviceBuffer, cuda.PinnedBuffer)


class EngineError(RunError):
    """TensorRT refused a call that should have worked; the message has what it logged."""


class Context:
    """An execution context with its stream, buffers and graph; one caller at a time.

    Args:
        context: TensorRT's.
        layout: The engine's inputs and outputs.
        reason: Gives what TensorRT logged last, for messages.

    Attributes:
        request: The state it is in; None if that is not known.
        profile: Index of its optimization profile, None before it has one.
        shapes: Of the inputs, as set; None before.
        graph: Its work in that state, if captured.
        repeats: Runs without a graph since it came into that state.
    """

    def __init__(self, context: Any, layout: Layout, reason: Callable[[], str]) -> None:
        self._context = context
        self._layout = layout
        self._reason = reason
        self.stream = cuda.Stream()
        self.buffers: dict[str, cuda.DeviceBuffer] = {}
        self.request: Request | None = None
        self.profile: int | None = None
        self.shapes: tuple[Shape, ...] | None = None
        self.graph: cuda.Graph | None = None
        self.repeats = 0
        self.busy = False
        self._pinned: dict[str, cuda.PinnedBuffer] = {}
        self._outputs: tuple[Shape, ...] = ()
        self._seen: set[tuple[Shape, ...]] = set()
        self._done = cuda.Event()
        self._uploaded = cuda.Event()
        self._ready = cuda.Event()

    # -- state -----------------------------------------------------------------------------------

    def take_profile(self, profile: int) -> bool:
        """Switch to an optimization profile; False if TensorRT keeps it for another context."""
        if self.profile != profile and self._layout.dynamic:
            self._forget()
            self._done.synchronize()
            self.profile = self.shapes = None
            if not self._context.set_optimization_profile_async(profile, self.stream.handle):
                return False
            self.stream.synchronize()
        self.profile = profile
        return True

    def shape(self, request: Request) -> tuple[Shape, ...]:
        """Set the inputs' shapes; those of the outputs, in order.

        Raises:
            UserError: If each shape is within its range, but they do not go together.
        """
        if self.shapes == request.shapes:
            return self._outputs
        self._forget()
        self.shapes = None
        for tensor, shape in zip(self._layout.inputs, request.shapes, strict=True):
            if -1 in tensor.shape and not self._context.set_input_shape(tensor.name, shape):
                raise EngineError(
                    f"TensorRT refused shape {list(shape)} for '{tensor.name}', which is within "
                    f"profile {request.profile}: {self._reason()}"
                )
        outputs = self._infer()
        if outputs is None:
            raise UserError(
                f"the shapes {self._layout.describe(request.shapes)} do not go together: "
                "TensorRT finds no outputs for them"
            )
        self.shapes, self._outputs = request.shapes, outputs
        return outputs

    def _infer(self) -> tuple[Shape, ...] | None:
        """The outputs' shapes for the inputs' shapes as set, None if they do not go together."""
        try:
            if hasattr(self._context, "infer_shapes") and self._context.infer_shapes():
                return None
            shapes = tuple(
                tuple(self._context.get_tensor_shape(tensor.name))
                for tensor in self._layout.outputs
            )
        except (RuntimeError, ValueError):  # newer versions, and a Dims of -1 axes in older ones
            return None
        return None if any(length < 0 for shape in shapes for length in shape) else shapes

    def address(self, request: Request) -> None:
        """Bind every tensor to its address; own buffers are made as large as they have to be."""
        if self.request == request:
            return
        self._forget()
        shapes = iter(request.shapes), iter(self._outputs)
        for tensor, pointer in zip(self._layout.tensors, request.pointers, strict=True):
            shape = next(shapes[tensor.mode == "output"])
            address = self._buffer(tensor, shape) if pointer is None else pointer
            if not self._context.set_tensor_address(tensor.name, address):
                raise EngineError(
                    f"TensorRT refused an address for '{tensor.name}': {self._reason()}"
                )
        self.request = request

    def is_new(self, shapes: tuple[Shape, ...]) -> bool:
        """Whether the context never ran these shapes before; they count as known from now on."""
        new = shapes not in self._seen
        self._seen.add(shapes)
        return new

    def _forget(self) -> None:
        """Leave the present state; a graph, which belongs to it, goes."""
        self.request, self.repeats = None, 0
        if self.graph is not None:
            self._done.synchronize()
            self.graph.close()
            self.graph = None

    def _buffer(self, tensor: EngineTensor, shape: Shape) -> int:
        """Address of the context's own buffer for a tensor, large enough for a shape."""
        return int(self._grown(self.buffers, cuda.DeviceBuffer, tensor, shape).handle)

    def _stage(self, tensor: EngineTensor, shape: Shape) -> cuda.PinnedBuffer:
        """The context's pinned buffer for a tensor, large enough for a shape."""
        return self._grown(self._pinned, cuda.PinnedBuffer, tensor, shape)

    def _grown(
        self, buffers: dict[str, _B], kind: Callable[[int], _B], tensor: EngineTensor, shape: Shape
    ) -> _B:
        """A tensor's buffer among these, replaced by a larger one where it is too small."""
        needed = tensor.dtype.itemsize * math.prod(shape)
        buffer = buffers.get(tensor.name)
        if buffer is None or buffer.nbytes < needed:
            if buffer is not None:
                self._done.synchronize()
                buffers.pop(tensor.name).close()
            buffer = buffers[tensor.name] = kind(needed)
        return buffer

    # -- work ------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def turn(self, stream: int) -> Iterator[None]:
        """What is put into the stream in this block comes after the last turn, on the GPU too."""
        self._done.block(stream)
        try:
            yield
        finally:
            self._done.record(stream)

    def follow(self, array: Source, stream: int) -> None:
        """Let the stream wait until an array is ready that belongs to another stream."""
        if isinstance(array, DeviceArray) and array.stream is not None:
            if {array.stream, stream} <= {0, 1} or array.stream == stream:  # 0 and 1 are the same
                return
            self._ready.record(array.stream)
            self._ready.block(stream)

    def feed(self, request: Request, sources: Mapping[str, Source], stream: int) -> None:
        """Copy the inputs that are not read where they lie to the context's own buffers."""
        own = [
            (tensor, sources[tensor.name], self.buffers[tensor.name].handle)
            for tensor, pointer in zip(self._layout.tensors, request.pointers, strict=True)
            if tensor.mode == "input" and pointer is None
        ]
        from_host = any(isinstance(source, np.ndarray) for _, source, _ in own)
        if from_host:
            self._uploaded.synchronize()  # the last call's copies have left the pinned buffers
        try:
            for tensor, source, target in own:
                if isinstance(source, DeviceArray):
                    cuda.copy_on_device(target, source.pointer, source.nbytes, stream)
                    continue
                staged = self._stage(tensor, source.shape)
                np.copyto(staged.view(source.shape, tensor.dtype), source)
                cuda.copy_to_device(target, staged.handle, source.nbytes, stream)
        finally:
            if from_host:
                self._uploaded.record(stream)

    def fetch(self, tensor: EngineTensor, shape: Shape, stream: int) -> NDArray[Any]:
        """Copy an output to pinned memory; the array is filled when the stream has come so far."""
        staged = self._stage(tensor, shape)
        view = staged.view(shape, tensor.dtype)
        cuda.copy_to_host(staged.handle, self.buffers[tensor.name].handle, view.nbytes, stream)
        return view

    def execute(self, stream: int) -> None:
        """Put TensorRT's work into a stream, as a graph if there is one."""
        if self.graph is not None:
            self.graph.launch(stream)
            return
        self._enqueue(stream)
        self.repeats += 1

    def capture(self) -> None:
        """Record TensorRT's work in the present state.

        Nothing happens where TensorRT says that it is not ready for it yet.

        Raises:
            cuda.CudaError, EngineError: If it cannot be recorded.
        """
        stream = self.stream.handle
        ready = getattr(self._context, "is_stream_capturable", None)  # TensorRT-RTX
        if ready is None or ready(stream):
            self.graph = cuda.capture(stream, lambda: self._enqueue(stream))

    def _enqueue(self, stream: int) -> None:
        if not self._context.execute_async_v3(stream):
            raise EngineError(f"TensorRT refused to run the engine: {self._reason()}")

    def close(self) -> None:
        """Wait for its work and release it and all it owns."""
        self._done.synchronize()
        self._forget()
        self._context = None
        for resource in (
            *self.buffers.values(),
            *self._pinned.values(),
            self._done,
            self._uploaded,
            self._ready,
            self.stream,
        ):
            resource.close()


class Pool:
    """Lends contexts: makes them as they are needed, up to a limit, then waits for one."""

    def __init__(self, backend: Backend, engine: Any, layout: Layout, limit: int) -> None:
        self.refused: str | None = None
        self._backend = backend
        self._engine = engine
        self._layout = layout
        self._limit = limit
        self._shared = True
        self._opening = 0
        self._closed = False
        self._changed = threading.Condition()
        self._contexts = [self._new()]
        """In the order of their last use."""

    @contextlib.contextmanager
    def lend(self, request: Request) -> Iterator[Context]:
        """A context that has the profile of a request, and its state too if one is free that has.

        Raises:
            RuntimeError: If the pool is closed, also while waiting.
        """
        context = self._take(request)
        try:
            yield context
        finally:
            self._give(context)

    def close(self) -> None:
        """Wait until every context is back, and release them and the engine."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            self._changed.wait_for(
                lambda: not self._opening and not any(c.busy for c in self._contexts)
            )
            contexts, self._contexts = self._contexts, []
        for context in contexts:
            context.close()
        self._engine = None

    def _take(self, request: Request) -> Context:
        while True:
            with self._changed:
                context = self._wait(request)
            if context is not None:
                return context
            self._open()

    def _wait(self, request: Request) -> Context | None:
        """The context that suits best, once it is free; None if another one is to be made."""
        while True:
            if self._closed:
                raise RuntimeError("this engine was closed")
            context = self._best(request)
            if context is None and self._may_open(request):
                self._opening += 1
                return None
            # Under the lock: no other thread sees a profile between two contexts.
            if context is not None and context.take_profile(request.profile):
                context.busy = True
                return context
            if context is not None and self._shared:
                self._stop_sharing()
                continue
            if not self._opening and not any(other.busy for other in self._contexts):
                raise EngineError(
                    f"TensorRT refused optimization profile {request.profile}: "
                    f"{self._backend.last_errors()}"
                )
            self._changed.wait()

    def _best(self, request: Request) -> Context | None:
        """One that is free: in its state, else unused, else (if none may be made) the nearest."""
        free = [context for context in self._contexts if not context.busy]
        if self._is_held(request):
            free = [context for context in free if context.profile == request.profile]
        for context in free:
            if context.request == request:
                return context
        for context in free:
            if context.profile is None:
                return context
        if self._may_open(request):
            return None
        return min(
            free,
            key=lambda c: (c.profile != request.profile, c.shapes != request.shapes),
            default=None,
        )

    def _may_open(self, request: Request) -> bool:
        made = len(self._contexts) + self._opening
        return made < self._limit and not self._is_held(request)

    def _is_held(self, request: Request) -> bool:
        """Whether a context has the profile, in a TensorRT that gives each to one context alone."""
        return not self._shared and any(c.profile == request.profile for c in self._contexts)

    def _stop_sharing(self) -> None:
        """Leave each profile to the context that has it: TensorRT 8.6 refuses it to others."""
        self._shared = False
        profiles = len(self._layout.profiles)
        if profiles < self._limit:
            self._limit = profiles
            self.refused = (
                "this TensorRT runs one context for each optimization profile, and the engine "
                f"has {profiles}"
            )
        self._drop_idle()

    def _drop_idle(self) -> None:
        """Release contexts that have no profile, as far as there are too many."""
        for context in [c for c in self._contexts if c.profile is None and not c.busy]:
            if len(self._contexts) > self._limit:
                self._contexts.remove(context)
                context.close()

    def _open(self) -> None:
        """Make another context; if that fails, go on with those there are."""
        context, refused = None, None
        try:
            context = self._new()
        except UserError as error:
            refused = str(error)
        finally:
            with self._changed:
                self._opening -= 1
                if context is not None:
                    self._contexts.append(context)
                    self._drop_idle()
                if refused is not None:
                    self._limit, self.refused = len(self._contexts), refused
                self._changed.notify_all()

    def _new(self) -> Context:
        needed, free = self._backend.context_memory(self._engine), cuda.free_memory()
        try:
            context = self._backend.create_context(self._engine)
            return Context(context, self._layout, self._backend.last_errors)
        except UserError as error:
            raise UserError(
                f"{error} (an execution context needs {needed / cuda.MIB:.1f} MiB of GPU memory "
                f"and {free / cuda.MIB:.1f} MiB are free)"
            ) from error

    def _give(self, context: Context) -> None:
        with self._changed:
            context.busy = False
            self._contexts.remove(context)
            self._contexts.append(context)
            self._changed.notify_all()
