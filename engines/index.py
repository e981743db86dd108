"""Where engines lie, by the requests that built them, so that no request is built twice.

A small file for each request in the user's cache folder. It is no more than a hint: the engine's
own manifest says what it is, and without a hint it is built.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from engines.papers import read_engine
from mat_export.contract import UserError
from mat_export.files import atomic_write, cache_folder

__all__ = ["recall_engine", "remember_engine"]


def remember_engine(path: Path, manifest: Mapping[str, Any], keys: Iterable[str]) -> None:
    """Keep where an engine lies; nothing is kept where there is no place for it.

    Args:
        path: The plan.
        manifest: Its manifest.
        keys: Digests of the requests that it is the engine of.
    """
    entry = json.dumps({"path": str(path.absolute()), "sha256": manifest["sha256"]}) + "\n"
    with contextlib.suppress(UserError, OSError):
        for key in keys:
            place = _place(key)
            place.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(place, entry)


def recall_engine(key: str) -> tuple[Path, dict[str, Any], bytes] | None:
    """The plan that a request gave, its manifest and its bytes, if it is where it was, as it was.

    The manifest may have changed: a parity check writes its verdict there.
    """
    try:
        entry = json.loads(_place(key).read_text(encoding="utf-8"))
        path = Path(entry["path"])
        manifest, plan = read_engine(path)
        same = manifest["sha256"] == entry["sha256"]
    except (UserError, OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    return (path, manifest, plan) if same else None


def _place(key: str) -> Path:
    return cache_folder() / "engines" / f"{key}.json"
