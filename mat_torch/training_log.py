"""What a training run tells: a log of lines, grids of pictures, TensorBoard's files, progress."""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mat_torch.training_options import TrainingError

__all__ = ["Meter", "RunLog", "format_line", "picture_grid", "pixels"]


def pixels(image: Tensor) -> NDArray[np.uint8]:
    """[B, 3, H, W] in [-1, 1] → uint8 [B, H, W, 3]."""
    levels = ((image.detach().float() + 1.0) * 127.5).round().clamp(0.0, 255.0)
    array: NDArray[np.uint8] = levels.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return array


def picture_grid(columns: Sequence[Tensor], gap: int = 4) -> NDArray[np.uint8]:
    """One row an image, one column a tensor, white between them.

    Args:
        columns: Each [B, 3, H, W] in [-1, 1], all of one shape.
        gap: Pixels between pictures.

    Returns:
        uint8 [rows, columns, 3].
    """
    pictures = np.stack([pixels(column) for column in columns], axis=1)
    rows, count, height, width, _ = pictures.shape
    sheet = np.full(
        (rows * (height + gap) - gap, count * (width + gap) - gap, 3), 255, dtype=np.uint8
    )
    for i in range(rows):
        for j in range(count):
            y, x = i * (height + gap), j * (width + gap)
            sheet[y : y + height, x : x + width] = pictures[i, j]
    return sheet


class Meter:
    """Means of scalars over the steps between two lines, and where the time went.

    Args:
        clock: Seconds; another one for tests.
    """

    def __init__(self, clock: Any = time.perf_counter) -> None:
        self._clock = clock
        self._start()

    def _start(self) -> None:
        self._sums: dict[str, tuple[float, int]] = {}
        self._images, self._waited, self._since = 0, 0.0, self._clock()

    def add(self, scalars: Mapping[str, float], *, images: int, waited: float) -> None:
        """Note a step: its scalars, the images it took, the seconds it waited for them."""
        for name, value in scalars.items():
            total, count = self._sums.get(name, (0.0, 0))
            self._sums[name] = total + value, count + 1
        self._images += images
        self._waited += waited

    def line(self, *, images_left: int) -> dict[str, float]:
        """Means of each scalar over the steps that had it, with speed; then start over.

        Returns:
            The means, and ``images_per_second``, ``seconds_left``, ``waiting_share`` in [0, 1].
        """
        seconds = max(self._clock() - self._since, 1e-9)
        speed = self._images / seconds
        means = {name: total / count for name, (total, count) in self._sums.items()}
        means["images_per_second"] = speed
        means["seconds_left"] = images_left / speed if speed else 0.0
        means["waiting_share"] = min(1.0, self._waited / seconds)
        self._start()
        return means


_SHORT = {
    "loss_generator": "G",
    "loss_discriminator": "D",
    "r1": "R1",
    "perceptual": "perceptual",
    "reconstruction": "L1",
}
"""Losses by their names in the log, and what a line for people calls them."""


def format_line(line: Mapping[str, Any], images: int) -> str:
    """A line of the log for people."""
    left = int(line["seconds_left"])
    hours, minutes = divmod(left // 60, 60)
    skipped = f" · {line['skipped']} skipped" if line["skipped"] else ""
    losses = " ".join(f"{short} {line[name]:.3f}" for name, short in _SHORT.items() if name in line)
    return (
        f"{line['images']:,} of {images:,} images · {losses} · "
        f"{line['images_per_second']:.1f} images/s, {line['waiting_share']:.0%} waiting for data · "
        f"{hours} h {minutes:02} min left{skipped}"
    )


class RunLog:
    """``log.jsonl`` and ``grids/IMAGES.png`` in a folder, and TensorBoard's files if asked.

    A resumed run cuts the log back to its step, so that no step is there twice.

    Args:
        folder: The run's.
        step: Steps that the run has done.
        images: Images that it has seen.
        tensorboard: Write into ``tensorboard/`` too.

    Raises:
        TrainingError: If TensorBoard is asked for and missing, or the folder cannot be written.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        step: int = 0,
        images: int = 0,
        tensorboard: bool = False,
    ) -> None:
        self._folder = Path(folder)
        self._path = self._folder / "log.jsonl"
        self._writer = _summary_writer(self._folder, images) if tensorboard else None
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            _cut_log(self._path, step)
        except OSError as error:
            raise _cannot_write(self._path, error) from error

    def write(self, line: Mapping[str, Any]) -> None:
        """Append a line with ``step`` and ``images`` among its numbers."""
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(dict(line)) + "\n")
        except OSError as error:
            raise _cannot_write(self._path, error) from error
        if self._writer is not None:
            for name, value in line.items():
                if name not in ("step", "images"):
                    self._writer.add_scalar(name, value, line["images"])

    def grid(self, sheet: NDArray[np.uint8], images: int) -> Path:
        """Write a sheet of pictures (uint8 [H, W, 3]) of the run after so many images."""
        from PIL import Image

        path = self._folder / "grids" / f"{images:012}.png"
        try:
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(sheet).save(path)
        except OSError as error:
            raise _cannot_write(path, error) from error
        if self._writer is not None:
            self._writer.add_image("pictures", sheet, images, dataformats="HWC")
        return path

    def close(self) -> None:
        """Flush TensorBoard's files."""
        if self._writer is not None:
            self._writer.close()


def _cannot_write(path: Path, error: OSError) -> TrainingError:
    return TrainingError(f"{path}: cannot be written ({error.strerror}); make space and resume")


def _cut_log(path: Path, step: int) -> None:
    """Keep the whole lines up to this step, in order."""
    if not path.exists():
        return
    kept = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            if not text.endswith("\n") or json.loads(text)["step"] > step:
                break
        except (ValueError, TypeError, KeyError):
            break  # cut short by a crash, or no line of ours: nothing after it is in order
        kept.append(text)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_text("".join(kept), encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _summary_writer(folder: Path, images: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise TrainingError(
            "TensorBoard is asked for and not installed: pip install tensorboard, or train "
            "without it (log.jsonl and grids/ have the same)"
        ) from error
    return SummaryWriter(str(folder / "tensorboard"), purge_step=images + 1)
