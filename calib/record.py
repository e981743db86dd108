"""What a calibration measured, in a file: reused while it is of the same model, data and method.

A record says what everything was measured on (its key) and what was found. It holds no times and
no paths, so that the same calibration gives the same bytes, with as many threads: ONNX Runtime 1.32
rounds a convolution to a single pixel (mat-tiny-256 has a large one) by how many threads share it.
Nothing is decided by last digits, so the key does not ask for the number.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from calib.ranges import Range
from mat_export.contract import UserError
from mat_export.files import atomic_write
from mat_export.manifest import differences

__all__ = ["Record", "load_record"]

FORMAT = 1
"""Version of the file; another is refused."""


@dataclass(frozen=True)
class Record:
    """Measurements.

    Attributes:
        key: What they are of: digests of model and samples, seeds, and every option of the method.
        powers: Of each layer's input channels (`calib.equalizing`).
        ranges: Of each tensor.
        costs: Noise of each layer alone, by sample; empty while no decision needed them, and of the
            first samples alone where measuring was interrupted.
    """

    key: Mapping[str, Any]
    powers: Mapping[str, tuple[int, ...]]
    ranges: Mapping[str, Range]
    costs: Mapping[str, tuple[float, ...]]

    def samples_done(self, layers: Iterable[str]) -> int:
        """For how many samples, from the first on, the costs of all these layers are known."""
        return min(len(self.costs.get(name, ())) for name in layers)

    def with_costs(self, sample: int, noises: Mapping[str, float]) -> Record:
        """The record with what the layers cost in one more sample; those after it are dropped."""
        costs = {name: (*self.costs.get(name, ())[:sample], n) for name, n in noises.items()}
        return replace(self, costs=costs)

    @property
    def scales(self) -> dict[str, float]:
        """The scale of each tensor."""
        return {name: found.scale for name, found in self.ranges.items()}

    def to_json(self) -> str:
        """JSON that from_json reads back."""
        entries = {"format": FORMAT, **asdict(self)}
        return json.dumps(entries, indent=1, sort_keys=True, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Record:
        """The record that to_json wrote.

        Raises:
            UserError: If it is none, or of another version.
        """
        try:
            entries = json.loads(text)
            version = entries["format"]
            if version == FORMAT:
                return cls(
                    key=entries["key"],
                    powers={name: tuple(map(int, v)) for name, v in entries["powers"].items()},
                    ranges={name: _range(v) for name, v in entries["ranges"].items()},
                    costs={name: tuple(map(_noise, v)) for name, v in entries["costs"].items()},
                )
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise UserError(f"it is unreadable ({error})") from error
        raise UserError(f"it is of version {version} and this mat-export knows version {FORMAT}")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it whole or not at all. Raises UserError if the system refuses."""
        atomic_write(path, self.to_json())


def load_record(path: str | os.PathLike[str], key: Mapping[str, Any]) -> Record | None:
    """The record in a file, or None if there is no file.

    Args:
        path: The file.
        key: What it has to be of.

    Raises:
        UserError: If it is no record, damaged, or of something else; it tells the difference.
    """
    if not Path(path).exists():
        return None
    again = "delete it, or name another file with --record"
    try:
        record = Record.from_json(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeError, UserError) as error:
        raise UserError(f"'{path}' is no calibration record: {error}; {again}") from error
    found = list(differences(record.key, key))
    if found:
        raise UserError(
            f"'{path}' is the record of another calibration ({'; '.join(found)}): {again}"
        )
    return record


def _range(entries: Mapping[str, Any]) -> Range:
    found = Range(**entries)
    if not (isinstance(found.scale, float) and 0.0 < found.scale < math.inf):
        raise ValueError(f"a scale of {found.scale!r}")
    return found


def _noise(value: Any) -> float:
    number = float(value)
    if not 0.0 <= number < math.inf:
        raise ValueError(f"a noise of {value!r}")
    return number
