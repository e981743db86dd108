"""One interface over TensorRT 8.6, 10.13 and later, 11, and TensorRT-RTX.

What differs between them is known here and nowhere else. Their modules are imported on use alone.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import re
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from engines.options import BACKENDS, BuildOptions, capability_of, parse_target
from mat_export.contract import GraphSpec, UserError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from engines.profiles import Profile

__all__ = [
    "Absent",
    "Backend",
    "BuildHooks",
    "Gpu",
    "Progress",
    "find_backends",
    "find_gpu",
    "open_backend",
]

Capability = tuple[int, int]
"""CUDA compute capability of a GPU: (8, 9) is written sm_89 or 8.9."""

_EXTRAS = {"tensorrt": "trt", "tensorrt-rtx": "rtx"}
"""The extra of mat-export that installs each backend."""

_AMPERE: Capability = (8, 0)
"""The first GPUs with bfloat16, and the first that hardware-compatible engines run on."""


@dataclass(frozen=True)
class Gpu:
    """This machine's GPU.

    Attributes:
        name: NVIDIA's name for it.
        capability: Its compute capability.
        driver: Newest CUDA version that its driver knows, such as ``12.4``.
        total_mib: Its memory in MiB.
        free_mib: What was free of it when this was asked, in MiB.
    """

    name: str
    capability: Capability
    driver: str
    total_mib: int
    free_mib: int


def find_gpu() -> Gpu:
    """The GPU that engines are built for and run on here.

    Raises:
        UserError: If there is no usable GPU, driver or cuda-python.
    """
    from engines.cuda import CudaError, device_info

    try:
        found = device_info()
    except CudaError as error:
        raise UserError(f"the GPU does not answer: {error}") from error
    return Gpu(
        found.name,
        found.compute_capability,
        f"{found.driver[0]}.{found.driver[1]}",
        found.total >> 20,
        found.free >> 20,
    )


@dataclass(frozen=True)
class Absent:
    """A backend that cannot be used here.

    Attributes:
        name: One of BACKENDS.
        why: The reason, and what to do.
    """

    name: str
    why: str


_LOADED: set[Path] = set()
"""Plugin libraries in this process, which TensorRT takes once only."""


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
        builds_without_gpu: Whether it builds for a GPU that is not here.
        has_timing_cache: Whether its builds time kernels and remember the figures.
        allow_host_code: Load plans that carry code for the host, as version-compatible ones do;
            set it for files that you trust.
    """

    name: str = "tensorrt"
    title: str = "TensorRT"
    opset: int = 22
    ir_version: int | None = None
    precisions: frozenset[str] = frozenset(("fp32", "tf32", "fp16", "bf16"))
    builds_without_gpu: bool = False
    has_timing_cache: bool = True
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
    def targets(self) -> tuple[str, ...]:
        """GPU generations it builds for without having one, ``sm_NN``."""
        return ()

    # -- what it can do ----------------------------------------------------------------------------

    def runs_on(self, capability: Capability) -> bool:
        """Whether GPUs of this compute capability are supported."""
        return capability >= self._lowest

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
        if precision not in self.precisions:
            raise UserError(
                f"{self.label} has no {precision}; the file may be in "
                f"{', '.join(sorted(self.precisions))}"
            )
        if opset > self.opset or (self.ir_version is not None and ir_version > self.ir_version):
            limit = "" if self.ir_version is None else f" and IR version {self.ir_version}"
            raise UserError(
                f"{self.label} parses ONNX up to opset {self.opset}{limit}, the file has opset "
                f"{opset} and IR version {ir_version}: export it with --opset {self.opset}"
            )
        capability = self._built_for(options, gpu)
        if precision == "bf16" and capability is not None and capability < _AMPERE:
            raise UserError(
                f"GPUs of compute capability {_text(capability)} have no bfloat16: use fp16 or fp32"
            )
        self._check_options(options, capability, gpu)

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
            if capability is not None and capability < _AMPERE:
                raise UserError(
                    "hardware-compatible engines are built on Ampere and later GPUs (8.0), "
                    f"this one has compute capability {_text(capability)}"
                )
        if options.refittable:
            self._member("BuilderFlag", "REFIT", "refittable engines")
        if options.tactic_sources is not None:
            self._tactic_sources(options.tactic_sources)

    def _check_runs_on(self, gpu: Gpu) -> None:
        if not self.runs_on(gpu.capability):
            raise UserError(
                f"{self.label} does not run on {gpu.name} (compute capability "
                f"{_text(gpu.capability)}): use another --backend"
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

    def load_plugins(self, library: Path) -> None:
        """Make the operators of a plugin library known in this process; again does nothing.

        Raises:
            UserError: If it is not there, or is no plugin library of this TensorRT.
        """
        path = library.absolute()
        if path in _LOADED:
            return
        if not path.is_file():
            raise UserError(f"there is no plugin library '{library}'")
        logger = self._logger()
        if self.module.get_plugin_registry().load_library(str(path)) is None:
            raise UserError(
                f"'{library}' is no plugin library for {self.label}: {_reason(logger.errors)}"
            )
        _LOADED.add(path)

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
            raise UserError(f"{self.label} could not build the engine: {_reason(logger.errors)}")
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
        raise UserError(f"{self.label} {_refusal(errors, model)}")

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
        progress, cancelled = hooks.progress, hooks.cancelled
        interface = self.module.IProgressMonitor

        class Monitor(interface):  # type: ignore[misc, valid-type]
            """Passes TensorRT's phases on; any thread of TensorRT's may call."""

            def __init__(self) -> None:
                interface.__init__(self)

            def phase_start(self, phase_name: str, parent_phase: str, num_steps: int) -> None:
                progress.start(phase_name, parent_phase, num_steps)

            def step_complete(self, phase_name: str, step: int) -> bool:
                progress.step(phase_name)
                return not cancelled()

            def phase_finish(self, phase_name: str) -> None:
                progress.finish(phase_name)

        config.progress_monitor = monitor = Monitor()
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
            raise UserError(f"{self.label} does not load the plan: {_reason(logger.errors)}")
        return engine

    def create_context(self, engine: Any) -> Any:
        """An execution context, which takes GPU memory. Raises UserError if there is too little."""
        logger = self._logger()
        context = engine.create_execution_context()
        if context is None:
            needed = self.context_memory(engine) >> 20
            raise UserError(
                f"{self.label} made no context for the engine, which takes {needed} MiB of GPU "
                f"memory besides its weights: {_reason(logger.errors)}"
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
                    f"values): {_reason(logger.errors)}"
                )
        missing = sorted(refitter.get_missing_weights())
        if missing:
            raise UserError(f"the engine needs weights that were not given: {_listed(missing)}")
        if not refitter.refit_cuda_engine():
            raise UserError(f"{self.label} did not refit the engine: {_reason(logger.errors)}")
        return self._serialize(engine)

    def _held(self, array: NDArray[Any]) -> NDArray[Any]:
        """A weight of the file as an engine of this version holds it."""
        return _contiguous(array)

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

    # -- shared ------------------------------------------------------------------------------------

    def _logger(self, sink: Callable[[str, str], None] | None = None) -> Any:
        """The module's logger, its errors forgotten."""
        logger = _logger_of(self.module)
        logger.errors.clear()
        logger.sink = sink
        return logger

    def _made(self, kind: str, logger: Any) -> Any:
        """An object of TensorRT's whose constructor fails without a usable GPU."""
        try:
            return getattr(self.module, kind)(logger)
        except (TypeError, RuntimeError) as error:
            reason = _reason(logger.errors) if logger.errors else str(error)
            raise UserError(f"{self.label} does not start on this machine: {reason}") from error


class _TensorRT8(Backend):
    """TensorRT 8.6: weakly typed, no progress monitor, and no way to cancel but to end it."""

    opset = 17
    ir_version = 8
    precisions = frozenset(("fp32", "tf32", "fp16"))
    _lowest = (5, 0)
    _highest: ClassVar[Capability] = (9, 0)

    def runs_on(self, capability: Capability) -> bool:
        return self._lowest <= capability <= self._highest

    def _held(self, array: NDArray[Any]) -> NDArray[Any]:
        # Its parser makes INT32 of INT64, which this version does not know.
        return _contiguous(array.astype("int32") if array.dtype == "int64" else array)

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
        if spec is None or spec.precision != "fp16":
            return
        from engines.weak_typing import constrain

        config.set_flag(self.module.BuilderFlag.FP16)
        config.set_flag(self.module.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
        constrain(self.module, network, proto)


class _TensorRTRtx(Backend):
    """TensorRT-RTX: kernels are compiled where the engine runs, so that it builds anywhere."""

    name = "tensorrt-rtx"
    title = "TensorRT-RTX"
    builds_without_gpu = True
    # It times nothing; and asking for a cache makes a build look for a GPU.
    has_timing_cache = False

    def load_plugins(self, library: Path) -> None:
        raise UserError(f"{self.label} takes no plugins: leave the operators to their functions")

    @property
    def targets(self) -> tuple[str, ...]:
        known = self.module.ComputeCapability.__members__
        numbers = sorted(int(name[2:]) for name in known if re.fullmatch(r"SM\d+", name))
        return tuple(f"sm_{number}" for number in numbers)

    def runs_on(self, capability: Capability) -> bool:
        return capability == (7, 5) or capability[0] in (8, 12)

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
        return None if options.target is None else capability_of(options.target)

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


# -- finding one ---------------------------------------------------------------------------------


def find_backends() -> tuple[Backend | Absent, ...]:
    """Every backend in the order of BACKENDS: usable, or why not."""
    return tuple(_find(name) for name in BACKENDS)


def open_backend(choice: str = "auto", *, target: str | None = None) -> Backend:
    """The backend to use.

    Args:
        choice: One of BACKENDS, or ``auto``: with a target the one that builds without a GPU, else
            the first that is installed and runs on this machine's GPU.
        target: ``sm_NN`` or None.

    Raises:
        UserError: If there is none, with the way to install one; or if it does not know the target.
    """
    if choice not in ("auto", *BACKENDS):
        known = ", ".join(("auto", *BACKENDS))
        raise UserError(f"the backend is one of {known}, got '{choice}'")
    if choice == "auto" and target is None:
        return _open_for_gpu()
    found = _find("tensorrt-rtx" if choice == "auto" else choice)
    if isinstance(found, Absent):
        raise UserError(f"{found.name} is {found.why}")
    if target is not None:
        found.check_target(parse_target(target))
    return found


def _open_for_gpu() -> Backend:
    """The preferred backend that runs on this machine's GPU."""
    try:
        gpu = find_gpu()
    except UserError as error:
        raise UserError(
            f"{error}; to build for a GPU that is not here, name it with --target sm_NN "
            "(TensorRT-RTX, pip install 'mat-export[rtx]')"
        ) from error
    reasons = []
    for found in find_backends():
        if isinstance(found, Absent):
            reasons.append(f"{found.name} is {found.why}")
        elif found.runs_on(gpu.capability):
            return found
        else:
            reasons.append(f"{found.label} does not run on it")
    where = f"{gpu.name}, compute capability {_text(gpu.capability)}"
    raise UserError(f"no TensorRT for the GPU ({where}): {'; '.join(reasons)}")


def _find(name: str) -> Backend | Absent:
    module_name = name.replace("-", "_")
    extra = f"pip install 'mat-export[{_EXTRAS[name]}]'"
    try:
        module = importlib.import_module(module_name)
        version = str(module.__version__)
    except Exception as error:  # a broken install can raise anything
        if isinstance(error, ModuleNotFoundError) and error.name == module_name:
            return Absent(name, f"not installed: {extra}")
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        return Absent(name, f"installed, but does not import ({reason}): {extra}")
    if name == "tensorrt-rtx":
        return _TensorRTRtx(module)
    numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:2])
    if numbers[:2] == (8, 6):
        return _TensorRT8(module)
    if numbers >= (10, 13):
        return Backend(module)
    return Absent(name, f"version {version}, we know 8.6 and from 10.13 on: {extra}")


