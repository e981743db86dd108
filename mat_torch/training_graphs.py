"""Work that is captured into a CUDA graph once and replayed: no time goes to launching kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

__all__ = ["Record", "Replayed", "Work", "record_cuda_graph"]

Work: TypeAlias = Callable[..., Sequence[Tensor]]
"""Takes tensors, gives tensors, and leaves gradients in parameters; waits for nothing."""

Record: TypeAlias = Callable[[Callable[[], None]], Callable[[], None]]
"""Runs a function once or more, and gives what does the same again, on the same memory."""

_WARM_UP = 3  # what PyTorch's notes on CUDA graphs ask for: libraries and autotuners settle


def record_cuda_graph(run: Callable[[], None]) -> Callable[[], None]:
    """Capture what a function launches on this thread's GPU.

    Returns:
        What replays it, on the current stream.
    """
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph: Any = torch.cuda.CUDAGraph()
    # The loader's thread may pin memory meanwhile, which a capture in "global" mode forbids.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        run()
    replay: Callable[[], None] = graph.replay
    return replay


class Replayed:
    """A piece of work, recorded at its first call and replayed from then on.

    Inputs are copied to where they lay then, so each call brings tensors of the same shapes.
    Results and gradients stay valid until the next call.

    Args:
        parameters: Whose gradients the work computes, from nothing each time.
        record: How it is recorded.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], record: Record = record_cuda_graph
    ) -> None:
        self._parameters = [p for p in parameters if p.requires_grad]
        self._record = record
        self._replay: Callable[[], None] | None = None
        self._inputs: list[Tensor] = []
        self._results: Sequence[Tensor] = ()
        self._gradients: list[Tensor | None] = []

    def __call__(self, work: Work, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """Do the work on these inputs; `work` itself is only looked at in the first call."""
        if self._replay is None:
            self._inputs = [tensor.clone() for tensor in inputs]
            self._replay = self._record(lambda: self._run(work))
        for mine, tensor in zip(self._inputs, inputs, strict=True):
            mine.copy_(tensor)
        self._replay()
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        return self._results

    def _run(self, work: Work) -> None:
        for parameter in self._parameters:
            parameter.grad = None
        self._results = work(*self._inputs)
        self._gradients = [parameter.grad for parameter in self._parameters]
