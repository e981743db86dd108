"""TensorRT 8.6: weakly typed, no progress monitor, and no way to cancel but to end it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from engines.backend.base import Backend, contiguous
from engines.backend.gpu import Capability
from engines.backend.hooks import BuildHooks, Progress
from mat_export.contract import GraphSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["TensorRT8"]


class TensorRT8(Backend):
    """TensorRT 8.6."""

    opset = 17
    ir_version = 8
    precisions = frozenset(("fp32", "tf32", "fp16", "int8"))
    weakly_typed = True
    _lowest = (5, 0)
    _highest: ClassVar[Capability] = (9, 0)

    def runs_on(self, capability: Capability) -> bool:
        return self._lowest <= capability <= self._highest

    def _held(self, array: NDArray[Any]) -> NDArray[Any]:
        # Its parser makes INT32 of INT64, which this version does not know.
        return contiguous(array.astype("int32") if array.dtype == "int64" else array)

    def _network_flags(self) -> int:
        return 1 << int(self.module.NetworkDefinitionCreationFlag.EXPLICIT_BATCH)

    def _sink(self, hooks: BuildHooks) -> Callable[[str, str], None]:
        lines = _LogProgress(hooks.progress)

        def sink(severity: str, text: str) -> None:
            if severity == "verbose":
                lines.read(text)
            else:
                hooks.log(severity, text)

        return sink

    def _watch(self, config: Any, hooks: BuildHooks) -> Any:
        return None  # the log is all there is

    def _obey_types(self, config: Any, network: Any, model: bytes) -> None:
        import onnx

        proto = onnx.load_model_from_string(model)
        spec = GraphSpec.of_model(proto)
        if spec is None or spec.precision not in ("fp16", "int8"):
            return
        from engines.weak_typing import constrain

        config.set_flag(self.module.BuilderFlag.FP16)
        if spec.precision == "int8":
            config.set_flag(self.module.BuilderFlag.INT8)
        config.set_flag(self.module.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
        constrain(self.module, network, proto)


class _LogProgress:
    """Progress from the verbose lines of the log, where there is no monitor.

    A layer's turn begins with a line that leaves out its name; the kernels that are timed have it.
    When all layers have had theirs, conversions between layouts are timed, hundreds of them.
    """

    _LAYERS = re.compile(r"After .+: (\d+) layers")
    _COSTS = re.compile(r"=+ Computing costs for")
    _TIMED = re.compile(r"-+ Timing Runner: (.+?)( \(\w+\[0x\w+\]\))?$")

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._total = self._done = self._conversions = 0

    def read(self, line: str) -> None:
        """One line of the log."""
        if self._COSTS.match(line):
            self._done += 1
            return
        timed = self._TIMED.match(line)
        if timed is not None:
            name = timed[1] if len(timed[1]) <= 60 else f"{timed[1][:60]}…"
            if name.startswith("Optimizer Reformat"):
                self._conversions += 1
                name = f"choosing layouts, {self._conversions} conversions timed"
            self._progress.tell(name, 100 * self._done // max(self._total, self._done, 1))
            return
        layers = self._LAYERS.match(line)
        if layers is not None:
            self._total = int(layers[1])
            self._progress.tell("optimizing the graph", 0)