def _text(capability: Capability) -> str:
    return f"{capability[0]}.{capability[1]}"


# -- what went wrong -----------------------------------------------------------------------------


@functools.cache
def _logger_of(module: Any) -> Any:
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


def _reason(errors: deque[str]) -> str:
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


def _refusal(errors: list[Any], model: bytes) -> str:
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


def _contiguous(array: NDArray[Any]) -> NDArray[Any]:
    import numpy as np

    return np.ascontiguousarray(array)


def _listed(names: list[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"


# -- progress of TensorRT 8.6 ----------------------------------------------------------------------


class _LogProgress:
    """Progress from the verbose lines of the log, where there is no monitor.

    A layer's turn begins with a line that leaves out its name; the kernels that are timed have it.
    """

    _LAYERS = re.compile(r"After .+: (\d+) layers")
    _COSTS = re.compile(r"=+ Computing costs for")
    _TIMED = re.compile(r"-+ Timing Runner: (.+?)( \(\w+\[0x\w+\]\))?$")

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._total = self._done = 0

    def read(self, line: str) -> None:
        """One line of the log."""
        if self._COSTS.match(line):
            self._done += 1
            return
        timed = self._TIMED.match(line)
        if timed is not None:
            name = timed[1] if len(timed[1]) <= 60 else f"{timed[1][:60]}…"
            self._progress.tell(name, 100 * self._done // max(self._total, self._done, 1))
            return
        layers = self._LAYERS.match(line)
        if layers is not None:
            self._total = int(layers[1])
            self._progress.tell("optimizing the graph", 0)
