"""Running a model, whatever it is made of: one small contract, NumPy in and NumPy out.

A runner holds its session until it is closed (use it as a context manager). The arrays that
``run`` returns are the caller's own: the runner neither keeps nor overwrites them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mat_export.contract import Closing, GraphSpec, UserError, check_inputs
from mat_export.openers import opener_of

if TYPE_CHECKING:
    import onnx

    from mat_torch.checkpoint import Checkpoint

__all__ = [
    "OrtRunner",
    "Runner",
    "TorchRunner",
    "hold_half",
    "open_runner",
    "read_checkpoint",
    "reason_of",
    "session_options",
    "torch_device",
]

Arrays = dict[str, NDArray[Any]]


class Runner(Protocol):
    """A loaded model.

    Attributes:
        name: What it is, for tables and messages.
        spec: What it takes and gives.
    """

    name: str
    spec: GraphSpec

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        """The outputs for these inputs, both by their names in ``spec``.

        Raises:
            UserError: If an input is missing, unknown, or of the wrong type or shape.
        """

    def close(self) -> None:
        """Release the model; running afterwards is an error."""

    def __enter__(self) -> Runner: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


class TorchRunner(Closing):
    """The reference model in PyTorch, eager, FP32.

    Args:
        checkpoint: Its weights.
        spec: Contract to follow; by default any batch, native size, constant noise, float.
        device: Where to run, ``cpu`` or ``cuda``.
        threads: CPU threads, PyTorch's choice if None.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        spec: GraphSpec | None = None,
        device: str = "cpu",
        threads: int | None = None,
    ) -> None:
        import torch

        if threads is not None:
            torch.set_num_threads(threads)
        self.spec = spec or GraphSpec(
            checkpoint.config,
            batch=None,
            coarse=True,
            checkpoint=checkpoint.digest,
            source=checkpoint.source,
        )
        self.name = f"PyTorch {torch.__version__} eager, {device}"
        self._device = torch.device(device)
        self._model: Any = checkpoint.build().to(self._device)

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        import torch

        from mat_export.pixels import from_unit, to_unit

        if self._model is None:
            raise RuntimeError("this runner was closed")
        check_inputs(self.spec, inputs)
        arrays = dict(inputs)
        if self.spec.io == "uint8":
            arrays["image"], arrays["mask"] = to_unit(arrays["image"], arrays["mask"])
        # Copies: torch takes neither negative strides nor read-only arrays as they are.
        tensors = {k: torch.from_numpy(v.copy()).to(self._device) for k, v in arrays.items()}
        noise = {k: tensors.pop(k) for k in list(tensors) if k.startswith("noise_")}
        with torch.inference_mode():
            output, coarse = self._model(**tensors, noise=noise)
        results = {"output": output.cpu().numpy()}
        if self.spec.coarse:
            results["coarse"] = coarse.cpu().numpy()
        if self.spec.io == "uint8":
            results = {k: from_unit(v) for k, v in results.items()}
        return results

    def close(self) -> None:
        self._model = None


