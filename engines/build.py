"""Build an engine and its papers, or find that it is built already.

The build itself runs in a process of its own (`engines.worker`): TensorRT may crash or be killed
there, and Ctrl-C ends it at once and leaves nothing but the timing cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from engines import worker
from engines.backend import Backend, Gpu, find_gpu, open_backend
from engines.options import BuildOptions
from engines.papers import FORMAT, differences, read_engine_manifest, save_engine
from engines.profiles import profiles_of
from mat_export.contract import GraphSpec, UserError
from mat_export.files import cache_folder, require_writable
from mat_export.manifest import manifest_path, package_version

__all__ = ["BuildReport", "build_engine", "timing_cache_path"]

_PATIENCE_SECONDS = 5.0
"""How long the process may take to end by itself; it saves its timing cache in that time."""

_NOTED_WARNINGS = 10
"""Kinds of TensorRT's warnings that are shown; the manifest has them all."""


@dataclass(frozen=True)
class BuildReport:
    """What a build made, or found made.

    Attributes:
        path: The plan; its manifest is beside it.
        manifest: Everything that is known of it.
        cached: The plan was there already, made by the same request.
        seconds: Wall time of this call.
    """

    path: Path
    manifest: dict[str, Any]
    cached: bool
    seconds: float

    @property
    def bytes(self) -> int:
        """Size of the plan."""
        return int(self.manifest["bytes"])

    @property
    def backend(self) -> str:
        """Name and version of what built it."""
        return f"{self.manifest['request']['backend']} {self.manifest['request']['version']}"

    @property
    def layers(self) -> dict[str, Any] | None:
        """Figures of the layers (`engines.layers`); None where no GPU could tell them."""
        return self.manifest.get("layers")

    @property
    def context_bytes(self) -> int | None:
        """GPU memory of each context, in bytes; None where no GPU could tell."""
        return self.manifest.get("context_bytes")

    def to_dict(self) -> dict[str, Any]:
        """The report for JSON."""
        return {
            "path": str(self.path),
            "cached": self.cached,
            "seconds": self.seconds,
            "manifest": self.manifest,
        }


def build_engine(
    model: bytes,
    output: Path,
    options: BuildOptions,
    *,
    sources: Mapping[str, Any] | None = None,
    progress: Callable[[str, int, int], None] = lambda phase, done, total: None,
    note: Callable[[str], None] = lambda text: None,
    force: bool = False,
    timing_cache: Path | None = None,
) -> BuildReport:
    """Build the engine of a typed ONNX file, unless the same request built it before.

    Args:
        model: The file that the parser gets: functions inlined, or left to plugins.
        output: The plan to write; its manifest goes beside it.
        options: What to build it for.
        sources: What the caller knows of the model's making, for the manifest (JSON types):
            ``checkpoint`` digest, ``onnx`` path and digest, ``passes`` and so on. ``command`` is
            the command line that builds it again, as a list. ``plugin`` (``path``, ``sha256``) is
            held against the library whenever the engine is opened.
        progress: Called with what is being done, and how much of a total is done.
        note: Called with lines about the work: warnings of TensorRT's, each kind once.
        force: Build even if the same request built it before.
        timing_cache: Where kernel timings are kept. By default a file of the user's cache folder
            for each TensorRT and GPU.

    Raises:
        UserError: If the file is not ours, the backend or GPU cannot do what is asked, the parser
            refuses a node, TensorRT builds no engine or dies, or the output cannot be written.
        KeyboardInterrupt: On Ctrl-C; nothing is left but the timing cache.
    """
    started = time.monotonic()
    require_writable(output)
    require_writable(manifest_path(output))
    facts = _read_model(model)
    backend = open_backend(options.backend, target=options.target)
    gpu = _gpu_if_any()
    resolved = replace(options, backend=backend.name, target=backend.resolve_target(options, gpu))
    backend.check_request(
        resolved,
        precision=facts.spec.precision,
        opset=facts.opset,
        ir_version=facts.ir_version,
        gpu=gpu,
    )
    given = dict(sources or {})
    command = given.pop("command", None) or _command(facts.spec, options, output)
    request = _request(facts, backend, resolved, gpu, given.get("plugin"))
    if not force:
        found = _built_before(output, request, note)
        if found is not None:
            return BuildReport(output, found, True, time.monotonic() - started)
    cache = timing_cache or timing_cache_path(backend, gpu)
    log = _Log(note)
    built, plan = _build_in_process(
        model,
        worker.Request(
            options=resolved,
            profiles=request["profiles"],
            cache=cache if backend.has_timing_cache else None,
            inspect=_can_inspect(resolved, gpu),
            plugin=None if given.get("plugin") is None else Path(given["plugin"]["path"]),
        ),
        backend.label,
        progress,
        log,
    )
    manifest = save_engine(
        plan,
        output,
        {
            **built,
            "key": _digest(request),
            "request": request,
            "graph": json.loads(facts.spec.to_json()),
            "sources": {"checkpoint": facts.spec.checkpoint, **given},
            "gpu": None if gpu is None else asdict(gpu),
            "command": [str(part) for part in command],
            "warnings": log.kinds(),
            "build_seconds": round(time.monotonic() - started, 1),
        },
    )
    return BuildReport(output, manifest, False, time.monotonic() - started)


