"""Build an engine and its papers, or find that it is built already.

The build itself runs in a process of its own (`engines.worker`): TensorRT may crash or be killed
there, and Ctrl-C ends it at once and leaves nothing but the timing cache.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from engines import worker
from engines.backend import Backend, Gpu, find_gpu, open_backend
from engines.index import recall_engine, remember_engine
from engines.options import BuildOptions
from engines.papers import FORMAT, read_engine_manifest, save_engine, write_engine
from engines.process import WorkerLog, run_worker
from engines.profiles import profiles_of
from mat_export.contract import GraphSpec, UserError
from mat_export.files import cache_folder, require_writable
from mat_export.manifest import differences, manifest_path, package_version

__all__ = [
    "Build",
    "BuildReport",
    "build_engine",
    "check_build",
    "find_built",
    "run_build",
    "timing_cache_path",
]

Progress = Callable[[str, int, int], None]
"""Called with what is being done, and how much of a total is done."""

Note = Callable[[str], None]
"""Called with a line about the work."""


@dataclass(frozen=True)
class BuildReport:
    """What a build made, or found made.

    Attributes:
        path: The plan; its manifest is beside it.
        manifest: Everything that is known of it.
        cached: The same request had built the plan before, here or elsewhere.
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
    def plugins(self) -> bool:
        """Whether the engine calls a plugin library."""
        return self.manifest["sources"].get("plugin") is not None

    @property
    def missed(self) -> str | None:
        """What of parity the engine failed where `engines.choice` checked it; None if nothing."""
        choice: dict[str, Any] = self.manifest["sources"].get("plugin_choice", {})
        missed: str | None = choice.get("missed")
        return missed

    @property
    def layers(self) -> dict[str, Any] | None:
        """Figures of the layers (`engines.layers`); None where no GPU could tell them."""
        return self.manifest.get("layers")

    @property
    def context_bytes(self) -> int | None:
        """GPU memory of each context, in bytes; None where no GPU could tell."""
        return self.manifest.get("context_bytes")


@dataclass(frozen=True)
class Build:
    """A build that may begin: what can be refused at once is checked.

    Attributes:
        model: The file that the parser gets.
        spec: What it takes and gives.
        backend: What builds it.
        gpu: This machine's GPU, if any.
        options: With backend and target resolved.
        sources: What the manifest says of the model's making.
        command: The command line that builds it again.
        request: Everything that decides what engine is built.
    """

    model: bytes
    spec: GraphSpec
    backend: Backend
    gpu: Gpu | None
    options: BuildOptions
    sources: dict[str, Any]
    command: tuple[str, ...]
    request: dict[str, Any]

    @property
    def key(self) -> str:
        """Digest of the request."""
        return hashlib.sha256(json.dumps(self.request, sort_keys=True).encode()).hexdigest()


def build_engine(
    model: bytes,
    output: Path,
    options: BuildOptions,
    *,
    sources: Mapping[str, Any] | None = None,
    progress: Progress = lambda phase, done, total: None,
    note: Note = lambda text: None,
    force: bool = False,
    timing_cache: Path | None = None,
) -> BuildReport:
    """Build the engine of a typed ONNX file, unless the same request built it before.

    Args:
        model: The file that the parser gets: functions inlined, or left to plugins.
        output: The plan to write; its manifest goes beside it.
        options: What to build it for.
        sources: As in `check_build`.
        progress: Hears how far the build is.
        note: Called with lines about the work: warnings of TensorRT's, each kind once.
        force: Build even if the same request built it before.
        timing_cache: Where kernel timings are kept; a file that holds something else is left as it
            is. By default a file of the user's cache folder for each TensorRT and GPU.

    Raises:
        UserError: If the file is not ours, the backend or GPU cannot do what is asked, the parser
            refuses a node, TensorRT builds no engine or dies, or the output cannot be written.
        KeyboardInterrupt: On Ctrl-C; nothing is left but the timing cache.
    """
    started = time.monotonic()
    build = check_build(model, output, options, sources=sources)
    found = None if force else find_built(output, [build], note)
    if found is not None:
        return BuildReport(output, found, True, time.monotonic() - started)
    manifest = run_build(build, output, progress=progress, note=note, timing_cache=timing_cache)
    remember_engine(output, manifest, [build.key])
    return BuildReport(output, manifest, False, time.monotonic() - started)


def check_build(
    model: bytes,
    output: Path,
    options: BuildOptions,
    *,
    sources: Mapping[str, Any] | None = None,
    weighed: str | None = None,
) -> Build:
    """Check what can be refused before the work, and say what exactly is asked.

    Args:
        model: The file that the parser gets.
        output: Where the plan is to be written in the end.
        options: What to build it for.
        sources: What the caller knows of the model's making, for the manifest (JSON types):
            ``checkpoint`` digest, ``onnx`` path and digest, ``passes`` and so on. ``command`` is
            the command line that builds it again, as a list. ``plugin`` (``path``, ``sha256``) is
            held against the library whenever the engine is opened.
        weighed: Digest of the plugin library whose use is weighed (`engines.choice`), if any.

    Raises:
        UserError: If the file is not ours, the backend or GPU cannot do what is asked, or the
            output cannot be written.
    """
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
    plugin = given.get("plugin")
    return Build(
        model=model,
        spec=facts.spec,
        backend=backend,
        gpu=gpu,
        options=resolved,
        sources={"checkpoint": facts.spec.checkpoint, **given},
        command=tuple(str(part) for part in command),
        request={
            **_request(facts, backend, resolved, gpu),
            "plugin": None if plugin is None else plugin.get("sha256"),
            "weighed_plugin": weighed,
        },
    )


