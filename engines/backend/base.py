"""TensorRT 10.13 and later, and 11; the other generations differ from it where they must."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from engines.backend.gpu import AMPERE, Capability, Gpu, capability_text, find_gpu
from engines.backend.hooks import BuildHooks, monitor_of
from engines.backend.messages import logger_of, reason_of, refusal_of
from engines.options import BuildOptions
from mat_export.contract import UserError
from mat_export.files import file_digest

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from engines.profiles import Profile

__all__ = ["Backend", "contiguous", "numbers_of"]

_LOADED: set[tuple[Any, str]] = set()
"""Modules and digests of plugin libraries in this process, which TensorRT takes once only,
wherever copies of them lie."""

_SUCCESSORS = {8: (8, 9, 10), 10: (10, 11)}
"""Major versions of TensorRT that run version-compatible engines of a major version; else its own
and the next."""


class Backend:
    """TensorRT of one generation.

    Attributes:
        name: One of BACKENDS.
        title: What its makers call it.
        module: The imported module.
        version: Its version; plans of another one do not load.
        opset: Newest opset of the ONNX standard that it is known to parse.
        ir_version: Newest ONNX IR version likewise, or None for any.
        precisions: What a file may be typed in.
        weakly_typed: Whether it chooses types itself unless each layer is told; then it takes no
            weights in INT8 either.
        builds_without_gpu: Whether it builds for a GPU that is not here.
        has_timing_cache: Whether its builds time kernels and remember the figures.
        has_plugin_layers: Whether a graph may call operators of a plugin library.
        allow_host_code: Load plans that carry code for the host, as version-compatible ones do;
            set it for files that you trust.
    """

    name: str = "tensorrt"
    title: str = "TensorRT"
    opset: int = 22
    ir_version: int | None = None
    precisions: frozenset[str] = frozenset(("fp32", "tf32", "fp16", "bf16", "int8"))
    weakly_typed: bool = False
    builds_without_gpu: bool = False
    has_timing_cache: bool = True
    has_plugin_layers: bool = True
    _lowest: ClassVar[Capability] = (7, 5)

    def __init__(self, module: Any) -> None:
        self.module = module
        self.version = str(module.__version__)
        self.allow_host_code = False

    @property
    def label(self) -> str:
        """Title and version."""
        return f"{self.title} {self.version}"

    @property
    def major(self) -> int:
        """First number of the version: a plugin library is made for one of them."""
        return int(self.version.partition(".")[0])

    @property
    def targets(self) -> tuple[str, ...]:
        """GPU generations it builds for without having one, ``sm_NN``."""
        return ()

    # -- what it can do ----------------------------------------------------------------------------

    def runs_on(self, capability: Capability) -> bool:
        """Whether GPUs of this compute capability are supported."""
        return capability >= self._lowest

    def runs_engines_of(self, version: str, *, version_compatible: bool) -> bool:
        """Whether an engine runs that this or another version built."""
        if version == self.version:
            return True
        old, new = numbers_of(version), numbers_of(self.version)
        successors = _SUCCESSORS.get(old[0], (old[0], old[0] + 1))
        return version_compatible and old <= new and new[0] in successors

    def check_target(self, target: str) -> None:
        """Raise UserError, with the known ones, if it does not build for ``sm_NN``."""
        if not self.targets:
            raise UserError(
                f"{self.label} builds for the GPU of this machine only: leave out --target "
                f"{target}, or use --backend tensorrt-rtx"
            )
        if target not in self.targets:
            raise UserError(
                f"{self.label} does not know the target {target}; it knows "
                f"{', '.join(self.targets)}"
            )

    def resolve_target(self, options: BuildOptions, gpu: Gpu | None) -> str | None:
        """The target of a build: the one asked for, the GPU's, or None where there is no choice.

        Raises:
            UserError: If it does not know the target, does not run on the GPU, or needs a GPU and
                there is none.
        """
        if options.target is not None:
            self.check_target(options.target)
            return options.target
        if gpu is None:
            raise UserError(f"no GPU: {self.label} builds on a machine with one only")
        self._check_runs_on(gpu)
        return None

    def check_request(
        self,
        options: BuildOptions,
        *,
        precision: str,
        opset: int,
        ir_version: int,
        gpu: Gpu | None,
    ) -> None:
        """Refuse at once what this TensorRT cannot build, rather than after minutes.

        Args:
            options: What is asked, with the target resolved.
            precision: What the file is typed in.
            opset: Its version of the ONNX standard's operators.
            ir_version: Its version of the ONNX format.
            gpu: This machine's GPU, if any.

        Raises:
            UserError: With the reason and the way out.
        """
        self.check_precision(precision)
        if opset > self.opset or (self.ir_version is not None and ir_version > self.ir_version):
            limit = "" if self.ir_version is None else f" and IR version {self.ir_version}"
            raise UserError(
                f"{self.label} parses ONNX up to opset {self.opset}{limit}, the file has opset "
                f"{opset} and IR version {ir_version}: export it with --opset {self.opset}"
            )
        capability = self._built_for(options, gpu)
        if precision == "bf16" and capability is not None and capability < AMPERE:
            raise UserError(
                f"GPUs of compute capability {capability_text(capability)} have no bfloat16: "
                "use fp16 or fp32"
            )
        self._check_options(options, capability, gpu)

    def check_precision(self, precision: str) -> None:
        """Raise UserError, with those it has, if it does not know a precision."""
        if precision not in self.precisions:
            raise UserError(
                f"{self.label} has no {precision}; the file may be in "
                f"{', '.join(sorted(self.precisions))}"
            )

    def _built_for(self, options: BuildOptions, gpu: Gpu | None) -> Capability | None:
        """The compute capability of the GPUs a build is for, if it is one and known."""
        return None if gpu is None else gpu.capability

    def _check_options(
        self, options: BuildOptions, capability: Capability | None, gpu: Gpu | None
    ) -> None:
        if options.version_compatible:
            self._member("BuilderFlag", "VERSION_COMPATIBLE", "version-compatible engines")
        if options.hardware_compatible:
            self._member("HardwareCompatibilityLevel", "AMPERE_PLUS", "hardware-compatible engines")
            if capability is not None and capability < AMPERE:
                raise UserError(
                    "hardware-compatible engines are built on Ampere and later GPUs (8.0), "
                    f"this one has compute capability {capability_text(capability)}"
                )
        if options.refittable:
            self._member("BuilderFlag", "REFIT", "refittable engines")
        if options.tactic_sources is not None:
            self._tactic_sources(options.tactic_sources)

    def _check_runs_on(self, gpu: Gpu) -> None:
        if not self.runs_on(gpu.capability):
            raise UserError(
                f"{self.label} does not run on {gpu.name} (compute capability "
                f"{capability_text(gpu.capability)}): use another --backend"
            )

    def _member(self, enum: str, name: str, what: str) -> Any:
        """A member of one of the module's enumerations. Raises UserError if it has none."""
        member = getattr(getattr(self.module, enum, None), name, None)
        if member is None:
            raise UserError(f"{self.label} has no {what}")
        return member

    def _tactic_sources(self, names: tuple[str, ...]) -> int:
        """The set of tactic sources as TensorRT's bit mask."""
        known = getattr(getattr(self.module, "TacticSource", None), "__members__", {})
        for name in names:
            if name not in known:
                raise UserError(
                    f"{self.label} has no tactic source '{name}'; it has "
                    f"{', '.join(known) or 'none'}"
                )
        return sum(1 << int(known[name]) for name in names)

    # -- plugins -----------------------------------------------------------------------------------

    def check_plugins(self, precision: str, options: BuildOptions) -> None:
        """Refuse a build with plugins that this TensorRT cannot make, whatever their library.

        Args:
            precision: What the file is typed in.
            options: What is asked.

        Raises:
            UserError: With the reason.
        """
        if not self.has_plugin_layers:
            raise UserError(f"{self.label} has no plugin layers")
        if options.version_compatible:
            raise UserError(
                "an engine with plugins runs on the TensorRT that their library is for, so it "
                "cannot be version-compatible"
            )
        self.check_precision(precision)

    def load_plugins(self, library: Path) -> None:
        """Make the operators of a plugin library known in this process; again does nothing.

        Raises:
            UserError: If it is not there, or is no plugin library of this TensorRT.
        """
        if not self.has_plugin_layers:
            raise UserError(f"{self.label} has no plugin layers")
        path = library.absolute()
        if not path.is_file():
            raise UserError(f"there is no plugin library '{library}'")
        loaded = self.module, file_digest(path)
        if loaded in _LOADED:
            return
        logger = self._logger()
        if self.module.get_plugin_registry().load_library(str(path)) is None:
            raise UserError(
                f"'{library}' is no plugin library for {self.label}: {reason_of(logger.errors)}"
            )
        _LOADED.add(loaded)

    # -- building ----------------------------------------------------------------------------------

    def build(
        self,
        model: bytes,
        options: BuildOptions,
        profiles: Mapping[str, Profile],
        hooks: BuildHooks,
    ) -> bytes:
        """Build an engine; this takes seconds to hours, and may end the process.

        Args:
            model: A typed ONNX file.
            options: Checked by check_request, with the target resolved.
            profiles: Shapes of every dynamic input.
            hooks: What the build tells and asks.

        Returns:
            The plan: the engine, serialized.

        Raises:
            UserError: If the parser refuses a node, TensorRT builds no engine, or the build was
                cancelled.
        """
        logger = self._logger(self._sink(hooks))
        builder = self._made("Builder", logger)
        network = builder.create_network(self._network_flags())
        self._parse(network, model, logger)
        config = self._configure(builder, options, hooks)
        self._add_profiles(builder, config, profiles)
        self._obey_types(config, network, model)
        monitor = self._watch(config, hooks)  # TensorRT does not hold it
        keep = hooks.timing_cache if self.has_timing_cache else None
        with contextlib.nullcontext() if keep is None else keep(config):
            plan = builder.build_serialized_network(network, config)
        del monitor
        if plan is None:
            if hooks.cancelled():
                raise UserError("the build was cancelled")
            raise UserError(f"{self.label} could not build the engine: {reason_of(logger.errors)}")
        return bytes(plan)

    def _sink(self, hooks: BuildHooks) -> Callable[[str, str], None]:
        """Where the log goes during a build."""

        def sink(severity: str, text: str) -> None:
            if severity != "verbose":
                hooks.log(severity, text)

        return sink

    def _network_flags(self) -> int:
        flags = getattr(self.module, "NetworkDefinitionCreationFlag", None)
        typed = getattr(flags, "STRONGLY_TYPED", None)  # once all networks are, it may go
        return 0 if typed is None else 1 << int(typed)

    def _parse(self, network: Any, model: bytes, logger: Any) -> None:
        parser = self.module.OnnxParser(network, logger)
        if parser.parse(model):
            return
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        raise UserError(f"{self.label} {refusal_of(errors, model)}")

    def _configure(self, builder: Any, options: BuildOptions, hooks: BuildHooks) -> Any:
        module = self.module
        config = builder.create_builder_config()
        config.profiling_verbosity = module.ProfilingVerbosity.DETAILED  # the inspector needs it
        if options.level is not None:
            config.builder_optimization_level = options.level
        if options.timing_iterations is not None:
            config.avg_timing_iterations = options.timing_iterations
        if options.workspace_mib is not None:
            pool = module.MemoryPoolType.WORKSPACE
            config.set_memory_pool_limit(pool, options.workspace_mib << 20)
        if options.tactic_sources is not None:
            config.set_tactic_sources(self._tactic_sources(options.tactic_sources))
        if options.tf32:
            config.set_flag(self._member("BuilderFlag", "TF32", "TF32"))
        elif hasattr(module.BuilderFlag, "TF32"):
            config.clear_flag(module.BuilderFlag.TF32)  # TensorRT sets it by default
        if options.refittable:
            config.set_flag(module.BuilderFlag.REFIT)
            if self.version.startswith("11.3."):
                hooks.log(
                    "warning",
                    "TensorRT 11.3 is known to drop biases of matrix products in refittable "
                    "engines: check parity, or use another version",
                )
        if options.version_compatible:
            config.set_flag(module.BuilderFlag.VERSION_COMPATIBLE)
        self._set_hardware(config, options)
        return config

    def _set_hardware(self, config: Any, options: BuildOptions) -> None:
        if options.hardware_compatible:
            level = self.module.HardwareCompatibilityLevel.AMPERE_PLUS
            config.hardware_compatibility_level = level

    def _add_profiles(self, builder: Any, config: Any, profiles: Mapping[str, Profile]) -> None:
        if not profiles:
            return
        profile = builder.create_optimization_profile()
        for name, (low, best, high) in profiles.items():
            profile.set_shape(name, low, best, high)
        config.add_optimization_profile(profile)

    def _obey_types(self, config: Any, network: Any, model: bytes) -> None:
        """Make the engine follow the types in the file; strongly typed networks do so anyway."""

    def _watch(self, config: Any, hooks: BuildHooks) -> Any:
        """Watch a build through a progress monitor, which is to live as long as the build."""
        config.progress_monitor = monitor = monitor_of(self.module.IProgressMonitor, hooks)
        return monitor

    # -- using engines -----------------------------------------------------------------------------

    def deserialize(self, plan: bytes) -> Any:
        """The engine of a plan, on this machine's GPU.

        Raises:
            UserError: If there is no GPU, or TensorRT does not load the plan.
        """
        find_gpu()  # without a GPU, TensorRT 8.6 does not refuse: it ends the process
        logger = self._logger()
        runtime = self._made("Runtime", logger)
        if self.allow_host_code:
            runtime.engine_host_code_allowed = True
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise UserError(f"{self.label} does not load the plan: {reason_of(logger.errors)}")
        return engine

    def create_context(self, engine: Any) -> Any:
        """An execution context, which takes GPU memory. Raises UserError if there is too little."""
        logger = self._logger()
        context = engine.create_execution_context()
        if context is None:
            needed = self.context_memory(engine) >> 20
            raise UserError(
                f"{self.label} made no context for the engine, which takes {needed} MiB of GPU "
                f"memory besides its weights: {reason_of(logger.errors)}"
            )
        return context

    def context_memory(self, engine: Any) -> int:
        """GPU memory that each context of an engine takes, in bytes."""
        size = getattr(engine, "device_memory_size_v2", None)
        return int(engine.device_memory_size if size is None else size)

    def layer_information(self, engine: Any) -> dict[str, Any]:
        """What TensorRT's engine inspector tells of an engine.

        Raises:
            UserError: If it is not JSON.
        """
        layout = self.module.LayerInformationFormat.JSON
        text = engine.create_engine_inspector().get_engine_information(layout)
        try:
            information = json.loads(text, strict=False)
        except (ValueError, RecursionError) as error:
            raise UserError(f"the inspector of {self.label} gave no JSON: {error}") from error
        return information if isinstance(information, dict) else {"Layers": information}

    def refittable_weights(self, engine: Any) -> frozenset[str]:
        """Names of the weights that can be replaced in an engine; most are ONNX initializers."""
        return frozenset(self.module.Refitter(engine, self._logger()).get_all_weights())

    def refit(self, engine: Any, weights: Mapping[str, NDArray[Any]]) -> bytes:
        """Replace the weights of a refittable engine.

        Args:
            engine: Built with ``refittable``; it changes.
            weights: Arrays by ONNX initializer, of the shapes and types of the file the engine
                was built of. Those that the engine does not hold are left aside.

        Returns:
            The plan of the engine with the new weights, refittable again where TensorRT can.

        Raises:
            UserError: If the engine is not refittable, or weights are missing or do not fit.
        """
        if not engine.refittable:
            raise UserError("the engine's weights are fixed: build it again with --refittable")
        logger = self._logger()
        refitter = self.module.Refitter(engine, logger)
        given = [name for name in refitter.get_all_weights() if name in weights]
        if not given:
            raise UserError("none of these weights is in the engine: it is of another model")
        arrays = {name: self._held(weights[name]) for name in given}  # read until refit is done
        for name, array in arrays.items():
            if not refitter.set_named_weights(name, self._as_weights(array)):
                raise UserError(
                    f"weight '{name}' does not fit the engine ({array.dtype}, {array.size} "
                    f"values): {reason_of(logger.errors)}"
                )
        missing = sorted(refitter.get_missing_weights())
        if missing:
            raise UserError(f"the engine needs weights that were not given: {_listed(missing)}")
        if not refitter.refit_cuda_engine():
            raise UserError(f"{self.label} did not refit the engine: {reason_of(logger.errors)}")
        return self._serialize(engine)

    def _held(self, array: NDArray[Any]) -> NDArray[Any]:
        """A weight of the file as an engine of this version holds it."""
        return contiguous(array)

    def _as_weights(self, array: NDArray[Any]) -> Any:
        """What set_named_weights takes; NumPy itself has no bfloat16."""
        if str(array.dtype) != "bfloat16":
            return array
        return self.module.Weights(self.module.DataType.BF16, array.ctypes.data, array.size)

    def _serialize(self, engine: Any) -> bytes:
        keep = getattr(getattr(self.module, "SerializationFlag", None), "INCLUDE_REFIT", None)
        if keep is None:
            return bytes(engine.serialize())
        config = engine.create_serialization_config()
        config.set_flag(keep)
        return bytes(engine.serialize_with_config(config))

    def last_errors(self) -> str:
        """What TensorRT, or a plugin through it, logged last, as part of a sentence; then no more.

        Its logger keeps errors whether or not anybody listens.
        """
        errors = logger_of(self.module).errors
        reason = reason_of(errors)
        errors.clear()
        return reason

    # -- shared ------------------------------------------------------------------------------------

    def _logger(self, sink: Callable[[str, str], None] | None = None) -> Any:
        """The module's logger, its errors forgotten."""
        logger = logger_of(self.module)
        logger.errors.clear()
        logger.sink = sink
        return logger

    def _made(self, kind: str, logger: Any) -> Any:
        """An object of TensorRT's whose constructor fails without a usable GPU."""
        try:
            return getattr(self.module, kind)(logger)
        except (TypeError, RuntimeError) as error:
            reason = reason_of(logger.errors) if logger.errors else str(error)
            raise UserError(f"{self.label} does not start on this machine: {reason}") from error


def numbers_of(version: str) -> tuple[int, ...]:
    """The numbers in a version, at least one."""
    return tuple(int(n) for n in re.findall(r"\d+", version)) or (0,)


def contiguous(array: NDArray[Any]) -> NDArray[Any]:
    import numpy as np

    return np.ascontiguousarray(array)


def _listed(names: list[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
