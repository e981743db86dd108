"""What TensorRT says, made into sentences: its log, its errors, and what its parser refuses."""

from __future__ import annotations

import contextlib
import functools
import re
from collections import deque
from collections.abc import Callable
from typing import Any

from engines.backend.gpu import find_gpu
from mat_export.contract import UserError

__all__ = ["logger_of", "reason_of", "refusal_of"]


_SURVIVED = re.compile(r"myelinCache\.h::deserialize|timing cache will not be used", re.IGNORECASE)
"""Errors that a build goes on after: 8.6 drops Myelin's part of a timing cache alone."""


@functools.cache
def logger_of(module: Any) -> Any:
    """The one logger of a module: TensorRT keeps the first it is given for good."""

    class Logger(module.ILogger):
        """Passes lines on, and keeps the last errors for messages."""

        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self.errors: deque[str] = deque(maxlen=20)
            self.sink: Callable[[str, str], None] | None = None

        def log(self, severity: Any, msg: str) -> None:
            word = severity.name.lower()
            if word == "verbose" and self.sink is None:
                return
            word = "error" if word == "internal_error" else word
            word = "warning" if _SURVIVED.search(msg) else word
            if word == "error":
                self.errors.append(msg)
            # An exception would cross TensorRT's C++ and end the process.
            with contextlib.suppress(Exception):
                if self.sink is not None:
                    self.sink(word, msg)

    return Logger()


_HINTS = (
    (r"driver version is insufficient|cuda.*error:? 35", "the NVIDIA driver is missing or too old"),
    (
        r"out of memory|outofmemory|insufficient|not enough memory|memoryallocation|alloc_failed",
        (
            "the GPU has too little free memory{free}: close what else uses it, or ask for less "
            "with --workspace, --batch or --size"
        ),
    ),
    (
        r"nvinfer_lean",
        (
            "a version-compatible engine holds TensorRT's lean runtime: install tensorrt_lean in "
            "the same version, or leave out --version-compatible"
        ),
    ),
    (r"could not find any implementation", "raise --workspace or --level, or lower the size"),
)
"""What to do about errors of TensorRT's, by what they say; the first that matches counts."""


def reason_of(errors: deque[str]) -> str:
    """TensorRT's last errors as part of a sentence, and what to do about them if that is known."""
    lines = list(dict.fromkeys(" ".join(error.split()) for error in errors))[-3:]
    if not lines:
        return "it gave no reason"
    text = "; ".join(line if len(line) <= 400 else f"{line[:400]}…" for line in lines)
    for pattern, hint in _HINTS:
        if re.search(pattern, text, re.IGNORECASE):
            return f"{text}; {hint.format(free=_free_memory())}"
    return text


def _free_memory() -> str:
    """How much GPU memory is free, in words, if that can be told."""
    try:
        gpu = find_gpu()
    except UserError:
        return ""
    return f" ({gpu.free_mib} of {gpu.total_mib} MiB)"


def refusal_of(errors: list[Any], model: bytes) -> str:
    """What the parser refused: the node, its operator, its PyTorch module, and why."""
    if not errors:
        return "does not parse the ONNX file, and gives no reason"
    error = next((e for e in errors if e.node() >= 0), errors[0])
    reason = " ".join(str(error.desc()).split()) or "no reason given"
    code = getattr(error.code(), "name", error.code())
    more = f", and {len(errors) - 1} more" if len(errors) > 1 else ""
    name, operator = _node_of(error, model)
    if not name:
        return f"does not parse the ONNX file: {reason} ({code}{more})"
    return (
        f"does not parse the node '{name}' ({operator}) of the module '{_module_of(name)}': "
        f"{reason} ({code}{more})"
    )


def _node_of(error: Any, model: bytes) -> tuple[str, str]:
    """Name and operator of the node an error is about; 8.6 gives but its place in the file."""
    if hasattr(error, "node_name") and error.node_name():
        return str(error.node_name()), str(error.node_operator())
    import onnx

    nodes = onnx.load_model_from_string(model).graph.node
    if not 0 <= error.node() < len(nodes):
        return "", ""
    node = nodes[error.node()]
    return node.name or f"number {error.node()}", node.op_type


def _module_of(node_name: str) -> str:
    """The PyTorch module of a node: our exporter names nodes ``module.path/Op``."""
    module, slash, _ = node_name.partition("/")
    return module if slash else "the graph itself"