def timing_cache_path(backend: Backend, gpu: Gpu | None) -> Path | None:
    """Where kernel timings of a TensorRT on a GPU are kept; None if there is no place for them."""
    try:
        root = cache_folder()
    except UserError:
        return None
    name = f"{backend.name}-{backend.version}-{'any' if gpu is None else gpu.name}"
    slug = re.sub(r"[^A-Za-z0-9.]+", "-", name).lower()
    return root / "timing" / f"{slug}.cache"


# -- the request -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _ModelFacts:
    spec: GraphSpec
    opset: int
    ir_version: int
    digest: str


def _read_model(model: bytes) -> _ModelFacts:
    """What the file says of itself. Raises UserError if it is not ours."""
    import onnx

    try:
        proto = onnx.load_model_from_string(model)
    except Exception as error:  # protobuf's own, of no common base
        raise UserError(f"not a readable ONNX model: {error}") from error
    spec = GraphSpec.of_model(proto)
    if spec is None:
        raise UserError("not a model of mat-export: export one with 'mat-export onnx'")
    opset = next((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), 0)
    return _ModelFacts(spec, opset, proto.ir_version, hashlib.sha256(model).hexdigest())


def _gpu_if_any() -> Gpu | None:
    try:
        return find_gpu()
    except UserError:
        return None


def _can_inspect(options: BuildOptions, gpu: Gpu | None) -> bool:
    """Whether the GPU here is one that the engine is for."""
    if gpu is None:
        return False
    return options.target in (None, f"sm_{gpu.capability[0]}{gpu.capability[1]}")


