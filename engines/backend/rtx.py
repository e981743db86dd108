"""TensorRT-RTX: kernels are compiled where the engine runs, so that it builds anywhere."""

from __future__ import annotations

import re
from typing import Any

from engines.backend.base import Backend
from engines.backend.gpu import AMPERE, Capability, Gpu
from engines.options import BuildOptions, capability_of
from mat_export.contract import UserError

__all__ = ["TensorRTRtx"]


class TensorRTRtx(Backend):
    """TensorRT-RTX 1.x."""

    name = "tensorrt-rtx"
    title = "TensorRT-RTX"
    builds_without_gpu = True
    # It times nothing; and asking for a cache makes a build look for a GPU.
    has_timing_cache = False
    has_plugin_layers = False  # with one in the graph, its builder ends the process

    @property
    def targets(self) -> tuple[str, ...]:
        known = self.module.ComputeCapability.__members__
        numbers = sorted(int(name[2:]) for name in known if re.fullmatch(r"SM\d+", name))
        return tuple(name for name in (f"sm_{n}" for n in numbers) if capability_of(name) >= AMPERE)

    def runs_on(self, capability: Capability) -> bool:
        # Nor on Turing, which it knows: it has no FP32 matrix products there, and every graph does.
        return capability[0] in (8, 12)

    def check_target(self, target: str) -> None:
        if capability_of(target) < AMPERE:
            raise UserError(
                f"{self.label} has no FP32 matrix products before sm_80, and these graphs need "
                f"them: give one of {', '.join(self.targets)}, got {target}, or use --backend "
                "tensorrt on a machine with that GPU"
            )
        super().check_target(target)

    def resolve_target(self, options: BuildOptions, gpu: Gpu | None) -> str | None:
        if options.target is not None:
            self.check_target(options.target)
            return options.target
        if options.hardware_compatible:
            return None
        if gpu is None:
            raise UserError(
                f"no GPU to build for: name one to {self.label} with --target "
                f"({', '.join(self.targets)}), or build for all with --hardware-compatible"
            )
        self._check_runs_on(gpu)
        target = f"sm_{gpu.capability[0]}{gpu.capability[1]}"
        self.check_target(target)
        return target

    def _built_for(self, options: BuildOptions, gpu: Gpu | None) -> Capability | None:
        if options.target is None:
            return None
        self.check_target(options.target)
        return capability_of(options.target)

    def _check_options(
        self, options: BuildOptions, capability: Capability | None, gpu: Gpu | None
    ) -> None:
        if options.version_compatible:
            raise UserError(f"{self.label} has no version-compatible engines")
        if options.refittable and gpu is None:
            raise UserError(
                f"{self.label} builds refittable engines on a machine with a GPU only: "
                "leave out --refittable"
            )
        if options.tactic_sources is not None:
            self._tactic_sources(options.tactic_sources)

    def _set_hardware(self, config: Any, options: BuildOptions) -> None:
        if options.target is None:
            return  # its engines run on every GPU from Ampere on, unless told to be for one
        capability = self.module.ComputeCapability
        config.num_compute_capabilities = 1
        config.set_compute_capability(
            getattr(capability, options.target.replace("_", "").upper()), 0
        )