def find_built(output: Path, builds: Sequence[Build], note: Note) -> dict[str, Any] | None:
    """The manifest of the output if one of these builds made it; else say why it is built anew.

    An engine that one of them made elsewhere is copied to the output.

    Args:
        output: The plan, which need not be there.
        builds: One or more.
        note: Called with where the engine was, or the reason.

    Raises:
        UserError: If the output cannot be written.
    """
    why = None
    if output.exists():
        try:
            manifest = read_engine_manifest(output)
        except UserError as error:
            why = f"building anew: {error}"
        else:
            why = _why_anew(output, manifest, builds)
            if why is None:
                keys = [build.key for build in builds]
                if not any(map(recall_engine, keys)):  # it was moved, or the cache was emptied
                    remember_engine(output, manifest, keys)
                return manifest
    copied = _copy_built(output, builds, note)
    if copied is None and why is not None:
        note(why)
    return copied


def _why_anew(output: Path, manifest: Mapping[str, Any], builds: Sequence[Build]) -> str | None:
    """Why an engine is not what one of these builds gives; None if it is."""
    if manifest["key"] not in {build.key for build in builds}:
        changed = min((_changes(manifest["request"], build.request) for build in builds), key=len)
        told = "; ".join(changed) or "its weights were swapped"
        return f"building '{output}' anew, since it was built otherwise: {told}"
    if "undecided" in manifest["sources"].get("plugin_choice", {}):
        return "building anew, since the last contest with plugins was not decided"
    return None


def _copy_built(output: Path, builds: Sequence[Build], note: Note) -> dict[str, Any] | None:
    """Copy the engine that one of these builds made elsewhere; its manifest, None if there is none.

    Where its files lie, and the command that builds it again, are those of this build.
    """
    for recalled in (recall_engine(build.key) for build in builds):
        if recalled is None:
            continue
        path, manifest, plan = recalled
        if _why_anew(path, manifest, builds) is not None:
            continue
        build = next(build for build in builds if build.key == manifest["key"])
        choice = {k: v for k, v in manifest["sources"].items() if k == "plugin_choice"}
        manifest["sources"] = {**choice, **build.sources}
        manifest["command"] = list(build.command)
        write_engine(plan, output, manifest)
        note(f"the same request built '{path}' before: copied")
        return manifest
    return None


def run_build(
    build: Build,
    output: Path,
    *,
    progress: Progress = lambda phase, done, total: None,
    note: Note = lambda text: None,
    timing_cache: Path | None = None,
) -> dict[str, Any]:
    """Build, and write the plan and its manifest. Arguments and errors are those of build_engine.

    Returns:
        The manifest.
    """
    started = time.monotonic()
    cache = timing_cache or timing_cache_path(build.backend, build.gpu)
    plugin = build.sources.get("plugin")
    log = WorkerLog(note)
    built, plan = run_worker(
        build.model,
        worker.Request(
            options=build.options,
            profiles=build.request["profiles"],
            cache=cache if build.backend.has_timing_cache else None,
            own_cache=timing_cache is None,
            inspect=_can_inspect(build.options, build.gpu),
            plugin=None if plugin is None else Path(plugin["path"]),
        ),
        build.backend.label,
        progress,
        log,
    )
    return save_engine(
        plan,
        output,
        {
            **built,
            "key": build.key,
            "request": build.request,
            "graph": json.loads(build.spec.to_json()),
            "sources": build.sources,
            "gpu": None if build.gpu is None else asdict(build.gpu),
            "command": list(build.command),
            "warnings": log.kinds(),
            "build_seconds": round(time.monotonic() - started, 1),
        },
    )


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
    facts: _ModelFacts, backend: Backend, options: BuildOptions, gpu: Gpu | None
) -> dict[str, Any]:
    """What of graph, backend, options and GPU decides what engine is built."""
    for_this_gpu = options.target is None and not backend.builds_without_gpu
    return {
        "format": FORMAT,
        "tool": package_version(),
        "model": facts.digest,
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


def _changes(before: Mapping[str, Any], request: Mapping[str, Any]) -> list[str]:
    """Where two requests differ, in words."""
    asked = json.loads(json.dumps(request))
    return [  # profiles follow from the model and the options
        line for line in differences(before, asked) if not line.startswith("profiles.")
    ]


def _command(spec: GraphSpec, options: BuildOptions, output: Path) -> list[str]:
    """The command line that builds this again, as well as it can be told from here."""
    arguments = [f"--{spec.precision}", *options.to_arguments(), "-o", str(output)]
    return ["mat-export", "trt", "MODEL.onnx", *arguments]
