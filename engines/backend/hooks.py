"""What a build tells its caller, and asks of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

__all__ = ["BuildHooks", "Progress", "monitor_of"]


class Progress:
    """Who hears how far a build is; any thread of TensorRT's may call. This one ignores it."""

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """A phase of so many steps begins, inside another one or not."""

    def step(self, name: str) -> None:
        """A step of a phase is done."""

    def finish(self, name: str) -> None:
        """A phase ends, perhaps before its last step."""

    def tell(self, name: str, percent: int) -> None:
        """Where there are no phases: what is being done, and how much of everything is done."""


@dataclass(frozen=True)
class BuildHooks:
    """What a build tells and asks its caller; any thread of TensorRT's may call.

    Attributes:
        log: Called with a severity (``error``, ``warning`` or ``info``) and a line of TensorRT's.
        progress: Hears how far the build is.
        cancelled: Whether to stop; asked often.
        timing_cache: Called with a builder configuration before a build that times kernels: gives
            it the timing cache on entering, and keeps the cache on leaving. None keeps nothing.
    """

    log: Callable[[str, str], None] = lambda severity, text: None
    progress: Progress = field(default_factory=Progress)
    cancelled: Callable[[], bool] = lambda: False
    timing_cache: Callable[[Any], contextlib.AbstractContextManager[Any]] | None = None


def monitor_of(interface: Any, hooks: BuildHooks) -> Any:
    """A progress monitor that passes on what TensorRT tells.

    Args:
        interface: The module's IProgressMonitor.
        hooks: Who hears it, and whether to stop.
    """
    progress, cancelled = hooks.progress, hooks.cancelled

    class Monitor(interface):
        """Any thread of TensorRT's may call."""

        def __init__(self) -> None:
            interface.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str, num_steps: int) -> None:
            progress.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            progress.step(phase_name)
            return not cancelled()

        def phase_finish(self, phase_name: str) -> None:
            progress.finish(phase_name)

    return Monitor()