def _request(
    facts: _ModelFacts,
    backend: Backend,
    options: BuildOptions,
    gpu: Gpu | None,
    plugin: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Everything that decides what engine is built."""
    for_this_gpu = options.target is None and not backend.builds_without_gpu
    return {
        "format": FORMAT,
        "tool": package_version(),
        "model": facts.digest,
        "plugin": None if plugin is None else plugin.get("sha256"),
        "backend": backend.name,
        "version": backend.version,
        "options": options.to_dict(),
        "profiles": profiles_of(facts.spec, options),
        "gpu": {
            "name": gpu.name,
            "capability": gpu.capability,
            "driver": gpu.driver.partition(".")[0],
        }
        if gpu is not None and for_this_gpu
        else None,
    }


def _digest(request: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()


def _command(spec: GraphSpec, options: BuildOptions, output: Path) -> list[str]:
    """The command line that builds this again, as well as it can be told from here."""
    arguments = [f"--{spec.precision}", *options.to_arguments(), "-o", str(output)]
    return ["mat-export", "trt", "MODEL.onnx", *arguments]


def _built_before(
    output: Path, request: Mapping[str, Any], note: Callable[[str], None]
) -> dict[str, Any] | None:
    """The manifest of the output if this very request made it; else says why it is built anew."""
    if not output.exists():
        return None
    try:
        manifest = read_engine_manifest(output)
    except UserError as error:
        note(f"building anew: {error}")
        return None
    if manifest["key"] == _digest(request):
        return manifest
    asked = json.loads(json.dumps(request))
    changed = [  # profiles follow from the model and the options
        line for line in differences(manifest["request"], asked) if not line.startswith("profiles.")
    ]
    note(f"building '{output}' anew, since it was built otherwise: {'; '.join(changed)}")
    return None


# -- the process -----------------------------------------------------------------------------------


@dataclass
class _Log:
    """TensorRT's warnings by kind, and its last errors."""

    note: Callable[[str], None]
    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def __call__(self, severity: str, text: str) -> None:
        if severity == "info":
            return
        line = " ".join(text.split())
        # Messages of one kind differ in names of layers and in figures.
        kind = re.sub(r"\S*[/.]\S*|\d+", "#", line)
        self.counts[kind] += 1
        if kind in self.first:
            return
        self.first[kind] = line
        if len(self.first) <= _NOTED_WARNINGS:
            self.note(f"TensorRT {severity}: {line if len(line) <= 300 else f'{line[:300]}…'}")
        elif len(self.first) == _NOTED_WARNINGS + 1:
            self.note("TensorRT gives more warnings: all are in the manifest")

    def kinds(self) -> list[dict[str, Any]]:
        """The first of each kind, and how many there were."""
        return [{"text": self.first[kind], "count": n} for kind, n in self.counts.items()]


def _build_in_process(
    model: bytes,
    request: worker.Request,
    label: str,
    progress: Callable[[str, int, int], None],
    log: _Log,
) -> tuple[dict[str, Any], bytes]:
    """Run a worker: the facts it tells, and the plan."""
    with _temporary_folder() as folder:
        try:
            (folder / worker.MODEL).write_bytes(model)
            (folder / worker.REQUEST).write_text(request.to_json(), encoding="utf-8")
        except OSError as error:
            raise _no_room(error) from error
        with (folder / "stderr").open("wb") as errors, _worker(folder, errors) as child:
            outcome = _listen(child, progress, log)
        if "refused" in outcome:
            raise UserError(outcome["refused"])
        if "done" not in outcome:
            raise _died(child.returncode, label, outcome.get("phase"), folder / "stderr")
        return outcome["done"], (folder / worker.PLAN).read_bytes()


@contextlib.contextmanager
def _temporary_folder() -> Iterator[Path]:
    try:
        folder = Path(tempfile.mkdtemp(prefix="mat-export-"))
    except OSError as error:
        raise _no_room(error) from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _no_room(error: OSError) -> UserError:
    return UserError(
        f"cannot write temporary files to '{tempfile.gettempdir()}' ({error.strerror}): "
        "set TMPDIR to a folder with room for the model and the engine"
    )


@contextlib.contextmanager
def _worker(folder: Path, errors: Any) -> Iterator[subprocess.Popen[str]]:
    """A running worker, which has ended when the block is left, however that happens."""
    paths = [str(Path(__file__).parent.parent), *sys.path]
    child = subprocess.Popen(
        [sys.executable, "-m", "engines.worker", str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        cwd=folder,  # -m looks there first, and the user's folder may hold anything
        env={**os.environ, "PYTHONPATH": os.pathsep.join(str(Path(p).absolute()) for p in paths)},
        encoding="utf-8",
        start_new_session=True,  # Ctrl-C is for us alone; we end the worker
    )
    try:
        yield child
    finally:
        _end(child)


def _end(child: subprocess.Popen[str]) -> None:
    """Let a worker end, then make it; a second Ctrl-C makes it at once."""
    try:
        assert child.stdin is not None
        assert child.stdout is not None
        with contextlib.suppress(OSError):
            child.stdin.close()
        for harder in (child.terminate, child.kill):
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(_PATIENCE_SECONDS)
                break
            harder()
        child.wait()
        child.stdout.close()
    except BaseException:
        child.kill()
        child.wait()
        raise


def _listen(
    child: subprocess.Popen[str], progress: Callable[[str, int, int], None], log: _Log
) -> dict[str, Any]:
    """Pass events on until the outcome: ``done``, ``refused``, or the ``phase`` it died in."""
    phase = None
    assert child.stdout is not None
    for line in child.stdout:
        try:
            event: dict[str, Any] = json.loads(line)
        except ValueError:  # cut off in the middle
            break
        if "log" in event:
            log(*event["log"])
        elif "progress" in event:
            phase = event["progress"][0]
            progress(*event["progress"])
        else:
            return event
    return {"phase": phase}


def _died(status: int, label: str, phase: str | None, errors: Path) -> Exception:
    """What to raise when a worker ended without an outcome."""
    lines = errors.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    where = f", at '{phase}'" if phase else ""
    if status >= 0:  # an exception of ours that nobody foresaw
        return RuntimeError("the building process failed:\n" + "\n".join(lines[-40:]))
    number = -status
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    if number == signal.SIGKILL:
        return UserError(
            f"the process in which {label} was building was killed ({name}{where}), most likely "
            "for want of memory: close other programs, or ask for less with --batch or --size"
        )
    last = f": {lines[-1].strip()}" if lines else ""
    return UserError(
        f"{label} died while building ({name}{where}){last}; nothing was written: try another "
        "--level or --backend"
    )
