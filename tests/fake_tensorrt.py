"""A stand-in for TensorRT's Python module in the forms of 8.6, 10.13, 10.14 and 11.

Enough of each version's API, and no more, to hold our code against: what a version lacks is not
there. A built "plan" is JSON that says how the build was configured. `write_module` makes it
importable as ``tensorrt``, in this process and in those it starts.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import time
from enum import IntEnum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

__all__ = ["GPU", "make_tensorrt", "write_module"]

GPU = {"name": "Fake GPU", "capability": (8, 6), "driver": (12, 4), "total": 8 << 30}
"""The GPU that write_module gives a process."""


def make_tensorrt(version: str, behaviour: str = "builds") -> ModuleType:
    """A module like TensorRT's.

    Args:
        version: Such as ``10.13.3.9``.
        behaviour: What a build does: ``builds``, ``fails`` (with an error), ``memory`` (likewise),
            ``crashes``, ``killed``, ``hangs``, ``stuck`` (hangs and lets no thread run), ``hangs
            at exit``, ``raises``, ``fills the disk``; or else ``refuses`` (the parser does) or
            ``no GPU``.
    """
    numbers = tuple(int(n) for n in version.split(".")[:2])
    module = ModuleType("tensorrt")
    for name, value in _members(numbers, behaviour).items():
        setattr(module, name, value)
    module.__version__ = version  # type: ignore[attr-defined]
    return module


def write_module(folder: Path, version: str, behaviour: str = "builds") -> None:
    """Write ``tensorrt`` and a GPU into a folder for the import path of a process and its children.

    The GPU comes with ``sitecustomize``, so it is there in new processes alone.
    """
    here = str(Path(__file__).parent)
    (folder / "tensorrt.py").write_text(
        f"import sys\nsys.path.append({here!r})\nfrom fake_tensorrt import make_tensorrt\n"
        f"sys.modules[__name__] = make_tensorrt({version!r}, {behaviour!r})\n"
    )
    (folder / "sitecustomize.py").write_text(
        f"import sys\nsys.path.append({here!r})\nimport fake_tensorrt\nfake_tensorrt.give_gpu()\n"
    )


def give_gpu() -> None:
    """Let `engines.cuda` find GPU in this process."""
    from engines import cuda

    cuda.device_info = fake_device_info


def fake_device_info(index: int | None = None) -> Any:
    """What `engines.cuda.device_info` gives for GPU."""
    from engines.cuda import DeviceInfo

    return DeviceInfo(
        index=0,
        name=str(GPU["name"]),
        compute_capability=GPU["capability"],  # type: ignore[arg-type]
        driver=GPU["driver"],  # type: ignore[arg-type]
        total=GPU["total"],  # type: ignore[arg-type]
        free=1 << 30,
    )


# -- the module ----------------------------------------------------------------------------------


def _enum(name: str, *members: str) -> Any:
    return IntEnum(name, {member: i for i, member in enumerate(members)})


class _Options(SimpleNamespace):
    """An object whose attributes may be set."""


def _members(numbers: tuple[int, ...], behaviour: str) -> dict[str, Any]:
    old, eleven = numbers < (10, 0), numbers >= (11, 0)
    severity = _enum("Severity", "INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE")

    class ILogger:
        Severity = severity

        def __init__(self) -> None:
            self.made = True

        def log(self, severity: Any, msg: str) -> None:
            raise NotImplementedError

    flags = ["REFIT", "TF32", "VERSION_COMPATIBLE"]
    if not eleven:
        flags += ["FP16", "INT8", "OBEY_PRECISION_CONSTRAINTS"]
    members: dict[str, Any] = {
        "ILogger": ILogger,
        "BuilderFlag": _enum("BuilderFlag", *flags),
        "HardwareCompatibilityLevel": _enum("HardwareCompatibilityLevel", "NONE", "AMPERE_PLUS"),
        "LayerInformationFormat": _enum("LayerInformationFormat", "ONELINE", "JSON"),
        "MemoryPoolType": _enum("MemoryPoolType", "WORKSPACE"),
        "ProfilingVerbosity": _enum("ProfilingVerbosity", "LAYER_NAMES_ONLY", "DETAILED"),
        "TacticSource": _enum(
            "TacticSource",
            *(["CUDNN"] if old else []),
            "EDGE_MASK_CONVOLUTIONS",
            "JIT_CONVOLUTIONS",
        ),
        "float16": "half",
        "float32": "float",
    }
    if old:
        members["NetworkDefinitionCreationFlag"] = _enum("Flag", "EXPLICIT_BATCH")
    else:
        members["IProgressMonitor"] = type("IProgressMonitor", (), {"__init__": lambda self: None})
        if not eleven:
            members["NetworkDefinitionCreationFlag"] = _enum(
                "Flag", "EXPLICIT_BATCH", "STRONGLY_TYPED"
            )
    if numbers >= (10, 14):
        members["SerializationFlag"] = _enum(
            "SerializationFlag", "EXCLUDE_WEIGHTS", "INCLUDE_REFIT"
        )
    _add_builder(members, severity, behaviour, old)
    _add_runtime(members, severity, old, numbers >= (10, 14))
    return members


def _add_builder(members: dict[str, Any], severity: Any, behaviour: str, old: bool) -> None:
    builder_flag = members["BuilderFlag"]

    class Cache:
        def __init__(self, data: bytes) -> None:
            self.data = data

        def serialize(self) -> bytes:
            return self.data

        def combine(self, other: Cache, ignore_mismatch: bool) -> bool:
            self.data += other.data
            return True

    class Config:
        def __init__(self) -> None:
            self.flags = {builder_flag.TF32}
            self.pools: dict[str, int] = {}
            self.sources: int | None = None
            self.profiles: list[Any] = []
            self.cache: Cache | None = None

        def set_flag(self, flag: Any) -> None:
            self.flags.add(flag)

        def clear_flag(self, flag: Any) -> None:
            self.flags.discard(flag)

        def set_memory_pool_limit(self, pool: Any, size: int) -> None:
            self.pools[pool.name] = size

        def set_tactic_sources(self, sources: int) -> bool:
            self.sources = sources
            return True

        def add_optimization_profile(self, profile: Any) -> int:
            self.profiles.append(profile.shapes)
            return 0

        def create_timing_cache(self, data: bytes) -> Cache | None:
            return None if data.startswith(b"another GPU") else Cache(data or b"new")

        def set_timing_cache(self, cache: Cache, ignore_mismatch: bool) -> bool:
            self.cache = cache
            return True

        def get_timing_cache(self) -> Cache:
            assert self.cache is not None
            return self.cache

    class Profile:
        def __init__(self) -> None:
            self.shapes: dict[str, Any] = {}

        def set_shape(self, name: str, low: Any, best: Any, high: Any) -> None:
            self.shapes[name] = [low, best, high]

    class Builder:
        def __init__(self, logger: Any) -> None:
            if behaviour == "no GPU":
                logger.log(severity.ERROR, "CUDA initialization failure with error: 35")
                raise TypeError("pybind11::init(): factory function returned nullptr")
            self.logger = logger

        def create_network(self, flags: int = 0) -> Any:
            return _Options(flags=flags, model=b"")

        def create_builder_config(self) -> Config:
            return Config()

        def create_optimization_profile(self) -> Profile:
            return Profile()

        def build_serialized_network(self, network: Any, config: Any) -> bytes | None:
            os.write(1, b"printed by C++\n")
            _say_progress(self.logger, config, severity, old)
            _act(behaviour, self.logger, severity)
            if behaviour in ("fails", "memory"):
                return None
            if behaviour == "hangs" and not _keep_going(config):
                return None
            if config.cache is not None:
                config.cache.data += b" timed"
            return json.dumps(_configuration(network, config)).encode()

    class ParserError:
        def __init__(self, index: int) -> None:
            self._index = index
            if not old:
                self.node_name = lambda: "first_stage.enc.0/Unique_1"
                self.node_operator = lambda: "Unique"

        def node(self) -> int:
            return self._index

        def desc(self) -> str:
            return "Assertion failed: no\nimporter"

        def code(self) -> Any:
            return SimpleNamespace(name="UNSUPPORTED_NODE")

    class OnnxParser:
        def __init__(self, network: Any, logger: Any) -> None:
            self._network = network
            self.num_errors = 0

        def parse(self, model: bytes) -> bool:
            self._network.model = model
            self.num_errors = 2 if behaviour == "refuses" else 0
            return not self.num_errors

        def get_error(self, i: int) -> ParserError:
            return ParserError((-1, 1)[i])

    members |= {"Builder": Builder, "OnnxParser": OnnxParser}


def _say_progress(logger: Any, config: Any, severity: Any, old: bool) -> None:
    """What each generation tells while it builds."""
    logger.log(severity.INFO, "Total Weights Memory: 1 bytes")
    if old:
        logger.log(severity.VERBOSE, "After vertical fusions: 9 layers")
        logger.log(severity.VERBOSE, "After concat removal: 4 layers")
        for i in range(4):
            runner = f"layer {i} (CaskConvolution[0x80000009])"
            logger.log(severity.VERBOSE, "=============== Computing costs for ")
            logger.log(severity.VERBOSE, f"--------------- Timing Runner: {runner}")
            logger.log(severity.VERBOSE, "Tactic: 0x0 Time: 0.01")
        return
    monitor = config.progress_monitor
    monitor.phase_start("Building engine", None, 2)
    for i in range(2):
        monitor.phase_start("Timing tactics", "Building engine", 2)
        for j in range(2):
            monitor.step_complete("Timing tactics", j)
        monitor.phase_finish("Timing tactics")
        monitor.step_complete("Building engine", i)
    monitor.phase_finish("Building engine")


def _act(behaviour: str, logger: Any, severity: Any) -> None:
    if behaviour == "fails":
        logger.log(severity.WARNING, "block.0/Add: slow 1")
        logger.log(severity.WARNING, "block.1/Add: slow 22")
        logger.log(severity.ERROR, "Error Code 10: no\n  implementation for first_stage/Conv")
    elif behaviour == "memory":
        logger.log(severity.ERROR, "Error Code 2: OutOfMemory (Requested size was 99 bytes)")
    elif behaviour == "crashes":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif behaviour == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif behaviour == "stuck":
        ctypes.PyDLL(None).sleep(600)  # and Python's lock with it: no thread of ours can run
    elif behaviour == "fills the disk":
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, most))  # no file takes a byte from now on
    elif behaviour == "raises":
        raise AttributeError("no such method")
    elif behaviour == "hangs at exit":
        import atexit

        atexit.register(time.sleep, 600)


def _keep_going(config: Any) -> bool:
    """Go on for long, or until cancelled where that is possible."""
    config.cache.data += b" timed so far"
    for _ in range(600):
        time.sleep(0.05)
        monitor = getattr(config, "progress_monitor", None)
        if monitor is not None and not monitor.step_complete("x", 0):
            return False
    return True


def _configuration(network: Any, config: Any) -> dict[str, Any]:
    named = ("builder_optimization_level", "avg_timing_iterations", "hardware_compatibility_level")
    return {
        "network": network.flags,
        "flags": sorted(flag.name for flag in config.flags),
        "pools": config.pools,
        "sources": config.sources,
        "profiles": config.profiles,
        "verbosity": config.profiling_verbosity.name,
        "constrained": getattr(network, "constrained", False),
        **{name: getattr(config, name, None) for name in named},
    }


def _add_runtime(members: dict[str, Any], severity: Any, old: bool, keeps_refit: bool) -> None:
    class Engine:
        def __init__(self, plan: bytes) -> None:
            configuration = json.loads(plan)
            self.refittable = "REFIT" in configuration["flags"]
            self.weights = {"w": None, "b": None}
            if old:
                self.device_memory_size = 1 << 20
            else:
                self.device_memory_size_v2 = 2 << 20

        def create_execution_context(self) -> Any:
            return None

        def create_engine_inspector(self) -> Any:
            layer = {"Name": "conv", "LayerType": "CaskConvolution", "Inputs": [], "Outputs": []}
            text = json.dumps({"Layers": [layer, {**layer, "LayerType": "Reformat"}]})
            return SimpleNamespace(get_engine_information=lambda form: text)

        def serialize(self) -> bytes:
            return b"plain"

    if keeps_refit:

        def create_serialization_config(self: Engine) -> Any:
            config = _Options(flags=set())
            config.set_flag = config.flags.add
            return config

        def serialize_with_config(self: Engine, config: Any) -> bytes:
            return " ".join(flag.name for flag in config.flags).encode()

        Engine.create_serialization_config = create_serialization_config  # type: ignore[attr-defined]
        Engine.serialize_with_config = serialize_with_config  # type: ignore[attr-defined]

    class Runtime:
        def __init__(self, logger: Any) -> None:
            self._logger = logger
            self.engine_host_code_allowed = False

        def deserialize_cuda_engine(self, plan: bytes) -> Engine | None:
            try:
                engine = Engine(plan)
            except (ValueError, KeyError):
                self._logger.log(severity.ERROR, "Serialization assertion failed")
                return None
            if "VERSION_COMPATIBLE" in json.loads(plan)["flags"] and not (
                self.engine_host_code_allowed
            ):
                self._logger.log(severity.ERROR, "host code is not allowed")
                return None
            return engine

    class Refitter:
        def __init__(self, engine: Engine, logger: Any) -> None:
            self._engine, self._set = engine, set[str]()

        def get_all_weights(self) -> list[str]:
            return list(self._engine.weights)

        def set_named_weights(self, name: str, weights: Any) -> bool:
            if not keeps_refit and weights.dtype == "int64":  # as 8.6 does, which has no INT64
                raise TypeError("Could not implicitly convert NumPy data type: i64 to TensorRT.")
            self._set.add(name)
            return bool(weights.size == 3)

        def get_missing_weights(self) -> list[str]:
            return [name for name in self._engine.weights if name not in self._set]

        def refit_cuda_engine(self) -> bool:
            return True

    class Registry:
        loaded: ClassVar[list[str]] = []

        def load_library(self, path: str) -> Any:
            self.loaded.append(path)
            return SimpleNamespace() if Path(path).read_bytes().endswith(b"code") else None

    members |= {"Runtime": Runtime, "Refitter": Refitter}
    members["get_plugin_registry"] = Registry
