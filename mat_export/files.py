"""Files that are written whole or not at all, and their digests."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from mat_export.contract import UserError

__all__ = [
    "atomic_path",
    "atomic_write",
    "cache_folder",
    "file_digest",
    "require_folder",
    "require_other",
    "require_writable",
]

_PATH = str | os.PathLike[str]


@contextlib.contextmanager
def atomic_path(path: _PATH) -> Iterator[Path]:
    """A new empty file in the same folder, which takes the name `path` when the block ends well.

    Readers of `path` see the old file or the new one, never a part; if the block fails nothing is
    left.

    Raises:
        UserError: If the system refuses: no folder, no permission, no space.
    """
    target = Path(path)
    temporary = _temporary_beside(target)
    try:
        yield temporary
        os.replace(temporary, target)
    except OSError as error:
        raise _refused(target, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def atomic_write(path: _PATH, data: bytes | str) -> None:
    """Write a whole file or nothing. Raises UserError as atomic_path does."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def cache_folder() -> Path:
    """Where this user's programs keep what can be made again; ours has a folder there.

    Raises:
        UserError: If the user has no home folder.
    """
    try:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:
        raise UserError("there is no home folder to keep a cache in: set XDG_CACHE_HOME") from error
    return root.absolute() / "mat-export"


def require_writable(path: _PATH) -> None:
    """Raise the UserError of atomic_path now rather than after a long job; leaves nothing."""
    _temporary_beside(Path(path)).unlink()


def require_folder(path: _PATH) -> None:
    """Make a folder if there is none, and raise UserError if files cannot be written there."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder '{path}': {error.strerror}") from error
    require_writable(folder / "index.html")


def require_other(output: _PATH, *inputs: _PATH | None) -> None:
    """Raise UserError if an output is one of the inputs, which it would replace."""
    target = Path(output)
    for path in inputs:
        if path is not None and target.exists() and Path(path).exists() and target.samefile(path):
            raise UserError(f"the output '{output}' is an input: choose another name")


def file_digest(path: _PATH) -> str:
    """SHA-256 of a file, as hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _temporary_beside(target: Path) -> Path:
    """A new empty file in the folder of `target`, which must be a place for a file."""
    temporary = target.with_name(f".{target.name[:100]}.{secrets.token_hex(6)}.part")
    try:
        if target.is_dir():
            raise UserError(f"'{target}' is a folder; name a file to write")
        if len(os.fsencode(target.name)) > 255:
            raise UserError(f"'{target}' cannot be written: file name too long")
        temporary.open("xb").close()
    except OSError as error:
        raise _refused(target, error) from error
    return temporary


def _refused(target: Path, error: OSError) -> UserError:
    reason = error.strerror or str(error)
    return UserError(f"'{target}' cannot be written: {reason.lower()}")
