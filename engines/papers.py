"""The papers of an engine: what it was made of and how, and whether it may run here.

A plan never travels alone: the manifest beside it (``mat.plan.json``) says which weights, which
ONNX file, which options, TensorRT and GPU made it, and whether it proved equal to its reference.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import platform
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines.backend import Backend, find_gpu, open_backend
from engines.backend.gpu import AMPERE, capability_text
from engines.options import BACKENDS, BuildOptions, capability_of
from engines.plugins.library import check_library, describe_library, kept_libraries
from engines.profiles import Profiles
from mat_export.contract import GraphSpec, UserError
from mat_export.files import atomic_path, atomic_write, file_digest
from mat_export.manifest import manifest_path, package_version

__all__ = [
    "FORMAT",
    "OpenedPlan",
    "open_plan",
    "read_engine",
    "read_engine_manifest",
    "rebuild_command",
    "record_parity",
    "save_engine",
    "write_engine",
]

FORMAT = 1
"""Version of an engine's manifest, and of how engines are built; another is built anew."""

KIND = "engine"

_PATH = str | os.PathLike[str]


@dataclass(frozen=True)
class OpenedPlan:
    """A plan that may run here.

    Attributes:
        path: The file.
        plan: Its bytes.
        spec: What the graph takes and gives.
        backend: The TensorRT that runs it.
        manifest: Everything that is known of it.
        notes: What the user should know though it is no mistake, each a few words.
    """

    path: Path
    plan: bytes
    spec: GraphSpec
    backend: Backend
    manifest: dict[str, Any]
    notes: tuple[str, ...] = ()

    @property
    def profiles(self) -> Profiles:
        """Of each dynamic input the shapes that it was built for."""
        return _profiles(self.manifest)


# -- writing -------------------------------------------------------------------------------------


