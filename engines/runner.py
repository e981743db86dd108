"""A TensorRT engine file as a runner, to the pipeline, parity and benchmarks one like any other."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from engines import cuda
from engines.papers import open_plan
from engines.runtime import Engine
from mat_export.contract import Closing, GraphSpec, UserError, check_inputs

__all__ = ["EngineRunner"]


class EngineRunner(Closing):
    """An engine that ``mat-export trt`` built. Use as a context manager.

    Args:
        path: The engine; its manifest lies beside it.
        threads: Taken because every runner is opened with it; TensorRT works on the GPU and has no
            CPU threads to set.
        contexts: Inferences that may be on the GPU at the same time, see Engine.
        graphs: Capture and replay CUDA graphs, see Engine.

    Attributes:
        name: TensorRT's version and the GPU, and what is to be known of the engine on it.
        spec: What the engine takes and gives.
        image_shapes: Smallest, best and largest shape of ``image`` that the engine was built for;
            None: the one of its spec.
        engine: For what NumPy has no part in, such as ``engine.enqueue``.

    Raises:
        UserError: If there is no such file, it does not fit this TensorRT or GPU, there is no GPU,
            or the engine is not what its manifest says.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        threads: int | None = None,
        contexts: int = 1,
        graphs: bool = True,
    ) -> None:
        del threads
        opened = open_plan(Path(path))
        self.spec: GraphSpec = opened.spec
        self.image_shapes = opened.profiles.get("image")
        self.engine = Engine(opened.backend, opened.plan, contexts=contexts, graphs=graphs)
        try:
            self._check(path)
            device = cuda.device_info(self.engine.device)
            self.name = ", ".join((opened.backend.label, device.name, *opened.notes))
        except BaseException:
            self.engine.close()
            raise

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The outputs for these inputs, both by their names in ``spec``; any thread may call.

        An engine built with ``--mask-states`` gives those too.

        Raises:
            UserError: If an input is missing, unknown, or of the wrong type or shape, or GPU memory
                is too small.
            RuntimeError: If the runner was closed.
        """
        check_inputs(self.spec, inputs)
        return self.engine.run({name: inputs[name] for name in self._used})

    def close(self) -> None:
        """Release the engine; running afterwards is an error."""
        self.engine.close()

    def _check(self, path: str | os.PathLike[str]) -> None:
        """Hold the engine against its specification; an input that it does not use may be gone."""
        tensors = {tensor.name: tensor for tensor in self.engine.tensors}
        self._used = [t.name for t in self.engine.tensors if t.mode == "input"]
        specified = {tensor.name: tensor for tensor in (*self.spec.inputs, *self.spec.outputs)}
        wrong = [name for name in self._used if name not in specified]
        wrong += [t.name for t in self.spec.outputs if t.name not in tensors]
        wrong += [
            name
            for name, tensor in tensors.items()
            if name in specified and str(tensor.dtype) != specified[name].dtype
        ]
        if wrong:
            raise UserError(
                f"'{path}' is not the engine its manifest describes (see {', '.join(wrong)}): "
                "build it again with 'mat-export trt'"
            )
