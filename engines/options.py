"""What is asked of an engine build: every option, checked, and as JSON.

The precision is none of them: it lives in the ONNX file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

from mat_export.contract import UserError

__all__ = [
    "BACKENDS",
    "PLUGINS",
    "BatchRange",
    "BuildOptions",
    "Size",
    "SizeRange",
    "capability_of",
    "parse_batch",
    "parse_size",
    "parse_target",
    "range_text",
]

BACKENDS = ("tensorrt", "tensorrt-rtx")
"""Backends by name, the preferred one first."""

PLUGINS = ("auto", "on", "off")
"""Whether an engine is to call our plugin library, the default first."""

BatchRange = tuple[int, int, int]
"""Fewest images at once, the number to be fastest at, most images."""

Size = tuple[int, int]
"""Height and width in pixels."""

SizeRange = tuple[Size, Size, Size]
"""Smallest size, the size to be fastest at, largest size."""

_LEVELS = range(6)
"""Optimization levels of every TensorRT."""

_LARGEST = 1 << 20
"""Above any batch, side in pixels or workspace in MiB that is meant."""

_T = TypeVar("_T")


@dataclass(frozen=True)
class BuildOptions:
    """Options of one build; each is part of what identifies the engine.

    Attributes:
        backend: ``auto`` or one of BACKENDS.
        target: ``sm_NN``, the GPU generation to build for without having it; None is this machine's
            GPU.
        batch: Images at once, for a graph with a dynamic batch; None is 1:1:8.
        size: Sizes in pixels, for a graph with a dynamic size; None is from the native size to
            twice that.
        level: TensorRT's optimization level, 0 (fast build) to 5; None is TensorRT's default.
        workspace_mib: Most scratch memory of one layer, in MiB; None is TensorRT's default.
        tf32: Let FP32 convolutions and matrix products round their inputs to TF32: faster, and a
            relative error of some 3e-4.
        version_compatible: The engine runs on later versions of TensorRT too.
        hardware_compatible: The engine runs on other GPUs too, Ampere and later.
        refittable: The weights can be replaced in the built engine.
        tactic_sources: TensorRT's names of the tactic sources to use; None is its default.
        timing_iterations: Timings to average for each tactic; None is TensorRT's default.
        plugins: One of PLUGINS: the graph calls the plugin library (``on``), holds the operators'
            functions (``off``), or is whichever of the two is faster (``auto``, `engines.choice`).

    Raises:
        UserError: If a value is out of range, or two options exclude each other.
    """

    backend: str = "auto"
    target: str | None = None
    batch: BatchRange | None = None
    size: SizeRange | None = None
    level: int | None = None
    workspace_mib: int | None = None
    tf32: bool = False
    version_compatible: bool = False
    hardware_compatible: bool = False
    refittable: bool = False
    tactic_sources: tuple[str, ...] | None = None
    timing_iterations: int | None = None
    plugins: str = "auto"

    def __post_init__(self) -> None:
        if self.backend not in ("auto", *BACKENDS):
            known = ", ".join(("auto", *BACKENDS))
            raise UserError(f"the backend is one of {known}, got {self.backend!r}")
        if self.plugins not in PLUGINS:
            raise UserError(f"plugins are {', '.join(PLUGINS)}, got {self.plugins!r}")
        for name in ("tf32", "version_compatible", "hardware_compatible", "refittable"):
            if type(getattr(self, name)) is not bool:
                raise UserError(f"{name} is true or false, got {getattr(self, name)!r}")
        self._check_whole("level", "optimization level", 0, _LEVELS[-1])
        self._check_whole("workspace_mib", "workspace in MiB", 1, _LARGEST)
        self._check_whole("timing_iterations", "number of timing iterations", 1, 1000)
        if self.target is not None:
            object.__setattr__(self, "target", parse_target(self.target))
        if self.target is not None and self.hardware_compatible:
            raise UserError(
                f"a hardware-compatible engine has no single target, got {self.target}: "
                "leave out one of the two"
            )
        if self.batch is not None:
            _check_batch(self.batch)
        if self.size is not None:
            _check_sizes(self.size)
        self._check_sources()

    def _check_whole(self, field: str, meaning: str, low: int, high: int) -> None:
        value = getattr(self, field)
        if value is not None and (type(value) is not int or not low <= value <= high):
            raise UserError(f"the {meaning} is a whole number from {low} to {high}, got {value!r}")

    def _check_sources(self) -> None:
        names = self.tactic_sources
        if names is None:
            return
        if not isinstance(names, tuple) or not names or not all(type(n) is str for n in names):
            raise UserError(f"tactic sources are one or more names, got {names!r}")
        object.__setattr__(
            self, "tactic_sources", tuple(sorted({n.strip().upper() for n in names}))
        )

    # -- as text -----------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Every option by name, of JSON's types but for tuples."""
        return asdict(self)

    def to_json(self) -> str:
        """One line of JSON that from_json reads back."""
        return json.dumps(self.to_dict(), sort_keys=True)

    @classmethod
    def from_dict(cls, entries: Any) -> BuildOptions:
        """The options that to_dict gave, also after a way through JSON.

        Raises:
            UserError: If they are none.
        """
        known = {field.name for field in fields(cls)}
        if not isinstance(entries, dict) or not set(entries) <= known:
            raise UserError(f"not the options of an engine build: {entries!r}")
        return cls(**{name: _tuples(value) for name, value in entries.items()})

    @classmethod
    def from_json(cls, text: str) -> BuildOptions:
        """The options that to_json wrote. Raises UserError if the text is none."""
        try:
            entries = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"not the options of an engine build: {error}") from error
        return cls.from_dict(entries)

    def to_arguments(self) -> list[str]:
        """The arguments of ``mat-export trt`` that ask for these options, defaults left out."""
        values = {
            "--backend": None if self.backend == "auto" else self.backend,
            "--target": self.target,
            "--batch": range_text(self.batch),
            "--size": range_text(self.size),
            "--level": self.level,
            "--workspace": self.workspace_mib,
            "--tactic-sources": ",".join(self.tactic_sources) if self.tactic_sources else None,
            "--timing-iterations": self.timing_iterations,
            "--plugins": None if self.plugins == "auto" else self.plugins,
        }
        switches = {
            "--tf32": self.tf32,
            "--version-compatible": self.version_compatible,
            "--hardware-compatible": self.hardware_compatible,
            "--refittable": self.refittable,
        }
        given = [(name, str(value)) for name, value in values.items() if value is not None]
        return [
            *(text for pair in given for text in pair),
            *(name for name, wanted in switches.items() if wanted),
        ]


