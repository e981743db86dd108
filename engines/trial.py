"""Run a graph once in TensorRT, to look at its inner tensors: build, run, throw away."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from engines.build import check_build, run_build
from engines.options import BuildOptions
from engines.papers import open_plan
from engines.process import temporary_folder
from engines.runtime import Engine

if TYPE_CHECKING:
    import onnx

__all__ = ["run_tensorrt"]


def run_tensorrt(
    model: onnx.ModelProto,
    inputs: Mapping[str, NDArray[Any]],
    backend: str = "auto",
    *,
    tf32: bool = False,
    tactic_sources: tuple[str, ...] | None = None,
) -> dict[str, NDArray[Any]]:
    """Every output of a graph, by an engine that lives for this one call.

    Args:
        model: A graph without functions, with the outputs to look at; its metadata is ours.
        inputs: Arrays by name; those that the engine does not read are left out.
        backend: ``tensorrt``, ``tensorrt-rtx`` or ``auto``.
        tf32: Let FP32 products round their inputs to TF32.
        tactic_sources: TensorRT's tactic sources to use; None is its default.

    Raises:
        UserError: If there is no TensorRT or GPU, or the engine cannot be built or run.
    """
    with temporary_folder() as folder:
        plan = folder / "trial.plan"
        options = BuildOptions(backend=backend, level=0, tf32=tf32, tactic_sources=tactic_sources)
        run_build(check_build(model.SerializeToString(), plan, options), plan)
        opened = open_plan(plan)
    with Engine(opened.backend, opened.plan) as engine:
        used = [tensor.name for tensor in engine.tensors if tensor.mode == "input"]
        return engine.run({name: inputs[name] for name in used})