def save_engine(plan: bytes, path: _PATH, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Write a plan and its manifest, both or neither.

    Args:
        plan: The serialized engine.
        path: Where to; the manifest goes beside it.
        facts: What the manifest says besides kind, digest, size and versions.

    Returns:
        The manifest.

    Raises:
        UserError: If either cannot be written.
    """
    manifest = {
        **facts,
        "kind": KIND,
        "format": FORMAT,
        "sha256": hashlib.sha256(plan).hexdigest(),
        "bytes": len(plan),
        "parity": facts.get("parity"),
        "versions": {
            "mat-export": package_version(),
            "python": platform.python_version(),
            str(facts["request"]["backend"]): str(facts["request"]["version"]),
        },
    }
    write_engine(plan, path, manifest)
    return manifest


def write_engine(plan: bytes, path: _PATH, manifest: Mapping[str, Any]) -> None:
    """Write a plan and the whole manifest of it, both or neither.

    Raises:
        UserError: If either cannot be written.
    """
    with atomic_path(manifest_path(path)) as papers, atomic_path(path) as temporary:
        temporary.write_bytes(plan)
        papers.write_text(_json(manifest), encoding="utf-8")


def record_parity(path: _PATH, verdict: Mapping[str, Any]) -> None:
    """Write a parity verdict into the manifest of the very plan it was reached on.

    Raises:
        UserError: If the plan is not the one its manifest describes.
    """
    manifest = read_engine_manifest(path)
    atomic_write(manifest_path(path), _json({**manifest, "parity": dict(verdict)}))


def _json(manifest: Mapping[str, Any]) -> str:
    return json.dumps(manifest, indent=2, sort_keys=True) + "\n"


# -- reading -------------------------------------------------------------------------------------


def read_engine_manifest(path: _PATH) -> dict[str, Any]:
    """The manifest of a plan, held against the plan; needs neither TensorRT nor a GPU.

    Raises:
        UserError: If either is missing, unreadable or damaged, or they do not belong together.
    """
    return read_engine(path)[0]


def open_plan(path: _PATH) -> OpenedPlan:
    """A plan, if it may run here.

    Raises:
        UserError: As read_engine_manifest; or if its TensorRT is not installed or of another
            version, there is no GPU, or the engine was built for another one. The message says
            what differs and how to build it again.
    """
    path = Path(path)
    manifest, plan = read_engine(path)
    request = manifest["request"]
    again = f"build it again: {rebuild_command(manifest)}"
    options = BuildOptions.from_dict(request["options"])
    plugin = _checked_plugin(path, manifest, again)
    backend = open_backend(request["backend"])
    _check_version(path, backend, request["version"], options, again)
    notes = _check_gpu(path, backend, request, options, again)
    backend.allow_host_code = options.version_compatible
    if plugin is not None:
        if options.hardware_compatible:  # the engine runs on more GPUs than its plugins may
            check_library(describe_library(plugin), backend.major, find_gpu().capability)
        backend.load_plugins(plugin)
    spec = GraphSpec.from_json(json.dumps(manifest["graph"]))
    return OpenedPlan(path, plan, spec, backend, manifest, tuple(notes))


def rebuild_command(manifest: Mapping[str, Any]) -> str:
    """The command line that builds an engine again."""
    return shlex.join(str(part) for part in manifest["command"])


def read_engine(path: _PATH) -> tuple[dict[str, Any], bytes]:
    """The manifest of a plan and the plan's bytes. Raises UserError as read_engine_manifest."""
    path = Path(path)
    own = manifest_path(path)
    if not path.is_file():
        raise UserError(f"there is no file '{path}'")
    if not own.is_file():
        raise UserError(
            f"'{path}' has no manifest '{own.name}' beside it, without which an engine is not run: "
            "bring both, or build it again with 'mat-export trt'"
        )
    try:
        manifest = json.loads(own.read_text(encoding="utf-8"))
        plan = path.read_bytes()
    except OSError as error:
        raise UserError(f"'{path}' or its manifest is unreadable: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"the manifest '{own}' is unreadable ({error}): build the engine again with "
            "'mat-export trt'"
        ) from error
    _check_manifest(own, manifest)
    if hashlib.sha256(plan).hexdigest() != manifest["sha256"]:
        size = manifest["bytes"]
        found = f"it has {len(plan)} bytes of {size}" if len(plan) != size else "its digest differs"
        raise UserError(
            f"'{path}' is not the file its manifest describes ({found}): build it again: "
            f"{rebuild_command(manifest)}"
        )
    return manifest, plan


def _check_manifest(own: Path, manifest: Any) -> None:
    """Raise UserError unless this is an engine's manifest of our format."""
    if not isinstance(manifest, dict) or manifest.get("kind") != KIND:
        raise UserError(f"'{own}' is no manifest of an engine: build it with 'mat-export trt'")
    if manifest.get("format") != FORMAT:
        raise UserError(
            f"the manifest '{own}' has format {manifest.get('format')!r} and this mat-export "
            f"knows {FORMAT}: build the engine again with 'mat-export trt'"
        )
    wrong = next(_wrong_entries(manifest), None)
    if wrong is not None:
        raise UserError(
            f"the manifest '{own}' is damaged ({wrong}): build the engine again with "
            "'mat-export trt'"
        )


def _wrong_entries(manifest: dict[str, Any]) -> Iterator[str]:
    """Names of entries that are missing or of another form."""
    kinds: dict[str, type] = {
        "sha256": str,
        "bytes": int,
        "key": str,
        "graph": dict,
        "command": list,
        "request": dict,
        "sources": dict,
    }
    yield from (name for name, kind in kinds.items() if not isinstance(manifest.get(name), kind))
    request = manifest["request"]
    if request.get("backend") not in BACKENDS:
        yield "request.backend"
    if not isinstance(request.get("version"), str):
        yield "request.version"
    try:
        options = BuildOptions.from_dict(request.get("options"))
        _profiles(manifest)
        GraphSpec.from_json(json.dumps(manifest["graph"]))
        if options.target is None and not options.hardware_compatible:
            _gpu_of(request)
    except (UserError, KeyError, TypeError, ValueError, AttributeError) as error:
        yield f"request or graph: {error}"
    for name in ("passes", "plugin_choice"):
        if not isinstance(manifest["sources"].get(name, {}), dict):
            yield f"sources.{name}"
    plugin = manifest["sources"].get("plugin")
    if plugin is not None and not (
        isinstance(plugin, dict)
        and all(isinstance(plugin.get(name), str) for name in ("path", "sha256"))
    ):
        yield "sources.plugin"


def _profiles(manifest: Mapping[str, Any]) -> Profiles:
    def shape(sizes: Any) -> tuple[int, ...]:
        return tuple(int(size) for size in sizes)

    return {
        str(name): (shape(low), shape(best), shape(high))
        for name, (low, best, high) in manifest["request"]["profiles"].items()
    }


def _gpu_of(request: Mapping[str, Any]) -> tuple[str, tuple[int, int]]:
    """Name and compute capability of the GPU an engine was built on."""
    major, minor = request["gpu"]["capability"]
    return str(request["gpu"]["name"]), (int(major), int(minor))


# -- may it run here -----------------------------------------------------------------------------


def _checked_plugin(path: Path, manifest: Mapping[str, Any], again: str) -> Path | None:
    """The plugin library an engine needs, if any: where it was, beside the engine, or in the cache.

    Raises:
        UserError: If it is in none of these places as it was.
    """
    plugin = manifest["sources"].get("plugin")
    if plugin is None:
        return None
    known = Path(plugin["path"])
    places = list(dict.fromkeys((known, path.absolute().parent / known.name)))
    for place in itertools.chain(places, _libraries_in_cache()):
        if _digest_if_any(place) == plugin["sha256"]:
            return place
    names = " and ".join(f"'{place}'" for place in places)
    looked = f"looked for as {names} and in the cache"
    other = next((place for place in places if _digest_if_any(place)), None)
    if other is not None:
        raise UserError(
            f"'{path}' was built with another plugin library than '{other}' is now ({looked}); "
            f"{again}"
        )
    raise UserError(
        f"'{path}' needs the plugin library '{known.name}' ({looked}), which is not there: bring "
        f"it, or {again}"
    )


def _libraries_in_cache() -> Iterator[Path]:
    with contextlib.suppress(UserError):  # no home folder, no cache
        yield from kept_libraries()


def _digest_if_any(path: Path) -> str:
    """SHA-256 of a file; empty if it is not there or unreadable."""
    try:
        return file_digest(path) if path.is_file() else ""
    except (OSError, ValueError):
        return ""


def _check_version(
    path: Path, backend: Backend, built: str, options: BuildOptions, again: str
) -> None:
    if backend.runs_engines_of(built, version_compatible=options.version_compatible):
        return
    raise UserError(
        f"'{path}' was built with {backend.title} {built}, and {backend.version} is installed; "
        f"{again}"
    )


def _check_gpu(
    path: Path, backend: Backend, request: Mapping[str, Any], options: BuildOptions, again: str
) -> list[str]:
    """Raise UserError if this GPU cannot run the engine; notes if it may run worse."""
    gpu = find_gpu()
    if not backend.runs_on(gpu.capability):
        raise UserError(
            f"{backend.label} does not run on {gpu.name} (compute capability "
            f"{capability_text(gpu.capability)}), so '{path}' cannot be used here"
        )
    if options.hardware_compatible:
        if gpu.capability < AMPERE:
            raise UserError(
                f"'{path}' runs on Ampere and later GPUs (8.0), and {gpu.name} has compute "
                f"capability {capability_text(gpu.capability)}; {again}"
            )
        return []
    if options.target is None:
        name, capability = _gpu_of(request)
    else:
        name, capability = options.target, capability_of(options.target)
    if capability != gpu.capability:
        raise UserError(
            f"'{path}' was built for compute capability {capability_text(capability)} ({name}), "
            f"and {gpu.name} has {capability_text(gpu.capability)}; {again}"
        )
    if options.target is None and name != gpu.name:
        return [f"built on {name} and perhaps slower here"]
    return []