class OrtRunner(Closing):
    """An exported model in ONNX Runtime: CUDA where onnxruntime-gpu offers it, else the CPU.

    Args:
        model: Path of an ONNX file, or the bytes of one.
        providers: Execution providers in order of preference; None chooses.
        threads: CPU threads within an operator, ONNX Runtime's choice if None.
        spec: Contract to follow; by default the one in the file's metadata.
        label: What to call the model in messages; by default its path.
        stored_half: On the CPU, store every half tensor in half as a GPU does (see ``hold_half``):
            to judge a model rather than to use it, since optimizations are then off.

    Raises:
        UserError: If there is no such file, ONNX Runtime cannot load it, or it has no contract.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | bytes,
        *,
        providers: Sequence[str] | None = None,
        threads: int | None = None,
        spec: GraphSpec | None = None,
        label: str | None = None,
        stored_half: bool = False,
    ) -> None:
        import onnxruntime as ort

        self._label = label or ("the model" if isinstance(model, bytes) else f"'{model}'")
        source = model if isinstance(model, bytes) else _existing_file(model)
        options = session_options(threads)
        chosen = list(providers) if providers else _providers(ort.get_available_providers())
        held = _held(source, self._label) if stored_half and chosen[0] == _CPU else None
        if held is not None:
            source = held
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            self._session: Any = ort.InferenceSession(source, options, providers=chosen)
        except Exception as error:  # ONNX Runtime's exceptions share no base of their own
            raise UserError(
                f"ONNX Runtime cannot load {self._label}: {reason_of(error)}"
            ) from error
        metadata = self._session.get_modelmeta().custom_metadata_map
        found = spec or GraphSpec.from_metadata(metadata)
        if found is None:
            raise UserError(
                f"{self._label} is an ONNX model, but not one that mat-export wrote: "
                "export it with 'mat-export onnx'"
            )
        self.spec = found
        self.providers: list[str] = self._session.get_providers()
        self._outputs = [output.name for output in self._session.get_outputs()]
        kind = self.providers[0].removesuffix("ExecutionProvider")
        self.name = f"ONNX Runtime {ort.__version__}, {kind}"
        if held is not None:
            self.name += ", half tensors stored in half"

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        if self._session is None:
            raise RuntimeError("this runner was closed")
        check_inputs(self.spec, inputs)
        used = {tensor.name for tensor in self._session.get_inputs()}
        feed = {k: np.ascontiguousarray(v) for k, v in inputs.items() if k in used}
        try:
            results = self._session.run(self._outputs, feed)
        except Exception as error:  # as above
            raise UserError(f"ONNX Runtime cannot run {self._label}: {reason_of(error)}") from error
        return dict(zip(self._outputs, results, strict=True))

    def close(self) -> None:
        self._session = None


_CPU = "CPUExecutionProvider"


def _held(source: str | bytes, label: str) -> bytes | None:
    """What ``hold_half`` makes of a model, or None if it has no half tensors.

    Raises:
        UserError: If it is no ONNX model.
    """
    import onnx

    try:
        model = onnx.load_from_string(source) if isinstance(source, bytes) else onnx.load(source)
    except Exception as error:  # protobuf's, whichever implementation it has
        raise UserError(f"ONNX Runtime cannot load {label}: {reason_of(error)}") from error
    held = hold_half(model)
    if held is model:
        return None
    data: bytes = held.SerializeToString()
    return data


def hold_half(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph with its half tensors held in half, or the model itself if it has none.

    ONNX Runtime's CPU provider computes half operators in FP32 and, between two of them, never
    rounds to half: what overflows on a GPU passes there unseen. It moves half values as they are,
    so an Identity makes it store them, as long as its optimizations are off; two in a row, since it
    turns a lone half node among FP32 ones into FP32. It has no operators for bfloat16: those become
    FP32 ones whose results are rounded, by a cast there and back.
    """
    import onnx
    from onnx import TensorProto, helper

    inferred = onnx.shape_inference.infer_shapes(model)
    halves = {
        info.name: info.type.tensor_type.elem_type
        for info in (*inferred.graph.value_info, *inferred.graph.output)
        if info.type.tensor_type.elem_type in (TensorProto.FLOAT16, TensorProto.BFLOAT16)
    }
    if not halves:
        return model
    result = onnx.ModelProto()
    result.CopyFrom(model)
    if TensorProto.BFLOAT16 in halves.values():
        _widen(result.graph)
    nodes: list[onnx.NodeProto] = []
    for node in result.graph.node:
        nodes.append(node)
        for i, name in enumerate(node.output):
            if name not in halves:
                continue
            chain = [f"{name}/computed", f"{name}/rounded", name]
            node.output[i] = chain[0]
            steps: list[dict[str, Any]] = [{"op_type": "Identity"}] * 2
            if halves[name] == TensorProto.BFLOAT16:
                there, back = TensorProto.BFLOAT16, TensorProto.FLOAT
                steps = [{"op_type": "Cast", "to": to} for to in (there, back)]
            nodes += [
                helper.make_node(inputs=[one], outputs=[other], name=f"{other}/held", **step)
                for (one, other), step in zip(pairwise(chain), steps, strict=True)
            ]
    del result.graph.node[:], result.graph.value_info[:]
    result.graph.node.extend(nodes)
    return result