def parse_batch(text: str) -> BatchRange:
    """``N`` or ``min:opt:max`` as a range of batches. Raises UserError if it is neither."""

    def number(part: str) -> int:
        if not part.isascii() or not part.isdecimal() or len(part) > 9:
            raise ValueError
        return int(part)

    batch = _parse_range(text, number, "a batch is N or min:opt:max, such as 4 or 1:4:8")
    _check_batch(batch)
    return batch


def parse_size(text: str) -> SizeRange:
    """``S`` or ``min:opt:max`` as a range of sizes, each ``N`` (square) or ``HEIGHTxWIDTH``.

    Raises:
        UserError: If it is neither.
    """

    def size(part: str) -> Size:
        match = re.fullmatch(r"(\d{1,7})(?:[x×](\d{1,7}))?", part, re.ASCII)
        if match is None:
            raise ValueError
        return int(match[1]), int(match[2] or match[1])

    sizes = _parse_range(
        text, size, "a size is S or min:opt:max with S as N or HEIGHTxWIDTH, such as 512x1024"
    )
    _check_sizes(sizes)
    return sizes


def parse_target(text: str) -> str:
    """A GPU generation as ``sm_NN``, from that, ``smNN`` or ``N.N``.

    Raises:
        UserError: If it has another form. Whether a backend knows it is another question.
    """
    if isinstance(text, str):
        match = re.fullmatch(r"(?:sm_?)?(\d{1,2})\.?(\d)", text.strip().lower(), re.ASCII)
        if match is not None:
            return f"sm_{int(match[1])}{match[2]}"
    raise UserError(f"a target is a GPU generation such as sm_89, got {text!r}")


def capability_of(target: str) -> tuple[int, int]:
    """The compute capability of a target: ``sm_120`` is (12, 0)."""
    number = int(target.removeprefix("sm_"))
    return number // 10, number % 10


def range_text(values: BatchRange | SizeRange | None) -> str | None:
    """What parse_batch or parse_size reads back; None of None."""
    if values is None:
        return None
    texts = [str(v) if isinstance(v, int) else f"{v[0]}x{v[1]}" for v in values]
    return texts[0] if len(set(texts)) == 1 else ":".join(texts)


def _parse_range(text: str, part: Callable[[str], _T], usage: str) -> tuple[_T, _T, _T]:
    parts = text.strip().split(":")
    if len(parts) == 1:
        parts *= 3
    try:
        low, best, high = (part(p) for p in parts)
    except ValueError:
        raise UserError(f"{usage}; got '{text}'") from None
    return low, best, high


def _check_batch(batch: Any) -> None:
    if not _is_whole(batch, 3) or not 1 <= batch[0] <= batch[1] <= batch[2] <= _LARGEST:
        raise UserError(f"a batch range rises from 1 up, min:opt:max, got {_shown(batch)}")


def _check_sizes(sizes: Any) -> None:
    pairs = isinstance(sizes, tuple) and len(sizes) == 3 and all(_is_whole(s, 2) for s in sizes)
    rising = pairs and all(
        1 <= sizes[0][axis] <= sizes[1][axis] <= sizes[2][axis] <= _LARGEST for axis in (0, 1)
    )
    if not rising:
        raise UserError(f"a size range rises in height and width, min:opt:max, got {_shown(sizes)}")


def _is_whole(values: Any, count: int) -> bool:
    """Whether this is a tuple of so many whole numbers."""
    return (
        isinstance(values, tuple) and len(values) == count and all(type(v) is int for v in values)
    )


def _shown(values: Any) -> str:
    try:
        return str(range_text(values))
    except (TypeError, IndexError):
        return repr(values)


def _tuples(value: Any) -> Any:
    """JSON's lists back to tuples."""
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value
