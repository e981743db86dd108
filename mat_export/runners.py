"""Running a model, whatever it is made of: one small contract, NumPy in and NumPy out.

A runner holds its session until it is closed (use it as a context manager). The arrays that
``run`` returns are the caller's own: the runner neither keeps nor overwrites them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mat_export.contract import GraphSpec, UserError
from mat_torch.config import ConfigError, GeneratorConfig

if TYPE_CHECKING:
    from mat_torch.checkpoint import Checkpoint

__all__ = [
    "OrtRunner",
    "Runner",
    "TorchRunner",
    "check_inputs",
    "open_runner",
    "read_checkpoint",
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


class _Closing:
    """What every runner shares: leaving its context closes it."""

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Any:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def check_inputs(spec: GraphSpec, inputs: Mapping[str, NDArray[Any]]) -> None:
    """Hold the inputs against the specification; axes of one name must agree.

    Raises:
        UserError: With the input, what it is and what it has to be.
    """
    expected = {tensor.name: tensor for tensor in spec.inputs}
    for missing in (name for name in expected if name not in inputs):
        raise UserError(f"input '{missing}' is missing; the model takes {', '.join(expected)}")
    for unknown in (name for name in inputs if name not in expected):
        raise UserError(f"the model has no input '{unknown}'; it takes {', '.join(expected)}")
    axes: dict[str, int] = {}
    for name, tensor in expected.items():
        array = inputs[name]
        fits = array.ndim == len(tensor.shape) and all(
            size >= 1 and size == (axis if isinstance(axis, int) else axes.setdefault(axis, size))
            for axis, size in zip(tensor.shape, array.shape, strict=True)
        )
        if not fits or str(array.dtype) != tensor.dtype:
            wanted = ", ".join(str(axes.get(str(axis), axis)) for axis in tensor.shape)
            raise UserError(
                f"input '{name}' is {array.dtype} {list(array.shape)}, "
                f"the model takes {tensor.dtype} [{wanted}]"
            )
        if name == "image" and spec.dynamic_size:
            axes |= _axes_of_size(spec.config, axes["height"], axes["width"])


def _axes_of_size(config: GeneratorConfig, height: int, width: int) -> dict[str, int]:
    """Every axis that follows from the size of the image."""
    try:
        config.check_size(height, width)
    except ConfigError as error:
        raise UserError(str(error)) from error
    h, w = config.bottleneck_grid(height, width)
    axes = {"tokens": h * w, "grid_height": h, "grid_width": w}
    for side in config.noise_resolutions.values():
        axes[f"height_{side}"] = side * height // config.resolution
        axes[f"width_{side}"] = side * width // config.resolution
    return axes


class TorchRunner(_Closing):
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


class OrtRunner(_Closing):
    """An exported model in ONNX Runtime: CUDA where onnxruntime-gpu offers it, else the CPU.

    Args:
        model: Path of an ONNX file, or the bytes of one.
        providers: Execution providers in order of preference; None chooses.
        threads: CPU threads within an operator, ONNX Runtime's choice if None.
        spec: Contract to follow; by default the one in the file's metadata.
        label: What to call the model in messages; by default its path.

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
    ) -> None:
        import onnxruntime as ort

        self._label = label or ("the model" if isinstance(model, bytes) else f"'{model}'")
        source = model if isinstance(model, bytes) else _existing_file(model)
        options = ort.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        chosen = list(providers) if providers else _providers(ort.get_available_providers())
        try:
            self._session: Any = ort.InferenceSession(source, options, providers=chosen)
        except Exception as error:  # ONNX Runtime's exceptions share no base of their own
            raise UserError(f"ONNX Runtime cannot load {self._label}: {_reason(error)}") from error
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

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        if self._session is None:
            raise RuntimeError("this runner was closed")
        check_inputs(self.spec, inputs)
        used = {tensor.name for tensor in self._session.get_inputs()}
        feed = {k: np.ascontiguousarray(v) for k, v in inputs.items() if k in used}
        try:
            results = self._session.run(self._outputs, feed)
        except Exception as error:  # as above
            raise UserError(f"ONNX Runtime cannot run {self._label}: {_reason(error)}") from error
        return dict(zip(self._outputs, results, strict=True))

    def close(self) -> None:
        self._session = None


def _reason(error: Exception) -> str:
    """The first line of what ONNX Runtime says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _providers(available: Sequence[str]) -> list[str]:
    """CUDA first where it is offered; the CPU always stands behind it."""
    cuda = [p for p in available if p == "CUDAExecutionProvider"]
    return [*cuda, "CPUExecutionProvider"]


def _existing_file(path: str | os.PathLike[str]) -> str:
    if not os.path.isfile(path):  # which raises for no path at all, unlike pathlib's
        raise UserError(f"there is no file '{path}'")
    return os.fspath(path)


def open_runner(path: str | os.PathLike[str], *, threads: int | None = None) -> Runner:
    """The runner for a model file: ONNX by ONNX Runtime, anything else as a checkpoint.

    Raises:
        UserError: If there is no such file or no runner reads it.
    """
    if Path(path).suffix.lower() == ".onnx":
        return OrtRunner(path, threads=threads)
    return TorchRunner(read_checkpoint(path), threads=threads)


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