def _widen(graph: onnx.GraphProto) -> None:
    """Give what a graph holds in bfloat16 the type FP32; no value changes."""
    from onnx import AttributeProto, TensorProto, numpy_helper

    def widen(tensor: TensorProto) -> None:
        if tensor.data_type == TensorProto.BFLOAT16:
            values = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))

    for tensor in graph.initializer:
        widen(tensor)
    for info in (*graph.input, *graph.output):
        if info.type.tensor_type.elem_type == TensorProto.BFLOAT16:
            info.type.tensor_type.elem_type = TensorProto.FLOAT
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.TENSOR:
                widen(attribute.t)
            elif node.op_type == "Cast" and attribute.i == TensorProto.BFLOAT16:
                attribute.i = TensorProto.FLOAT


def session_options(threads: int | None) -> Any:
    """ONNX Runtime's options of a session: errors alone are logged.

    Args:
        threads: CPU threads within an operator, ONNX Runtime's choice if None.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    return options


def reason_of(error: Exception) -> str:
    """The first line of what a library's error says, or its type."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _providers(available: Sequence[str]) -> list[str]:
    """CUDA first where it is offered; the CPU always stands behind it."""
    cuda = [p for p in available if p == "CUDAExecutionProvider"]
    return [*cuda, _CPU]


def _existing_file(path: str | os.PathLike[str]) -> str:
    if not os.path.isfile(path):  # which raises for no path at all, unlike pathlib's
        raise UserError(f"there is no file '{path}'")
    return os.fspath(path)


def open_runner(
    path: str | os.PathLike[str], *, threads: int | None = None, device: str = "cpu"
) -> Runner:
    """The runner for a model file.

    ONNX files run in ONNX Runtime, file types of ``openers`` by theirs, anything else is read as a
    checkpoint.

    Args:
        path: The file.
        threads: CPU threads, the runtime's choice if None.
        device: Where a checkpoint runs, ``cpu`` or ``cuda``.

    Raises:
        UserError: If there is no such file or no runner reads it.
    """
    if Path(path).suffix.lower() == ".onnx":
        return OrtRunner(path, threads=threads)
    opener = opener_of(path)
    if opener is not None:
        return opener(_existing_file(path), threads=threads)
    return TorchRunner(read_checkpoint(path), threads=threads, device=device)


def torch_device(wanted: str = "auto") -> str:
    """Where PyTorch is to run.

    Args:
        wanted: ``cpu``, ``cuda``, or ``auto``: ``cuda`` where torch sees a GPU.

    Raises:
        UserError: If CUDA is asked for and torch sees no GPU.
    """
    import torch

    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"torch {torch.__version__} sees no GPU here: leave out --device cuda, or see "
            "'mat-export doctor'"
        )
    return wanted


def read_checkpoint(path: str | os.PathLike[str], key: str = "G_ema") -> Checkpoint:
    """``mat_torch.load_checkpoint``, every failure a UserError.

    Raises:
        UserError: If there is no such file, torch is not installed, or it is no checkpoint.
    """
    _existing_file(path)
    try:
        from mat_torch.checkpoint import CheckpointError, load_checkpoint
    except ModuleNotFoundError as error:
        raise UserError(
            f"'{path}' is not an ONNX file, and reading a checkpoint needs torch: "
            "install mat-export[export], or export it to ONNX elsewhere"
        ) from error
    try:
        return load_checkpoint(path, key=key)
    except CheckpointError as error:
        raise UserError(str(error)) from error
