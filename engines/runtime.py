"""Run a TensorRT engine: contexts in a pool, fixed buffers, CUDA graphs, no needless copy.

How it works:

- A **context** executes one inference at a time. A pool lends up to ``contexts`` of them; a caller
  waits until one is free. Each owns a stream, its buffers and at most one graph.
- **Buffers** belong to a context and only grow: after the first call of a shape nothing is
  allocated but the arrays that ``run`` gives away.
- A **graph** holds TensorRT's work alone, without the copies: so ``run`` copies one input to the
  GPU while it stages the next, and ``enqueue`` launches the same graph with no copy at all. A
  graph freezes addresses and shapes, and NVIDIA leaves undefined what it does once its context was
  changed; so a context keeps its graph exactly as long as it keeps its shapes and addresses, and
  the pool lends a caller the context that is already as the call needs it. Several shapes, or
  several sets of buffers, that take turns want as many ``contexts``; with fewer the results are
  the same, without a graph.
- **When a graph is captured**: ``run`` captures in its first call of a shape, after TensorRT has
  run once without (which it requires). ``enqueue``, and ``run`` when it comes back to a shape,
  capture when the same call comes a second time in a row.
- **Order on the GPU**: every use of a context waits there for its last one, on whatever stream.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from engines import cuda
from engines.arrays import DeviceArray, as_device_array, as_host_array
from engines.contexts import Context, EngineError, Pool
from engines.layout import EngineTensor, Layout, Shape, Source, is_aligned
from mat_export.contract import Closing, UserError

if TYPE_CHECKING:
    from engines.backend import Backend

__all__ = ["Engine", "EngineError", "EngineTensor"]


class Engine(Closing):
    """A deserialized engine, on the GPU that is current in the calling thread.

    Any number of threads may call it at once. Use as a context manager, or close it.

    Args:
        backend: The TensorRT that built the engine.
        plan: The serialized engine.
        contexts: Inferences that may be on the GPU at the same time. Each costs its own memory.
            The first is made now, further ones when first needed; one that cannot be made is
            done without.
        graphs: Capture and replay CUDA graphs.

    Attributes:
        tensors: Inputs and outputs, in the engine's order.
        device: Number of the GPU.
        graphs: Whether graphs are captured. Becomes False where a capture fails.
        graphs_refused: Why it did, else None.
        contexts_refused: Why there are fewer contexts than asked for, else None.

    Raises:
        UserError: If there is no GPU, TensorRT refuses the plan, or memory is too small.
    """

    def __init__(
        self, backend: Backend, plan: bytes, *, contexts: int = 1, graphs: bool = True
    ) -> None:
        if contexts < 1:
            raise UserError(f"an engine needs at least one context, got {contexts}")
        self.graphs = graphs
        self.graphs_refused: str | None = None
        self.device = cuda.current_device()
        with cuda.on_device(self.device):
            engine = backend.deserialize(plan)
            self._layout = Layout(engine)
            self.tensors = self._layout.tensors
            self._pool = Pool(backend, engine, self._layout, contexts)

    @property
    def contexts_refused(self) -> str | None:
        return self._pool.refused

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The outputs for these inputs, when they are there.

        Args:
            inputs: Every input by name: NumPy, or another library's arrays on the host.

        Returns:
            Every output by name, as arrays that are the caller's own.

        Raises:
            UserError: If an input is missing, unknown or of the wrong type, its shape is none that
                the engine was built for, or memory is too small.
            RunError: If TensorRT or CUDA fails, with the reason.
            RuntimeError: If the engine was closed.
        """
        sources: dict[str, Source] = {
            name: as_host_array(inputs[name], name=f"input '{name}'")
            for name in self._layout.check_names(inputs)
        }
        request = self._layout.request(sources, {})
        with cuda.on_device(self.device), self._pool.lend(request) as context:
            outputs = context.shape(request)
            context.address(request)
            new = context.is_new(request.shapes)
            stream = context.stream.handle
            with context.turn(stream):
                context.feed(request, sources, stream)
                self._execute(context, stream)
                views = {
                    tensor.name: context.fetch(tensor, shape, stream)
                    for tensor, shape in zip(self._layout.outputs, outputs, strict=True)
                }
            context.stream.synchronize()
            results = {name: view.copy() for name, view in views.items()}
            if new:
                self._capture(context)
            return results

    def enqueue(
        self,
        inputs: Mapping[str, Any],
        outputs: Mapping[str, Any] | None = None,
        *,
        stream: int,
    ) -> dict[str, DeviceArray]:
        """Put one inference into a stream and return at once, before it is done.

        An array on the GPU is read and written where it lies; only one whose address is no multiple
        of 256 is copied, on the GPU. The call waits for the GPU only where it must change buffers
        or a graph that are in use: at a shape or at addresses that are new.

        Args:
            inputs: Every input by name: C-contiguous arrays on this GPU (``__dlpack__`` or
                ``__cuda_array_interface__``), which must stay alive and unchanged until the work
                is done; or arrays on the host, which are copied before this returns.
            outputs: Arrays on this GPU to write to, by name, for some or all outputs.
            stream: Handle of the caller's CUDA stream, 0 for the default one; it must not be
                capturing. The work starts after what the stream already has.

        Returns:
            Every output by name. Where the caller gave none they lie in buffers of the engine,
            which **the next call overwrites**, from whatever thread: with several threads, or to
            keep a result, give ``outputs``.

        Raises:
            UserError: As run does, or if an array lies elsewhere, is not contiguous, or an output
                is not as the engine writes it.
            RuntimeError: If the engine was closed.
        """
        stream = operator.index(stream)
        with cuda.on_device(self.device):
            sources = {
                name: self._source(inputs[name], f"input '{name}'", stream)
                for name in self._layout.check_names(inputs)
            }
            targets = self._targets(outputs or {}, stream)
            request = self._layout.request(sources, targets)
            with self._pool.lend(request) as context:
                shapes = context.shape(request)
                self._layout.check_targets(targets, shapes)
                context.address(request)
                with context.turn(stream):
                    for array in (*sources.values(), *targets.values()):
                        context.follow(array, stream)
                    context.feed(request, sources, stream)
                    self._execute(context, stream)
                    return {
                        tensor.name: self._deliver(context, tensor, shape, targets, stream)
                        for tensor, shape in zip(self._layout.outputs, shapes, strict=True)
                    }

    def close(self) -> None:
        """Wait for what is running and release everything; callers that still wait get an error.

        Arrays that enqueue gave without ``outputs`` end with it. Once more does nothing.
        """
        with cuda.on_device(self.device):
            self._pool.close()

    # -- one call ------------------------------------------------------------------------------

    def _source(self, value: Any, name: str, stream: int) -> Source:
        array = as_device_array(value, name=name, device=self.device, stream=stream)
        return as_host_array(value, name=name) if array is None else array

    def _targets(self, outputs: Mapping[str, Any], stream: int) -> dict[str, DeviceArray]:
        """The caller's arrays for outputs, as far as they can be checked without their shapes."""
        targets = {}
        for name, value in outputs.items():
            array = as_device_array(
                value, name=f"output '{name}'", device=self.device, stream=stream
            )
            if array is None:
                raise UserError(
                    f"output '{name}' is not on the GPU: give an array that is, or use run"
                )
            if array.read_only:
                raise UserError(f"output '{name}' is read-only: give an array to write to")
            targets[name] = array
        return targets

    def _execute(self, context: Context, stream: int) -> None:
        if context.graph is None and context.repeats:
            self._capture(context)
        context.execute(stream)

    def _capture(self, context: Context) -> None:
        """Make the context's graph; where that fails, go on without graphs for good."""
        if not self.graphs or context.graph is not None:
            return
        try:
            context.capture()
        except (cuda.CudaError, EngineError) as error:
            self.graphs, self.graphs_refused = False, str(error)

    def _deliver(
        self,
        context: Context,
        tensor: EngineTensor,
        shape: Shape,
        targets: Mapping[str, DeviceArray],
        stream: int,
    ) -> DeviceArray:
        """An output where the caller asked for it, else in the context's own buffer."""
        target = targets.get(tensor.name)
        buffer = context.buffers.get(tensor.name)
        if target is None:
            assert buffer is not None, "address() gives every tensor without a target a buffer"
            pointer, owner = buffer.handle, buffer
        else:
            pointer, owner = target.pointer, target.owner
            if not is_aligned(target):
                assert buffer is not None, "address() gives a target that is not aligned a buffer"
                cuda.copy_on_device(pointer, buffer.handle, target.nbytes, stream)
        return DeviceArray(pointer, shape, tensor.dtype, self.device, stream=stream, owner=owner)
