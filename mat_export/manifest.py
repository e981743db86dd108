"""Papers of an artifact: a manifest beside it, with digests and versions."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mat_export.contract import GraphSpec, UserError
from mat_export.files import atomic_path, file_digest

if TYPE_CHECKING:
    import onnx

__all__ = [
    "differences",
    "manifest_path",
    "package_version",
    "read_manifest",
    "save_model",
]


def package_version(package: str = "mat-export") -> str:
    """The installed version of a package, ``unknown`` where it runs uninstalled."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"


def manifest_path(path: str | os.PathLike[str]) -> Path:
    """Where the manifest of an artifact lies: ``mat.onnx`` has ``mat.onnx.json``."""
    return Path(f"{os.fspath(path)}.json")


def save_model(
    model: onnx.ModelProto, path: str | os.PathLike[str], facts: Mapping[str, Any]
) -> tuple[str, int]:
    """Write an ONNX model and its manifest, both or neither.

    Args:
        model: The model, below 2 GiB.
        path: Where to; the manifest goes beside it.
        facts: What the manifest says besides digest, size and versions.

    Returns:
        SHA-256 and size in bytes of the file.
    """
    graph = facts.get("graph")
    with atomic_path(manifest_path(path)) as papers, atomic_path(path) as temporary:
        temporary.write_bytes(model.SerializeToString())
        digest, size = file_digest(temporary), temporary.stat().st_size
        entries = {
            **facts,
            **({"graph": json.loads(graph.to_json())} if isinstance(graph, GraphSpec) else {}),
            "sha256": digest,
            "bytes": size,
            "versions": {
                "mat-export": package_version(),
                "python": platform.python_version(),
                **{name: package_version(name) for name in ("torch", "onnx", "onnxscript")},
            },
        }
        papers.write_text(json.dumps(entries, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return digest, size


def read_manifest(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The manifest of an artifact, or None if it has none.

    Raises:
        UserError: If it is unreadable or belongs to another file.
    """
    own = manifest_path(path)
    if not own.is_file():
        return None
    try:
        entries: dict[str, Any] = json.loads(own.read_text(encoding="utf-8"))
        recorded = entries["sha256"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"the manifest '{own}' is unreadable ({error}); export again") from error
    if recorded != file_digest(path):
        raise UserError(
            f"'{path}' is not the file its manifest '{own}' describes: "
            "one of them was replaced; export again or delete the manifest"
        )
    return entries


def differences(old: Any, new: Any, name: str = "") -> Iterator[str]:
    """Where two trees of JSON differ, one line each: ``options.level: 3, now 5``."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted({*old, *new}):
            inner = f"{name}.{key}" if name else str(key)
            yield from differences(old.get(key), new.get(key), inner)
    elif old != new:
        yield f"{name}: {_short(old)}, now {_short(new)}"


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:12]}…"
