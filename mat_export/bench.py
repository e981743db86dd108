"""Latency and memory of models, side by side in one run.

Each model lives in a process of its own, so that its peak memory is its own; the processes take
turns, one run each, so that whatever else the machine does falls on all of them alike.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from mat_export.contract import GraphSpec, UserError
from mat_export.manifest import package_version
from mat_export.openers import OPENERS

__all__ = ["BenchReport", "ModelTiming", "bench", "example_inputs"]


@dataclass(frozen=True)
class ModelTiming:
    """Figures of one model.

    Attributes:
        model: The file.
        runner: What ran it.
        batch: Images at once.
        milliseconds: Wall time of each run, in order.
        p50: Median of them; likewise p90 and p99.
        peak_mib: Most memory its process held, in MiB, loading included.
        load_seconds: From opening the file to being ready.
    """

    model: str
    runner: str
    batch: int
    milliseconds: tuple[float, ...]
    p50: float
    p90: float
    p99: float
    peak_mib: float
    load_seconds: float


@dataclass(frozen=True)
class BenchReport:
    """Figures of all models, and of the machine they ran on."""

    models: tuple[ModelTiming, ...]
    machine: dict[str, Any]
    threads: int
    date: str

    def to_json(self) -> str:
        """Everything, each model with its ratio to the first."""
        entries = asdict(self)
        for model in entries["models"]:
            model["ratio_to_first"] = model["p50"] / self.models[0].p50
        return json.dumps(entries, indent=2) + "\n"


def bench(
    models: Sequence[str | os.PathLike[str]],
    *,
    runs: int = 10,
    warmup: int = 2,
    batch: int = 1,
    threads: int | None = None,
    progress: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> BenchReport:
    """Time models against each other.

    Args:
        models: Files that ``open_runner`` opens.
        runs: Timed runs of each.
        warmup: Runs before them.
        batch: Images at once, for models with a dynamic batch.
        threads: CPU threads of each; all cores if None.
        progress: Called with the next model, runs done and runs in all.

    Raises:
        UserError: If a model cannot be opened or runs fail.
    """
    if runs < 1 or warmup < 0:
        raise UserError(f"bench needs at least one run, got {runs} and {warmup} to warm up")
    threads = threads or os.cpu_count() or 1
    workers: list[_Worker] = []
    total = len(models) * (runs + warmup)
    try:
        workers.extend(_Worker(model, batch, threads) for model in models)
        times: list[list[float]] = [[] for _ in workers]
        for i in range(runs + warmup):
            for j, worker in enumerate(workers):
                progress(worker.model, i * len(workers) + j, total)
                times[j].append(worker.call("run"))
        progress("done", total, total)
        timings = tuple(
            worker.timing(own[warmup:]) for worker, own in zip(workers, times, strict=True)
        )
    finally:
        for worker in workers:
            worker.close()
    return BenchReport(timings, machine(), threads, datetime.now(timezone.utc).isoformat())


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    packages = (
        *("torch", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx", "numpy"),
        "mat-export",
    )
    versions = {name: package_version(name) for name in packages}
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: v for name, v in versions.items() if v != "unknown"},
    }


def example_inputs(
    spec: GraphSpec, batch: int, size: tuple[int, int] | None = None
) -> dict[str, Any]:
    """A photograph with a large hole and randomness from seed 0, in the model's own types.

    Args:
        spec: What the model takes.
        batch: Images at once, where it takes any number.
        size: Height and width in pixels; by default the native size.
    """
    from mat_export.pixels import to_unit
    from mat_export.suite import MASKS, PHOTOGRAPHS, photograph
    from mat_torch.sampling import draw

    n = spec.batch or batch
    height, width = size or (spec.config.resolution,) * 2
    image = np.repeat(photograph(PHOTOGRAPHS[0], height, width)[None], n, axis=0)
    keep = np.repeat(MASKS["random-large"](height, width)[None], n, axis=0)
    mask = keep.astype(np.uint8) * np.uint8(255)
    inputs: dict[str, Any] = dict(
        draw(spec.config, list(range(n)), height, width, noise=spec.noise == "input"),
        truncation=np.ones(1, np.float32),
    )
    inputs["image"], inputs["mask"] = (image, mask) if spec.io == "uint8" else to_unit(image, mask)
    return inputs


class _Worker:
    """A model in its own process."""

    def __init__(self, model: str | os.PathLike[str], batch: int, threads: int) -> None:
        self.model = os.fspath(model)
        # A fresh interpreter: forking one that has loaded a runtime's threads is not safe.
        context = multiprocessing.get_context("spawn")
        self._connection, far = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(far, self.model, batch, threads, dict(OPENERS)), daemon=True
        )
        self._process.start()
        far.close()
        self.name, self.batch, self.load_seconds = self.call(None)

    def call(self, command: str | None) -> Any:
        """Send a command (None: only wait) and return the answer."""
        try:
            if command is not None:
                self._connection.send(command)
            kind, value = self._connection.recv()
        except (EOFError, BrokenPipeError) as error:
            self._process.join()
            raise UserError(
                f"the process that ran '{self.model}' ended with code {self._process.exitcode}; "
                "it may have run out of memory"
            ) from error
        if kind == "error":
            raise UserError(value)
        return value

    def timing(self, seconds: Sequence[float]) -> ModelTiming:
        ms = tuple(1e3 * s for s in seconds)
        p50, p90, p99 = (float(np.percentile(ms, p)) for p in (50, 90, 99))
        return ModelTiming(
            model=Path(self.model).name,
            runner=self.name,
            batch=self.batch,
            milliseconds=ms,
            p50=p50,
            p90=p90,
            p99=p99,
            peak_mib=self.call("peak"),
            load_seconds=self.load_seconds,
        )

    def close(self) -> None:
        self._connection.close()
        self._process.join(timeout=5)
        if self._process.is_alive():
            self._process.kill()


def _serve(
    connection: Connection, model: str, batch: int, threads: int, openers: dict[str, str]
) -> None:
    """What a worker's process does: open the model, then run it each time it is told to.

    A spawned process knows no file types but our own, so it is told those of its parent.
    """
    from mat_export.runners import open_runner

    OPENERS.update(openers)
    try:
        start = time.perf_counter()
        with open_runner(model, threads=threads) as runner:
            inputs = example_inputs(runner.spec, batch)
            size = inputs["image"].shape[0]
            connection.send(("ok", (runner.name, size, time.perf_counter() - start)))
            while True:
                command = connection.recv()
                if command == "peak":
                    connection.send(("ok", _peak_mib()))
                    continue
                start = time.perf_counter()
                runner.run(inputs)
                connection.send(("ok", time.perf_counter() - start))
    except EOFError:
        pass  # the parent is done
    except UserError as error:
        connection.send(("error", str(error)))
    except Exception as error:  # whatever it was, the parent tells it in a sentence
        connection.send(("error", f"'{model}' failed: {type(error).__name__}: {error}"))


def _peak_mib() -> float:
    """Most resident memory this process ever had, in MiB."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20) if platform.system() == "Darwin" else peak / 1024


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
