"""Which code opens which kind of model file: a table of names, so that nothing loads before need.

``open_runner`` knows ONNX files and checkpoints by itself. Whoever brings another kind of file
registers it here; this package never has to know who that is.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mat_export.runners import Runner

__all__ = ["OPENERS", "opener_of", "register_opener"]

OPENERS: dict[str, str] = {}
"""``module:attribute`` of the opener of each further file type, by lower-case suffix (``.ext``).

The attribute is called as ``opener(path, threads=N or None)`` and returns a Runner; a file it
cannot read is its UserError. A spawned process starts with an empty table: hand it this one.
"""

_RESERVED = (".onnx",)
"""What ``open_runner`` opens itself."""

_SUFFIX = re.compile(r"\.[a-z0-9_]+")
_TARGET = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def register_opener(suffix: str, target: str) -> None:
    """Let every command open files of one more type; registering anew replaces.

    Args:
        suffix: The end of their names, such as ``.ext``; upper and lower case are the same.
        target: ``module:attribute`` of the opener; nothing is imported yet.

    Raises:
        ValueError: If either has another form, or the suffix is one that we open ourselves.
    """
    if not _SUFFIX.fullmatch(suffix.lower()) or suffix.lower() in _RESERVED:
        raise ValueError(
            f"a suffix is a dot and a name, and none of {', '.join(_RESERVED)}; got '{suffix}'"
        )
    if not _TARGET.fullmatch(target):
        raise ValueError(f"an opener is named 'module:attribute', got '{target}'")
    OPENERS[suffix.lower()] = target


def opener_of(path: str | os.PathLike[str]) -> Callable[..., Runner] | None:
    """The opener for a file, its module imported now, or None if the table has none.

    Raises:
        ImportError: If its module, or something that it needs, is not installed.
        AttributeError: If the module has no such attribute.
    """
    target = OPENERS.get(Path(path).suffix.lower())
    if target is None:
        return None
    module, _, attribute = target.partition(":")
    opener: Callable[..., Runner] = getattr(importlib.import_module(module), attribute)
    return opener
