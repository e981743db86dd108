"""Papers of an artifact: digests, a manifest beside it, and writes that are whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mat_export.contract import GraphSpec, UserError

if TYPE_CHECKING:
    import onnx

__all__ = [
    "atomic_path",
    "atomic_write",
    "file_digest",
    "manifest_path",
    "package_version",
    "read_manifest",
    "require_writable",
    "save_model",
]


def package_version(package: str = "mat-export") -> str:
    """The installed version of a package, ``unknown`` where it runs uninstalled."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"


def file_digest(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, as hex."""
    with open(path, "rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else _digest_310(file)
        )


def _digest_310(file: Any) -> str:
    """hashlib.file_digest for Python 3.10."""
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path in the same folder, which becomes `path` if the block succeeds.

    Raises:
        UserError: If the folder is missing or cannot be written, or the disk is full.
    """
    target = Path(path)
    temporary = _temporary_beside(target)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp's files are the owner's alone
        os.replace(temporary, target)
    except OSError as error:
        raise UserError(f"cannot write '{target}': {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _temporary_beside(target: Path) -> Path:
    """A new empty file in the folder of `target`, which must be a place for a file."""
    try:
        if target.is_dir():
            raise UserError(f"'{target}' is a folder; name a file to write")
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=".", suffix=target.suffix)
        os.close(handle)
    except OSError as error:
        raise UserError(f"cannot write '{target}': {error.strerror}") from error
    return Path(name)


def require_writable(path: str | os.PathLike[str]) -> None:
    """Raise the UserError of atomic_path now rather than after a long job; leaves nothing."""
    _temporary_beside(Path(path)).unlink()


def atomic_write(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Write a whole file or nothing. Raises UserError as atomic_path does."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


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
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"the manifest '{own}' is unreadable ({error}); export again") from error
    if recorded != file_digest(path):
        raise UserError(
            f"'{path}' is not the file its manifest '{own}' describes: "
            "one of them was replaced; export again or delete the manifest"
        )
    return entries
